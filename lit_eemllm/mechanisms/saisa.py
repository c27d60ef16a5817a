"""SAISA (2502.02458): no layer updates visual tokens; each layer has its own projector that makes them of the encoder's features Z::

    I_l = MLP_l(Z)

Text queries [I_l; T_l] in every layer, with the layer's own weights, at LLaVA's positions (the authors' code).
"""

from .base import NO_ALIGNER, Mechanism, register_mechanism

register_mechanism("saisa", Mechanism(visual_source="layerwise", aligner=NO_ALIGNER))
