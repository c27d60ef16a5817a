"""The encoders of Qwen2.5-VL and Qwen3-VL: images in their own aspect ratio, packed, attention in windows in some layers.

Their mergers are connectors here (`Merger`), so an encoder gives the features that enter them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from ..compat.transformers import vision_arguments
from ..errors import ConfigError
from ..inputs.images import Transform
from ..inputs.resolutions import NativeTransform, transform_from_dict
from ..layout import upload
from ..mechanisms.pooling import squares
from .folders import naming
from .pretrained import load_model, load_pretrained, refuse_missing
from .vision import VisionEncoder, register_vision_encoder

KEY = "model.vision.path"
MERGERS = ("merger.", "deepstack_merger_list.")


class Squares(nn.Module):
    """In a merger's place: the features of a square side by side, [tokens, P x d]."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places

    def forward(self, x_Rd: Tensor) -> Tensor:
        return x_Rd.view(-1, self.places * x_Rd.shape[-1])


@register_vision_encoder("qwen_vl")
class QwenVision(VisionEncoder):
    """States of the last layer before its merger and, of Qwen3-VL, to their right those of the layers that DeepStack reads.

    Lengths are on the CPU, where its attention, PyTorch's, reads them (`vision_arguments`).

    Args:
        model: transformers' encoder; its mergers are taken out.
        transform: of pictures in whole squares of patches.
    """

    name, select_layer = "qwen_vl", None
    FAMILIES = ("qwen2_5_vl_vision", "qwen3_vl_vision")

    def __init__(self, model: nn.Module, transform: Transform) -> None:
        super().__init__()
        self.model: Any
        self.model, self.transform, config = model, transform, cast(Any, model.config)
        self.side, self.patch = int(config.spatial_merge_size), int(config.patch_size)
        self.levels = len(getattr(config, "deepstack_visual_indexes", ()))
        self.hidden_size = int(config.hidden_size) * (1 + self.levels)
        self.model.merger = Squares(self.side**2)
        if self.levels:
            self.model.deepstack_merger_list = nn.ModuleList(Squares(self.side**2) for _ in range(self.levels))

    @classmethod
    def from_path(cls, path: str, *, select_layer: int | None, policy: str, **options: Any) -> QwenVision:
        """Of a folder that `convert` wrote."""
        if policy != "native" or select_layer is not None:
            found = f"policy={policy} and select_layer={select_layer}"
            raise ConfigError(f"model.vision: found {found}, this encoder has policy=native and select_layer=null")
        with naming(KEY, cls.__name__, path):
            made = cls.from_config(cls.read_config(path, options.get("max_tokens")))
        mapping = {r"^vision\.model\.": ""}
        made.model, info = load_model(
            AutoModel, path, KEY, torch.float32, config=made.model.config, key_mapping=mapping
        )
        missing = {name for name in info["missing_keys"] if not name.startswith(MERGERS)}
        refuse_missing(made.model, {**info, "missing_keys": missing}, KEY, path)
        return cls(made.model, made.transform)

    @staticmethod
    def read_config(path: str, max_tokens: int | None = None) -> dict[str, Any]:
        """What `to_config` gave, of a folder that `convert` wrote, with at most so many patches of a picture. Raises ConfigError."""
        whole = load_pretrained(AutoConfig, path, KEY)
        if whole.model_type != "eemllm" or whole.vision["encoder"] != QwenVision.name:
            raise ConfigError(
                f"{KEY}: {path} holds no Qwen encoder; make the folder of such a model with lit-eemllm convert"
            )
        told: dict[str, Any] = whole.vision["config"]
        if max_tokens is None:
            return told
        transform = transform_from_dict(told["transform"])
        assert isinstance(transform, NativeTransform)
        return {**told, "transform": transform.within(max_tokens).to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QwenVision:
        kind = config["model"].get("model_type")
        if kind not in cls.FAMILIES:
            raise ConfigError(f"encoder qwen_vl: found {kind!r:.99}, expected one of {', '.join(cls.FAMILIES)}")
        model = AutoModel.from_config(AutoConfig.for_model(**config["model"]))
        return cls(model, transform_from_dict(config["transform"]))

    def to_config(self) -> dict[str, Any]:
        model = {**self.model.config.to_diff_dict(), "model_type": self.model.config.model_type}
        return {"model": model, "transform": self.transform.to_dict()}

    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def forward(self, pixels: Any) -> Tensor:
        """[3, height, width] of each image to the rows of all, [R, d x (1 + levels)]."""
        images, side = list(pixels), self.side
        grids = tuple((image.shape[-2] // self.patch, image.shape[-1] // self.patch) for image in images)
        patches = torch.cat([self.patches(image) for image in images])
        sent, kept = vision_arguments(self.model, torch.tensor([(1, *grid) for grid in grids]))
        sent = {name: upload(x, patches.device) for name, x in sent.items()}
        output = self.model(patches, **sent, **kept)
        layers = [output.pooler_output, *(output.deepstack_features if self.levels else ())]
        raster = upload(torch.from_numpy(squares(grids, side)).flatten().argsort(), patches.device)
        return torch.cat([x.view(len(patches), -1).index_select(0, raster) for x in layers], dim=1)

    def patches(self, image: Tensor) -> Tensor:
        """[3, height, width] to [patches, 3 x 2 x patch x patch], square by square; a picture is a video of two equal frames."""
        unit, frames = self.side * self.patch, int(self.model.config.temporal_patch_size)
        blocks = image.unfold(1, unit, unit).unfold(2, unit, unit)  # [3, rows, columns, unit, unit]
        cut = blocks.unflatten(4, (self.side, self.patch)).unflatten(3, (self.side, self.patch))
        patches = cut.permute(1, 2, 3, 5, 0, 4, 6)[:, :, :, :, :, None]  # [rows, columns, y, x, 3, 1, patch, patch]
        return patches.expand(*patches.shape[:5], frames, *patches.shape[6:]).flatten(0, 3).flatten(1)
