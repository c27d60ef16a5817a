"""The model: vision encoder -> two-layer MLP projector -> pretrained decoder whose layers run any mechanism."""

from ..inputs.processor import Processor
from .modeling import EEMLLM, EEMLLMConfig
from .vision import VisionEncoder, register_vision_encoder

__all__ = ["EEMLLM", "EEMLLMConfig", "Processor", "VisionEncoder", "register_vision_encoder"]
