"""Vision encoders: CLIP, SigLIP and relatives from transformers, and a registry for a user's own encoder.

Legend of shapes in `lit_eemllm.layout`, and here:
    P patches of an image, CLIP's class token among them    n those that query
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Idefics2VisionConfig,
    Idefics3VisionConfig,
    Idefics3VisionTransformer,
    InternVLVisionConfig,
    InternVLVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMVisionConfig,
    SmolVLMVisionTransformer,
)

from ..compat.transformers import Idefics2VisionTransformer
from ..core.ranking import ROWS
from ..errors import ConfigError
from ..inputs.images import ImageTransform, Transform
from ..inputs.resolutions import NativeTransform, transform_from_dict, with_policy
from ..layout import Pixels
from ..mechanisms import Connector
from .folders import naming, read_of
from .pretrained import load_pretrained, load_weighted


class VisionEncoder(nn.Module, ABC):
    """From pixels to features, of which the connector makes visual tokens.

    Attributes:
        hidden_size: their width d.
        transform: how an image becomes pixels, and how many visual tokens it has behind the model's connector.
    """

    hidden_size: int
    transform: Transform

    @classmethod
    @abstractmethod
    def from_path(cls, path: str, *, select_layer: int | None, policy: str) -> VisionEncoder:
        """The encoder with pretrained weights. The arguments are the keys of ``model.vision``; ``max_tokens`` only if it is set."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> VisionEncoder:
        """The same architecture from what `to_config` returned, without weights."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Plain types that describe the architecture, stored in the model's config.json."""

    @abstractmethod
    def forward(self, pixels: Any) -> Any:
        """[I, 3, height, width] to [I, features, d]; if images differ in shape, a list of [3, height, width] to [features, d], those
        of all images in order. Features of an image are in the order of its rows of patches.

        An encoder that `says_importance` is called with ``importance=True`` too. It then returns a pair: the features, and how
        important each of them is, [I, features] or [features], 0 or more and without gradients. Mechanisms rank visual tokens by it.


        One that `reads_depths` is called with ``depths`` too, `Mechanism.encoder_depths`, and puts the states after those layers to the
        right of its features, [..., d x (1 + depths)].
        """

    @property
    def says_importance(self) -> bool:
        """Whether `forward` takes ``importance=True``."""
        return False

    @property
    def reads_depths(self) -> bool:
        """Whether `forward` takes ``depths``."""
        return False

    def blocks(self) -> list[nn.Module]:
        """Its layers from input to output, for learning rates by depth; empty if they have no order."""
        return []

    def unused(self) -> list[nn.Module]:
        """Parts whose output is never read, such as layers above the chosen one: they are never trained."""
        return []


_ENCODERS: dict[str, type[VisionEncoder]] = {}


def register_vision_encoder(name: str) -> Callable[[type[VisionEncoder]], type[VisionEncoder]]:
    """Class decorator that makes an encoder available as ``model.vision.encoder=NAME``. Raises ValueError if taken."""

    def register(cls: type[VisionEncoder]) -> type[VisionEncoder]:
        if name in _ENCODERS:
            raise ValueError(f"vision encoder {name!r} is registered already; registered: {sorted(_ENCODERS)}")
        _ENCODERS[name] = cls
        return cls

    return register


def encoder_name(vision: VisionEncoder) -> str:
    """The name that its class is registered under."""
    return next(name for name, cls in _ENCODERS.items() if cls is type(vision))


def get_vision_encoder(name: str) -> type[VisionEncoder]:
    """The registered class. Raises ConfigError that lists the registered encoders."""
    if name not in _ENCODERS:
        raise ConfigError(
            f"model.vision.encoder: unknown encoder {name!r}; registered: {sorted(_ENCODERS)}. "
            "An encoder of your own is registered by a file given with --import FILE."
        )
    return _ENCODERS[name]


WITH_CLASS_TOKEN = {"clip_vision_model", "internvl_vision"}
NATIVE = {"siglip2_vision_model", "idefics2_vision"}
"""Families whose images keep their aspect ratio and differ in shape."""


@register_vision_encoder("transformers")
class TransformersVision(VisionEncoder):
    """Encoders of transformers: the hidden states of one layer without class token, as in LLaVA, or the encoder's output.

    A feature is as important as the attention that it gets in the layer that is read, summed over its heads: the class token's
    (VisionZip), or in encoders without one that of all patches.

    CLIP and SigLIP take images of one size. SigLIP 2 NaFlex, and Idefics2's SigLIP, whose position ids depend on the place in the
    image, take many sizes: images of similar size form a batch, whose padding is removed from the output.
    """

    FAMILIES = {
        "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
        "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
        "siglip2_vision_model": (Siglip2VisionConfig, Siglip2VisionModel),
        "idefics2_vision": (Idefics2VisionConfig, Idefics2VisionTransformer),
        "idefics3_vision": (Idefics3VisionConfig, Idefics3VisionTransformer),
        "smolvlm_vision": (SmolVLMVisionConfig, SmolVLMVisionTransformer),
        "internvl_vision": (InternVLVisionConfig, InternVLVisionModel),
    }

    def __init__(self, model: nn.Module, transform: Transform, select_layer: int | None) -> None:
        super().__init__()
        self.model, self.transform, self.select_layer = model, transform, select_layer
        self.hidden_size, depth = int(model.config.hidden_size), int(model.config.num_hidden_layers)
        if select_layer is not None and not -depth - 1 <= select_layer <= depth:
            raise ConfigError(f"model.vision.select_layer: found {select_layer}, this encoder has {depth} layers")
        view, (side, patch) = getattr(transform, "view", transform), sides(model.config)
        if isinstance(view, ImageTransform) and (view.height, view.width, view.patch) != (side, side, patch):
            raise ConfigError(
                f"preprocessor_config.json gives images of {view.height} x {view.width} pixels in patches of {view.patch}, but its "
                f"encoder (config.json) reads {side} x {side} in patches of {patch}"
            )

    @classmethod
    def read_config(cls, path: str) -> tuple[Any, dict[str, Any]]:
        """transformers' config of the encoder in a folder and, if the folder holds an EEMLLM, its encoder's `to_config`; else {}."""
        config = load_pretrained(AutoConfig, path, "model.vision.path")
        saved = config.vision["config"] if config.model_type == "eemllm" else {}
        with naming("model.vision.path", cls.__name__, path):
            if "model" in saved:
                config = cls.FAMILIES[saved["model"]["model_type"]][0](**saved["model"])
        config = getattr(config, "vision_config", config)  # of a model of images and text, such as CLIPModel
        if config.model_type not in cls.FAMILIES:
            raise ConfigError(
                f"model.vision.path: {path} is a {config.model_type!r}, expected one of {sorted(cls.FAMILIES)}; "
                "for another encoder register a class of your own (docs/vision.md)"
            )
        return config, saved

    @classmethod
    def from_path(
        cls, path: str, *, select_layer: int | None, policy: str, max_tokens: int | None = None
    ) -> TransformersVision:
        config, saved = cls.read_config(path)
        if saved:
            mapping, transform = {r"^vision\.model\.": ""}, transform_from_dict(saved["transform"])
        else:
            name = "preprocessor_config.json"
            preprocessor = read_of(path, "model.vision.path", name)
            kind = NativeTransform if config.model_type in NATIVE else ImageTransform
            with naming("model.vision.path", name, path):
                transform = kind.from_preprocessor_config(preprocessor, patch=config.patch_size)
            # a folder of a whole Idefics2 has the decoder too
            mapping = {r"^model\.vision_model\.": ""} if config.model_type == "idefics2_vision" else {}
        options: dict[str, Any] = {"config": config, **({"key_mapping": mapping} if mapping else {})}
        model = load_weighted(cls.FAMILIES[config.model_type][1], path, "model.vision.path", **options)
        transform = with_policy(transform, policy)
        if max_tokens is not None and isinstance(transform, NativeTransform):
            transform = transform.within(max_tokens)
        with naming("model.vision.path", cls.__name__, path):
            return cls(model, transform, select_layer)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TransformersVision:
        config_class, model_class = cls.FAMILIES[config["model"]["model_type"]]
        model = model_class(config_class(**config["model"]))
        return cls(model, transform_from_dict(config["transform"]), config["select_layer"])

    def to_config(self) -> dict[str, Any]:
        model = {**self.model.config.to_diff_dict(), "model_type": self.model.config.model_type}
        return {"model": model, "transform": self.transform.to_dict(), "select_layer": self.select_layer}

    def _layers(self) -> nn.ModuleList:
        depth = self.model.config.num_hidden_layers
        return next(m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)

    def blocks(self) -> list[nn.Module]:
        depth = len(self._layers())
        return list(self._layers()[: depth if self.select_layer is None else self.select_layer % (depth + 1)])

    def unused(self) -> list[nn.Module]:
        normed = (
            self.select_layer is None and self.model.config.model_type != "clip_vision_model"
        )  # CLIP's post_layernorm norms only the pooled output
        names = ("head",) if normed else ("post_layernorm", "layernorm", "head")
        rest = [m for name, m in self.model.named_modules() if name.rpartition(".")[2] in names]
        return [*self._layers()[len(self.blocks()) :], *rest]

    @property
    def says_importance(self) -> bool:
        return bool(self.blocks())  # else there is no layer before what is read

    @property
    def reads_depths(self) -> bool:
        return True

    def forward(self, pixels: Pixels, importance: bool = False, depths: tuple[float, ...] = ()) -> Any:
        if isinstance(self.transform, NativeTransform):
            found = self._native(list(pixels), self.transform.patch, importance, depths)
        else:
            assert isinstance(pixels, Tensor)
            _, patch = sides(self.model.config)
            tokens = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
            found = tuple(x[:, -tokens:] for x in self._states(importance, depths, pixels))  # a class token is first
        return found if importance else found[0]

    def _states(self, importance: bool, depths: tuple[float, ...], *args: Any) -> tuple[Tensor, ...]:
        """The states that are read, [I, P, d], with those of `depths` beside them, and if asked for the importance of each, [I, P]. `args`: of the model, the second is a
        mask of what is no padding."""
        last: Any = self.blocks()[-1] if importance else None
        attention = getattr(last, "self_attn", None) or getattr(last, "attention", None)
        names = ("q_proj", "k_proj") if importance else ()
        with outputs_of({name: getattr(attention, name) for name in names}) as kept:
            if self.select_layer is None and not depths:
                states = self.model(*args).last_hidden_state
            else:
                output = self.model(*args, output_hidden_states=True)
                chosen, all_states = self.select_layer, output.hidden_states
                states = output.last_hidden_state if chosen is None else all_states[chosen]
                states = torch.cat([states, *(all_states[round(x * len(self.blocks()))] for x in depths)], -1)
        if not importance:
            return (states,)
        q_IPd, k_IPd = (kept[name] for name in names)
        if self.model.config.model_type in WITH_CLASS_TOKEN:
            q_IPd = q_IPd[:, :1]
        real_IP = args[1].bool() if len(args) > 1 and args[1] is not None else None
        with torch.autocast(k_IPd.device.type, enabled=False):
            return states, attention_received(q_IPd.float(), k_IPd.float(), attention.num_heads, real_IP)

    def _native(
        self, images: list[Tensor], patch: int, importance: bool, depths: tuple[float, ...]
    ) -> tuple[Tensor, ...]:
        """Images [3, height, width] of many sizes to the rows of all in order, [V, d], and if asked for their importance, [V]."""
        grids = [(image.shape[-2] // patch, image.shape[-1] // patch) for image in images]
        rows: dict[int, list[Tensor]] = {}
        if self.model.config.model_type == "idefics2_vision":  # it pads in two dimensions: batch only equal shapes
            shapes = defaultdict(list)
            for i, grid in enumerate(grids):
                shapes[grid].append(i)
            for alike in shapes.values():
                found = self._states(importance, depths, torch.stack([images[i] for i in alike]))
                rows |= {i: [x[n] for x in found] for n, i in enumerate(alike)}
        else:
            for alike in alike_lengths([height * width for height, width in grids]):
                patches = [patches_of(images[i], patch) for i in alike]
                lengths = torch.tensor([len(x) for x in patches])
                real_IL = torch.arange(int(lengths.max())) < lengths[:, None]
                mask = None if real_IL.all() else real_IL.long().to(images[0].device)
                shapes_I2 = torch.tensor([grids[i] for i in alike])  # read on the CPU
                found = self._states(importance, depths, pad_sequence(patches, batch_first=True), mask, shapes_I2)
                rows |= {i: [x[n, : len(patches[n])] for x in found] for n, i in enumerate(alike)}
        return tuple(torch.cat(parts) for parts in zip(*(rows[i] for i in range(len(images))), strict=True))


def sides(config: Any) -> tuple[int | None, int]:
    """Pixels of the side of an image and of a patch; None = images may have any size."""
    side, patch = (
        x[0] if isinstance(x, list | tuple) else x for x in (getattr(config, "image_size", None), config.patch_size)
    )
    return side, int(patch)


@contextmanager
def outputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What modules return while the context lasts, by their names and without gradients."""
    kept = dict[str, Tensor]()

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: kept.update({name: output.detach()})

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def attention_received(q_Ind: Tensor, k_IPd: Tensor, heads: int, real_IP: Tensor | None = None) -> Tensor:
    """The attention that each key gets, summed over heads and queries, [I, P]: a few queries at a time, so that not all weights are there
    at once.

    Args:
        q_Ind: queries of n patches, by head side by side.
        k_IPd: keys of all P.
        heads: how many.
        real_IP: False where a patch is padding, which neither gives attention nor gets any; then n is P.
    """
    k_INHP = k_IPd.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)
    received_IP = k_IPd.new_zeros(k_IPd.shape[:2])
    for start in range(0, q_Ind.shape[1], ROWS):
        some = slice(start, start + ROWS)
        q_INnH = q_Ind[:, some].unflatten(-1, (heads, -1)).transpose(1, 2)
        scores_INnP = q_INnH @ k_INHP * k_INHP.shape[2] ** -0.5
        if real_IP is None:
            received_IP += scores_INnP.softmax(-1).sum((1, 2))
        else:
            weights_INnP = scores_INnP.masked_fill(~real_IP[:, None, None], float("-inf")).softmax(-1)
            received_IP += (weights_INnP * real_IP[:, None, some, None]).sum((1, 2))
    return received_IP


def ranking_problem(encoder: VisionEncoder, connector: Connector) -> str:
    """Why visual tokens cannot be ranked by the encoder; empty = they can."""
    what = "visual tokens are ranked by the encoder's attention"
    if not encoder.says_importance:
        return f"{what}, and {type(encoder).__name__} says none: it reads no layer, or its class lacks says_importance (docs/vision.md)"
    if not connector.says_importance:
        return (
            f"{what}, and no token of the connector {connector.name} stands for a place in it: it has no `importance`"
        )
    return ""


def patches_of(image: Tensor, patch: int) -> Tensor:
    """[3, height, width] to [patches, patch x patch x 3], row by row, colour last, as SigLIP 2 reads them."""
    return image.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 3, 4, 0).flatten(0, 1).flatten(1)


def alike_lengths(lengths: list[int]) -> list[list[int]]:
    """Indices in groups, the longest first; in a group none is shorter than three quarters of the longest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and 4 * lengths[i] >= 3 * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
