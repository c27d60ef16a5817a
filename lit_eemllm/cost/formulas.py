"""FLOPs, cache and their parts as formulas of the table, from shapes alone.

One multiply-add counts 2; attention is counted full, as the papers do: a query times all keys that its kind sees, or as many as a
window or a chunk holds. A token that is generated is counted over all of the cache, on which these are a mask. Language-model head, vision encoder, connector or
resampler, and embeddings are left out; connectors of single layers (SAISA) are counted, since they replace what the decoder
would do.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch

from ..compat.torch import FakeTensorMode, flop_counter
from ..core.families import FAMILIES
from ..core.select import Top
from ..core.table import LayerPlan, executed, ranked_in
from ..layout import Window, span
from ..mechanisms import Connector, Mechanism, Sizes
from ..mechanisms.connectors import DEFAULT


def prefill_flops(
    mechanism: Mechanism,
    decoder: Any,
    text: int,
    visual: int,
    last_layer_saving: bool = True,
    vision_width: int = 0,
    prefix: int = 0,
    connector: Connector = DEFAULT,
    view: tuple[int, int] = (1, 1),
) -> int:
    """FLOPs of the decoder layers for one prompt.

    Args:
        mechanism: how visual tokens are treated.
        decoder: the decoder's transformers config.
        text: text tokens T.
        visual: visual tokens V, of one image.
        last_layer_saving: count only keys and values of visual tokens in the last layer, as this program computes;
            False for comparison with the papers' tables.
        vision_width: of the encoder's features; needed for connectors of single layers and modules that the mechanism adds.
        prefix: text tokens whose scores over the image are not counted, since they stand before it (ViCA's accounts).
        connector: of each layer, where each has its own.
        view: rows and columns of the features of a view, by which its FLOPs for a token are found.
    """
    of_layers = layer_flops(mechanism, decoder, text, visual, vision_width, prefix, last_layer_saving, connector, view)
    return sum(of_layers)


def layer_flops(
    mechanism: Mechanism,
    decoder: Any,
    text: int,
    visual: int,
    vision_width: int = 0,
    prefix: int = 0,
    last_layer_saving: bool = True,
    connector: Connector = DEFAULT,
    view: tuple[int, int] = (1, 1),
) -> list[int]:
    """Of each layer, with the module before it; arguments as in `prefill_flops`."""
    layers = decoder.num_hidden_layers
    sizes = Sizes.of(decoder, vision_width, connector=connector)
    table = mechanism.table(layers)
    table = executed(table) if last_layer_saving else table
    unrotated = mechanism.visual_positions == "unrotated"
    windows = FAMILIES[decoder.model_type].windows(decoder)
    own = round(visual * token_flops(sizes, view)) if visual and any(row.source == "own" for row in table) else 0
    return [
        row_flops(row, ranked_in(table, layer), decoder, layer, text, visual, prefix, unrotated, windows[layer])
        + own * (row.source == "own")
        + mechanism.block_cost(layer, sizes, text, visual).prefill
        for layer, row in enumerate(table)
    ]


@cache
def token_flops(sizes: Sizes, view: tuple[int, int]) -> float:
    """FLOPs of the connector for one of the tokens that it makes of a view with so many rows and columns of features: those of the
    module itself, on tensors without data."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        module, features = sizes.connector.module(sizes), torch.empty(prod(view), sizes.vision)
        with flop_counter() as counted:
            made = module(features, None, (view,))
    return counted.get_total_flops() / len(made)


def row_flops(
    row: LayerPlan,
    ranks: Top | None,
    decoder: Any,
    layer: int,
    text: int,
    visual: int,
    prefix: int = 0,
    unrotated: bool = False,
    window: Window | None = None,
) -> int:
    """FLOPs of a decoder layer for one prompt; `ranks`: what it ranks, `window`: how many tokens before itself a token sees, or of what
    chunk, other arguments as in `prefill_flops`."""
    h = decoder.hidden_size
    w, w_kv = Sizes.of(decoder).widths
    ffn, text_row = _row_flops(decoder)[layer]
    here, seen = row.tokens.count(visual), row.seen.count(visual)
    within = text + visual if window is None else span(window)
    scores = (text - prefix) * min(within, text + seen) + prefix * min(within, text)
    total = text * text_row + 4 * scores * w
    if unrotated:
        total += 2 * text * min(within, text + seen) * w  # queries and keys of twice the head size
    if ranks is not None and not ranks.by_encoder and visual:
        ranked, rows = ranks.ranked(visual), 1 if ranks.by == "question" else text
        total += rows * (2 * h * w + 2 * (text + ranked) * w)  # queries that rank, and their scores
        total += (ranked - here) * 2 * h * w_kv  # keys of those that leave before the layer
    total += here * 2 * h * w_kv * (row.keys + row.values)
    if row.queries:
        sees = min(within, text + here) if row.dense else min(int(row.attend) + 1, here)
        total += here * (2 * h * w + 4 * sees * w)
    return total + here * 2 * h * w * ("output" in row.update) + row.fed(visual) * ffn


def decode_flops(mechanism: Mechanism, decoder: Any, text: int, visual: int) -> int:
    """FLOPs of the decoder layers for one new token after a prompt."""
    sizes, of_rows = Sizes.of(decoder), _row_flops(decoder)
    score = 6 if mechanism.visual_positions == "unrotated" else 4
    return sum(
        of_rows[layer][1]
        + score * (text + 1 + row.kept.count(visual)) * sizes.widths[0]
        + mechanism.block_cost(layer, sizes, text, visual).decode
        for layer, row in enumerate(executed(mechanism.table(sizes.layers)))
    )


def cache_bytes(mechanism: Mechanism, decoder: Any, text: int, visual: int, itemsize: int = 2) -> int:
    """Keys and values kept of one prompt: a layer holds those that its text sees.

    Args:
        mechanism: how visual tokens are treated; text scoring unrotated keys needs both, twice the size.
        decoder: the decoder's transformers config.
        text: text tokens T.
        visual: visual tokens V, of one image.
        itemsize: bytes of a number.
    """
    sizes = Sizes.of(decoder)
    width = sizes.widths[1] * (3 if mechanism.visual_positions == "unrotated" else 2)
    return itemsize * sum(
        (text + row.kept.count(visual)) * width + mechanism.block_cost(layer, sizes, text, visual).kept
        for layer, row in enumerate(executed(mechanism.table(sizes.layers)))
    )


def _row_flops(decoder: Any) -> list[tuple[int, int]]:
    """For each layer, FLOPs of a row in the feed-forward network and in all matrices."""
    attention = 4 * decoder.hidden_size * sum(Sizes.of(decoder).widths)
    weights = FAMILIES[decoder.model_type].ffn_weights(decoder)
    return [(2 * ffn, attention + 2 * ffn) for ffn in weights]
