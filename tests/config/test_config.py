"""The configuration: precedence, references resolved last, every mistake at once, nothing executed, round trip."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from lightning import Trainer

from lit_eemllm import errors
from lit_eemllm.config import config_hash, is_key, keys, load, load_config, nearest_key, to_yaml
from lit_eemllm.config.keys import FOR_TRAINER, NOT_FOR_TRAINER, Config, check
from lit_eemllm.config.load import MAX_FILES
from lit_eemllm.errors import ConfigError
from lit_eemllm.names import check_names, check_options
from lit_eemllm.shipped import nowhere

GOOD = """
model: {decoder: some/decoder, vision: {path: some/encoder}}
data: {train: recipe.yaml}
optim: {lr: 1e-3, max_steps: 100}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files into an empty current directory: write(name=text) -> paths in that order."""
    monkeypatch.chdir(tmp_path)

    def write(**texts: str) -> list[Path]:
        paths = [Path(f"{name}.yaml") for name in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            path.write_text(text, encoding="utf-8")
        return paths

    return write


def mistakes(files, overrides=(), **keywords) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(files, overrides, **keywords)
    head, *lines = str(caught.value).split("\n  ")
    assert head.startswith(f"{len(lines)} mistakes" if len(lines) > 1 else "a mistake")
    return lines


def only(files, overrides=(), **keywords) -> str:
    lines = mistakes(files, overrides, **keywords)
    assert len(lines) == 1, lines
    return lines[0]


def test_defaults_then_files_then_overrides(write):
    files = write(
        a=GOOD + "seed: 1\nout: from-a\ntrainer: {devices: 2, strategy: {name: ddp, find: true}}\neval: {control: 3}\n",
        b="seed: 2\noptim: {betas: [0.8, 0.9]}\ntrainer: {strategy: {find: false}}\n",
    )
    config = load_config(files, ["seed=3", "seed=4", "optim.betas=[0.5, 0.6]", "trainer.strategy.extra=x"])
    assert isinstance(config, Config)
    assert config.seed == 4
    assert config.out == "from-a"
    assert config.optim.betas == [0.5, 0.6]  # a list is replaced, not merged
    assert config.optim.weight_decay == Config().optim.weight_decay
    assert config.trainer == {"devices": 2, "strategy": {"name": "ddp", "find": False, "extra": "x"}}
    assert config.eval.control == 3
    assert load_config(files[:1]).seed == 1
    assert load_config(files).seed == 2
    assert load_config([*files, files[0]]).seed == 1  # a file named twice on the command line wins where it stands last


def test_references_are_resolved_after_all_files_and_overrides(write):
    files = write(
        a=GOOD + "out: runs/${model.mechanism.preset}/${seed}\neval: {samples: '${trainer.limit}'}\n",
        b="seed: 2\nmodel: {tokenizer: '${model.decoder}'}\noptim: {projector_lr: '${optim.lr}'}\n"
        "trainer: {limit: 7}\n",
    )
    config = load_config(files)
    assert (config.out, config.eval.samples) == ("runs/ee_mllm/2", 7)
    config = load_config(files, ["model.mechanism.preset=llava", "seed=5", "optim.lr=0.5", "trainer.limit=8"])
    assert config.out == "runs/llava/5"
    assert config.optim.projector_lr == 0.5
    assert config.model.tokenizer == "some/decoder"
    assert config.eval.samples == 8
    config = load_config(files, ["optim.vision_lr=${optim.eps}", "optim.tuning.vision=full"])
    assert config.optim.vision_lr == config.optim.eps


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-3", "optim.lr", 0.001),
        ("optim.lr=2E+1", "optim.lr", 20.0),
        ("optim.lr=3", "optim.lr", 3.0),
        ("data.max_image_pixels=1_000", "data.max_image_pixels", 1000),
        ("model.mechanism.aligner.ffn=off", "model.mechanism.aligner.ffn", False),
        ("model.mechanism.aligner.ffn=Yes", "model.mechanism.aligner.ffn", True),
        ("model.mechanism.aligner.ffn=", "model.mechanism.aligner.ffn", None),
        ("model.mechanism.dense_layers=none", "model.mechanism.dense_layers", "none"),
        ("model.mechanism.dense_layers=[0, 2]", "model.mechanism.dense_layers", [0, 2]),
        ("model.mechanism={preset: llava, aligner: {value: no}}", "model.mechanism.aligner.value", False),
        ("optim.clip_grad_norm=null", "optim.clip_grad_norm", None),
        # text stays as it is written, whatever YAML would make of it elsewhere
        ("out=1.50", "out", "1.50"),
        ("out=no", "out", "no"),
        ("out=0123", "out", "0123"),
        ("out=2024-01-01", "out", "2024-01-01"),
        ("out='runs/a=b: c'", "out", "runs/a=b: c"),
        ("data.val=~", "data.val", None),
        ("trainer.limit=1e-3", "trainer.limit", 0.001),
        # and where the schema does not say, 1:30 is no number of seconds and 010 no octal
        ("trainer.limit=1:30", "trainer.limit", "1:30"),
        ("trainer.limit=010", "trainer.limit", "010"),
    ],
)
def test_values(write, override, key, value):
    config = asdict(load_config(write(a=GOOD), [override]))
    for part in key.split("."):
        config = config[part]
    assert config == value and type(config) is type(value)
    # the same text in a file
    section, _, text = override.partition("=")
    nested = "".join(f"{'  ' * i}{part}:\n" for i, part in enumerate(section.split(".")))
    (path,) = write(b=f"{nested.rstrip()} {text}\n")
    assert asdict(load_config(["a.yaml", path])) == asdict(load_config(["a.yaml"], [override]))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("optim.wd", "optim.weight_decay"),
        ("lora_rank", "optim.lora.r"),
        ("num_workers", "data.workers"),
        ("data.batch", "eval.batch_size"),
        ("steps", "optim.max_steps"),
        ("epochs", "optim.epochs"),
        ("model.preset", "model.mechanism.preset"),
        ("mechanism.preset", "model.mechanism.preset"),
        ("optim.tuning.vison", "optim.tuning.vision"),  # not model.vision
        ("gradient_checkpointing", "optim.activation_checkpointing"),
        ("modle.vision.path", "model.vision.path"),
        ("Seed", "seed"),
        ("ffn", "model.mechanism.aligner.ffn"),
        ("model.lr", "optim.lr"),
        ("vison.path", "model.vision.path"),  # there is no section of that name
    ],
)
def test_the_key_that_was_meant(write, key, meant):
    assert only(write(a=GOOD), [f"{key}=1"]) == f"command line: {key}: unknown key; did you mean {meant}?"


@pytest.mark.parametrize("key", ["devices", "data.foo", "model.lm_head", "x.y", "_", "a", "data.path", "output"])
def test_no_key_is_guessed_that_is_not_like_it(write, key):
    section = {
        "data.foo": "data has: train,",
        "data.path": "data has: train,",
        "model.lm_head": "model has: decoder,",
    }.get(key, "the top level has: ")
    assert f"{key}: unknown key; {section}" in only(write(a=GOOD), [f"{key}=1"])


def test_looking_for_what_was_meant_has_an_end(write, monkeypatch):
    """Many unknown keys, or long ones, in a file of the accepted size."""
    compared = []
    matcher = errors.SequenceMatcher
    monkeypatch.setattr(errors, "SequenceMatcher", lambda _, a, b: compared.append(len(a + b)) or matcher(None, a, b))
    files = write(a=GOOD, b="".join(f"k{i:04}x: 1\n" for i in range(2000)))
    lines = mistakes(files)
    assert len(lines) == 2000 and lines[0].startswith("b.yaml:1: k0000x: unknown key; ")
    assert lines[19].endswith(" eval") and lines[20] == "b.yaml:21: k0020x: unknown key"
    assert len(compared) < 20_000
    assert nearest_key("x" * 200_000) and max(compared) <= 200


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.mechanism.preset=ee_mlm", "or withdrawal; did you mean ee_mllm?"),
        ("model.attention=spda", "did you mean sdpa?; one of your own needs --import FILE"),
        ("model.template=vicuna", "found 'vicuna', expected jinja or plain or vicuna_v1; did you mean vicuna_v1?"),
        ("model.dtype=bfloat", "found 'bfloat', expected float32 or bfloat16; did you mean bfloat16?"),
        ("optim.schedule=step", "found 'step', expected cosine or linear or constant"),
        ("trainer.device=1", "lightning.Trainer has no such argument; did you mean devices?"),
    ],
)
def test_the_value_that_was_meant(write, override, expected):
    assert only(write(a=GOOD), [override], checks=[check_names]).endswith(expected)


def test_every_mistake_at_once_with_file_line_and_nearest_name(write):
    files = write(
        a="""\
optim:
  lr: fast
  max_step: 10
  warmup_ratio: 1.5
  tuning: {projector: some}
model:
  decodr: x
  mechanism: {aligner: {ffn: 3}, dense_layers: some}
  vision: {path: v, policy: squash}
data: {workers: many, truncation: cut, pack_samples: 0, max_length: 9000}
""",
        b="optimizer: {lr: 1}\nseed: -1\neval: 3\nbetas: [1]\n",
    )
    assert sorted(mistakes(files, ["optim.betas=[1, x]", "quality=3", "eval.batch_size=0", "=3"])) == sorted(
        [
            "a.yaml:2: optim.lr: found 'fast' (text), expected a number",
            "a.yaml:3: optim.max_step: unknown key; did you mean optim.max_steps?",
            "optim.max_steps: required, but not set; add it to a file or write optim.max_steps=VALUE or optim.epochs=VALUE",
            "a.yaml:4: optim.warmup_ratio: found 1.5, expected 0 to 1",
            "a.yaml:5: optim.tuning.projector: found 'some', expected frozen or full or lora",
            "a.yaml:7: model.decodr: unknown key; did you mean model.decoder?",
            "model.decoder: required, but not set; add it to a file or write model.decoder=VALUE",
            "a.yaml:8: model.mechanism.aligner.ffn: found 3 (a whole number), expected true or false or null",
            "a.yaml:8: model.mechanism.dense_layers: found 'some', expected all, none, null or a list of distinct "
            "layer numbers such as [0, 1]",
            "a.yaml:9: model.vision.policy: found 'squash', expected pad or resize or crop or anyres or tiles or split or native",
            "a.yaml:10: data.workers: found 'many' (text), expected a whole number",
            "a.yaml:10: data.truncation: found 'cut', expected drop or truncate or error",
            "a.yaml:10: data.pack_samples: found 0, expected 1 or more",
            "a.yaml:10: data.max_length: 9000 tokens do not fit in a pack of data.pack_tokens=4096",
            "data.train: required, but not set; add it to a file or write data.train=VALUE",
            "b.yaml:1: optimizer: unknown key; did you mean optim?",
            "b.yaml:2: seed: found -1, expected 0 to 4294967295",
            "b.yaml:3: eval: found 3 (a whole number), expected a section",
            "b.yaml:4: betas: unknown key; did you mean optim.betas?",
            "command line: optim.betas: found [1, 'x'] (a list), expected a list of numbers",
            "command line: quality: unknown key; the top level has: seed, out, resume, init_from, model, data, optim, "
            "logger, trainer, eval",
            "command line: eval.batch_size: found 0, expected 1 or more",
            "command line: =3: expected key=value",
        ]
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.lr=.nan"], "optim.lr: found nan, expected more than 0"),
        (["optim.lr=.inf"], "optim.lr: found inf, expected more than 0"),
        (["optim.lr=0"], "optim.lr: found 0.0, expected more than 0"),
        (["optim.lr=true"], "optim.lr: found True (true or false), expected a number"),
        (["optim.weight_decay=-1"], "optim.weight_decay: found -1.0, expected 0 or more"),
        (["optim.betas=[0.9, 1.0]"], "optim.betas: found [0.9, 1.0], expected two numbers from 0 to below 1"),
        (["optim.betas=[0.9]"], "optim.betas: found [0.9], expected two numbers from 0 to below 1"),
        (["optim.max_steps=1.5"], "optim.max_steps: found 1.5 (a number), expected a whole number"),
        (["optim.max_steps=null"], "optim.max_steps: required, but not set; add it"),
        (["optim.schedule=cos"], "optim.schedule: found 'cos', expected cosine or linear or constant"),
        (["model.mechanism.dense_layers=[0, 0]"], "model.mechanism.dense_layers: found [0, 0], expected all"),
        (["model.mechanism.dense_layers=[true]"], "model.mechanism.dense_layers: found [True], expected all"),
        (["model.vision.path=null"], "model.vision.path: required by model.vision.encoder=transformers"),
        (["model.decoder=[a]"], "model.decoder: found ['a'] (a list), expected text"),
        (["out={a: b}"], "out: found {'a': 'b'} (a section), expected text"),
        (["out=' '"], "out: found ' ', expected text that is not empty"),
        (["data.pack_tokens=100"], "data.max_length: 2048 tokens do not fit in a pack of data.pack_tokens=100"),
        (["optim.tuning.projector=frozen"], "optim.tuning: vision, projector and llm are all frozen"),
        (["optim.vision_lr=1"], "optim.vision_lr: has no effect: optim.tuning.vision is frozen"),
        (
            ["optim.projector_lr=1", "optim.tuning={projector: frozen, llm: full}"],
            "optim.projector_lr: has no effect: optim.tuning.projector is frozen",
        ),
        (["optim.activation_offload=true"], "optim.activation_offload: has no effect without optim.activation_check"),
        (
            ["optim.states=8bit", "trainer.strategy=fsdp2"],
            "optim.states: found 8bit together with trainer.strategy=fsdp2, and is proved with auto and ddp alone",
        ),
        (
            ["logger=[csv, wandb, tensorbord]"],
            "logger: found 'tensorbord', expected csv or tensorboard or wandb or mlflow; did you mean tens",
        ),
        (
            ["logger=[wandb]"],
            "logger: found ['wandb'], expected csv, which `report` and `sweep` read, and others once each",
        ),
        (["logger=[csv, csv]"], "logger: found ['csv', 'csv'], expected csv"),
        (["optim.patience=0"], "optim.patience: found 0, expected 1 or more"),
        (["optim.patience=2"], "optim.patience: belongs to validations, of which there are none: set data.val"),
        (["eval.during_training=0"], "eval.during_training: found 0, expected 1 or more"),
        (["eval.during_training=9"], "eval.during_training: belongs to validations, of which there are none"),
        (["optim.samples_every=9"], "optim.samples_every: there are no questions to ask: set data.val, eval.data or"),
        (["trainer.max_steps=5"], "trainer.max_steps: cannot be set here: set optim.max_steps"),
        (["trainer.gradient_clip_val=5"], "trainer.gradient_clip_val: cannot be set here: set optim.clip_grad"),
        (["trainer=5"], "trainer: found 5 (a whole number), expected a section"),
        (["optim=${model}"], "optim: found '${model}' (text), expected a section"),
        (["seed"], "seed: expected key=value"),
        (["seed.=1"], "seed.=1: expected key=value"),
        (["seed=#1"], "seed: found null, expected a whole number"),
        (["optim.lr.x=1"], "optim.lr.x: unknown key; did you mean optim.lr?"),
        (["data.learning=1"], "data.learning: unknown key; data has: train, val, pack_tokens,"),
        (["defaults=[a.yaml]"], "defaults: unknown key"),
        (["seed=[1"], "seed: not valid YAML: "),
        (["seed=${modle.decoder}"], "seed: ${modle.decoder} refers to modle.decoder, which is not a key; did you mean"),
        (["trainer.a=${trainer.b}"], "trainer.a: ${trainer.b} refers to trainer.b, which is not a key"),
        (["seed=${model.decoder}"], "seed: ${model.decoder} does not give a whole number"),
        (["out=${model}"], "out: ${model} does not give text"),
        (["trainer.x=???"], "trainer.x: ??? marks a required key of the schema; write a value"),
        (["optim.betas=[0.1, '???']"], "optim.betas: ??? marks a required key of the schema; write a value"),
    ],
)
def test_one_mistake(write, overrides, expected):
    line = only(write(a=GOOD), overrides)
    assert line.removeprefix("command line: ").removeprefix("a.yaml:3: ").startswith(expected)


@pytest.mark.parametrize("other", ["model.quantization=nf4", "model.liger=true", "optim.lora.dora=true"])
def test_what_no_graph_can_hold_is_not_compiled(write, other):
    options = ["model.compile=true", other, "optim.tuning.llm=lora"]
    key = other.partition("=")[0]
    assert f"model.compile: found true together with {key}, " in only(write(a=GOOD), options)
    assert load_config(write(a=GOOD), [*options[:1], options[2]]).model.compile


def test_consequences_of_a_mistake_are_not_listed(write):
    files = write(a=GOOD + "out: ${optim.schedule}\nseed: '${trainer.a}'\ntrainer: {a: '${trainer.no}'}\n")
    lines = mistakes(
        files,
        ["data.pack_tokens=big", "data.max_length=9000", "optim.max_steps=???", "data.workers=${optim.max_steps}"],
    )
    assert [line.partition(": ")[2].partition(":")[0] for line in lines[:1]] == ["data.pack_tokens"]
    assert len(lines) == 3, lines
    assert sum("optim.max_steps: required" in line for line in lines) == 1
    assert sum("trainer.a: ${trainer.no} refers to" in line for line in lines) == 1


def test_circular_references_are_named(write):
    lines = mistakes(write(a=GOOD), ["optim.lr=${optim.eps}", "optim.eps=${optim.lr}"])
    assert lines[0] == "command line: optim.lr: ${optim.eps} cannot be resolved: Recursive interpolation detected"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nout: x\nseed: 2\n", "x.yaml:3: seed: set twice, first in line 1; remove one"),
        ("eval:\n  samples: 1\n  samples: 1\n", "x.yaml:3: eval.samples: set twice, first in line 2; remove one"),
        ("seed: 1\n out: 2\n", "x.yaml:2: not valid YAML: "),
        (
            "eval: {samples: ${seed}}\n",
            "x.yaml:1: not valid YAML: expected ',' or '}', but got '{'; inside [] or {} write",
        ),
        ("optim.lr: 1\n", "x.yaml:1: expected a word before the colon; write a key `a.b` as `a:` with `b:` below it"),
        ("[a]: 1\n", "x.yaml:1: expected a word before the colon"),
        ("- seed\n", "x.yaml:1: found ['seed'] (a list), expected a section"),
        ("seed: 1\n---\nseed: 2\n", "x.yaml:2: not valid YAML: but found another document"),
        ("out: &a x\ninit_from: *a\n", "x.yaml:2: not valid YAML: aliases (*name) are not allowed"),
        (
            "seed: !!python/object/apply:os.system ['touch ran']\n",
            "x.yaml:1: not valid YAML: the tag tag:yaml.org,2002",
        ),
        ("out: !!binary aGk=\n", "x.yaml:1: not valid YAML: the tag tag:yaml.org,2002:binary is not allowed"),
        ("trainer: " + "[" * 5000, "x.yaml:1: not valid YAML: more than 20 levels of nesting"),
        ("out: \x00\n", "x.yaml: not valid YAML: "),
        ("# " + "x" * 70_000, "x.yaml: more than 65536 bytes: not a configuration"),
        ("defaults: {a: b}\n", "x.yaml:1: defaults: expected a list of files, such as [base.yaml]"),
        (
            "defaults: [none.yaml]\n",
            "none.yaml: no such file (named under defaults of x.yaml)",
        ),
        (
            "defaults: [/etc/passwd]\n",
            "/etc/passwd: a configuration file ends in .yaml or .yml (named under defaults of",
        ),
    ],
)
def test_broken_files(write, text, expected):
    (good, broken) = write(a=GOOD, x=text)
    assert only([good, broken]).startswith(expected)
    assert not Path("ran").exists()


def test_a_file_that_is_not_there_or_empty(write):
    (good, empty) = write(a=GOOD, empty="# nothing\n")
    for gone in ("gone.yaml", "runs/nope", "n" * 300):
        for files in ([gone], [good, gone]):  # what the file would have set is not asked for
            assert only(files, checks=[check_names]).startswith(
                f"{gone}: no such run directory or file; looked for in "
            )
    assert mistakes(["gone.yaml", "away.yaml"], ["sead=1"]) == [
        f"gone.yaml: no such run directory or file{nowhere('gone.yaml')}",
        f"away.yaml: no such run directory or file{nowhere('away.yaml')}",
        "command line: sead: unknown key; did you mean seed?",
    ]
    assert load_config([good, empty], ["seed=3"]).seed == 3
    (sections,) = write(sections="model:\noptim:\n  # lr: 3\ntrainer:\n")
    assert load_config([good, sections]) == load_config([good])


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:HOME}",
        "x${oc.env:HOME,none}",
        "${oc.decode:'{a: 1}'}",
        "${oc.create:${model}}",
        "${oc.select:seed}",
        "${${out}:HOME}",
        "${model.${out}}",
        "\\${seed}",
        "${ oc.env:HOME}",
        "${.seed}",
        "${seed",
    ],
)
@pytest.mark.parametrize("key", ["data.val", "trainer.x"])
def test_only_plain_references(write, monkeypatch, key, value):
    monkeypatch.setenv("HOME", "secret")
    (path,) = write(a=GOOD)
    nested = {key.partition(".")[0]: {key.partition(".")[2]: [value] if key == "trainer.x" else value}}
    Path("b.yaml").write_text(yaml.safe_dump(nested), encoding="utf-8")
    for line in (only([path, "b.yaml"]), only([path], [f"{key}={yaml.safe_dump(value).partition(chr(10))[0]}"])):
        assert f": {key}: found {value!r}; only a plain reference such as ${{optim.lr}} is allowed" in line
        assert "secret" not in line


def test_a_resolver_that_someone_registered_is_not_run(write):
    from omegaconf import OmegaConf

    ran = []
    OmegaConf.register_resolver("lit_test", lambda: ran.append(1))
    try:
        assert "only a plain reference" in only(write(a=GOOD), ["out='${lit_test:}'"])
    finally:
        OmegaConf.clear_resolver("lit_test")
    assert not ran


def test_defaults_are_relative_to_their_file_and_applied_once(write):
    Path("base").mkdir()
    Path("base/common.yaml").write_text(GOOD + "seed: 1\nout: common\neval: {control: 1}\n", encoding="utf-8")
    Path("base/left.yaml").write_text("defaults: [common.yaml]\nseed: 2\n", encoding="utf-8")
    Path("base/right.yaml").write_text("defaults: common.yaml\nout: right\n", encoding="utf-8")
    (top,) = write(top="eval: {control: 5}\ndefaults: [base/left.yaml, base/right.yaml]\n")
    config = load_config([top])
    # common, left, right, top: right's own `defaults` do not take back what left says
    assert (config.seed, config.out, config.eval.control) == (2, "right", 5)
    assert load_config([top, "base/common.yaml"]).seed == 1  # named on the command line, it counts where it stands


def test_defaults_in_a_circle(write):
    files = write(a="defaults: [b.yaml]\n" + GOOD, b="defaults: [c.yaml]\n", c="defaults: [a.yaml]\n")
    assert only(files[:1]).endswith("circle: a.yaml -> b.yaml -> c.yaml -> a.yaml")
    assert only(files[1:2]).endswith("circle: b.yaml -> c.yaml -> a.yaml -> b.yaml")


def test_many_defaults_are_refused(write):
    (good,) = write(a=GOOD)
    for i in range(MAX_FILES + 1):
        Path(f"n{i}.yaml").write_text(f"defaults: [n{i + 1}.yaml]\n", encoding="utf-8")
    assert "built from more than 64 files (named under defaults of n62.yaml)" in only([good, "n0.yaml"])


def test_round_trip_and_hash(write):
    (good,) = write(a=GOOD)
    awkward = [
        "out='runs/a: b #c \"quoted\" Größe'",
        "init_from='1e-3'",
        "data.val='null'",
        "optim.eps=1e-30",
        "model.mechanism.dense_layers=[0, 3]",
        "model.mechanism.aligner.value=off",
        "trainer={a: '1e-3', b: 1e-3, c: 'yes', d: '', e: {f: [1, {g: null}], h: {}}, i: '010'}",
        "trainer.j='2024-01-01'",
        "trainer.k='~'",
    ]
    config = load_config([good], awkward)
    assert config.data.val == "null" and config.trainer["a"] == "1e-3" and config.trainer["e"]["h"] == {}
    for comments in (False, True):
        (path,) = write(saved=to_yaml(config, comments))
        assert load_config([path]) == config
        assert config_hash(load_config([path])) == config_hash(config)
    # ordinary YAML readers agree, but for text that YAML 1.1 has no float for
    assert yaml.safe_load(to_yaml(config)) == asdict(config)
    assert config_hash(load_config([good], [*awkward, "seed=1"])) != config_hash(config)
    orders = [config_hash(load_config([good], [f"trainer={text}"])) for text in ("{a: 1, b: 2}", "{b: 2, a: 1}")]
    assert orders[0] == orders[1]
    assert re.fullmatch("[0-9a-f]{16}", config_hash(config))


def test_every_key_is_explained():
    config = load_config(
        [], ["optim.lr=1", "optim.max_steps=1", "model.decoder=a", "model.vision.path=b", "data.train=c"]
    )
    text = to_yaml(config, comments=True).splitlines()

    def keys(section, indent):
        for item in fields(section):
            value = getattr(section, item.name)
            if is_dataclass(value):
                yield from keys(value, indent + "  ")
            else:
                yield f"{indent}{item.name}: "

    for key in keys(config, ""):
        index = next(i for i, line in enumerate(text) if line.startswith(key))
        assert re.match(r" *# \S.*\.$", text[index - 1]), key


def test_a_key_of_an_older_version_is_read_under_its_new_name(write):
    files = write(good=GOOD, old="model: {mechanism: {gated: {every: 2, heads: null}}}")
    for words, every in (
        ([], 2),
        (["model.mechanism.gated.every=3"], 3),
        (["model.mechanism.options.gated.every=4"], 4),
    ):
        assert load_config(files, words).model.mechanism.options == {"gated": {"every": every, "heads": None}}


def test_options_of_a_mechanism_are_checked_with_all_else(write):
    own = """
model:
  mechanism:
    preset: flamingo
    options: {gated: {every: two, evry: 1}, other: 1}
  nonsense: 1
"""
    assert mistakes(write(good=GOOD, own=own), checks=[check_options]) == [
        "own.yaml:6: model.nonsense: unknown key; model has: decoder, tokenizer, vision, connector, mechanism, attention, template, dtype, "
        "quantization, liger, compile, fp8",
        "own.yaml:5: model.mechanism.options.gated.every: found 'two', expected a whole number",
        "own.yaml:5: model.mechanism.options.gated.evry: the preset flamingo has no such option; found 'evry', expected every or latents or heads or "
        "head_size or depth or immediate; did you mean every?",
        "own.yaml:5: model.mechanism.options.other: the preset flamingo has no such option; found 'other', expected gated",
    ]
    for option, told in (
        ("gated=1", "gated: found 1, expected a section"),
        ("gated.every=true", "every: found True, expected a whole number"),
    ):
        words = ["model.mechanism.preset=flamingo", f"model.mechanism.options.{option}"]
        assert told in only(write(good=GOOD), words, checks=[check_options])
    assert "use preset=flamingo" in only(
        write(good=GOOD), ["model.mechanism.options.gated.every=1"], checks=[check_options]
    )


def test_checks_of_names(write):
    files = write(a=GOOD)
    load_config(files, checks=[check_names])
    lines = mistakes(
        files,
        [
            "model.mechanism.preset=lava",
            "model.attention=x",
            "model.template=y",
            "model.vision.encoder=z",
            "trainer.device=1",
        ],
        checks=[check_names, lambda config: [(("seed",), f"found {config.seed}, and {config.optim.lr}")]],
    )
    assert [line.partition(": ")[2].partition(":")[0] for line in lines[:-1]] == [
        "model.mechanism.preset",
        "model.attention",
        "model.template",
        "model.vision.encoder",
        "trainer.device",
    ]
    assert "ee_mllm or ee_mllm_f or fastv" in lines[0] and "reference" in lines[1] and "vicuna_v1" in lines[2]
    assert all("--import FILE" in line for line in (lines[1], lines[3]))
    assert "transformers" in lines[3] and "did you mean devices?" in lines[4]
    assert lines[-1] == "seed: found 0, and 0.001"


def test_check_of_a_configuration_made_in_python():
    config = Config()
    config.optim.lr, config.optim.max_steps, config.model.vision.path = -1.0, 10, "x"
    assert check(config) == [(("optim.lr",), "found -1.0, expected more than 0")]


def test_every_argument_of_the_trainer_is_settled(write) -> None:
    """Set and tested (`tests/training/test_trainer_arguments.py` and those of strategies, devices and precision), or refused with what to do."""
    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert {*FOR_TRAINER, *NOT_FOR_TRAINER} == arguments and not {*FOR_TRAINER} & {*NOT_FOR_TRAINER}
    keys = {key for reason in NOT_FOR_TRAINER.values() for key in re.findall(r"(?:optim|data|eval)(?:\.\w+)+", reason)}
    assert len(keys) > 5 and all(is_key(key) for key in keys)
    for name, reason in NOT_FOR_TRAINER.items():
        assert only(write(a=GOOD), [f"trainer.{name}=1"]).endswith(f"trainer.{name}: cannot be set here: {reason}")


def test_an_argument_that_only_a_newer_trainer_has_is_refused(write, monkeypatch) -> None:
    monkeypatch.setattr("lit_eemllm.names.FOR_TRAINER", ("devices",))
    found = mistakes(write(a=GOOD), ["trainer.benchmark=true"], checks=[check_names])
    assert (
        "command line: trainer.benchmark: cannot be set here; arguments of lightning.Trainer that can be: devices"
        in found
    )


def test_the_meaning_of_a_key_names_the_words_that_it_takes():
    meanings, taken = load._comments(), {}
    for key, bound in keys._BOUNDS.items():
        section, _, name = key.rpartition(".")
        if load._KINDS[key] in (str, str | None) and (problem := bound("?")):
            taken[key] = problem.partition(", expected ")[2].split(" or ")
            meaning = meanings[load._KINDS[section].__name__, name]
            assert [word for word in taken[key] if f'"{word}"' not in meaning] == [], key
    assert len(taken) == 13 and taken["model.dtype"] == ["float32", "bfloat16"]
