"""The model: vision encoder -> connector -> pretrained decoder whose layers execute any mechanism."""

from .configuration import EEMLLMConfig
from .modeling import EEMLLM
from .processor import Processor
from .qwen_vision import QwenVision
from .vision import VisionEncoder, register_vision_encoder

__all__ = ["EEMLLM", "EEMLLMConfig", "Processor", "QwenVision", "VisionEncoder", "register_vision_encoder"]
