"""LLaVA (2304.08485, 2310.03744): visual tokens are tokens like all others. The baseline, equal to transformers' own model.

In every layer, of all rows X = [T; I] in the order of the stream::

    H = X + attention(norm1(X), causal) W_o        X' = H + FFN(norm2(H))
"""

from .base import Mechanism, register_mechanism

register_mechanism("llava", Mechanism(dense_layers="all"))
