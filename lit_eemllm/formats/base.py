"""What a family of models of images and text in transformers' own format needs to be read as an EEMLLM and written again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from ..inputs.images import RESAMPLING, ImageTransform, Transform
from ..inputs.resolutions import NativeTransform
from ..mechanisms import Connector
from ..mechanisms.connectors import DEFAULT
from ..model.modeling import EEMLLM
from ..model.qwen_vision import QwenVision
from ..model.vision import TransformersVision, VisionEncoder


class Format(ABC):
    """A family of models of images and text in transformers. What it holds in all: an encoder, a connector, a decoder, an image token.

    Attributes:
        model_type: of its config.json.
        config_class, model_class: transformers'.
        encoders: `model_type`s of the encoders that it may have; a model is written in the first format that has its encoder.
        names: prefixes of our tensors -> those of theirs; the first that fits.
        template: name of the chat template of a model whose tokenizer has none.
        needs: packages that its processor needs for videos, also where there are none.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[Any]
    model_class: ClassVar[Any]
    encoders: ClassVar[tuple[str, ...]]
    names: ClassVar[dict[str, str]]
    template: ClassVar[str] = "jinja"
    needs: ClassVar[tuple[str, ...]] = ()

    # --- reading
    @abstractmethod
    def problems(self, config: Any) -> list[str]:
        """What in a configuration an EEMLLM cannot be: key, what was found, what was expected."""

    @abstractmethod
    def transform(self, config: Any, values: dict[str, Any]) -> Transform:
        """Of a configuration and its preprocessor's. Raises ConfigError."""

    def select_layer(self, config: Any) -> int | None:
        """The encoder's layer whose states are read; None = its output."""
        return None

    def connector(self, config: Any) -> Connector:
        return DEFAULT

    def decoder_config(self, config: Any) -> PretrainedConfig:
        """The decoder's, of a family of causal language models."""
        decoder: PretrainedConfig = config.text_config
        decoder.tie_word_embeddings = config.tie_word_embeddings
        return decoder

    def vision(self, tower: nn.Module, transform: Transform, config: Any) -> VisionEncoder:
        """Our encoder around theirs."""
        return TransformersVision(tower, transform, self.select_layer(config))

    # --- writing
    def refusal(self, model: EEMLLM) -> str | None:
        """Why a model with an encoder of this format's cannot be written in it, or None."""
        return None

    def text_config(self, model: EEMLLM) -> PretrainedConfig:
        """The decoder's, as theirs is."""
        return deepcopy(model.config.text_config)

    @abstractmethod
    def settings(self, model: EEMLLM) -> dict[str, Any]:
        """Keys of config.json beside the encoder's, the decoder's and the image token's."""

    @abstractmethod
    def files(self, model: EEMLLM) -> dict[str, dict[str, Any]]:
        """Files of its processor beside the tokenizer's."""

    def inputs(self, model: EEMLLM, size: tuple[int, int], ids: Tensor) -> dict[str, Any]:
        """Arguments of its model for a picture of this width and height, beside ids and pixels."""
        return {}

    def pixels(self, model: EEMLLM, views: Tensor) -> Tensor:
        """Pixels of one picture as its model takes them, from what the encoder gets of it, [views, 3, height, width]."""
        return views

    @staticmethod
    def encoder(model: EEMLLM) -> Any:
        """The configuration of its encoder."""
        assert isinstance(model.vision, TransformersVision | QwenVision)
        return model.vision.model.config

    def theirs(self, name: str) -> str:
        """What one of our tensors is called there."""
        return next(new + name.removeprefix(old) for old, new in self.names.items() if name.startswith(old))


def normalisation(transform: ImageTransform | NativeTransform) -> dict[str, Any]:
    """The keys that the image processors of transformers share."""
    return {
        "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(transform.mean), "image_std": list(transform.std), "resample": int(RESAMPLING[transform.resample]),
    }  # fmt: skip
