"""ShortV (2504.00502): layers that change the output least freeze visual tokens, I' = I; the others are LLaVA's."""

from .base import NO_ALIGNER, Mechanism, register_mechanism

LEAST_USEFUL = (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19)
"""19 of the 32 layers of LLaVA-1.5-7B, as the paper ranks them."""

register_mechanism(
    "shortv", Mechanism(dense_layers=tuple(n for n in range(32) if n not in LEAST_USEFUL), aligner=NO_ALIGNER)
)
