"""PyramidDrop (2410.17247 and its code): after each quarter of the layers half of the visual tokens leave, in training too.

Before layers 8, 16 and 24 of 32 the attention that the layer itself would pay ranks those that are left: that of the last instruction
token, in training of the token before each answer, mean over heads; an eighth is left in the end. Our reading: tokens keep their
positions, which the code numbers anew, and an odd number loses the smaller half. The options are ``visual_drop``.
"""

from .base import Mechanism, register_mechanism

register_mechanism("pyramid_drop", Mechanism(dense_layers="all", visual_drop=((8, 0.5), (16, 0.25), (24, 0.125))))
