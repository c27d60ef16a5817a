"""Attention to visual tokens against explicit weights, and runs side by side as a user compares them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from lib.equations import DEEP, DROPPING, MECHANISMS, plain
from PIL import Image

from lit_eemllm import cli
from lit_eemllm.evaluation.calibrate.attention import attention_to_images
from lit_eemllm.evaluation.calibrate.bench import Bench
from lit_eemllm.evaluation.calibrate.beside import label

PACKS = [[[3, 0, 4], [2, 0, 1, 0, 3], [0, 2]], [[1, 0, 0, 6]]]
CASES = [
    *(("llama-gqa", name, 3, "reference") for name in MECHANISMS),
    *(("llama-gqa", name, DEEP, "reference") for name in DROPPING),
    *(("llama-gqa", name, 3, "sdpa") for name in ("llava", "ee_mllm", "vica", "unrotated", "dense, text sees every third")),
    *((family, name, 3, "reference") for family in ("qwen3", "gemma3_text", "mistral-window", "llama4_text") for name in ("llava", "ee_mllm")),
]  # fmt: skip


def weights_of(model, packs):
    """For each layer, the shares of visual keys in the rows of all packs, [N, rows]: of targets, and of text after an image."""
    found = {}
    for pack in packs:
        shares, behind = {}, []

        def watch(number, is_visual, weights_NLL, shares=shares, behind=behind):
            shares.setdefault(number, []).append(weights_NLL[:, ~is_visual][:, :, is_visual].sum(-1))
            behind += (is_visual.cumsum(0) > 0)[~is_visual].tolist() if not number else []

        plain(model, pack, watch=watch)
        for number, parts in shares.items():
            share_NT = torch.cat(parts, 1)
            for name, rows in (("answers", pack.target_rows), ("text", torch.tensor(behind))):
                found.setdefault((number, name), []).append(share_NT[:, rows])
    return {key: torch.cat(parts, 1).double() for key, parts in found.items()}


@pytest.mark.parametrize(("decoder", "name", "layers", "backend"), CASES)
@torch.no_grad()
def test_attention_equals_the_weights_of_an_explicit_softmax(decoder, name, layers, backend):
    mechanism = (DROPPING if layers == DEEP else MECHANISMS)[name]
    model = tiny.model(decoder, mechanism, layers=None if isinstance(mechanism, str) else layers)
    packs, steps = [tiny.pack(pack, seed) for seed, pack in enumerate(PACKS)], []
    model.set_attention(backend)
    logits = model.packed_logits(packs[0])
    rows, true = attention_to_images(Bench(model, packs, 9, 16), steps.append), weights_of(model, packs)
    assert [row["layer"] for row in rows] == list(range(len(model.language_model.model.layers))) and steps == [1, 1]
    for row in rows:
        for kind in ("answers", "text"):
            weights_NR = true[row["layer"], kind]
            assert row["heads"][kind] == pytest.approx(weights_NR.mean(1).tolist(), abs=1e-5)
            assert row[kind] == pytest.approx(weights_NR.mean().item(), abs=1e-5)
        blind = model.table[row["layer"]].blind
        assert (row["text"] == 0) if blind else 0.01 < row["text"] < 1
    assert model.backend.name == backend and model.packed_logits(packs[0]).equal(logits)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.language_model.model.layers)


def test_command_line_journey(dense_run, trained, tmp_path, capsys):
    """A run of llava beside one of ee_mllm, on conversations of the first one's data."""
    line = [
        "calibrate",
        dense_run.out,
        "--samples",
        "6",
        "--out",
        str(tmp_path),
        "--beside",
        trained.out,
        "data.max_length=400",
    ]
    assert cli.main(line) == 0
    said = " ".join(capsys.readouterr().out.split())
    llava, ee_mllm = json.loads((tmp_path / "beside.json").read_text())["runs"]
    assert (llava["run"], llava["preset"]) == (dense_run.out, "llava")
    assert (ee_mllm["run"], ee_mllm["preset"]) == (trained.out, "ee_mllm")
    for run in (llava, ee_mllm):
        assert run["data"] == dense_run.data.val and run["samples"] == 6 and run["seed"] == dense_run.seed
        assert Path(run["checkpoint"]).parents[1] == Path(run["run"])
        assert [(row["layer"], row["operator"]) for row in run["alone"]] == [
            *((n, name) for n in range(2) for name in ("attention", "ffn", "seen")), (2, "seen")
        ]  # fmt: skip
        assert [row["layer"] for row in run["attention"]] == [0, 1, 2]
        assert min(row["text"] for row in run["attention"]) > 0.005
        for row in run["alone"]:
            assert f"{row['kl']:.3g}" in said
    assert llava["alone"] != ee_mllm["alone"] and llava["attention"] != ee_mllm["attention"]
    assert Image.open(tmp_path / "beside.png").width > 1000

    capsys.readouterr()
    assert cli.main([*line[:6], "--beside", line[-1]]) == 0  # the run alone, which says the same
    assert json.loads((tmp_path / "beside.json").read_text())["runs"] == [llava]


def test_a_run_whose_layers_have_nothing_to_skip_still_has_its_attention(dense_run, tmp_path):
    line = ["calibrate", dense_run.out, "--checkpoint", "none", "--samples", "4", "--out", str(tmp_path)]
    assert cli.main([*line, "model.mechanism.preset=saisa", "--beside"]) == 0
    (run,) = json.loads((tmp_path / "beside.json").read_text())["runs"]
    assert run["alone"] == [] and label(run) == f"saisa: {dense_run.out}"
    assert min(row["answers"] for row in run["attention"]) > 0.005
    assert Image.open(tmp_path / "beside.png").width > 1000
