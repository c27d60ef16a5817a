"""What holds for every mechanism, shipped or a user's: checks of a model that need no knowledge of what it computes."""

from dataclasses import replace

import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from lit_eemllm.compat.transformers import CACHE
from lit_eemllm.core.families import FAMILIES
from lit_eemllm.core.table import executed
from lit_eemllm.cost.formulas import cache_bytes, decode_flops, prefill_flops
from lit_eemllm.layout import Chunk, PackedBatch
from lit_eemllm.mechanisms import Mechanism
from lit_eemllm.model import EEMLLM
from lit_eemllm.training.tuning import cast

BOUND = 1e-5  # relative to the largest value
PACK = [[3, 0, 4], [2, 0, 1, 0, 3], [7], [0, 2], [4, 0, 0, 2]]
TEXT, VISUAL = 9, tiny.TOKENS
KINDS = (
    "llava",
    "ee_mllm",
    "ee_mllm_f",
    "naavit",
    "saisa",
    "vica",
    "flamingo",
    "casa",
    "fastv",
    "visionzip",
    "deepstack",
    "skip_vision",
    "bidirectional",
)
"""Presets of which each goes another way through a layer. The others are tables of the same columns: tests/mechanisms has all."""


def text_logits(model: EEMLLM, batch: PackedBatch) -> torch.Tensor:
    return model.language_model.lm_head(model._text_states(batch.input_ids, batch.pixel_values, batch.layout))


def check_gradients(model: EEMLLM, pack: list[list[int]]) -> None:
    """Every trainable tensor has one, also in a pack without image: a rank that draws one must not leave the others waiting."""
    model.vision.requires_grad_(False)
    model.packed_loss(tiny.pack(pack)).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    if any(0 in document for document in pack):
        zero = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.count_nonzero()]
        assert not zero


def compared_gradients(model: EEMLLM, batch: PackedBatch, true: torch.Tensor, *found: torch.Tensor) -> list[str]:
    """Gradients of the loss of each of the logits `found` against those of `true`; names of the parameters that have some."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    results = []
    for logits in (true, *found):
        loss = cross_entropy(logits[batch.target_rows], batch.targets, reduction="sum")
        results.append(torch.autograd.grad(loss, parameters.values(), allow_unused=True))
    largest = max(g.abs().max() for g in results[0] if g is not None)
    compared = []
    for parameter, a, *others in zip(parameters, *results, strict=True):
        if a is None or a.abs().max() < 1e-6 * largest:
            assert all(b is None or b.abs().max() < 1e-5 * largest for b in others), parameter
            continue
        module = parameter.rpartition(".")[0]
        # A single number, a router's bias, is a sum in which most cancels: beside it stand the weights that it was summed with.
        beside = [
            x.abs().max()
            for n, x in zip(parameters, results[0], strict=True)
            if x is not None and n.startswith(f"{module}.")
        ]
        bound = 5 * BOUND * (max(beside) if a.numel() == 1 else a.abs().max())
        assert all((b - a).abs().max() <= bound for b in others), parameter
        compared.append(parameter)
    return compared


def check_packing(model: EEMLLM) -> None:
    """What other documents hold does not change a bit of a document's logits."""
    batch = tiny.pack(PACK)
    model.set_attention("sdpa")
    logits = text_logits(model, batch)
    for texts, rows, images, where in (
        (slice(7, None), slice(7 + tiny.TOKENS, None), slice(1, None), slice(None, 7)),  # all but the first document
        (slice(None, -6), slice(None, -6 - 2 * tiny.TOKENS), slice(None, -2), slice(-6, None)),  # all but the last
    ):
        ids, pixels = batch.input_ids.clone(), batch.pixel_values.clone()
        ids[rows] = 7
        pixels[images] *= -2
        changed = text_logits(model, replace(batch, input_ids=ids, pixel_values=pixels))
        assert changed[where].equal(logits[where]) and not changed[texts].equal(logits[texts])


def check_generation(model: EEMLLM) -> None:
    """With a cache as without, in a batch as alone, in beams."""
    documents = [[3, 0, 4], [5], [2, 0, 1, 0, 3], [0, 2]]
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    inputs = tiny.prompt(model, documents, seed=4)
    batch = model.generate(**inputs, **options)[:, -8:]
    assert len({tuple(row.tolist()) for row in batch}) == len(documents)  # the prompts matter
    assert batch.equal(model.generate(**inputs, **options, use_cache=False)[:, -8:])
    for i, document in enumerate(documents):
        alone = tiny.prompt(model, [document], seed=4 + i)
        assert model.generate(**alone, **options)[:, -8:].equal(batch[i : i + 1])
    options["max_new_tokens"] = 4
    beams = model.generate(**inputs, **options, num_beams=3)[:, -4:]
    assert beams.equal(model.generate(**inputs, **options, num_beams=3, use_cache=False)[:, -4:])


def check_later_turns(model: EEMLLM) -> None:
    """A prompt in three passes, the second image alone in the second, equals the prompt in one."""
    inputs = tiny.prompt(model, [[2, 0, 3, 0, 4]])
    ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]
    with torch.no_grad():
        whole, cache, found = model(**inputs).logits, None, []
        for first, last, images in ((0, 20, pixels[:1]), (20, 38, pixels[1:]), (38, 41, None)):
            out = model(ids[:, first:last], mask[:, :last], images, cache=cache, use_cache=True)
            cache = out[CACHE]
            found.append(out.logits)
    assert tiny.max_error(torch.cat(found, 1)[..., : tiny.VOCAB], whole[..., : tiny.VOCAB]) <= 2 * BOUND


def check_frozen_in_16_bits(model: EEMLLM) -> None:
    """Without autocast, where the decoder's states have another type than the weights that are trained."""
    model.vision.requires_grad_(False).to(torch.bfloat16)
    cast(model.language_model.requires_grad_(False), torch.bfloat16)
    for pack in (PACK, [[5], [9]]):
        model.packed_loss(tiny.pack(pack)).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.generate(**tiny.prompt(model, [[3, 0, 4], [5]]), max_new_tokens=3, pad_token_id=0).shape[0] == 2


# --- costs
def counted(function) -> tuple[object, FlopCounterMode]:
    """What a function returns, and its FLOPs; attention decomposed into the products that PyTorch's counter knows."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        return function(), counter


def of_layers(model: EEMLLM, counter: FlopCounterMode) -> int:
    """FLOPs of decoder layers and of the modules before them."""
    names = [f"EEMLLM.language_model.model.layers.{i}" for i in range(len(model.language_model.model.layers))]
    names += [f"EEMLLM.{model.mechanism.blocks_name}.{i}" for i in model.blocks]
    counts = counter.get_flop_counts()
    return sum(sum(counts[name].values()) for name in names if name in counts)


def scores_past_the_window(mechanism: Mechanism, model: EEMLLM) -> int:
    """FLOPs of the scores that the reference computes although a window or a chunk hides them, of a prompt that begins with an image."""
    config, total = model.config.text_config, 0
    w = config.num_attention_heads * model.language_model.model.layers[0].self_attn.head_dim
    score = 6 if mechanism.visual_positions == "unrotated" else 4
    windows = FAMILIES[config.model_type].windows(config)
    for row, window in zip(executed(mechanism.table(config.num_hidden_layers)), windows, strict=True):
        if window is not None:
            seen, here = row.seen.count(VISUAL), row.tokens.count(VISUAL)
            most = window.size if isinstance(window, Chunk) else window + 1
            total += score * TEXT * max(0, TEXT + seen - most) * w
            total += 4 * here * max(0, TEXT + here - most) * w * row.dense
        if isinstance(row.attend, int):
            here = row.tokens.count(VISUAL)
            total += 4 * here * max(0, here - row.attend - 1) * w
    return total


def check_flops_and_cache(model: EEMLLM) -> None:
    """Of a prompt and of a token after it, equal to the last FLOP and byte: the reference computes every score, as the formulas count."""
    model.requires_grad_(False)
    mechanism, config = model.mechanism, model.config.text_config
    prompt = tiny.prompt(model, [[0, TEXT]])
    output, counter = counted(lambda: model(**prompt, use_cache=True))
    expected = prefill_flops(mechanism, config, TEXT, VISUAL, vision_width=model.vision.hidden_size)
    expected += scores_past_the_window(mechanism, model)
    assert of_layers(model, counter) == expected

    cache = output[CACHE]
    _, counter = counted(lambda: model(prompt["input_ids"][:, -1:], cache=cache, use_cache=True))
    head = 2 * config.hidden_size * tiny.VOCAB
    assert counter.get_total_flops() - head == decode_flops(mechanism, config, TEXT, VISUAL)
    # After that token:
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    tensors += [x for k, v, _ in cache.media.values() for x in (k, v)]
    held = sum(x.numel() * x.element_size() for x in tensors)
    assert held == cache.num_bytes == cache_bytes(mechanism, config, TEXT + 1, VISUAL, itemsize=4)
