"""`explain`: the table, its FLOPs and masks, in words and as a picture."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from PIL import Image

from lit_eemllm import cli
from lit_eemllm.core.select import ALL, NOTHING, Every
from lit_eemllm.core.table import LayerPlan
from lit_eemllm.cost.explain import cells, mask, notes
from lit_eemllm.cost.formulas import layer_flops, prefill_flops
from lit_eemllm.mechanisms import PRESETS, build_mechanism

DENSE = LayerPlan(attend="causal")


def art(row: LayerPlan) -> list[str]:
    return ["".join(".xo-"[int(value)] for value in line) for line in mask(row)]


def test_masks_by_hand():
    """Of t t V V V V V t t t: x a look, o itself by the aligner, - not there."""
    text = ["x.........", "xx........"]
    dense = [f"{'x' * (i + 1)}{'.' * (9 - i)}" for i in range(10)]
    assert art(DENSE) == dense
    composite = [f"{'.' * i}o{'.' * (9 - i)}" for i in range(2, 7)]
    sees_all = ["xxxxxxxx..", "xxxxxxxxx.", "xxxxxxxxxx"]
    assert art(LayerPlan()) == [*text, *composite, *sees_all]
    assert art(LayerPlan(update=frozenset())) == [*text, *["." * 10] * 5, *sees_all]
    assert art(LayerPlan(attend=1)) == [
        *text, "..x.......", "..xx......", "...xx.....", "....xx....", ".....xx...", *sees_all
    ]  # fmt: skip
    blind = ["xx.....x..", "xx.....xx.", "xx.....xxx"]
    assert art(replace(DENSE, seen=NOTHING)) == [*text, *dense[2:7], *blind]
    half = ["xxx.x.xx..", "xxx.x.xxx.", "xxx.x.xxxx"]
    assert art(LayerPlan(seen=Every(2))) == [*text, *composite, *half]
    assert art(replace(DENSE, tokens=Every(2), seen=Every(2))) == [
        *text, "xxx.......", "...-......", "xxx.x.....", ".....-....", "xxx.x.x...", *half
    ]  # fmt: skip
    gone = [f"{'.' * i}-{'.' * (9 - i)}" for i in range(2, 7)]
    assert art(LayerPlan(tokens=NOTHING, seen=NOTHING)) == [*text, *gone, *blind]


def test_words_of_a_row():
    assert cells(LayerPlan(attend=3, seen=Every(2), source="own")) == {
        "tokens": "all", "attend": "3 before", "update": "value output ffn", "seen": "every 2", "source": "a projector"
    }  # fmt: skip
    assert set(cells(LayerPlan(tokens=NOTHING)).values()) == {"none", "–"}
    assert cells(replace(DENSE, seen=ALL))["attend"] == "all before"


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_of_the_layers_are_those_of_the_prompt(preset):
    mechanism, decoder = build_mechanism(preset, 3), tiny.DECODERS["llama-gqa"]
    layers = layer_flops(mechanism, decoder, 9, 16, 24)
    assert len(layers) == 3 and sum(layers) == prefill_flops(mechanism, decoder, 9, 16, vision_width=24)


def test_the_verb_prints_and_draws(tmp_path, monkeypatch, capsys):
    """Layers of equal rows in a line, with what the table does not say, and a picture in which something is drawn."""
    monkeypatch.chdir(tmp_path)
    words = [
        "explain",
        "--shape",
        "vicuna-7b",
        "--text",
        "55",
        "model.mechanism.preset=vica",
        "model.mechanism.freeze_prefix=true",
    ]
    assert cli.main([*words, "--out", "vica.png"]) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    layers = [line[0] for line in lines if line and line[0].replace("–", "").isdigit()]
    assert layers == ["0–1", "2–6", "7–11", "12–13", "14", "15–31"]
    assert "576 visual and 55 text tokens" in said and "Text before the first image takes no attention." in said
    shares = [float(line[-1].rstrip("%")) for line in lines if line and line[0] in layers]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    with Image.open("vica.png") as picture:
        assert picture.width > 900 and len(set(picture.convert("RGB").getdata())) > 10

    assert cli.main(["explain", "--shape", "vicuna-7b", "model.mechanism.rows=[{layers: 8-, seen: every 2}]"]) == 0
    assert "every 2" in capsys.readouterr().out and not list(tmp_path.glob("*.svg"))
    for given, told in (
        (["--visual", "0"], "--visual 0: expected 1 or more"),
        (["--out", "vica.png/x.png"], "vica.png/x.png could not be written"),
        (["model.mechanism.rows=[{layers: 40, seen: none}]"], "found '40', expected layers from 0 to 31"),
        (["model.mechanism.rows=[{layers: 4, sees: none}]"], "a row has no sees"),
    ):
        assert cli.main(["explain", "--shape", "vicuna-7b", *given]) in (1, 2)
        assert told in capsys.readouterr().err


def test_the_tables_of_a_schedule(capsys):
    schedule = (
        "optim.mechanisms=[{weight: 3, mechanism: {preset: vica}, teacher: {rows: [{layers: 8-, seen: every 2}]}}, {}]"
    )
    assert cli.main(["explain", "--shape", "vicuna-7b", "model.mechanism.preset=llava", schedule]) == 0
    said = capsys.readouterr().out
    own, first, second = said.split("trained by a schedule: ")
    assert first.startswith("{weight: 3, mechanism: {preset: vica}") and second.startswith("{}")
    table, teacher = first.partition("\n")[2].split("and its teacher")
    assert "7–11" in table and "every 2" in teacher and "every 2" not in table
    assert own.count("% of llava's") == 1 and "100.0% of llava's" in own and "100.0% of llava's" in second


def test_a_mechanism_of_ones_own(tmp_path, capsys):
    example = Path(__file__).parents[2] / "docs" / "my_mechanism.py"
    with tiny.forgotten_imports():
        line = ["explain", "--import", str(example), "--shape", "vicuna-7b", "model.mechanism.preset=thinning"]
        assert cli.main([*line, "--out", str(tmp_path / "x.svg")]) == 0
    said = capsys.readouterr().out
    assert "16–23" in said and "FLOPs of modules that it adds are counted" in said and "before it" in said
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")


def test_windows_of_the_decoder_are_told():
    llava, decoder = PRESETS["llava"], tiny.DECODERS["gemma3_text"]
    assert notes(llava, decoder) == " The decoder's window in layers 0, 2: 6 tokens."
    assert notes(llava, tiny.DECODERS["mistral-window"]) == " The decoder's window in layers 0–2: 6 tokens."
    assert notes(llava, tiny.DECODERS["llama4_text"]) == " The decoder's chunk in layers 0, 2: 6 tokens."
    assert notes(llava, tiny.DECODERS["llama"]) == ""
