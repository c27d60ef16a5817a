"""The model: vision encoder -> two-layer MLP projector -> pretrained decoder whose layers run any mechanism."""

from .modeling import EEMLLM, EEMLLMConfig
from .processor import Processor
from .vision import VisionEncoder, register_vision_encoder

__all__ = ["EEMLLM", "EEMLLMConfig", "Processor", "VisionEncoder", "register_vision_encoder"]
