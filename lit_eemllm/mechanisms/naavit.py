"""NAAViT, the pilot of SAISA (2502.02458): no attention among visual tokens, which still pass the feed-forward network::

    I' = I + FFN(norm2(I))

Our reading, as the paper does not say: visual tokens take no path through W_v and W_o either.
"""

from .base import Aligner, Mechanism, register_mechanism

register_mechanism("naavit", Mechanism(aligner=Aligner(value=False, output=False)))
