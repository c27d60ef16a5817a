"""EE-MLLM (2408.11795): composite attention, and the decoder's own weights as an aligner of visual tokens.

Text queries all keys before it (Eq. 1), visual tokens query none; with u = norm1(I), and no new parameters (Eq. 2-3)::

    H_I = I + R(u W_v) W_o        I' = H_I + FFN(norm2(H_I))

Our reading: pre-norm, which is not printed, and LLaVA's positions. So a layer equals the pretrained one under a mask in which a
visual token sees itself alone. The aligner's parts are switched by ``aligner`` (Table 6); without any, I' = I.
"""

from .base import Mechanism, register_mechanism

register_mechanism("ee_mllm", Mechanism())
