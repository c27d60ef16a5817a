"""The model: vision encoder -> two-layer MLP projector -> pretrained decoder whose layers run any mechanism."""

from ..inputs.processor import Processor
from .configuration import EEMLLMConfig
from .modeling import EEMLLM
from .vision import VisionEncoder, register_vision_encoder

__all__ = ["EEMLLM", "EEMLLMConfig", "Processor", "VisionEncoder", "register_vision_encoder"]
