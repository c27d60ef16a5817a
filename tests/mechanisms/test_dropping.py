"""Selections by rank in training: who ranks, what leaves, and what gradients pass, against plain implementations."""

from dataclasses import replace

import pytest
import tiny
import torch
from lib.equations import DEEP, DROPPING, FAMILIES, plain
from lib.mechanisms import text_logits
from torch.nn.functional import cross_entropy

from lit_eemllm.core.ranking import Ranking
from lit_eemllm.core.select import Every, Share, Top, parse_select
from lit_eemllm.core.table import executed, ranked_in
from lit_eemllm.errors import ConfigError
from lit_eemllm.layout import Run, SequenceLayout
from lit_eemllm.mechanisms import PRESETS, build_mechanism
from lit_eemllm.mechanisms.build import read_mechanism
from lit_eemllm.training.fit import fit

DOCUMENTS = [[3, 0, 9], [5], [0, 2, 0, 7, 0, 4], [2, 0, 1]]
ANSWERS = (((5, 8), (10, 12)), ((1, 5),), ((1, 2), (6, 9), (11, 13)), ())
"""Of the text rows of each: two answers, one without an image, one before an image, and none."""


def batch(seed=0, dtype=torch.float32):
    pack = tiny.pack(DOCUMENTS, seed, dtype)
    return replace(pack, layout=replace(pack.layout, answers=ANSWERS))


def made(name, decoder="llama-gqa"):
    return tiny.model(decoder, DROPPING[name], layers=DEEP)


@pytest.mark.parametrize("decoder", FAMILIES)
@pytest.mark.parametrize("name", DROPPING)
def test_logits_and_gradients_in_training(name, decoder):
    """In float64: layers that follow each other make a rounding of float32 larger than the bound, on one CPU and not on the next."""
    model, pack = made(name, decoder).double(), batch(dtype=torch.float64)
    logits = text_logits(model, pack)
    true = plain(model, pack)
    assert tiny.max_error(logits, true) <= 1e-5
    weights = torch.linspace(-1, 1, true.numel()).view_as(true)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, expected = (torch.autograd.grad((x * weights).sum(), parameters, allow_unused=True) for x in (logits, true))
    most = max(x.abs().max() for x in expected if x is not None)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if (
            other is not None and other.abs().max() > 1e-6 * most
        ):  # else it is zero up to rounding, as of the bias of keys
            assert tiny.max_error(one, other) <= 1e-4


@pytest.mark.parametrize("name", DROPPING)
def test_a_document_in_a_pack_is_the_document_alone(name):
    model, pack = made(name), batch()
    whole, row, image = text_logits(model, pack), 0, 0
    for number, document in enumerate(DOCUMENTS):
        images = document.count(0)
        alone = tiny.pack([document])
        length = alone.layout.num_tokens
        start = sum(n or tiny.TOKENS for d in DOCUMENTS[:number] for n in d)
        alone = replace(
            alone,
            input_ids=pack.input_ids[start : start + length],
            pixel_values=pack.pixel_values[image : image + images] if images else None,
            layout=replace(alone.layout, answers=ANSWERS[number : number + 1]),
        )
        states = text_logits(model, alone)
        assert tiny.max_error(whole[row : row + len(states)], states) <= 1e-5
        row, image = row + len(states), image + images


@pytest.mark.parametrize("name", DROPPING)
def test_recomputing_activations_changes_nothing(name):
    model, pack = made(name).train(), batch()
    gradients = []
    for again in (False, True):
        model.activation_checkpointing = again
        model.zero_grad()
        model.packed_loss(pack).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_ranking_leaves_every_weight_its_gradient_under_autocast():
    """Autocast keeps 16-bit copies of weights; one made without gradients would take them from the layer."""
    model, pack = made("fastv").train(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.packed_loss(pack)
    loss.backward()
    for layer in model.language_model.model.layers:
        assert all(
            p.grad is not None and p.grad.abs().max() > 0
            for p in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
        )


def test_rows_that_have_left_are_not_carried():
    model, pack = made("pyramid_drop"), batch()
    lengths = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: lengths.append(len(out[1])))
        for layer in model.language_model.model.layers
    ]
    model.packed_loss(pack)
    for hook in hooks:
        hook.remove()
    images = pack.layout.image_lengths
    left = [sum(n - int(share * n) for n in images) for share in (0, 0.5, 0.75, 0.875)]
    assert lengths == [left[0]] * 2 + [left[1]] * 2 + [left[2]] * 2 + [left[3]] * 2


def test_who_ranks_by_hand():
    """The row before each answer, or all text that is no answer; without answers a document's last, or all of it."""
    layout = SequenceLayout.of([[Run(False, 2), Run(True, 4), Run(False, 5)], [Run(True, 3), Run(False, 3)]])
    known = replace(layout, answers=(((3, 4), (6, 7)), ((1, 2),)))
    rows = {
        (by, which): Ranking.of(this, by, [4, 3], [2, 1]).rows_n.tolist()
        for by in ("question", "text")
        for which, this in (("known", known), ("not", layout))
    }
    assert rows["question", "known"] == [2, 5, 7]
    assert rows["question", "not"] == [6, 9]
    assert rows["text", "known"] == [0, 1, 2, 4, 5, 7, 9]
    assert rows["text", "not"] == list(range(10))


def test_images_of_many_lengths_are_ranked_each_by_itself():
    """In a pack, with several images in a document, against one score after the other."""
    layout = SequenceLayout.of(
        [[Run(True, 3), Run(False, 1), Run(True, 5), Run(False, 2)], [Run(False, 1)], [Run(True, 4), Run(False, 1)], [Run(True, 2)]]
    )  # fmt: skip
    q, k = torch.randn(5, 4, 8), torch.randn(5 + 14, 2, 8)
    ranking = Ranking.of(layout, "question", [3, 5, 4, 2], [1, 3, 2, 2])
    found = ranking.most_attended(q[ranking.rows_n], k, 0.7)
    expected = []
    for last, text, images in ((2, [0, 1, 2], [(0, 3, 1), (3, 8, 3)]), (4, [4], [(8, 12, 2)])):
        rows = text + [5 + i for first, end, _ in images for i in range(first, end)]
        heads = [torch.stack([q[last, n] @ k[row, n // 2] for row in rows]).mul(0.7).softmax(0) for n in range(4)]
        weight = dict(zip(rows, torch.stack(heads).mean(0).tolist(), strict=True))
        for first, end, most in images:
            ranked = sorted(range(first, end), key=lambda i, weight=weight: -weight[5 + i])
            expected += sorted(ranked[:most])
    assert found.tolist() == [*expected, 12, 13]


def test_what_nobody_reads_is_not_ranked():
    table = executed(PRESETS["fastv"].stretched(2).table(2))
    assert ranked_in(table, 0) is not None
    late = build_mechanism("llava", 3, {"rows": [{"layers": "2", "tokens": "all but 0.5 ranked in 1"}]})
    assert ranked_in(executed(late.table(3)), 1) is not None
    blind = build_mechanism(
        "llava", 3, {"rows": [{"layers": "2", "tokens": "all but 0.5 ranked in 1", "seen": "none"}]}
    )
    assert ranked_in(executed(blind.table(3)), 1) is None


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"layers": "3-", "tokens": "all but 0.5 ranked in 1"}], "rows.3.tokens: ranked in 1, expected this layer or the one before"),
        ([{"layers": "2", "tokens": "all but 0.5 ranked in 2"}], "rows.3.tokens: found all, expected none or a rank: tokens have left"),
        ([{"layers": "2", "tokens": "all but 0.5 ranked in 2"}, {"layers": "3-", "tokens": "all but 0.7 ranked in 3"}],
         "rows.3.tokens: dropped 0.7 after 0, expected more than 0.5 after 0.5"),
        ([{"layers": "1", "tokens": "none"}, {"layers": "2-", "tokens": "all but 0.5 ranked in 1"}], "rows.2.tokens: ranked in 1, expected a layer in"),
        ([{"layers": "2-", "tokens": "all but 0.5 ranked in 2", "ffn": "every 2"}], "rows.2.ffn: some tokens only"),
    ],
)  # fmt: skip
def test_ranks_that_contradict_each_other(rows, told):
    with pytest.raises(ConfigError) as error:
        build_mechanism("llava", 4, {"rows": rows})
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("preset", "options", "told"),
    [
        ("fastv", {"after": 0}, "options.after: found 0, expected 1 to 4"),
        ("fastv", {"drop": 1.0}, "options.drop: found 1, expected a share"),
        ("visionzip", {"drop": 1.0}, "options.drop: found 1, expected a share"),
        ("deepstack", {"layers": [1, 4, 3]}, "options.layers: found [1, 4, 3], expected layers from 0 to 3, in order"),
        (
            "deepstack",
            {"depths": [0.5]},
            "options.depths: found [0.5], expected a share from 0 to 1 for each of the layers [1, 2, 3]",
        ),
        ("deepstack", {"layers": "all"}, "options.layers: found 'all' with depths (0.333, 0.667, 1.0), expected lists"),
        ("withdrawal", {"after": 5}, "options.after: found 5, expected 1 to 4"),
        ("hidrop", {"begin": 3, "end": 2}, "options.begin: found 3 to 2"),
        ("hidrop", {"begin": 0, "end": 4, "pyramid": [[2, 0.5], [1, 0.25]]}, "options.pyramid: found layers [2, 1]"),
        (
            "hidrop",
            {"begin": 0, "end": 4, "pyramid": [[1, 0.25], [2, 0.5]]},
            "options.pyramid: found shares [0.25, 0.5]",
        ),
        ("hidrop", {"pyramid": "all"}, "options.pyramid: found 'all', expected pairs"),
        ("visipruner", {"band": 3, "end": 3}, "options.band: found 3 to 3"),
        ("sampled", {"share": 0.0}, "options.share: found 0, expected a share"),
        ("sampled", {"first": 4}, "options.first: found 4, expected 0 to 3"),
        ("skip_vision", {"fed": 2.0}, "options.fed: found 2, expected a share"),
        ("operator_skipping", {"ffn_layers": [9]}, "options.ffn_layers: found (9,), expected"),
        ("operator_skipping", {"ffn_layers": 3}, "options.ffn_layers: found 3, expected"),
        ("operator_skipping", {"ffn_layers": [{"a": 1}]}, "options.ffn_layers: found ({'a': 1},), expected"),
        ("operator_skipping", {"ffn_layers": [True]}, "options.ffn_layers: found (True,), expected"),
        ("hidrop", {"pyramid": {"a": 1}}, "options.pyramid: found {'a': 1}, expected a value such as ("),
        ("p_mod", {"average": float("nan")}, "options.average: found nan, expected a share from 0 to 1"),
    ],
)
def test_options_that_make_no_sense(preset, options, told):
    with pytest.raises(ConfigError) as error:
        build_mechanism(preset, 4, {"options": options})
    assert told in str(error.value)


def test_features_are_added_to_tokens_that_are_all_there():
    """Blocks get the rows that are left, and do not know which these are."""
    assert build_mechanism("deepstack", 4, {"visual_drop": [[3, 0.5]]}).layers == (1, 2, 3)
    with pytest.raises(ConfigError, match=r"options.layers: found \[1, 2, 3\], but tokens that"):
        build_mechanism("deepstack", 4, {"visual_drop": [[2, 0.5]]})


@pytest.mark.parametrize(
    ("preset", "overrides", "told"),
    [
        ("sampled", {"visual_drop": [[1, 0.5]]}, "visual_drop: found layers [1], but what this mechanism does with tokens"),
        ("hidrop", {"visual_drop": [[5, 0.5]]}, "visual_drop: found layers [5], but what this mechanism does with tokens"),
        ("operator_skipping", {"aligner": {"ffn": True}}, "aligner.ffn: options.ffn_layers says where"),
        ("deepstack", {"rows": [{"layers": "3-", "tokens": "all but 0.5 ranked in 2"}]}, "have left by rank before"),
        ("deepstack", {"rows": [{"layers": "3-", "tokens": "none"}]}, "no layer reads what is added before layer 3"),
        ("llava", {"rows": [{"layers": "0", "seen": "all"}] * 1001}, "rows: found 1,001 rows, expected 1000 at most"),
        ("llava", {"rows": [{"layers": "9" * 5000, "seen": "all"}]}, "expected layers from 0 to 7"),
        ("llava", {"rows": [{"layers": 3, "seen": "none"}, {"layers": "4-", "tokens": "all but 0.5 ranked in 3"}]},
         "expected a layer in which text sees them"),
    ],
)  # fmt: skip
def test_keys_that_would_do_nothing_or_too_much(preset, overrides, told):
    with pytest.raises(ConfigError) as error:
        build_mechanism(preset, DEEP, overrides)
    assert told in str(error.value)


def test_a_folder_that_names_what_a_mechanism_has_not():
    for saved, told in (
        ({"preset": "fastv", "foo": 1}, "model.mechanism.foo: fastv has no such option"),
        ({"preset": "sampled", "seed": 1.5}, "model.mechanism.options.seed: found 1.5, expected a whole number"),
        ({"preset": "hidrop", "pyramid": [[1, 0.5]] * 1001}, "model.mechanism.pyramid: a longer list than any decoder"),
    ):
        with pytest.raises(ConfigError) as error:
            read_mechanism(saved)
        assert told in str(error.value)


def test_routers_are_where_rows_say():
    """So mechanisms whose rows differ cannot take each other's place."""
    usual, changed = (
        build_mechanism("p_mod", DEEP, {"rows": rows}) for rows in (None, [{"layers": 5, "tokens": "all"}])
    )
    assert usual.modules != changed.modules


def test_the_text_of_a_selection_is_the_selection():
    """Caches know it by that, and configurations say it so."""
    for text in ("even 0.3333331", "even 0.3333334", "random 0.1 seed 7", "all but 0.8889 ranked in 0 by encoder",
                 "all but 0.123456789 ranked in 3 after 0.1 by text", "every 3", "all", "none"):  # fmt: skip
        assert str(parse_select(text)) == text
    with pytest.raises(ValueError, match="found 'every 99999999999'"):
        parse_select("every 99999999999")
    assert Share(1e-12).count(1) == Share(1e-12).count(9) == Top(1 - 1e-12, 0).count(5) == 1
    assert Share(0.5).count(0) == Top(0.5, 0).count(0) == 0
    assert Every(10**18).of_image(3).tolist() == [True, False, False]


@pytest.mark.parametrize("random", [False, True])
def test_controls_take_as_many_tokens_as_a_rank_would(random):
    """So that they are compared at equal cost; evenly spaced ones lie apart, drawn ones are the same for all images of a length."""
    sampled = build_mechanism("sampled", 4, {"options": {"share": 0.3, "random": random, "seed": 7}}).table(4)[0].tokens
    for length in (1, 2, 3, 10, 576, 577):
        top = build_mechanism("pyramid_drop", 4, {"visual_drop": [[0, 0.7]]}).table(4)[0].tokens
        flags = sampled.flags([length, length])
        assert flags.sum() == 2 * sampled.count(length) == 2 * top.count(length)
        assert torch.equal(flags[:length], flags[length:])
    gaps = sampled.of_image(576).nonzero().flatten().diff()
    assert (gaps.max() <= 4) is not random
    if random:
        other = replace(sampled, seed=8).of_image(576)
        assert not torch.equal(other, sampled.of_image(576))


def test_a_loss_of_answers_alone_is_that_of_the_plain_implementation():
    """As a collated pack has it: targets are the answers, and the rows before them rank."""
    model, pack = made("hidrop"), batch()
    starts = torch.tensor(pack.layout.text_lengths).cumsum(0).tolist()
    rows = [
        s + row - 1
        for s, answers in zip([0, *starts], ANSWERS, strict=False)
        for first, end in answers
        for row in range(first, end)
    ]
    pack = replace(pack, target_rows=torch.tensor(rows), targets=torch.arange(len(rows)) % tiny.VOCAB)
    true = cross_entropy(plain(model, pack)[pack.target_rows], pack.targets, reduction="sum")
    assert abs(model.packed_loss(pack) - true) <= 1e-5 * true


@pytest.mark.parametrize("preset", ["fastv", "pyramid_drop"])
def test_a_run_that_drops_by_rank_resumes_to_the_bit(preset, parts, shapes, tmp_path):
    """Through shards and the collator, which tells who ranks: the packs of the run have answers."""
    states, seen = [], []

    class Seeing(Ranking):
        @classmethod
        def of(cls, layout, by, lengths, stay):
            seen.append(layout.answers)
            return Ranking.of(layout, by, lengths, stay)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_eemllm.core.stream.Ranking", Seeing)
        for out, stops in (("whole", (4,)), ("cut", (2, 4))):
            for count in stops:
                more = ("optim.schedule=constant", "optim.warmup_ratio=0", "data.val=null", "optim.tuning.llm=full")
                fit(tiny.config(parts, shapes, tmp_path / out, f"model.mechanism.preset={preset}", "optim.save_every=2",
                                f"optim.max_steps={count}", *more))  # fmt: skip
            file = tmp_path / out / "checkpoints" / "step-4.ckpt"
            states.append(torch.load(file, weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys() and all(states[0][n].equal(x) for n, x in states[1].items())
    assert len(seen) >= 8 and all(any(answers) for answers in seen)
