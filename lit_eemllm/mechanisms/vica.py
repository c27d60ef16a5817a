"""ViCA (2602.07574): visual tokens E are constant, and text sees them in few layers S, elsewhere text alone::

    l in S      text queries [norm1(E); norm1(T)], one softmax        l not in S      text queries norm1(T)

S is that of the paper for 7B. Positions keep the gap of the image in every layer. ``freeze_prefix``: text before the image takes no
attention, a fact of the authors' code for 7B. ``visual_drop``: with progressive dropping (their Table 4).
"""

from .base import NO_ALIGNER, Mechanism, register_mechanism

register_mechanism("vica", Mechanism(cross_layers=(0, 1, 7, 8, 9, 10, 11, 14), aligner=NO_ALIGNER))
