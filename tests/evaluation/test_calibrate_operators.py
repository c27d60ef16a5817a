"""Calibration of operators: numbers against the plain implementation, the greedy choice, budgets, and the verb as a user calls it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from lib.equations import plain
from lib.mechanisms import check_flops_and_cache
from PIL import Image

from lit_eemllm import cli
from lit_eemllm.config import load_config
from lit_eemllm.core.table import executed
from lit_eemllm.cost.formulas import prefill_flops
from lit_eemllm.errors import ConfigError, UserError
from lit_eemllm.evaluation.calibrate.bench import Bench, mean_prompt, refuse_modules
from lit_eemllm.evaluation.calibrate.measure import compared
from lit_eemllm.evaluation.calibrate.operators import OPERATORS, Choice, Operator, presets
from lit_eemllm.inputs.spans import IMAGE_SLOT
from lit_eemllm.mechanisms import NO_ALIGNER, PRESETS, Aligner, Mechanism, build_mechanism

DENSE = Mechanism(dense_layers="all")
ALIGNED, WINDOW = Mechanism(), Mechanism(visual_window=3)
PACKS = [[[3, 0, 4], [2, 0, 1, 0, 3], [0, 2]], [[1, 0, 0, 6]]]
TEXT, VISUAL = 9, 16
SKIPPED = {
    ("attention",): {"attend": "none", "update": "ffn"},
    ("ffn",): {"update": "value output"},
    ("seen",): {"seen": "none"},
    ("attention", "ffn"): {"attend": "none", "update": "none"},
    ("attention", "seen"): {"attend": "none", "update": "ffn", "seen": "none"},
    ("ffn", "seen"): {"update": "value output", "seen": "none"},
    ("attention", "ffn", "seen"): {"attend": "none", "update": "none", "seen": "none"},
}
"""Columns of a layer without operators, written out."""


def bench_of(decoder="llama-gqa", layers=3, packs=PACKS, mechanism=DENSE):
    model = tiny.model(decoder, mechanism, layers=layers)
    return Bench(model, [tiny.pack(pack, seed) for seed, pack in enumerate(packs)], TEXT, VISUAL)


def by_hand(skipped, base=DENSE):
    """The mechanism without these operators."""
    layers = sorted({layer for layer, _ in skipped})
    names = {layer: tuple(name for name in OPERATORS if (layer, name) in skipped) for layer in layers}
    return replace(base, rows=tuple((str(layer), tuple(SKIPPED[names[layer]].items())) for layer in layers))


def divergence(bench, mechanism):
    """From the model as it is, by the plain implementation."""
    rows = []
    for pack in bench.packs:
        p, q = (
            plain(bench.model, pack)[pack.target_rows].double().log_softmax(-1) for _ in bench_under(bench, mechanism)
        )
        rows += [((a.exp() * (a - b)).sum().item(), bool(a.argmax() == b.argmax())) for a, b in zip(p, q, strict=True)]
    return {"kl": sum(kl for kl, _ in rows) / len(rows), "same_top": sum(same for _, same in rows) / len(rows)}


def bench_under(bench, mechanism):
    """Twice: the model as it is, and under the mechanism."""
    yield
    with bench.under(mechanism):
        yield


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(
    ("decoder", "preset"),
    [
        *((name, "llava") for name in ("llama-gqa", "qwen3", "olmo2", "smollm3", "gemma3_text", "llama4_text")),
        *(("llama-gqa", name) for name in ("bidirectional", "ee_mllm", "ee_mllm with a window")),
        ("olmo2", "ee_mllm"),
    ],
)
@torch.no_grad()
def test_numbers_equal_the_plain_implementation(decoder, preset, backend):
    base = WINDOW if preset == "ee_mllm with a window" else PRESETS[preset]
    bench = bench_of(decoder, mechanism=base)
    bench.model.set_attention(backend)
    logits, steps = bench.model.packed_logits(bench.packs[0]), []
    choice = Choice(bench, OPERATORS, 0)
    offered = choice.computed()
    sets = [{operator} for operator in offered]
    sets += [{(0, "attention"), (0, "ffn"), (1, "seen")}, {(0, "ffn"), (0, "seen"), (1, "attention"), (2, "seen")}]
    rows = compared(bench, [choice.without(skipped) for skipped in sets], steps.append)
    for skipped, row in zip(sets, rows, strict=True):
        true = divergence(bench, by_hand(skipped, base))
        assert row["kl"] == pytest.approx(true["kl"], rel=1e-4, abs=1e-9) and row["kl"] > 1e-3, skipped
        assert row["same_top"] == true["same_top"]
        assert row["flops"] == prefill_flops(by_hand(skipped, base), bench.model.config.text_config, TEXT, VISUAL)
    assert len(steps) == 2 * len(sets)
    assert bench.model.mechanism == base and bench.model.config.mechanism == base.to_dict()
    assert bench.model.packed_logits(bench.packs[0]).equal(logits)


def test_what_is_offered_and_written():
    """Nothing that is not computed anyway: in the last layer visual tokens are not updated."""
    choice = Choice(bench_of(layers=4), OPERATORS, 0)
    assert choice.computed() == [(n, name) for n in range(3) for name in OPERATORS] + [(3, "seen")]
    assert Choice(choice.bench, ["ffn"], 0).computed() == [(0, "ffn"), (1, "ffn"), (2, "ffn")]
    hidden = {
        Operator(3, "seen"),
        Operator(2, "seen"),
    }  # so no layer reads what layers 1 to 3 would make of visual tokens
    assert choice.computed(hidden) == [(0, "attention"), (0, "ffn"), (0, "seen"), (1, "seen")]
    some = {(0, "ffn"), (1, "attention"), (2, "attention"), (2, "seen")}
    assert choice.without(some).rows == (
        ("0", (("update", "value output"),)),
        ("1", (("attend", "none"), ("update", "ffn"))),
        ("2", (("attend", "none"), ("update", "ffn"), ("seen", "none"))),
    )
    both = {(n, name) for n in range(1, 4) for name in ("attention", "ffn")}
    assert choice.without(both).rows == (("1-3", (("attend", "none"), ("update", "none"))),)
    rows = replace(DENSE, dense_layers="none", rows=(("0-", (("attend", "causal"),)),))
    assert Choice(bench_of(mechanism=rows), OPERATORS, 0).without({(1, "seen")}).rows == (
        *rows.rows,
        ("1", (("seen", "none"),)),
    )


def test_of_other_mechanisms_what_they_have_and_can_be_without_is_offered():
    def offered(mechanism):
        return set(Choice(bench_of(mechanism=mechanism), OPERATORS, 0).computed())

    every = {(n, name) for n in range(2) for name in OPERATORS} | {(2, "seen")}
    assert offered(ALIGNED) == offered(WINDOW) == every
    assert offered(PRESETS["naavit"]) == every - {(0, "attention"), (1, "attention")}  # its aligner is the FFN
    assert offered(PRESETS["vica"].stretched(3)) == {(0, "seen"), (1, "seen")}  # where text looks
    ranking = Mechanism(dense_layers="all", visual_drop=((1, 0.5),))
    assert offered(ranking) == every - {(1, "seen")}  # it ranks there
    for none in (PRESETS["saisa"], PRESETS["flamingo"]):
        assert offered(none) == set()
        with pytest.raises(UserError, match="--operators: of attention, ffn, seen this model has none"):
            Choice(bench_of(mechanism=none), OPERATORS, 0).refuse_budget()
    refuse_modules(PRESETS["deepstack"].stretched(3), 3)
    for name in ("visual_experts", "p_mod"):
        with pytest.raises(ConfigError, match=f"other rows of {name} need other modules"):
            refuse_modules(PRESETS[name].stretched(3), 3)


def test_an_operator_that_saves_nothing_is_measured_but_not_chosen():
    """The values of visual tokens are computed for text anyway, so that an aligner of W_v alone adds no product."""
    bench = bench_of(mechanism=Mechanism(aligner=Aligner(output=False, ffn=False)))
    choice = Choice(bench, ("attention",), 0)
    assert choice.computed() == [(0, "attention"), (1, "attention")]
    assert choice.order(dict.fromkeys(choice.computed(), 1.0)) == []


def test_the_least_is_that_of_the_cheapest_look():
    """Not the first one, where later layers have fewer tokens."""
    bench = bench_of(layers=4, mechanism=Mechanism(aligner=NO_ALIGNER, rows=(("2-", (("tokens", "every 2"),)),)))
    flops = [
        bench.flops(Choice(bench, ["seen"], 0).without({(m, "seen") for m in range(4) if m != n})) for n in range(4)
    ]
    assert flops[0] == flops[1] > flops[2] == flops[3]
    assert (
        Choice(bench, ["seen"], 0).least() == flops[2]
        and Choice(bench, ["seen"], 0).least({(2, "seen"), (3, "seen")}) == flops[0]
    )


@pytest.mark.parametrize("base", [DENSE, ALIGNED], ids=["llava", "ee_mllm"])
@torch.no_grad()
def test_operators_that_do_nothing_go_first(base):
    """W_o or the last product of an FFN is zero: then attention, and what text sees by it, or the FFN adds nothing."""
    bench = bench_of(layers=4, packs=PACKS[:1], mechanism=base)
    layers = bench.model.language_model.model.layers
    layers[1].self_attn.o_proj.weight.zero_()
    layers[2].mlp.down_proj.weight.zero_()
    free = {(1, "attention"), (1, "seen"), (2, "ffn")}
    choice = Choice(bench, OPERATORS, 0.5 * bench.flops(base))
    kl = {Operator(row["layer"], row["operator"]): row["kl"] for row in choice.alone(lambda _: None)}
    assert {operator for operator in kl if kl[operator] == 0} == free
    assert min(kl[operator] for operator in kl if operator not in free) > 1e-3
    order = choice.order(kl)
    assert set(order[:3]) == free
    (together,) = compared(bench, [choice.without(order[:3])], lambda _: None)
    assert together["kl"] == 0 and together["same_top"] == 1


@pytest.mark.parametrize("names", [("attention", "ffn", "seen"), ("attention", "ffn"), ("seen",), ("ffn", "seen")])
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_greedy_by_kl_over_what_is_saved_now(names, seed):
    """Every step against all that could be done instead, by formulas of tables written by hand; until nothing is left."""
    bench = bench_of(layers=5)
    config, generator = bench.model.config.text_config, torch.Generator().manual_seed(seed)
    kl = {(n, name): torch.rand((), generator=generator).item() for n in range(5) for name in names}
    choice = Choice(bench, names, 0.9 * bench.flops(DENSE))
    order = choice.order(kl)

    def flops(skipped):
        return prefill_flops(by_hand(skipped), config, TEXT, VISUAL)

    def sees(skipped):
        return not all(row.blind for row in by_hand(skipped).table(5))

    for n in range(len(order) + 1):
        now = flops(order[:n])
        saved = {one: now - flops([*order[:n], one]) for one in kl if one not in order[:n]}
        allowed = [one for one in saved if saved[one] > 0 and sees([*order[:n], one])]
        if n < len(order):
            assert order[n] == min(allowed, key=lambda one: kl[one] / saved[one])
            assert saved[order[n]] > 0 and flops(order[: n + 1]) == bench.flops(choice.without(order[: n + 1]))
        else:
            assert not allowed
    if "seen" in names:
        assert sum(row.seen.empty for row in choice.without(order).table(5)) == 4
    if "seen" in names and len(names) == 1:  # each layer in which text looks last saves its updates too
        assert flops([(4, "seen")]) < flops([(3, "seen")])


def test_of_equal_operators_those_that_save_more_then_later_ones_go_first():
    choice = Choice(bench_of(layers=4), ("attention", "ffn"), 0)
    order = choice.order(dict.fromkeys(choice.computed(), -1e-17))  # rounding
    ffn_first = choice.flops([(0, "ffn")]) < choice.flops([(0, "attention")])
    first, then = ("ffn", "attention") if ffn_first else ("attention", "ffn")
    assert order == [(2, first), (1, first), (0, first), (2, then), (1, then), (0, then)]


def test_a_budget_stays_within_reach():
    """Only what text sees may go, and layer 0 is worth least. But once it is blind, others must be seen, with all updates before them."""
    bench = bench_of(layers=4)
    kl = {(n, "seen"): (0.0, 1.0, 2.0, 3.0)[n] for n in range(4)}
    dense = bench.flops(DENSE)
    low, high = (bench.flops(by_hand([(n, "seen") for n in range(4) if n != look])) for look in (0, 1))
    assert low < high
    for budget, looks in ((low, 0), ((low + high) // 2, 0), (high, 1)):
        choice = Choice(bench, ["seen"], budget)
        order = choice.order(kl)
        left = choice.without(order).table(4)
        assert next(n for n in range(4) if not left[n].blind) == looks
        assert choice.flops(order) <= budget < dense
        choice.refuse_budget()
    assert ((0, "seen") in Choice(bench, ["seen"], high).order(kl)) and (
        (0, "seen") not in Choice(bench, ["seen"], low).order(kl)
    )


def test_an_impossible_budget_is_refused_with_the_least_that_is_possible():
    bench = bench_of(layers=3)
    config = bench.model.config.text_config
    h, w, w_kv, m = 32, 32, 16, 48  # by hand: products of text, its scores, and of one look at the image
    text = 3 * (TEXT * (4 * h * w + 4 * h * w_kv + 6 * h * m) + 4 * TEXT**2 * w)
    assert text == prefill_flops(DENSE, config, TEXT, 0)
    look = 4 * h * w_kv * VISUAL + 4 * TEXT * VISUAL * w
    dense = bench.flops(DENSE)
    Choice(bench, OPERATORS, text + look).refuse_budget()
    everything = "attention, ffn, seen"
    with pytest.raises(
        UserError,
        match=rf"expected 0\.\d+ or more.* text alone takes {text / dense:.1%} .* {(text + look) / dense:.1%} are left .*\({everything}\)",
    ):
        Choice(bench, OPERATORS, text + look - 1).refuse_budget()
    with pytest.raises(UserError, match=rf" {(text + 3 * look) / dense:.1%} are left .*\(attention, ffn\)"):
        Choice(bench, ["attention", "ffn"], text + 3 * look - 1).refuse_budget()


def test_presets_beside_the_curve():
    """Those that need no other modules, and differ from the dense model."""
    papers = {"ee_mllm", "naavit", "vica"}
    deep, shallow = (set(presets(bench_of(layers=layers))) for layers in (5, 3))
    assert deep >= papers | {"ee_mllm_f", "shortv"} and deep.isdisjoint(
        {"llava", "saisa", "flamingo", "visual_experts"}
    )
    assert shallow >= papers and shallow.isdisjoint({"ee_mllm_f", "shortv"})  # which would be dense
    assert presets(bench_of(layers=5))["shortv"] == build_mechanism("shortv", 5)
    assert presets(bench_of(mechanism=replace(DENSE, visual_positions="shared"))) == {}


def test_a_preset_that_this_encoder_cannot_have_is_left_out(monkeypatch):
    """As visionzip, if the encoder does not say what is important: after all the measuring it would be refused."""
    bench = bench_of()
    right = type(bench.model).problems
    told = lambda model, m: [("preset", "no")] if m.name == "visionzip" else right(model, m)  # noqa: E731
    assert "visionzip" in presets(bench)
    monkeypatch.setattr(type(bench.model), "problems", told)
    assert "visionzip" not in presets(bench)


def test_the_mean_prompt_ends_before_the_first_answer_after_the_last_image():
    def sample(entries, supervised, tokens):
        supervised = [i in supervised for i in range(len(entries))]
        targets = [i for i, said in enumerate(supervised) if said]
        return SimpleNamespace(ids=entries, image_tokens=tokens, targets=lambda: targets)

    image = IMAGE_SLOT
    one = sample([1, image, 2, 3, 4, 5], {4, 5}, [16])  # text 1 2 3
    assert mean_prompt([one]) == (3, 16)
    turns = sample([1, image, 2, 3, 4, image, 5, 6, 7], {3, 7}, [16, 8])
    assert mean_prompt([turns]) == (5, 24)  # text 1 2 3 4 5
    assert mean_prompt([one, turns, turns]) == (4, 21)  # of 13 / 3 and 64 / 3


def test_command_line_journey(dense_run, tmp_path, capsys):
    """A budget as a user gives it; the file that is written makes the mechanism that was chosen, whatever stands before it."""
    run = Path(dense_run.out)
    assert cli.main(["calibrate", str(run), "--budget", "0.93", "--samples", "12", "--out", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    results = json.loads((tmp_path / "operators.json").read_text())
    prompt, dense = results["prompt"], results["base_flops"]
    assert (
        f"{prompt['text']} text and {prompt['visual']} visual tokens" in said and "of the model's prefill FLOPs" in said
    )
    assert [(row["layer"], row["operator"]) for row in results["alone"]] == [
        (n, name) for n in range(2) for name in OPERATORS
    ] + [(2, "seen")]
    flops = [dense, *(row["flops"] for row in results["curve"])]
    assert flops == sorted(set(flops), reverse=True), "each operator saves"
    chosen = results["curve"][: results["chosen"]]
    assert chosen[-1]["flops"] <= 0.93 * dense < flops[results["chosen"] - 1]
    effect = (
        f"{chosen[-1]['flops'] / dense:.1%} of the model's prefill FLOPs, KL {chosen[-1]['kl']:.3g} a token from it"
    )
    assert effect in said and effect in " ".join((tmp_path / "mechanism.yaml").read_text().split())
    assert {"ee_mllm", "naavit", "vica", "fastv"} <= set(results["presets"])
    assert Image.open(tmp_path / "operators.png").width > 1000

    expected = by_hand([(row["layer"], row["operator"]) for row in chosen])
    (tmp_path / "before.yaml").write_text(
        "model: {mechanism: {preset: vica, dense_layers: [0], cross_layers: [1], rows: [{layers: 0-1, tokens: none}]}}"
    )
    for before in ([], [tmp_path / "before.yaml"]):
        config = load_config([run / "config.yaml", *before, tmp_path / "mechanism.yaml"])
        overrides = asdict(config.model.mechanism)
        mechanism = build_mechanism(overrides.pop("preset"), 3, overrides)
        assert mechanism.table(3) == expected.table(3)
    left = {
        (n, name)
        for n, row in enumerate(executed(mechanism.table(3)))
        for name, skip in OPERATORS.items()
        if skip(row) != row
    }
    assert {(row["layer"], row["operator"]) for row in results["alone"] if not row["left_out"]} == left

    decoder = tiny.DECODERS["llama-gqa"]  # of the sizes of the run's
    assert prefill_flops(mechanism, decoder, prompt["text"], prompt["visual"]) == chosen[-1]["flops"]
    check_flops_and_cache(tiny.model("llama-gqa", mechanism))  # the formulas equal PyTorch's counter

    validated = tmp_path / "validated"
    line = [
        "validate",
        str(run / "config.yaml"),
        str(tmp_path / "mechanism.yaml"),
        "--checkpoint",
        results["checkpoint"],
    ]
    assert cli.main([*line, f"out={validated}", "eval.samples=3"]) == 0
    found = json.loads((validated / "eval" / "results.json").read_text())
    assert Mechanism.from_dict(found["mechanism"]) == mechanism
    assert (
        cli.main(
            [
                "fit",
                str(run / "config.yaml"),
                str(tmp_path / "mechanism.yaml"),
                f"init_from={run}",
                f"out={tmp_path / 'on'}",
            ]
        )
        == 0
    )
    assert (
        cli.main(
            [
                "explain",
                str(run / "config.yaml"),
                str(tmp_path / "mechanism.yaml"),
                "--text",
                str(prompt["text"]),
                "--visual",
                str(prompt["visual"]),
            ]
        )
        == 0
    )
    assert f"{chosen[-1]['flops'] / dense:.1%} of llava's" in " ".join(capsys.readouterr().out.split())


def test_a_few_operators_of_a_mechanism_of_ones_own(dense_run, tmp_path):
    """Its options stay, and so do its rows."""
    with tiny.forgotten_imports():
        file = str(Path(__file__).parents[1] / "examples" / "adapted.py")
        own = ["model.mechanism.preset=adapted", "model.mechanism.dense_layers=all", "model.mechanism.options={r: 3}"]
        line = ["calibrate", str(Path(dense_run.out) / "config.yaml"), *own, "--checkpoint", "none", "--import", file]
        assert (
            cli.main([*line, "--budget", "0.99", "--operators", "ffn", "--samples", "4", "--out", str(tmp_path)]) == 0
        )
        results = json.loads((tmp_path / "operators.json").read_text())
        assert results["operators"] == ["ffn"] and results["presets"] == {}
        assert {row["operator"] for row in results["alone"]} == {"ffn"}
        config = load_config([Path(dense_run.out) / "config.yaml", tmp_path / "mechanism.yaml"])
        overrides = asdict(config.model.mechanism)
        mechanism = build_mechanism(overrides.pop("preset"), 3, overrides)
        assert type(mechanism) is type(PRESETS["adapted"]) and mechanism.r == 3
        chosen = [(row["layer"], row["operator"]) for row in results["curve"][: results["chosen"]]]
        assert mechanism.table(3) == by_hand(chosen).table(3)


def test_what_cannot_be_done_is_said(dense_run, capsys):
    for options, text in (
        ([], "calibrate needs --target PRESET, to rank layers for it, --budget SHARE"),
        (["--budget", "1"], "--budget 1: expected a share of the model's FLOPs, between 0 and 1"),
        (["--budget", "nan"], "--budget nan: expected a share"),
        (["--budget", "0.02"], "--budget 0.02: expected 0."),
        (["--budget", "0.5", "--operators", "attention,fnn"], "--operators: found 'fnn', expected attention or ffn or seen"),
        (["--budget", "0.5", "--layers", "3"], "--layers goes with --target"),
        (["--budget", "0.5", "--by", "kl"], "--by goes with --target"),
        (["--budget", "0.5", "--checkpoint", "none", "model.mechanism.preset=saisa"], "--operators: of attention, ffn, seen this model has none"),
        (["--budget", "0.5", "--checkpoint", "none", "model.mechanism.preset=p_mod"], "other rows of p_mod need other modules"),
        (["--beside", "nowhere"], "nowhere"),
        (["--beside", "--operators", "ffn"], "--operators goes with --budget"),
        (["--beside", "--target", "vica"], "found --target and --beside, expected one of them"),
        (["--budget", "0.5", "--samples", "0"], "--samples 0: expected 1 or more"),
    ):  # fmt: skip
        assert cli.main(["calibrate", dense_run.out, *options]) == 2
        assert text in capsys.readouterr().err
