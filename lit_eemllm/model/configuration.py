"""EEMLLMConfig: everything needed to rebuild an EEMLLM's architecture; and the decoder's config that goes into it."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PretrainedConfig

from ..core.families import FAMILIES, check_decoder
from ..errors import ConfigError
from .folders import clean_config, naming
from .pretrained import load_pretrained

if TYPE_CHECKING:
    from ..config.keys import ModelConfig


class EEMLLMConfig(PretrainedConfig):
    """Everything needed to rebuild the architecture. The attention backend is not part of it.

    Args:
        text_config: the decoder's own transformers config; with ``image_rotary``, see `ImageRotary`, if images have positions of rows and columns.
        vision: ``encoder``, a registered name, and ``config``, what that encoder's `to_config` returned.
        mechanism: `Mechanism.to_dict`.
        image_token_id: the id of one visual token in the ids of `generate`; it is never embedded, so it may lie past the
            decoder's vocabulary.
        connector: `Connector.to_dict`; None = the default, as in folders of versions that knew no other.
    """

    model_type = "eemllm"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision: dict[str, Any] | None = None,
        mechanism: dict[str, Any] | None = None,
        image_token_id: int = -1,
        connector: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.vision, self.mechanism, self.connector = vision or {}, mechanism or {}, connector or {}
        self.image_token_id = image_token_id
        if text_config is not None:
            kwargs.setdefault("tie_word_embeddings", text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Of a folder's config.json, which `AutoConfig` hands on as it is, the keys that are read of any folder (`clean_config`)."""
        return super().from_dict(clean_config(config_dict, "config.json"), **options)

    @property
    def vocab_size(self) -> int:
        """Columns of the logits that `forward` returns: the decoder's vocabulary, and the image token if it lies past it."""
        return max(self.text_config.vocab_size, self.image_token_id + 1)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The decoder's config as `generate` needs it: beam search counts the columns of the logits by its vocabulary."""
        if self.text_config is None or self.text_config.vocab_size == self.vocab_size:
            return self.text_config or self
        text_config = copy(self.text_config)
        text_config.vocab_size = self.vocab_size
        return text_config


AutoConfig.register("eemllm", EEMLLMConfig, exist_ok=True)  # in place of the door


def refuse_experts(config: ModelConfig, decoder: PretrainedConfig) -> None:
    """Raises ConfigError if the decoder has experts, and its linear layers should be in fewer bits: all but experts are."""
    narrow = "model.quantization" if config.quantization else "model.fp8" if config.fp8 else None
    if narrow and FAMILIES[decoder.model_type].expert_layers:
        raise ConfigError(
            f"{narrow}: found a decoder of model_type {decoder.model_type!r}, whose experts are no linear layers; unset it"
        )


def load_decoder_config(path: str) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config of a causal LM, or of the one in an EEMLLM folder, and the options with which its weights are loaded."""
    config = load_pretrained(AutoConfig, path, "model.decoder")
    options: dict[str, Any] = {}
    if isinstance(config, EEMLLMConfig):
        config = config.text_config
        options = {"config": config, "key_mapping": {r"^language_model\.": ""}}
    with naming("model.decoder", "AutoConfig", path):
        check_decoder(config)
    return config, options
