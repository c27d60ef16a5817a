"""Mechanisms: how a decoder treats visual tokens, as a table that `core.decoder` executes; one file for each paper."""

from importlib import import_module

from .base import NO_ALIGNER, PRESETS, Aligner, BlockCost, Features, Mechanism, register_mechanism
from .build import build_connector, build_mechanism, configured_connector, configured_mechanism
from .connectors import CONNECTORS, Added, Connector, ConnectorModule, Projector, Sizes, register_connector

_FILES = (
    "pooling",
    "llava", "ee_mllm", "ee_mllm_f", "naavit", "shortv", "saisa", "vica", "flamingo", "casa",
    "fastv", "pyramid_drop", "hidrop", "withdrawal", "visipruner", "visionzip",
    "sampled", "skip_vision", "operator_skipping", "bidirectional", "visual_experts", "p_mod", "deepstack",
)  # fmt: skip
for _name in _FILES:
    import_module(f"{__name__}.{_name}")  # each registers itself; tables list them in this order

__all__ = [
    "CONNECTORS",
    "NO_ALIGNER",
    "PRESETS",
    "Added",
    "Aligner",
    "BlockCost",
    "Connector",
    "ConnectorModule",
    "Features",
    "Mechanism",
    "Projector",
    "Sizes",
    "build_connector",
    "build_mechanism",
    "configured_connector",
    "configured_mechanism",
    "register_connector",
    "register_mechanism",
]
