"""Calibration of layers: its numbers against a plain computation, planted layers, samples, and the verb as a user calls it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from transformers import LlamaConfig

from lit_eemllm import cli
from lit_eemllm.config import load_config
from lit_eemllm.cost.formulas import prefill_flops
from lit_eemllm.errors import ConfigError, SampleError, UserError
from lit_eemllm.evaluation import calibrate
from lit_eemllm.evaluation.calibrate import bench, layers, measure
from lit_eemllm.mechanisms import PRESETS, Aligner, Mechanism, build_mechanism

DENSE = Mechanism(dense_layers="all")
PACKS = [[[3, 0, 4], [2, 0, 1, 0, 3], [0, 2]], [[1, 0, 0, 6]]]
TARGETS = ("ee_mllm_f", "shortv", "vica")


def on(model, packs):
    """A bench; FLOPs are those of 9 text and 16 visual tokens."""
    return bench.Bench(model, packs, 9, 16)


def plain(model, batch, kinds, blind=(), window=0):
    """A document at a time under explicit masks: log-probabilities of the supervised positions, and every layer's cosines.

    Args:
        kinds: per layer what visual tokens do: "dense", "local" (see themselves and a window) or "frozen".
        blind: layers in which text does not see the images.
    """
    decoder, layout = model.language_model.model, batch.layout
    E_Vh = model.projector(model.image_features(batch.pixel_values))
    states, cosines, row, used = [], [[] for _ in kinds], 0, 0
    for document in layout.documents:
        visual = torch.tensor([run.visual for run in document for _ in range(run.length)])
        image = torch.tensor([i for i, run in enumerate(document) for _ in range(run.length)])
        L, V = len(visual), int(visual.sum())
        x = decoder.embed_tokens(batch.input_ids[row : row + L]).masked_scatter(visual[:, None], E_Vh[used : used + V])
        row, used = row + L, used + V
        i, j = torch.arange(L)[:, None], torch.arange(L)[None]
        for number, (layer, kind) in enumerate(zip(decoder.layers, kinds, strict=True)):
            attn = layer.self_attn
            norm1, post1, norm2, post2 = tiny.norms(layer)
            u = norm1(x)
            _, _, q, k, v = tiny.projections(layer, u, *tiny.angles(decoder, torch.arange(L), number))
            sees = (i >= j) & tiny.near(decoder, torch.arange(L), number)
            if number in blind:
                sees = sees & ~(visual[None] & ~visual[:, None])
            if kind != "dense":
                near = (i >= j) & (i - j <= window) & (image[:, None] == image[None])
                sees = torch.where(visual[:, None], near, sees)
            weights = torch.softmax((q @ k.mT * attn.scaling).masked_fill(~sees, -torch.inf), -1)
            out = attn.o_proj((weights @ v).transpose(0, 1).flatten(1))
            H = x + post1(out)
            part = (weights[:, :, visual] @ v[:, visual]).transpose(0, 1).flatten(1) @ attn.o_proj.weight.T
            if not isinstance(post1, torch.nn.Identity):  # RMSNorm: a factor of its own, the same for all that is added
                part = part * (post1(out) / out)
            behind = ~visual & (visual.cumsum(0) > 0)
            a, b = x[behind], (x + part)[behind]
            cosines[number].append((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)))
            new = H + post2(tiny.feed_forward(layer)(norm2(H)))
            x = torch.where(visual[:, None], x, new) if kind == "frozen" else new
        states.append(x[~visual])
    logits = model.language_model.lm_head(decoder.norm(torch.cat(states)))[batch.target_rows]
    return logits.double().log_softmax(-1), [torch.cat(parts) for parts in cosines]


def divergence(model, packs, kinds, blind=(), window=0):
    """KL and agreement from the dense model, written out."""
    rows = []
    for pack in packs:
        p, _ = plain(model, pack, ["dense"] * len(kinds))
        q, _ = plain(model, pack, kinds, blind, window)
        rows += [((a.exp() * (a - b)).sum().item(), a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True)]
    return {"kl": sum(kl for kl, _ in rows) / len(rows), "same_top": sum(bool(s) for _, s in rows) / len(rows)}


def one(target, layer, depth):
    """The plain description of one changed layer."""
    if target == "vica":
        return ["dense"] * depth, {layer}
    kinds = ["dense"] * depth
    kinds[layer] = "frozen" if target == "shortv" else "local"
    return kinds, ()


def close(found, true):
    return found["kl"] == pytest.approx(true["kl"], rel=1e-4, abs=1e-9) and found["same_top"] == true["same_top"]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("decoder", ["llama-gqa", "qwen3", "biased", "olmo2", "smollm3", "gemma3_text", "llama4_text"])
@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_numbers_equal_a_plain_computation(target, decoder, backend, monkeypatch):
    biased = LlamaConfig(**{**tiny.COMMON, "attention_bias": True}, num_attention_heads=4, num_key_value_heads=2)
    monkeypatch.setitem(tiny.DECODERS, "biased", biased)
    model, packs = tiny.model(decoder, DENSE), [tiny.pack(pack, seed) for seed, pack in enumerate(PACKS)]
    model.set_attention(backend)
    logits, steps = model.packed_logits(packs[0]), []
    rows = layers.one_by_one(on(model, packs), target, steps.append)
    for row in rows:
        assert close(row, divergence(model, packs, *one(target, row["layer"], 3)))
    moved = [row["kl"] for row in rows] if target == "vica" else [row["kl"] for row in rows[:-1]]
    assert min(moved) > 1e-3 and (target == "vica" or rows[-1]["kl"] == 0)  # the last one passes no visual states on
    if target == "vica":
        parts = zip(*(plain(model, pack, ["dense"] * 3)[1] for pack in packs), strict=True)
        true = [torch.cat(pair).mean().item() for pair in parts]
        assert [row["cosine"] for row in rows] == pytest.approx(true, abs=1e-5) and max(true) < 0.999
    else:
        assert all("cosine" not in row for row in rows)

    ranking = [1, 2, 0]
    for row in layers.together(on(model, packs), target, ranking, steps.append):
        chosen = set(ranking[: row["layers"]])
        kinds = [{"shortv": "frozen", "ee_mllm_f": "local"}[target] if n in chosen else "dense" for n in range(3)] if (
            target != "vica"
        ) else ["frozen"] * 3  # fmt: skip
        blind = set(range(3)) - chosen if target == "vica" else ()
        assert close(row, divergence(model, packs, kinds, blind))
        expected = prefill_flops(layers.converted(DENSE, target, chosen, 3), model.config.text_config, 9, 16)
        assert row["flops"] == expected
    assert len(steps) == 2 * (2 * 3 + 1)  # what the progress bar counts
    assert model.mechanism == DENSE and model.config.mechanism == DENSE.to_dict()
    assert model.packed_logits(packs[0]).equal(logits)


@torch.no_grad()
def test_ee_mllm_f_takes_the_aligner_and_the_window_of_the_configuration():
    """With value and output off it is V-Skip; ShortV has an aligner of its own: none."""
    model, packs = tiny.model("llama-gqa", replace(DENSE, visual_window=3)), [tiny.pack(PACKS[0])]
    kinds, _ = one("ee_mllm_f", 1, 3)
    row = layers.one_by_one(on(model, packs), "ee_mllm_f", lambda _: None)[1]
    assert close(row, divergence(model, packs, kinds, window=3))
    assert not close(row, divergence(model, packs, kinds))
    skip = Aligner(value=False, output=False)
    made = layers.converted(replace(DENSE, aligner=skip), "ee_mllm_f", [2], 3)
    assert made == Mechanism(dense_layers=(0, 1), aligner=skip)
    assert layers.converted(DENSE, "shortv", [0, 1, 2], 3) == replace(PRESETS["shortv"], dense_layers="none")
    assert layers.converted(DENSE, "vica", [0, 2], 3) == replace(PRESETS["vica"], cross_layers=(0, 2))


def test_a_failure_leaves_the_model_as_it_was():
    model = tiny.model("llama-gqa", DENSE)
    for target in TARGETS:
        with pytest.raises(ZeroDivisionError), on(model, []).under(layers.changed(DENSE, target, 0, 3)):
            raise ZeroDivisionError
    assert model.mechanism == DENSE
    assert not any(layer._forward_hooks for layer in model.language_model.model.layers)


@pytest.mark.parametrize("planted", [0, 1, 2])
@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_a_planted_layer_is_found(target, planted, monkeypatch):
    """Attention and feed-forward write nothing but in one layer, and in the last, which reads what came of it."""
    config = LlamaConfig(**{**tiny.COMMON, "num_hidden_layers": 4}, num_attention_heads=4, num_key_value_heads=2)
    monkeypatch.setitem(tiny.DECODERS, "deep", config)
    model, packs = tiny.model("deep", DENSE), [tiny.pack(PACKS[0])]
    writes = {planted} if target == "vica" else {planted, 3}
    for layer in model.language_model.model.layers:
        if layer.index not in writes:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    rows = layers.one_by_one(on(model, packs), target, lambda _: None)
    assert [row["layer"] for row in rows if row["kl"] > 1e-12] == [planted]
    ranking = layers.ranked(rows, target, "kl")
    assert sorted(ranking) == [0, 1, 2, 3]
    assert ranking[0 if target == "vica" else -1] == planted
    if target == "vica":
        assert [row["layer"] for row in rows if row["cosine"] < 1 - 1e-12] == [planted]
        assert layers.ranked(rows, target, "cosine")[0] == planted


def test_ranking_by_hand():
    rows = [
        {"layer": n, "kl": kl, "cosine": c} for n, (kl, c) in enumerate([(0.2, 0.9), (0, 0.2), (0.1, 0.95), (0, 1)])
    ]
    assert layers.ranked(rows, "shortv", "kl") == [3, 1, 2, 0]  # equal ones: the later first
    assert layers.ranked(rows, "vica", "kl") == [0, 2, 1, 3]
    assert layers.ranked(rows, "vica", "cosine") == [1, 0, 2, 3]


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    found = measure.Divergence()
    found.update(p.log(), q.log() + 3)  # logits know no scale
    found.update(q.log().repeat(300, 1), q.log().repeat(300, 1))
    kl = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(0.5 / 0.75).log()
    assert found.row() == {"kl": pytest.approx(kl.item() / 602, rel=1e-6), "same_top": 601 / 602}


def test_how_many_layers():
    defaults = [layers.how_many(target, 32, None) for target in TARGETS]
    assert defaults == [16, 19, 8]  # what the presets have
    assert layers.how_many("vica", 40, None) == 10 and layers.how_many("vica", 2, None) == 1
    assert layers.how_many("shortv", 32, 0.5) == 16 and layers.how_many("shortv", 32, 3.0) == 3
    assert layers.how_many("shortv", 32, 0.01) == layers.how_many("shortv", 32, 1.0) == 1
    for wrong in (0, 33, -1, 1.5, math.nan):
        with pytest.raises(UserError, match=f"--layers {wrong:g}: expected 1 to 32, .*, or a share of them below 1"):
            layers.how_many("shortv", 32, wrong)


def test_a_target_of_ones_own_is_found_by_its_layers(monkeypatch):
    monkeypatch.setitem(PRESETS, "mine", Mechanism(dense_layers=tuple(range(8)), aligner=Aligner(False, False, True)))
    assert not layers.kept("mine") and layers.kept("vica") and layers.how_many("mine", 8, None) == 6
    made = layers.converted(replace(DENSE, aligner=Aligner(True, True, False)), "mine", [2], 3)
    assert made == Mechanism(dense_layers=(0, 1), aligner=Aligner(False, False, False))
    for other in ("llava", "operator_skipping", "nonsense"):  # the second has a plan of its own
        with pytest.raises(UserError, match=f"--target {other}: .*ee_mllm_f, shortv, vica, mine, or --import"):
            layers.kept(other)


def test_the_base_must_be_dense():
    by_rows = Mechanism(rows=(("0-", (("attend", "causal"),)),))
    for fits in (
        DENSE,
        Mechanism(dense_layers=(0, 1)),
        replace(DENSE, visual_positions="shared"),
        by_rows,
        PRESETS["bidirectional"],
    ):
        bench.refuse_base(fits, 3)
    for base, text in (
        (PRESETS["ee_mllm"], r"layers \[0, 1\] of 3 are not dense"),
        (Mechanism(dense_layers=(0, 2)), r"layers \[1\] of 3 are not dense"),
        (replace(DENSE, rows=(("1", (("update", "value output"),)),)), r"layers \[1\] of 3 are not dense"),
        (replace(DENSE, rows=(("2", (("seen", "every 2"),)),)), "in layer 2 text sees every 2 of an image"),
        (Mechanism(dense_layers=(0, 1), cross_layers=(0, 1)), "in layer 2 text sees none of an image"),
        (PRESETS["flamingo"], r"layers \[0, 1\] of 3"),
        (PRESETS["visual_experts"], "other rows of visual_experts need other modules"),
    ):
        with pytest.raises(ConfigError, match=text):
            bench.refuse_base(base, 3)


@pytest.mark.parametrize("target", TARGETS)
def test_a_base_that_is_dense_by_its_rows_is_converted_like_any(target):
    by_rows = Mechanism(rows=(("0-", (("attend", "causal"),)),))
    for chosen in ([], [1], [0, 2], [0, 1, 2]):
        assert layers.converted(by_rows, target, chosen, 3) == layers.converted(DENSE, target, chosen, 3)
    assert layers.changed(by_rows, "vica", 1, 3).table(3) == layers.changed(DENSE, "vica", 1, 3).table(3)


def test_samples_are_drawn_evenly_from_those_with_images(monkeypatch):
    members = {f"{i}": {"json": b"", "jpg": b""} for i in range(10)} | {"text": {"json": b""}}

    def tokenize(key, members):
        if key == "3":
            raise SampleError("bad_json", "broken")
        return SimpleNamespace(key=key, length=10)

    def load_pixels(tokens):
        return SimpleNamespace(tokens=tokens, pixels=[] if tokens.key == "4" else [0])

    def draw(samples, seed):
        drawn, skipped = bench.draw_samples(recipe, encoder, samples, seed)
        return [sample.tokens.key for sample in drawn], skipped

    encoder = SimpleNamespace(tokenize=tokenize, load_pixels=load_pixels)
    source = SimpleNamespace(folder=Path(), shards=[("a", 11)])
    recipe = SimpleNamespace(sources=[source], num_samples=11, path="val.yaml")
    monkeypatch.setattr(bench, "read_shard", lambda path: iter(members.items()))
    assert draw(99, 0) == (["0", "1", "2", "5", "6", "7", "8", "9"], {"bad_json": 1})
    assert draw(3, 5) == draw(3, 5)
    times = Counter(key for seed in range(1000) for key in draw(3, seed)[0])
    assert set(times) == set("01256789") and all(250 < n < 350 for n in times.values())
    members = {"text": {"json": b""}, "3": {"json": b"", "jpg": b""}}
    with pytest.raises(UserError, match=r"val\.yaml: nothing to calibrate with: bad_json 1"):
        draw(3, 0)
    del members["3"]
    with pytest.raises(UserError, match="no conversation with an image"):
        draw(3, 0)


def test_command_line_journey(dense_run, tmp_path, capsys):
    """calibrate as a user calls it, and what it writes put to use as its header says."""
    run, folder = Path(dense_run.out), Path(dense_run.out) / "calibrate-vica"
    assert cli.main(["calibrate", str(run), "--target", "vica", "--samples", "12", "--layers", "2"]) == 0
    said = capsys.readouterr().out
    assert "12 conversations with images" in said and "layers for vica" in said and "2 of 3" in said
    results = json.loads((folder / "layers.json").read_text())
    assert results["samples"] == 12 and [row["layer"] for row in results["layers"]] == [0, 1, 2]
    assert results["ranking"] == sorted(range(3), key=lambda n: -results["layers"][n]["kl"])
    assert results["chosen"] == sorted(results["ranking"][:2])
    assert f"KL {results['together'][2]['kl']:.3g} a token" in said and results["together"][2]["layers"] == 2
    assert Image.open(folder / "layers.png").width > 800

    again = tmp_path / "again"
    line = ["calibrate", str(run), "--target", "vica", "--samples", "12", "--layers", "0.7", "--out", str(again)]
    assert cli.main(line) == 0
    assert json.loads((again / "layers.json").read_text()) == results

    text = (folder / "mechanism.yaml").read_text()
    lines = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    for part in (results["checkpoint"], "12 conversations", "seed 0", "Greedy by the KL", "--checkpoint"):
        assert part in lines
    checkpoint = results["checkpoint"]
    line = ["validate", str(run / "config.yaml"), str(folder / "mechanism.yaml"), "--checkpoint", checkpoint]
    assert cli.main([*line, f"out={tmp_path / 'vica'}", "eval.samples=3"]) == 0
    validated = json.loads((tmp_path / "vica" / "eval" / "results.json").read_text())
    assert validated["mechanism"] == results["mechanism"]
    assert Mechanism.from_dict(validated["mechanism"]) == replace(
        PRESETS["vica"], cross_layers=tuple(results["chosen"])
    )


@pytest.mark.parametrize("target", TARGETS)
def test_the_mechanism_file_goes_after_any_configuration(dense_run, target, tmp_path):
    assert cli.main(["calibrate", dense_run.out, "--target", target, "--samples", "4", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "layers.json").read_text())
    expected = Mechanism.from_dict(results["mechanism"])
    (tmp_path / "before.yaml").write_text(
        "model: {mechanism: {preset: vica, dense_layers: [0], cross_layers: [1], aligner: {ffn: false}, visual_window: 3, "
        "freeze_prefix: true, visual_positions: shared, visual_drop: [[1, 0.5]], rows: [{layers: 0, seen: none}]}}"
    )
    for before in ([], [tmp_path / "before.yaml"]):
        config = load_config([Path(dense_run.out) / "config.yaml", *before, tmp_path / "mechanism.yaml"])
        overrides = asdict(config.model.mechanism)
        assert overrides.pop("preset") == target
        assert build_mechanism(target, 3, overrides) == expected
    sets = {"vica": expected.cross_layers}.get(target, expected.dense_layers)
    kept = results["chosen"] if target == "vica" else [n for n in range(3) if n not in results["chosen"]]
    assert list(sets) == kept


def test_what_cannot_be_done_is_said(dense_run, capsys, monkeypatch):
    for options, text in (
        (["model.mechanism.preset=ee_mllm"], "layers [0, 1] of 3 are not dense"),
        (["--layers", "4"], "--layers 4: expected 1 to 3"),
        (["--layers", "1.5"], "--layers 1.5: expected 1 to 3"),
        (
            ["--budget", "0.5"],
            "--budget 0.5 is a share of FLOPs, for single operators, and --target shortv ranks whole layers",
        ),
        (["--operators", "ffn"], "--operators goes with --budget"),
        (["--samples", "0"], "--samples 0: expected 1 or more"),
        (["--by", "cosine"], "--by cosine is ViCA's criterion"),
        (["data.val=null"], "data.val is not set"),
        (["model.mechanism.visual_window=2"], "visual_window"),
    ):
        assert cli.main(["calibrate", dense_run.out, "--target", "shortv", *options]) == 2
        assert text in capsys.readouterr().err
    calls = []
    monkeypatch.setattr(calibrate, "calibrate_layers", lambda config, *rest: calls.append(rest))
    assert cli.main(["calibrate", dense_run.out, "--target", "vica", "--by", "cosine", "--out", "o"]) == 0
    assert calls == [(None, "vica", None, "cosine", 40, Path("o"))]
