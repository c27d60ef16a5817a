"""What we use of transformers that is private, or that its versions name or place differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from socket import getaddrinfo
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

__all__ = [
    "CACHE",
    "Generating",
    "Idefics2VisionTransformer",
    "best_grid",
    "file_of",
    "naflex_size",
    "nearest_grid",
    "template_names",
    "vision_arguments",
]

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""The key/value cache, as an argument of models and as a key of their outputs: ``past_key_values`` before 5.24."""


class Generating(GenerationMixin):
    """`generate`, for a model whose images are not one row a prompt."""

    def repeated_images(self, times: int, input_ids: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """Take the images out of the options of `generate`, and return those of each prompt so many times."""
        raise NotImplementedError

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        images = self.repeated_images(expand_size, input_ids, kwargs) if input_ids is not None else {}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, **images}


def file_of(model: str, name: str, needed: bool = False, **hub: Any) -> Path | None:
    """A file of a model on the hub, None if it has no such file. `hub` is ``revision`` and the like.

    Where the hub has no address, only its cache is looked into: the library would try again for half a minute, for every file.

    Raises:
        OSError: nobody answers, or what is `needed` is not there.
    """
    from transformers.utils import cached_file

    offline = not Path(model).is_dir() and unreachable()
    if offline:
        hub["local_files_only"] = True
    found = cached_file(model, name, _raise_exceptions_for_missing_entries=needed and not offline, **hub)
    if found is None and needed:
        raise OSError(
            f"it is no folder, the cache of the hub holds no {name} of it, and {offline}. Name a folder; of models that are only looked "
            "at, `lit-eemllm estimate --shape` and `lit-eemllm shrink --published` need no hub"
        )
    return None if found is None else Path(found)


@cache
def unreachable() -> str:
    """Why the hub cannot be asked; empty if it may be."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    host = urlsplit(constants.ENDPOINT).hostname or ""
    try:
        if not getproxies():  # which know addresses for us
            getaddrinfo(host, 443)
    except OSError as error:
        return f"{host} has no address here ({error.strerror})"
    return ""


def template_names() -> tuple[dict[str, Any], dict[str, Any]]:
    """The filters and the global names that chat templates know."""
    from transformers.utils.chat_template_utils import _compile_jinja_template  # imports jinja2

    environment = _compile_jinja_template("").environment
    return dict(environment.filters), dict(environment.globals)


def naflex_size(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Height and width to which SigLIP 2 resizes a picture of which it takes so many patches at most."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    return get_image_size_for_max_num_patches(height, width, patch, most)


def best_grid(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of possible heights and widths, the one that LLaVA-1.6 takes for a picture."""
    from transformers.image_processing_utils import select_best_resolution

    return select_best_resolution(size, list(sizes))


def nearest_grid(size: tuple[int, int], side: int, least: int, most: int) -> tuple[int, int]:
    """Rows and columns of tiles of `side` pixels, `least` to `most` in all, that InternVL takes for a picture (height, width)."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    columns, rows = get_optimal_tiled_canvas(size, (side, side), least, most)
    return rows, columns


def vision_arguments(encoder: Any, grid_thw: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a pass of Qwen's encoders takes beside patches, for images whose frames, rows and columns of patches are on the CPU: tensors that go
    to the device, and those that stay, of which the encoder reads lengths. Versions that take the grids alone compute all on the
    device, and wait for it."""
    try:
        from transformers import vision_utils as known
    except ImportError:
        return {"grid_thw": grid_thw}, {}
    if not hasattr(known, "get_vision_interpolation_indices_and_weights"):
        return {"grid_thw": grid_thw}, {}
    side = encoder.config.spatial_merge_size
    sent = {"position_ids": known.get_vision_position_ids(grid_thw, side)}
    kept = {"grid_thw": grid_thw, "cu_seqlens": known.get_vision_cu_seqlens(grid_thw)}
    if hasattr(encoder, "window_size"):
        sent["window_index"], kept["cu_window_seqlens"] = known.get_vision_window_index(
            grid_thw, side, encoder.window_size, encoder.patch_size
        )
    if hasattr(encoder, "interpolation_mode"):
        how = encoder.num_grid_per_side, encoder.interpolation_mode, encoder.interpolation_align_corners, side
        sent["interp_indices"], sent["interp_weights"] = known.get_vision_interpolation_indices_and_weights(
            grid_thw, *how
        )
    return sent, kept
