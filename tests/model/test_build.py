"""Joining pretrained parts: what is missing, foreign, hostile or misfitting is refused with a message, never half loaded."""

import copy
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from lit_eemllm.attention import resolve_backend
from lit_eemllm.cost.weightless import parts_of_config
from lit_eemllm.errors import CheckpointError, ConfigError
from lit_eemllm.layout import Visibility
from lit_eemllm.model.build import build
from lit_eemllm.model.pretrained import ImageRotary
from lit_eemllm.training.module import LitEEMLLM


@pytest.fixture
def parts(tmp_path):
    tiny.write_parts(tmp_path)
    return tmp_path


def config(parts, *overrides):
    return tiny.config(parts, "unused", parts / "run", *overrides)


@pytest.mark.parametrize("narrow", ["model.quantization=nf4", "model.fp8=true"])
def test_experts_are_not_narrowed(tmp_path, narrow):
    tiny.write_parts(tmp_path, "llama4_text", head_dim=8, intermediate_size_mlp=40, num_local_experts=2)
    key = narrow.partition("=")[0]
    for made in (build, parts_of_config):
        with pytest.raises(
            ConfigError, match=f"^{key}: found a decoder of model_type 'llama4_text', whose experts are no"
        ):
            made(config(tmp_path, narrow, "optim.tuning.llm=frozen").model)


@pytest.mark.parametrize("decoder", ["mistral-window", "llama4_text", "llama4-no-norms"])
def test_positions_of_rows_and_columns_are_for_decoders_that_count_none(decoder):
    text = copy.deepcopy(tiny.DECODERS[decoder])
    text.image_rotary = {"sections": [2, 1, 1]}
    with pytest.raises(ConfigError, match=r"^image_rotary: windows, chunks and queries that grow count positions"):
        ImageRotary.of(text)


def test_missing_and_foreign_folders_are_named(parts):
    for override, message in [
        ("model.decoder=nowhere/at-all", r"model\.decoder: AutoConfig cannot load 'nowhere/at-all'"),
        ("model.decoder=/nope", r"^model\.decoder: no such folder: /nope$"),
        ("model.decoder=./nope", r"^model\.decoder: no such folder: \./nope; looked for in "),
        ("model.vision.path=a/b/c", r"^model\.vision\.path: no such folder: a/b/c; looked for in "),
        ("model.tokenizer=~/nope", r"^model\.tokenizer: no such folder: ~/nope; ~ is not expanded"),
        (
            f"model.decoder={parts / 'encoder'}",
            r"^model\.decoder: .*encoder: this decoder is not supported: model_type",
        ),
        (f"model.tokenizer={parts / 'encoder'}", r"model\.tokenizer: AutoTokenizer cannot load"),
        ("model.vision.path=nowhere/at-all", r"model\.vision\.path: AutoConfig cannot load"),
        (f"model.vision.path={parts / 'decoder'}", r"is a 'llama', expected one of"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build(
                config(
                    parts, override, *([f"model.tokenizer={parts / 'decoder'}"] if "at-all" in override else [])
                ).model
            )
    (parts / "encoder" / "preprocessor_config.json").unlink()
    with pytest.raises(
        ConfigError, match=r"^model\.vision\.path: .* cannot load .*encoder': no preprocessor_config\.json in it$"
    ):
        build(config(parts).model)


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_a_missing_tensor_is_not_replaced_by_noise(parts, part):
    file = parts / part / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in sorted(tensors) if "layers.1" in name)
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of a \w+, such as .*layers.1"):
        build(config(parts).model)


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_code_in_a_model_folder_is_not_run(parts, part, monkeypatch):
    sentinel = parts / "executed"
    (parts / part / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Evil: pass\n")
    file = parts / part / "config.json"
    values = json.loads(file.read_text())
    values["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    values["model_type"] = "evil"
    file.write_text(json.dumps(values))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a hasty user would type
    with pytest.raises(ConfigError, match=r"model\.\w+"):
        build(config(parts).model)
    assert not sentinel.exists()


def test_weights_that_would_be_unpickled_are_refused(parts):
    file = parts / "decoder" / "model.safetensors"
    torch.save(load_file(file), parts / "decoder" / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(
        CheckpointError, match=r"^model\.decoder: no model\*\.safetensors in .*decoder; weights in other"
    ):
        build(config(parts).model)


def test_a_tokenizer_larger_than_the_decoder_is_refused(parts):
    file = parts / "decoder" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    tokenizer["added_tokens"].append({"id": len(tokenizer["model"]["vocab"]), "content": "<more>", **flags})
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"model\.tokenizer: 1 of its tokens, such as '<more>'"):
        build(config(parts).model)


def test_frozen_parts_in_bfloat16_keep_exact_rotary_frequencies(parts):
    chosen = config(parts, "model.dtype=bfloat16", "optim.tuning.llm=frozen")
    model = build(chosen.model)[0]
    exact = model.language_model.model.rotary_emb.inv_freq.clone()
    LitEEMLLM(model, chosen)
    found = model.language_model.model.rotary_emb.inv_freq
    assert found.dtype == torch.float32 and found.equal(exact)
    assert {p.dtype for p in model.language_model.parameters()} == {torch.bfloat16}
    assert resolve_backend("auto", "cpu", torch.bfloat16).backend.name == "sdpa"


def test_the_reference_computes_in_float32_under_autocast():
    backend, batch = resolve_backend("reference").backend, tiny.pack([[3, 0, 4]])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(23, 4, 8, generator=generator) for _ in range(3))
    plan = backend.plan(batch.layout, Visibility(True))
    with torch.autocast("cpu", torch.bfloat16):
        found = backend.attend(q, k, v, plan, 0.3)
    assert found.equal(backend.attend(q, k, v, plan, 0.3))


def test_an_image_token_inside_the_vocabulary_is_never_said():
    model = tiny.model()
    model.config.image_token_id = tiny.VOCAB - 1
    ids = torch.randint(3, tiny.VOCAB - 1, (2, 6))
    logits = model(ids).logits
    assert (
        logits.shape[-1] == tiny.VOCAB and (logits[..., -1] == -torch.inf).all() and logits[..., :-1].isfinite().all()
    )


def test_generation_stops_at_a_text(parts):
    """transformers' `stop_strings`, which needs the tokenizer."""
    model, processor = build(config(parts).model)
    model.generation_config.eos_token_id = None
    ids, tokenizer = torch.tensor([[5, 6, 7, 8, 9]]), processor.tokenizer
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    whole = model.generate(ids, **options)[0].tolist()
    stop = next(text for text in map(tokenizer.decode, whole[6:]) if text.isascii() and text.strip())
    first = next(i for i in range(5, 13) if stop in tokenizer.decode(whole[5 : i + 1]))
    assert model.generate(ids, **options, stop_strings=stop, tokenizer=tokenizer)[0].tolist() == whole[: first + 1]
    assert 5 < first < 12
