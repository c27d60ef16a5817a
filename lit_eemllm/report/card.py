"""The model card of a folder, README.md: how to use the model, what each layer does with visual tokens, its data, scores and costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import strict_yaml
from ..cost.explain import COLUMNS, cells, ranges
from ..doctor import provenance
from ..errors import UserError
from ..mechanisms.connectors import DEFAULT
from ..model import EEMLLM
from . import markdown_table, plain
from .runs import Comparison, Row, read_run
from .tables import Lines, tables
from .words import caption, incomplete, machines

CARD = "README.md"
LICENCE = "What the licences of its decoder, its vision encoder and its data allow; they are not known here. Write yours above, as `license: ...`, before you publish it."


def write_card(
    folder: Path,
    name: str,
    model: EEMLLM,
    values: Mapping[str, Any],
    scored: tuple[Path, str] | None,
    foreign: bool = False,
) -> None:
    """Write it into a folder.

    Args:
        name: of the model, as it will be called.
        values: configuration of the run that trained it, as its config.yaml has it; perhaps a part of one, or nothing.
        scored: the run that the weights are of, and the checkpoint; None where they are of no run as they are.
        foreign: the folder holds one of transformers' own models.
    """
    table = model.mechanism.table(len(model.language_model.model.layers))
    told = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    parts = [
        f"---\n{strict_yaml.dump({**told, 'tags': ['lit_eemllm', *([] if foreign else ['eemllm'])]})}---",
        f"# {plain(name)}",
        _made_of(model),
        _use(plain(name), foreign),
        f"## What each layer does with visual tokens\n\n{markdown_table(_layers(table))}",
    ]
    if model.connector != DEFAULT:
        parts.append(plain(f"Connector: {model.connector}."))
    if made := _training(values):
        parts.append("## Training\n\n" + "\n".join(f"- {key}: `{plain(text)}`" for key, text in made.items()))
    if scored is not None:
        parts.append("## Scores and costs\n\n" + _scores(*scored))
    parts.append(f"## Licence\n\n{LICENCE}")
    parts.append(f"## Where it comes from\n\nThis card: {plain(provenance())}")
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _made_of(model: EEMLLM) -> str:
    """Decoder and encoder by their families, and how large it is."""
    decoder, encoder = model.language_model, getattr(model.vision, "model", model.vision)
    family, size = type(decoder).__name__.removesuffix("ForCausalLM"), sum(one.numel() for one in model.parameters())
    shape = f"{len(decoder.model.layers)} layers, {decoder.config.hidden_size:,} wide"
    return f"A {family} decoder ({shape}) that sees through a {type(encoder).__name__}; {size:,} parameters."


def _use(name: str, foreign: bool) -> str:
    lines = ["import lit_eemllm"] * (not foreign)
    return "\n".join(
        [
            *["It needs the package lit_eemllm beside transformers.", ""] * (not foreign),
            "```python",
            *lines,
            "from transformers import pipeline",
            "",
            f"ask = pipeline('image-text-to-text', model={name!r})",
            "content = [{'type': 'image', 'image': 'cat.jpg'}, {'type': 'text', 'text': 'What is it?'}]",
            "print(ask(text=[{'role': 'user', 'content': content}], max_new_tokens=64, return_full_text=False)[0]['generated_text'])",
            "```",
        ]
    )


def _layers(table: Any) -> Lines:
    lines = [["layers", *COLUMNS.values()]]
    for first, last, row in ranges(table):
        told = cells(row)
        lines.append([str(first) if first == last else f"{first}–{last}", *(told[column] for column in COLUMNS)])
    return lines


def _training(values: Mapping[str, Any]) -> dict[str, str]:
    """What of a configuration says how a model was made."""
    found: dict[str, str] = {}
    for section, keys in (
        ("model", ("decoder", "vision", "mechanism", "template")),
        ("data", ("train", "val", "max_length", "pack_tokens")),
        ("optim", ("lr", "max_steps", "epochs", "tuning")),
    ):
        inside = values.get(section) or {}
        found |= {f"{section}.{key}": _told(inside[key]) for key in keys if inside.get(key) is not None}
    return found | {key: str(values[key]) for key in ("init_from", "seed") if values.get(key) is not None and found}


def _told(value: Any) -> str:
    """On one line, without what is not set."""
    if not isinstance(value, Mapping):
        return str(value)
    told = {key: _told(item) for key, item in value.items() if item not in (None, [])}
    return ", ".join(f"{key} {text}" for key, text in told.items() if text)


def _scores(run: Path, checkpoint: str) -> str:
    """The report's table of the run, if it was evaluated with these weights."""
    if not (run / "eval" / "results.json").is_file():
        return f"Not evaluated yet (`lit-eemllm validate {plain(str(run))}`)."
    try:
        found = read_run(run)
    except UserError as error:  # a model is written all the same
        return f"The run's results cannot be read: {plain(str(error))}"
    if Path(str(found.results.get("checkpoint"))).name != Path(checkpoint).name:
        return "The run's results are of another checkpoint."
    compared = Comparison([Row([found], found.label)])
    lines = [markdown_table(one) for one in tables(compared)]
    told = [" ".join(caption(compared)), incomplete(compared.rows), *machines(compared.rows)]
    return "\n\n".join([*lines, *map(plain, filter(None, told))])
