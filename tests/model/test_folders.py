"""What is read of a model's folder: no key or file of it imports, fetches or runs anything; what is broken is named."""

import base64
import json
import shutil
from dataclasses import fields

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_eemllm.core.families import FAMILIES
from lit_eemllm.errors import CheckpointError, ConfigError
from lit_eemllm.formats.vlm import FORMATS, load_vlm, save_vlm
from lit_eemllm.mechanisms import PRESETS
from lit_eemllm.model import EEMLLM, EEMLLMConfig, Processor
from lit_eemllm.model.build import build, build_processor
from lit_eemllm.model.configuration import load_decoder_config
from lit_eemllm.model.folders import CONFIG
from lit_eemllm.model.vision import TransformersVision

CANARY = "canary_of_a_model_folder"  # a module in the current folder, which is on Python's path


@pytest.fixture
def folder(tmp_path, parts, monkeypatch):
    """Parts to change, below the current folder, in which a module lies that must not be imported."""
    shutil.copytree(parts, tmp_path, dirs_exist_ok=True)
    imported = tmp_path / "imported"
    (tmp_path / f"{CANARY}.py").write_text(f"open({str(imported)!r}, 'w')\nraise SystemExit('it was imported')\n")
    shutil.copy(tmp_path / f"{CANARY}.py", tmp_path / "decoder")
    shutil.copy(tmp_path / f"{CANARY}.py", tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    assert not imported.exists()


def add(file, **values):
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))


def model_of(folder):
    return tiny.config(folder, "unused", folder / "run").model


HOSTILE = {
    "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer", "AutoProcessor"), f"{CANARY}.X"),
    "attn_implementation": f"{CANARY}/kernel",
    "_attn_implementation": f"{CANARY}/kernel",
    "_attn_implementation_internal": f"{CANARY}/kernel",
    "experts_implementation": f"{CANARY}/kernel",
    "use_kernels": True,
    "kernel_config": {"Linear": f"{CANARY}/kernel:X"},
    "fusion_config": {CANARY: True},
    "distributed_config": {"tp_size": 2},
    "transformers_weights": f"{CANARY}.bin",
    "megatron_config": {},
    "megatron_core": CANARY,
    "custom_generate": CANARY,
    "custom_pipelines": {"x": {"impl": f"{CANARY}.X"}},
    "cache_implementation": CANARY,
    "compile_config": {"backend": CANARY},
    "watermarking_config": {"x": CANARY},
    "per_layer_config": {"0": {"intermediate_size": 7}},
    "name_or_path": f"{CANARY}/model",
    "base_model_name_or_path": CANARY,
    "processor_class": f"{CANARY}.X",
    "feature_extractor_type": f"{CANARY}.X",
    "tokenizer_file": "/etc/hostname",
    "vocab_file": "/etc/hostname",
    "fast_tokenizer_files": ["../secret.json"],
    "gguf_file": "x.gguf",
    "init_inputs": [CANARY],
    "sp_model_kwargs": {"x": CANARY},
    "torch_dtype": CANARY,
    "dtype": CANARY,
    "return_dict": False,
}  # fmt: skip
"""Keys that some library imports, fetches, opens or computes otherwise for: all are as if they were not there."""


def test_keys_that_are_not_listed_are_not_there(folder):
    """All of them in all configurations at once: the model and the tokenizer are those of the clean folder, to the bit."""
    before, processor = build(model_of(folder))
    files = ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json")
    for part in ("decoder", "encoder"):
        for name in (*files, "special_tokens_map.json"):
            if (folder / part / name).exists() or part == "decoder":
                add(folder / part / name, **HOSTILE)
    torch.manual_seed(0)
    after, again = build(model_of(folder))
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys() and all(old[n].equal(new[n]) for n in old if not n.startswith("projector"))
    assert processor.fingerprint() == again.fingerprint()
    for config in (after.language_model.config, after.vision.model.config):
        assert CANARY not in json.dumps(config.to_dict(), default=str)
        assert config._attn_implementation in (None, "sdpa", "eager")
    assert CANARY not in json.dumps(after.generation_config.to_dict(), default=str)
    assert after.language_model.config.name_or_path == str(folder / "decoder")


def test_the_keys_are_those_that_the_families_have():
    """A new field of theirs is either read or, after a look at what it does, named here as left out."""
    left_out = {field.name for field in fields(PreTrainedConfig)} | {
        "pretraining_tp",
        "logit_scale_init_value",
        "perceiver_config",
        "output_router_logits",  # the last three are of no use to Llama 4's layers
        "router_aux_loss_coef",
        "router_jitter_noise",
    }
    for kind in (*FAMILIES, *TransformersVision.FAMILIES, *FORMATS, "clip", "siglip", "siglip2", "idefics2"):
        made = TransformersVision.FAMILIES[kind][0] if kind in TransformersVision.FAMILIES else CONFIG_MAPPING[kind]
        assert {field.name for field in fields(made)} - left_out - CONFIG == set(), kind


def test_windows_are_read_as_gemma_was_published(tmp_path):
    """In the words of its first config.json, before transformers wrote types of layers."""
    published = {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None, "sliding_window": 512, "sliding_window_pattern": 6,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    config, _ = load_decoder_config(str(tmp_path))
    family = FAMILIES["gemma3_text"]
    assert family.windows(config) == ([511] * 5 + [None]) * 4 + [511] * 2
    assert {kind: config.rope_parameters[kind]["rope_theta"] for kind, _ in family.rotary(config)} == {
        "sliding_attention": 10000, "full_attention": 1000000,
    }  # fmt: skip


def test_whole_models_are_read_likewise(folder):
    """EEMLLM.from_pretrained and a LLaVA."""
    model, processor = build(model_of(folder))
    model.set_mechanism(PRESETS["llava"])
    model.save_pretrained("whole")
    (folder / "llava").mkdir()
    save_vlm(model, processor.tokenizer, folder / "llava")
    for name in ("whole", "llava"):
        shutil.copy(f"{CANARY}.py", name)
        for file in (folder / name).glob("*.json"):
            if file.name != "tokenizer.json":
                add(file, **HOSTILE)
        raw = json.loads((folder / name / "config.json").read_text())
        nested = (raw["text_config"], raw["vision"]["config"]["model"] if name == "whole" else raw["vision_config"])
        for section in nested:
            section |= HOSTILE
        add(folder / name / "config.json", **raw)
    for found in (EEMLLM.from_pretrained(folder / "whole"), load_vlm(folder / "llava")[0]):
        state = found.state_dict()
        rows = (
            found.config.text_config.vocab_size - model.config.text_config.vocab_size
        )  # a LLaVA embeds the image token
        assert all(t.equal(state[n][: len(t)] if rows and t.ndim else state[n]) for n, t in model.state_dict().items())
        assert CANARY not in json.dumps(found.config.to_dict(), default=str)


def test_transformers_auto_classes_read_likewise(folder):
    """And what they read before they ask us runs nothing either."""
    model, processor = build(model_of(folder))
    model.save_pretrained("whole")
    processor.save_pretrained("whole")
    shutil.copy(f"{CANARY}.py", "whole")
    before = AutoConfig.from_pretrained("whole").to_dict()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        add(folder / "whole" / name, **{key: value for key, value in HOSTILE.items() if key != "processor_class"})
    raw = json.loads((folder / "whole" / "config.json").read_text())
    for section in (raw["text_config"], raw["vision"]["config"]["model"]):
        section |= HOSTILE
    add(folder / "whole" / "config.json", **raw)
    assert AutoConfig.from_pretrained("whole").to_dict() == before
    assert EEMLLMConfig.from_pretrained("whole").to_dict() == {**before, "_name_or_path": ""}
    found = AutoModelForImageTextToText.from_pretrained("whole")
    assert all(tensor.equal(found.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert CANARY not in json.dumps(found.generation_config.to_dict(), default=str)
    again = AutoProcessor.from_pretrained("whole", trust_remote_code=True)
    assert again.template.fingerprint() == processor.template.fingerprint()
    add(folder / "whole" / "processor_config.json", **HOSTILE)
    with pytest.raises(ValueError, match="contains custom code"):
        AutoProcessor.from_pretrained("whole")
    assert Processor.from_pretrained("whole").to_dict() == {"template": "vicuna_v1"}
    add(folder / "whole" / "processor_config.json", template="gone")
    with pytest.raises(ConfigError, match="unknown chat template 'gone'; known: jinja, plain, vicuna_v1"):
        Processor.from_pretrained("whole")


def test_options_of_the_hub_choose_the_files(tmp_path, monkeypatch):
    """A cache as the hub's client leaves it, with two revisions; each model is another one."""
    models, repo = [tiny.model(seed=seed) for seed in range(3)], tmp_path / "cache" / "models--me--mine"
    places = [repo / "snapshots" / "a", repo / "snapshots" / "b", repo / "snapshots" / "b" / "best"]
    for model, place in zip(models, places, strict=True):
        model.save_pretrained(place)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a")
    (repo / "refs" / "v1").write_text("b")
    cached = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    for model, source, options in (
        (models[0], "me/mine", cached),
        (models[1], "me/mine", {**cached, "revision": "v1"}),
        (models[2], "me/mine", {**cached, "revision": "v1", "subfolder": "best"}),
        (models[2], places[1], {"subfolder": "best"}),
    ):
        found, info = EEMLLM.from_pretrained(source, **options, output_loading_info=True)
        assert not info["missing_keys"] and found.name_or_path == found.config.name_or_path == str(source)
        assert all(tensor.equal(found.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ConfigError, match=r"^EEMLLM\.from_pretrained: EEMLLM cannot load 'me/mine': .*"):
        EEMLLM.from_pretrained("me/mine", **cached, revision="v2")
    asked = {}
    monkeypatch.setattr("transformers.utils.cached_file", lambda *_, **options: asked.update(options))
    with pytest.raises(
        ConfigError, match=r"the cache of the hub holds no config\.json of it, and HF_HUB_OFFLINE is set"
    ):
        EEMLLM.from_pretrained("me/mine", token="secret", force_download=True, proxies={"https": "x"})
    assert (asked["token"], asked["force_download"], asked["proxies"]) == ("secret", True, {"https": "x"})


def test_an_adapter_in_a_base_folder_is_refused(folder):
    adapter = {"peft_type": "LORA", "megatron_config": {}, "megatron_core": CANARY, "base_model_name_or_path": "x",
               "target_modules": ["q_proj"], "auto_mapping": {"parent_library": CANARY, "base_model_class": "X"}}  # fmt: skip
    for part, key in (("decoder", r"model\.decoder"), ("encoder", r"model\.vision\.path")):
        add(folder / part / "adapter_config.json", **adapter)
        with pytest.raises(
            ConfigError, match=rf"^{key}: \S*{part} holds an adapter .adapter_config.json., expected a whole model"
        ):
            build(model_of(folder))
        (folder / part / "adapter_config.json").unlink()
    model = build(model_of(folder))[0]
    model.save_pretrained("whole")
    add(folder / "whole" / "adapter_config.json", **adapter)
    with pytest.raises(ConfigError, match=r"whole holds an adapter"):
        EEMLLM.from_pretrained("whole")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("decoder/config.json", {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config: its weights are quantised"),
        ("decoder/config.json", {"num_hidden_layers": 10**9}, r"num_hidden_layers: found 1000000000, expected a whole number from 1 to 512"),
        ("decoder/config.json", {"hidden_size": 2.5}, r"hidden_size: found 2\.5, expected a whole number"),
        ("decoder/config.json", {"hidden_size": 32768, "head_dim": 8192}, r"describes [\d,]+ parameters, its files hold [\d,]+\. Copy"),
        ("decoder/config.json", {"rms_norm_eps": "x"}, r"AutoConfig cannot load .*rms_norm_eps"),
        ("decoder/tokenizer_config.json", {"tokenizer_class": f"{CANARY}.X"}, rf"tokenizer_class: found '{CANARY}\.X', expected one of"),
        ("decoder/tokenizer_config.json", {"added_tokens_decoder": {"9" * 12: {"content": "x"}}}, r"added_tokens_decoder: found '9+'"),
        ("decoder/tokenizer.json", {"model": {"type": "BPE"}}, r"AutoTokenizer cannot load"),
        ("encoder/preprocessor_config.json", {"size": {"height": 20, "width": 20}}, r"gives images of 20 x 20 pixels .* reads 16 x 16"),
        ("encoder/preprocessor_config.json", {"size": {"height": "16", "width": "16"}}, r"image height: found '16', expected"),
        ("encoder/preprocessor_config.json", {"image_mean": 3}, r"TypeError"),
    ],
)  # fmt: skip
def test_wrong_values_are_named_with_key_and_folder(folder, file, values, message):
    add(folder / file, **values)
    with pytest.raises((ConfigError, CheckpointError), match=message) as raised:
        build(model_of(folder))
    assert str(raised.value).startswith(("model.decoder: ", "model.vision.path: ", "model.tokenizer: "))
    assert str(folder / file.partition("/")[0]) in str(raised.value)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_download_that_was_cut_is_named(folder, size):
    file = folder / "decoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(
        CheckpointError, match=r"^model\.decoder: .*decoder/model\.safetensors: not readable: .*Copy it again"
    ):
        build(model_of(folder))


def test_shards_that_are_missing_or_elsewhere_are_named(folder):
    decoder = folder / "decoder"
    tensors = load_file(decoder / "model.safetensors")
    names = sorted(tensors)
    (decoder / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, decoder / file, {"format": "pt"})
    index = decoder / "model.safetensors.index.json"
    where = {name: file for file, part in files.items() for name in part}
    add(index, weight_map=where)
    assert build(model_of(folder))[0].state_dict()[f"language_model.{names[-1]}"].equal(tensors[names[-1]])
    for found in ("../encoder/model.safetensors", str(folder / "encoder" / "model.safetensors"), "pytorch_model.bin"):
        add(index, weight_map={**where, names[0]: found})
        with pytest.raises(
            CheckpointError, match=r"index\.json: weight_map: found .*, expected names of files beside it"
        ):
            build(model_of(folder))
    add(index, weight_map=where)
    (decoder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"decoder lacks 1 of 2 files of weights: model-00002-of-00002"):
        build(model_of(folder))


def test_a_panic_of_the_tokenizer_is_an_error_like_others(folder):
    """In Rust, and no Exception in Python: of a normaliser as it is read, and as it is used."""
    for charsmap in (b"\0\0\0", b"\x08\0\0\0" + b"\xff" * 8 + b"abc"):
        add(folder / "decoder" / "tokenizer.json",
            normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})  # fmt: skip
        with pytest.raises(ConfigError, match=r"^model\.tokenizer: \w+ cannot load '.*decoder': PanicException: "):
            build_processor(model_of(folder))


def test_a_clean_tokenizer_is_the_one_of_transformers(folder, shared):
    """Real ones, of other classes too."""
    for path in (shared / "weights" / "stories15m", folder / "decoder"):
        theirs = AutoTokenizer.from_pretrained(path)
        ours = build_processor(tiny.config(folder, "x", folder / "run", f"model.tokenizer={path}").model)[0].tokenizer
        assert type(ours) is type(theirs) and ours.name_or_path == str(path)
        text = "What's  this? 1234 ~é\n</s>"
        assert ours(text).input_ids == theirs(text).input_ids


def test_weights_that_a_folder_lacks_are_not_what_memory_held(tmp_path):
    """transformers makes room for them and tells; what they hold is then anything, even no number."""
    tiny.model("llama-gqa", "flamingo").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    for part in ("projector.", "gated.0."):
        save_file({n: x for n, x in whole.items() if not n.startswith(part)}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"lacks \d+ tensors of a EEMLLM, such as {part}"):
            EEMLLM.from_pretrained(tmp_path)
