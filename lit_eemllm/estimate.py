"""What a mechanism costs, from shapes alone. One multiply-add counts 2; attention is counted full, as the papers do.

Language-model head, vision encoder, projector and embeddings are left out.
"""

from __future__ import annotations

from typing import Any

from .mechanisms import Mechanism


def prefill_flops(mechanism: Mechanism, decoder: Any, text: int, visual: int, last_layer_saving: bool = True) -> int:
    """FLOPs of the decoder layers for one prompt.

    Args:
        mechanism: how visual tokens are treated.
        decoder: the decoder's transformers config.
        text: text tokens T.
        visual: visual tokens V.
        last_layer_saving: count only keys and values of visual tokens in the last layer, as this program computes;
            False for comparison with the papers' tables.
    """
    h, m, layers = decoder.hidden_size, decoder.intermediate_size, decoder.num_hidden_layers
    head = getattr(decoder, "head_dim", None) or h // decoder.num_attention_heads
    w, w_kv = head * decoder.num_attention_heads, head * decoder.num_key_value_heads
    text_row = 2 * (2 * h * w + 2 * h * w_kv + 3 * h * m)
    total = 0
    for layer in range(layers):
        last = last_layer_saving and layer == layers - 1
        total += text * text_row + 4 * text * (text + visual) * w
        if mechanism.visibility(layer).visual_queries and not last:
            total += visual * text_row + 4 * visual * (text + visual) * w
        else:
            total += visual * 4 * h * w_kv
            if not last:
                total += visual * (2 * h * w * mechanism.aligner.output + 6 * h * m * mechanism.aligner.ffn)
    return total
