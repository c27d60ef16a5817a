"""`bench`: this project's mechanisms beside transformers' LLaVA on the same weights, in one run on this machine: prefill, a second question
about the same picture, a new token, a training step of documents of mixed lengths, peak memory; over the number of visual tokens.

`hf eager`, `hf sdpa`, `hf flash` are `LlavaForConditionalGeneration` with its attention implementations; all others are mechanisms. Before
anything is timed the logits and the training loss of `llava` are compared with those of `hf sdpa`. Systems take turns, round by round.
Running out of memory is a result.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from .attention import registered_backends
from .console import console, progress, quiet_libraries, write_atomically
from .cost.weightless import SHAPES as LLAVA
from .doctor import provenance
from .errors import UserError, did_you_mean
from .formats.llava import Llava
from .inputs.images import ImageTransform
from .layout import PackedBatch, Run, SequenceLayout
from .mechanisms import PRESETS, build_mechanism
from .model import EEMLLM, EEMLLMConfig
from .model.image_cache import ImageCache
from .model.vision import TransformersVision
from .report.measured import BASE, MEASURES, draw, largest, report

SHAPES: dict[str, dict[str, int]] = {
    "7b": LLAVA["vicuna-7b"],
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152,
    ),
    "small": dict(hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=2, vocab_size=512),
}  # fmt: skip
"""Of decoders."""
HF = {"hf eager": "eager", "hf sdpa": "sdpa", "hf flash": "flash_attention_2"}
PATCH, PREFIX = 4, 35
Result = dict[str, Any]


@dataclass
class Setting:
    """What is measured, and how.

    Attributes:
        shape, layers: of the decoder; layers None: the shape's.
        visual: numbers of visual tokens of a picture, squares.
        text: text tokens of a prompt.
        tokens: of an answer.
        documents: in a training step: texts of T/2, T, 2T, ... tokens, each with a picture.
        rounds: at most; each size has one at least.
        minutes: after which no round begins but the first of a size, shared out by the square roots of the sizes.
        attention: this project's backend.
    """

    shape: str
    layers: int | None
    visual: Sequence[int]
    text: int
    tokens: int
    documents: int
    systems: Sequence[str]
    measures: Sequence[str]
    rounds: int
    minutes: float
    attention: str
    device: torch.device
    dtype: torch.dtype


def setting(**given: Any) -> Setting:
    """With defaults for this machine where None is given. Raises UserError for what cannot be measured, all of it together."""
    cuda = torch.cuda.is_available()
    default: dict[str, Any] = {
        "shape": "7b" if cuda else "small", "layers": None, "visual": [64, 576, 2304, 4900] if cuda else [64, 256, 1024, 4096],
        "text": 256 if cuda else 64, "tokens": 32 if cuda else 8, "documents": 4 if cuda else 2,
        "systems": [*(name for name in HF if cuda or name == BASE), *PRESETS], "measures": [name for name in MEASURES if cuda or name != "graph"],
        "rounds": 5, "minutes": 10.0 if cuda else 2.0, "attention": "auto",
        "device": torch.device("cuda" if cuda else "cpu"), "dtype": torch.bfloat16 if cuda else torch.float32,
    }  # fmt: skip
    made = Setting(**{**default, **{name: value for name, value in given.items() if value is not None}})
    wrong = []
    for key, words, known in (
        ("--shape", [made.shape], [*SHAPES]),
        ("--systems", made.systems, [*HF, *PRESETS]),
        ("--measures", made.measures, [*MEASURES]),
        ("--attention", [made.attention], ["auto", *registered_backends()]),
    ):
        for word in words:
            if word not in known:
                hint = did_you_mean(word, known)
                wrong.append(f"{key} {word}: expected of {', '.join(known)}" + (f"; {hint}" if hint else ""))
    wrong += [
        f"--visual {v}: expected a square from 4 to 65,536, as pictures are square"
        for v in made.visual
        if not 4 <= v <= 1 << 16 or math.isqrt(v) ** 2 != v
    ]
    for key, least, most in (
        ("layers", 1, 1024), ("text", PREFIX + 2, 1 << 16), ("tokens", 1, 4096), ("documents", 1, 8), ("rounds", 1, 1000), ("minutes", 0, 1e6),
    ):  # fmt: skip
        if (value := getattr(made, key)) is not None and not least <= value <= most:
            wrong.append(f"--{key} {value}: expected {least} to {most:,.0f}")
    if wrong:
        raise UserError("\n".join(wrong))
    made.systems = list(dict.fromkeys([BASE, *made.systems]))
    return made


# --- both models
class Pair:
    """transformers' LLaVA and this project's models on the same weights, for pictures of so many visual tokens.

    The encoder is one narrow layer: what is compared is the decoder.
    """

    def __init__(self, args: Setting, visual: int) -> None:
        self.args, self.visual, side = args, visual, PATCH * math.isqrt(visual)
        shape = {**SHAPES[args.shape], **({"num_hidden_layers": args.layers} if args.layers else {})}
        self.text = LlamaConfig(**shape, max_position_embeddings=16384, tie_word_embeddings=False)
        self.image = shape["vocab_size"] - 1
        tower = CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=side, patch_size=PATCH
        )  # fmt: skip
        config = LlavaConfig(
            vision_config=tower, text_config=self.text, image_token_index=self.image, vision_feature_layer=-1
        )
        torch.manual_seed(0)
        with _made_in(args):
            self.hf = LlavaForConditionalGeneration(config).eval()
        self.transform = ImageTransform(side, side, PATCH, (0.5,) * 3, (0.5,) * 3)
        self.ours: dict[str, EEMLLM] = {}
        self.pixels = torch.randn(args.documents, 3, side, side, device=args.device, dtype=args.dtype)

    def model(self, system: str) -> Any:
        """Ready to be run as a system."""
        if system in HF:
            self.hf.set_attn_implementation(HF[system])
            return self.hf
        mechanism = build_mechanism(system, self.text.num_hidden_layers)
        kind = str(mechanism.modules)
        if kind not in self.ours:
            vision = TransformersVision(self.hf.model.vision_tower, self.transform, -1)
            settings = EEMLLMConfig(
                text_config=self.text, vision={"encoder": "transformers", "config": vision.to_config()},
                mechanism=mechanism.to_dict(), image_token_id=self.image,
            )  # fmt: skip
            with _made_in(self.args):
                made = EEMLLM(settings, vision=vision).eval()
            theirs = dict(self.hf.named_parameters())
            for name, parameter in made.named_parameters():
                prefix = next((own for own in Llava.names if name.startswith(own)), None)
                if prefix and (same := theirs.get(name.replace(prefix, Llava.names[prefix], 1))) is not None:
                    parameter.data = same.data
            self.ours[kind] = made
        model = self.ours[kind]
        model.set_mechanism(mechanism)
        model.set_attention(self.args.attention, self.args.dtype)
        return model

    # --- what is measured, of a model that is ready
    def prompt(self, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, self.image, (1, self.args.text), generator=generator)
        picture = torch.full((1, self.visual), self.image)
        ids = torch.cat([ids[:, :PREFIX], picture, ids[:, PREFIX:]], 1).to(self.args.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self.pixels[:1]}

    @torch.no_grad()
    def logits(self, model: Any, seed: int = 0) -> Tensor:
        found: Tensor = model(**self.prompt(seed), use_cache=True, logits_to_keep=1).logits
        return found

    def prefill(self, model: Any) -> float:
        return self.timed(lambda: self.logits(model))

    def second(self, model: Any) -> float:
        """Of another prompt; this project keeps what it may of a picture."""
        if isinstance(model, EEMLLM):
            model.image_cache = ImageCache(1 << 40)
            self.logits(model, seed=1)
        seconds = self.timed(lambda: self.logits(model))
        if isinstance(model, EEMLLM):
            model.image_cache = None
        return seconds

    def graph(self, model: Any) -> float:
        """The same, recorded as a CUDA graph by this project's models alone."""
        if not isinstance(model, EEMLLM):
            raise ImportError("not recorded")
        model.record_steps = True
        try:
            return self.decode(model)
        finally:
            model.record_steps = False

    def decode(self, model: Any) -> float:
        """From the first new token of an answer to its last, for each."""
        clock, new = Clock(), self.args.tokens + 1
        with torch.no_grad():
            model.generate(
                **self.prompt(0),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )
        _, first, *rest = clock.times
        return (rest[-1] - first) / len(rest)

    def documents(self) -> list[int]:
        """Text tokens of each."""
        return [max(PREFIX + 2, (self.args.text << number) // 2) for number in range(self.args.documents)]

    def loss(self, model: Any) -> Tensor:
        """Mean over the text after the pictures: of a padded batch, and of a pack without padding."""
        generator = torch.Generator().manual_seed(0)
        texts = [torch.randint(1, self.image, (length,), generator=generator) for length in self.documents()]
        if not isinstance(model, EEMLLM):
            length = self.visual + max(map(len, texts))
            ids, labels = torch.zeros(len(texts), length, dtype=torch.long), torch.full((len(texts), length), -100)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(texts):
                whole = torch.cat([text[:PREFIX], torch.full((self.visual,), self.image), text[PREFIX:]])
                ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
                labels[row, PREFIX + self.visual + 1 : len(whole)] = text[PREFIX + 1 :]
            given = (x.to(self.args.device) for x in (ids, mask, labels))
            found: Tensor = model(
                **dict(zip(("input_ids", "attention_mask", "labels"), given, strict=True)), pixel_values=self.pixels
            ).loss
            return found
        layout = SequenceLayout.of(
            [[Run(False, PREFIX), Run(True, self.visual), Run(False, len(t) - PREFIX)] for t in texts]
        )
        ids = torch.zeros(layout.num_tokens, dtype=torch.long).index_copy(0, layout.text_index, torch.cat(texts))
        starts = torch.tensor([0, *map(len, texts)]).cumsum(0).tolist()
        rows = torch.cat([torch.arange(s + PREFIX, s + len(t) - 1) for s, t in zip(starts, texts, strict=False)])
        targets = torch.cat(texts)[rows + 1]
        batch = PackedBatch(ids, rows, targets, self.pixels, layout, ["bench"] * len(texts)).to(self.args.device)
        return model.packed_loss(batch) / len(rows)

    def training(self, model: Any) -> float:
        model.train().requires_grad_(True)
        try:
            return self.timed(lambda: self.loss(model).backward())
        finally:
            model.zero_grad(set_to_none=True)
            model.eval()

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds until it has been done, also on the device."""
        wait = torch.cuda.synchronize if self.args.device.type == "cuda" else lambda: None
        wait()
        begin = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - begin

    def compare(self) -> dict[str, float]:
        """Largest relative differences between `llava` and transformers; what is timed must be the same computation."""
        bound = 1e-3 if self.args.dtype == torch.float32 else 5e-2
        theirs, ours = (self.logits(self.model(name))[0, -1, : self.image].float() for name in (BASE, "llava"))
        with torch.no_grad():
            losses = [self.loss(self.model(name)).item() for name in (BASE, "llava")]
        found = {
            "logits": ((ours - theirs).abs().max() / theirs.abs().max()).item(),
            "loss": abs(losses[1] - losses[0]) / losses[0],
        }
        if not max(found.values()) <= bound:
            raise UserError(
                f"llava is not transformers' LLaVA here: {found}, at most {bound} expected; nothing was timed. Please report it with the output of doctor --json"
            )
        return found


class Clock:
    """A streamer of `generate`: when the prompt and each new token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        value.tolist()  # it is there
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class _made_in:
    """Modules are made in the type and place where they stay: 7B in float32 on the host would take minutes."""

    def __init__(self, args: Setting) -> None:
        self.device, self.dtype = args.device, args.dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        self.place = torch.device(self.device)
        self.place.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.place.__exit__(*error)
        torch.set_default_dtype(self.before)


# --- measuring
def measure(pair: Pair, args: Setting, deadline: float) -> list[Result]:
    """Every system, in turns. The first round warms up and counts only where time is up after it."""
    rows: dict[tuple[str, str], Result] = {}
    with progress(f"V = {pair.visual:,}", (args.rounds + 1) * len(args.measures) * len(args.systems)) as advance:
        for number in range(args.rounds + 1):
            for what in args.measures:
                for system in args.systems:
                    row = rows.setdefault(
                        (what, system), {"measure": what, "system": system, "visual": pair.visual, "seconds": []}
                    )
                    advance(1)
                    if "failed" not in row:
                        _turn(pair, row, warm=number > 0)
            if time.perf_counter() > deadline:
                break
    return list(rows.values())


def _turn(pair: Pair, row: Result, warm: bool) -> None:
    """One measurement of one system. What was measured before warm is forgotten by the next."""
    cuda = pair.args.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = getattr(pair, row["measure"])(pair.model(row["system"]))
    except (torch.OutOfMemoryError, ImportError) as error:
        row["failed"] = str(error).splitlines()[0] if isinstance(error, ImportError) else "out of memory"
        gc.collect()
        return
    row["seconds"] = [*(row["seconds"] if row.get("warm") else []), seconds]
    row["warm"] = warm
    if cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30


def bench(args: Setting, out: Path, command: str | None = None) -> None:
    """Measure, print a table, and write result.json, report.md and report.png, anew after every size.

    Raises:
        UserError: `llava` does not compute here what transformers does.
    """
    quiet_libraries()
    out.mkdir(parents=True, exist_ok=True)
    known = {key: value for key, value in asdict(args).items() if key not in ("device", "dtype", "systems", "measures")}
    result: Result = {
        **known, "layers": args.layers or SHAPES[args.shape]["num_hidden_layers"], "dtype": str(args.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "provenance": provenance(command), "differences": {}, "rows": [],
    }  # fmt: skip
    begin, sizes = time.perf_counter(), sorted(args.visual)
    for number, visual in enumerate(sizes, 1):
        pair = Pair(args, visual)
        found = pair.compare()
        result["differences"] = {key: max(value, result["differences"].get(key, 0)) for key, value in found.items()}
        share = sum(map(math.sqrt, sizes[:number])) / sum(map(math.sqrt, sizes))
        result["rows"] += measure(pair, args, begin + 60 * args.minutes * share)
        del pair
        gc.collect()
        write_atomically(out / "result.json", json.dumps(result, indent=1) + "\n")  # kept if it is interrupted
        write_atomically(out / "report.md", report(result))
        if any(row["seconds"] for row in result["rows"]):
            write_atomically(out / "report.png", draw(result))
    console.print(largest(result))
    console.print(f"{time.perf_counter() - begin:.0f} s; table and picture: {out / 'report.md'}, {out / 'report.png'}")
