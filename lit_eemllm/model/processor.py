"""Conversations and images to the inputs of an EEMLLM, and answers back to text; by our own names and by those of transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from ..config.keys import DataConfig
from ..inputs.chat import ChatTemplate, get_template
from ..inputs.conversation import IMAGE, Conversation, Turn
from ..inputs.images import Transform, open_image, read_file
from ..inputs.jinja import jinja_of
from ..inputs.rows import as_llava
from ..inputs.spans import IMAGE_SLOT, EncodedText, Span
from ..layout import join_images, upload
from ..mechanisms import build_connector
from .configuration import EEMLLMConfig
from .folders import HUB, PROCESSOR, TOKENIZER_FILES, opened, read_config
from .pretrained import without_weights
from .vision import get_vision_encoder

IDS = ("input_ids", "attention_mask", "assistant_masks")


class Processor(ProcessorMixin):
    """Tokenizer, chat template and image transform of a model, kept together. One of transformers' processors: `AutoProcessor` loads it from
    a folder, pipelines and trainers take it.

    Args:
        tokenizer: a fast tokenizer.
        template: name of the chat template.
        transform: image to pixels.
        image_token_id: stands for a visual token in the ids.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, transform: Transform, image_token_id: int
    ) -> None:
        self.template: ChatTemplate = get_template(template, tokenizer)
        self.begin = "".join(tokenizer.convert_ids_to_tokens(self.template.begin_ids))
        super().__init__(
            tokenizer,
            chat_template=f"{{{{- {json.dumps(self.begin)} -}}}}" * bool(self.begin) + jinja_of(self.template),
        )
        self.transform, self.image_token_id = transform, image_token_id

    # --- our names
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the vocabulary: do the same ids mean the same text?"""
        return sha256(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()).hexdigest()[:16]

    def prompts(
        self,
        conversations: Sequence[Conversation],
        images: Sequence[Sequence[Image]],
        device: torch.device | str = "cpu",
    ) -> dict[str, Any]:
        """Left-padded prompts up to where the model speaks: input_ids, attention_mask and, if there is any image,
        pixel_values, with image_sizes where images have many.

        Args:
            conversations: a trailing answer, if any, is left out.
            images: those of each conversation, in order.
            device: where the ids go. Pixels stay on the CPU, and the model sends those that it has not seen.
        """
        encoded = [self.template.encode(conversation, generation=True) for conversation in conversations]
        inputs = self._inputs(encoded, images)
        return {name: upload(x, torch.device(device)) if name in IDS else x for name, x in inputs.items()}

    def answers(self, ids_BL: Tensor, prompt_length: int) -> list[str]:
        """Text of the generated ids behind the prompt, up to the first id that ends a turn."""
        texts = []
        for row in ids_BL[:, prompt_length:].tolist():
            end = next((i for i, token in enumerate(row) if token in self.template.stop_ids), len(row))
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True).strip()
            texts.append(text.removeprefix(self.template.lead).strip())
        return texts

    # --- those of transformers
    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        add_special_tokens: bool = True,
        **options: Any,
    ) -> BatchFeature:
        """Texts, as `apply_chat_template` renders them, to padded tensors; pixels as bytes, which the model normalises.

        Args:
            images: Pillow's, or paths; one, a list, or a list of lists. They go to the placeholders of the texts in order.
            text: one, or several.
            add_special_tokens: begin with what the template begins with, where the text does not.
            options: see `_inputs`.

        Raises:
            ValueError: there are more or fewer images than placeholders.
            SampleError: an image cannot be read.
        """
        texts, pictures, slot = [text] if isinstance(text, str) else text or [], list(_flat(images)), self.template.slot
        counts = [each.count(slot) for each in texts]
        if sum(counts) != len(pictures):
            raise ValueError(f"found {len(pictures)} images, expected one for each {slot} in the text: {sum(counts)}")
        left = iter(pictures)
        encoded = [self._encoded(each, add_special_tokens) for each in texts]
        return self._inputs(encoded, [[next(left) for _ in range(count)] for count in counts], **options)

    def _encoded(self, text: str, begins: bool) -> EncodedText:
        begins |= bool(self.begin) and text.startswith(self.begin)
        pieces = re.split(f"({re.escape(self.template.slot)})", text.removeprefix(self.begin))
        ids, supervised = self.template.spans(
            [Span(IMAGE if piece == self.template.slot else piece, False) for piece in pieces if piece]
        )
        start = self.template.begin_ids if begins else []
        return EncodedText(start + ids, [False] * len(start) + supervised)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """Messages, or a list of several conversations, by the template that the model was trained with: the very ids of training.

        One that ends with a question always goes on to where the model speaks.

        Args:
            conversation: messages of ``role`` and ``content``, a text or a list of parts ``{"type": "text", "text": ...}`` and ``{"type": "image",
                "image": ...}``, of an image as `__call__` takes it.
            add_generation_prompt: as the conversation ends, it must be a question.
            tokenize: return tensors, else text.
            return_dict: return all of them, as `__call__` does, else the ids.
            return_assistant_tokens_mask: also ``assistant_masks`` [B, L], 1 at what is trained.
            processor_kwargs: options of `__call__`.
            variables: of other templates than ours, which has none; pipelines put more among them.

        Raises:
            SampleError: messages that cannot be read, or that the template refuses.
            ValueError: what cannot be done was asked for: another template, tools, to go on with a given answer.
        """
        refused = {name: variables.get(name) for name in ("tools", "documents", "continue_final_message")}
        if chat_template is not None and chat_template != self.chat_template:
            refused["chat_template"] = chat_template
        if wrong := [name for name, given in refused.items() if given]:
            raise ValueError(
                f"apply_chat_template: found {', '.join(wrong)}, expected messages of the model's own template alone"
            )
        several = isinstance(next(iter(conversation), None), list | tuple)
        read = [_read(messages) for messages in (conversation if several else [conversation])]
        if add_generation_prompt and any(one.roles[-1] == "gpt" for one, _ in read):
            raise ValueError(
                "add_generation_prompt: found a conversation that ends with an answer, expected a question"
            )
        if not tokenize:
            texts = [self.begin + "".join(span.text for span in self.template.render(one)) for one, _ in read]
            return texts if several else texts[0]
        encoded = [self.template.encode(one, generation=one.roles[-1] == "human") for one, _ in read]
        options = {name: value for name, value in (processor_kwargs or {}).items() if name != "add_special_tokens"}
        pictures = [shown for _, shown in read]
        inputs = self._inputs(encoded, pictures, flags=return_assistant_tokens_mask, **options)
        return inputs if return_dict else inputs["input_ids"]

    def _inputs(
        self,
        encoded: Sequence[EncodedText],
        images: Sequence[Sequence[Any]],
        *,
        flags: bool = False,
        padding: Any = True,
        padding_side: str = "left",
        pad_to_multiple_of: int | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Padded tensors of conversations and their images.

        Args:
            flags: also ``assistant_masks``.
            padding, return_tensors: rows of several are always padded, and always tensors of PyTorch.
            padding_side: left, as prompts are, or right.
            truncation: cut rows to `max_length`; the model refuses one in which an image is cut.
        """
        pixels, counted = list[Tensor](), list[tuple[int, int]]()
        rows: dict[str, list[list[int]]] = {name: [] for name in IDS}
        for text, pictures in zip(encoded, images, strict=True):
            made = [_picture(picture) for picture in pictures]
            sizes = [self.transform.size_among(picture.size, len(made)) for picture in made]
            shown = text.with_pieces([self.transform.pieces(*size) for size in sizes], self.template.text_ids)
            runs = iter(shown.runs)
            lengths = [next(runs) if token == IMAGE_SLOT else 1 for token in shown.ids]
            tokens = (self.image_token_id if token == IMAGE_SLOT else token for token in shown.ids)
            end = max_length if truncation else None
            for name, values in zip(IDS, (tokens, (1 for _ in lengths), map(int, shown.supervised)), strict=True):
                rows[name].append([x for x, length in zip(values, lengths, strict=True) for _ in range(length)][:end])
            pixels.extend(map(self.transform, made, sizes))
            counted += sizes
        step = pad_to_multiple_of or 1
        longest = -(-max(map(len, rows["input_ids"]), default=0) // step) * step
        fill = {"input_ids": self.tokenizer.pad_token_id or 0}
        inputs: dict[str, Any] = {
            name: torch.tensor([_padded(row, longest, fill.get(name, 0), padding_side) for row in found])
            for name, found in rows.items()
            if flags or name != "assistant_masks"
        }
        if pixels:
            inputs["pixel_values"] = join_images(pixels)
            if not self.transform.fixed:
                inputs["image_sizes"] = counted
        return BatchFeature(inputs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    def to_dict(self) -> dict[str, Any]:
        """What its own file says; the rest is in the tokenizer's files and in the model's configuration."""
        return {"template": self.template.name}

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **options: Any) -> None:
        """Write it into the folder of its model. `options`: those of ``push_to_hub`` are not taken; call that."""
        if push_to_hub:
            raise ValueError(
                "save_pretrained: found push_to_hub, expected a folder alone; call push_to_hub(REPOSITORY)"
            )
        folder = Path(save_directory)
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        (folder / PROCESSOR).write_text(json.dumps(self.to_dict()), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], **options: Any) -> Processor:
        """Of a model's folder or hub id. `options`: those in `HUB` are read.

        Raises:
            ConfigError: the folder does not hold an EEMLLM with a tokenizer, or is broken.
        """
        key, hub = "Processor.from_pretrained", {name: options[name] for name in HUB & options.keys()}
        with opened(str(path), key, cls.__name__, (*TOKENIZER_FILES, PROCESSOR), **hub) as folder:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
            tokenizer.name_or_path = str(path)
            config = EEMLLMConfig.from_pretrained(folder)
            encoder = without_weights(get_vision_encoder(config.vision["encoder"]), config.vision["config"])
            transform = encoder.transform.with_reduction(build_connector(config.connector))
            return cls(tokenizer, template_of(folder, tokenizer), transform, config.image_token_id)


AutoProcessor.register(EEMLLMConfig, Processor)


def template_of(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of the chat template of a model's folder; folders of older versions do not say it."""
    file = folder / PROCESSOR
    told = read_config(file, PROCESSOR).get("template") if file.is_file() else None
    return str(told or ("jinja" if tokenizer.chat_template else "vicuna_v1"))


def _padded(row: list[int], length: int, fill: int, side: str) -> list[int]:
    padding = [fill] * (length - len(row))
    return padding + row if side == "left" else row + padding


def _flat(images: Any) -> Iterator[Any]:
    """Images in lists of lists, one after the other."""
    for image in images if isinstance(images, list | tuple) else [] if images is None else [images]:
        yield from _flat(image) if isinstance(image, list | tuple) else [image]


def _picture(image: Any) -> Image:
    if not isinstance(image, str | PathLike):
        return image
    if re.match(r"\w+:", str(image)):
        raise ValueError(f"image: found {str(image)[:80]!r}, expected a path or a picture; nothing is fetched here")
    return open_image(read_file(Path(image), str(image)), str(image), DataConfig.max_image_pixels)


def _read(messages: Sequence[Mapping[str, Any]]) -> tuple[Conversation, list[Any]]:
    """Messages as a conversation, and the images that they hold."""
    images, numbered = list[Any](), list[Any]()
    for message in messages:
        parts = message.get("content")
        for i, part in enumerate(parts := list(parts) if isinstance(parts, list | tuple) else []):
            known = part if isinstance(part, Mapping) else {}
            held = [known[name] for name in ("image", "path", "url", "image_url") if known.get(name) is not None]
            if held and known.get("type") in ("image", "image_url"):
                images.append(held[0].get("url") if isinstance(held[0], Mapping) else held[0])
                parts[i] = {"type": "image", "image": str(len(images))}  # rows hold paths alone
        numbered.append({**message, "content": parts} if parts else message)
    row = as_llava({"messages": numbered}, "messages")
    turns = [Turn(turn["from"], turn["value"]) for turn in row.get("conversations", ())]
    return Conversation("messages", tuple(turns), sum(turn.text.count(IMAGE) for turn in turns)), images
