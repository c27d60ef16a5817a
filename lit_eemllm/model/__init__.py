"""The model: vision encoder -> connector -> pretrained decoder whose layers execute any mechanism."""

from ..inputs.processor import Processor
from .configuration import EEMLLMConfig
from .modeling import EEMLLM
from .vision import VisionEncoder, register_vision_encoder

__all__ = ["EEMLLM", "EEMLLMConfig", "Processor", "VisionEncoder", "register_vision_encoder"]
