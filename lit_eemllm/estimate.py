"""What a mechanism costs, from shapes alone. One multiply-add counts 2; attention is counted full, as the papers do.

Language-model head, vision encoder, projector or resampler, and embeddings are left out; projectors of single layers (SAISA)
are counted, since they replace what the decoder would do.
"""

from __future__ import annotations

from typing import Any

from .mechanisms import Mechanism


def prefill_flops(
    mechanism: Mechanism,
    decoder: Any,
    text: int,
    visual: int,
    last_layer_saving: bool = True,
    vision_width: int = 0,
    prefix: int = 0,
) -> int:
    """FLOPs of the decoder layers for one prompt.

    Args:
        mechanism: how visual tokens are treated.
        decoder: the decoder's transformers config.
        text: text tokens T.
        visual: visual tokens V, of one image.
        last_layer_saving: count only keys and values of visual tokens in the last layer, as this program computes;
            False for comparison with the papers' tables.
        vision_width: of the encoder's features; needed for layerwise projectors and gated cross-attention.
        prefix: text tokens whose scores over the image are not counted, since they stand before it (ViCA's accounts).
    """
    h, m, layers = decoder.hidden_size, decoder.intermediate_size, decoder.num_hidden_layers
    head = getattr(decoder, "head_dim", None) or h // decoder.num_attention_heads
    w, w_kv = head * decoder.num_attention_heads, head * decoder.num_key_value_heads
    text_row = 2 * (2 * h * w + 2 * h * w_kv + 3 * h * m)
    aligner, gated = mechanism.aligner, mechanism.gated
    total = 0
    for layer in range(layers):
        updated = not (last_layer_saving and layer == layers - 1)
        sees = mechanism.sees_images(layer)
        scores = text * text + (text - prefix) * visual * sees
        total += text * text_row + 4 * scores * w
        if mechanism.visual_positions == "unrotated" and sees:
            total += 2 * text * (text + visual) * w  # queries and keys of twice the head size
        if mechanism.is_dense(layer) and updated:
            total += visual * text_row + 4 * visual * (text + visual) * w
            continue
        if sees or (updated and not mechanism.constant):
            total += visual * 4 * h * w_kv
        if mechanism.visual_source == "layerwise" and sees:
            total += visual * 2 * (vision_width * h + h * h)
        if updated and not mechanism.constant:
            total += visual * (2 * h * w * aligner.output + 6 * h * m * aligner.ffn)
            if mechanism.visual_window:
                total += visual * (2 * h * w + 4 * min(mechanism.visual_window + 1, visual) * w)
        if gated is not None and layer % gated.every == 0 and visual:
            inner, tokens = gated.heads * gated.head_size, gated.latents or visual
            width = vision_width if gated.latents else h
            total += 4 * h * inner * text + 4 * width * inner * tokens + 4 * text * tokens * inner + 16 * text * h * h
    return total
