"""Hundreds of malformed model folders from a seeded fuzzer: decoders, encoders, tokenizers, processors, whole models, LLaVAs.

Each is either used, down to a forward pass, or refused by a message that names the key, the folder or the file; nothing hangs, takes
memory without end, or is executed. FUZZ_SEED and FUZZ_TIMES take it further.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fuzz_util import CANARY, ODD_TEXT, SEED, TIMES, bounded, flip, nothing_is_executed, odd, warp  # noqa: F401 a fixture of each test
from PIL import Image

from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.formats.vlm import load_vlm, save_vlm
from lit_eemllm.inputs.conversation import IMAGE, Conversation, Turn
from lit_eemllm.mechanisms import PRESETS
from lit_eemllm.model import EEMLLM
from lit_eemllm.model.build import build_processor
from lit_eemllm.model.vision import TransformersVision

HOSTILE = {
    "auto_map": {"AutoConfig": "canary.Config", "AutoModelForCausalLM": "canary.Model", "AutoTokenizer": ["canary.T", "canary.T"]},
    "attn_implementation": "canary/attention",
    "_attn_implementation": "canary/attention",
    "quantization_config": {"quant_method": "canary", "load_in_4bit": True, "modules_to_not_convert": None},
    "tokenizer_class": "canary.Tokenizer",
    "model_type": "canary",
    "kernel_config": {"Linear": "canary/linear"},
    "fusion_config": {"canary": True},
    "name_or_path": "canary/model",
    "transformers_weights": "canary.bin",
    "tokenizer_file": "/etc/passwd",
    "vocab_file": "../../etc/passwd",
    "chat_template": "{{ ''.__class__.__mro__ }}",
    "dtype": "load",
    "per_layer_config": {"0": {"hidden_size": 9}},
    "added_tokens_decoder": {"99999999999": {"content": "x"}},
}  # fmt: skip
NUMBERS = (0, -1, 1, 3, 7, 10**6, 2**31, 10**12, 10**400, 0.5, 1e308, float("nan"), True, "8", None)


def bad_json(draw: random.Random, content: bytes) -> bytes:
    """A configuration with odd or hostile values, or one that is no JSON."""
    values = json.loads(content)
    kind = draw.randrange(8)
    if kind == 0:
        return flip(draw, content, 3)
    if kind == 1:
        return draw.choice(
            (
                b"",
                b"null",
                b"[]",
                b"[" * 50_000,
                b'{"a":' * 50_000,
                b"\xff\xfe{\0}\0",
                b"{}",
                content[:-9],
                b'{"a": 1' + b"0" * 6000 + b"}",
            )
        )
    if kind == 2:
        name = draw.choice(list(HOSTILE))
        return json.dumps({**values, name: HOSTILE[name]}).encode()
    if kind < 6:
        names = [name for name, value in values.items() if isinstance(value, int | float)] or [next(iter(values), "x")]
        return json.dumps({**values, draw.choice(names): draw.choice(NUMBERS)}).encode()
    return json.dumps(warp(draw, values)).encode()


def bad_weights(draw: random.Random, content: bytes) -> bytes:
    """A file of safetensors that is cut, or whose header lies."""
    length = int.from_bytes(content[:8], "little")
    header, kind = json.loads(content[8 : 8 + length]), draw.randrange(6)
    if kind == 0:
        return content[: draw.choice((0, 7, 8, 99, length, len(content) // 2, len(content) - 1))]
    if kind == 1:
        return flip(draw, content[: length + 8], 3) + content[length + 8 :]
    if kind == 2:
        return draw.choice((2**63, 2**31, length - 1, length + 1, 0)).to_bytes(8, "little") + content[8:]
    if kind == 3:
        return b"<html>404 Not Found</html>" + content[:50]
    name = draw.choice([name for name in header if name != "__metadata__"])
    if kind == 4:
        header[name] = warp(draw, header[name])
    else:
        header[draw.choice(("other", name + "_packed"))] = header.pop(name)
    made = json.dumps(header).encode()
    return len(made).to_bytes(8, "little") + made + content[8 + length :]


def bad_bytes(draw: random.Random, content: bytes) -> bytes:
    return bad_json(draw, content) if content[:1] == b"{" and draw.random() < 0.7 else flip(draw, content, 5)


@pytest.mark.slow
def test_model_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400, most of which are refused, each by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "canary.py").write_text(f"open({str(CANARY)!r}, 'w')\n")
    tiny.write_parts(tmp_path)
    config = tiny.config(tmp_path, "none", tmp_path / "run").model
    processor, vision = build_processor(config)
    torch.manual_seed(0)
    parts = str(tmp_path / "decoder"), "transformers", vision, PRESETS["llava"], processor.image_token_id
    whole = EEMLLM.from_parts(*parts).eval()
    whole.save_pretrained(tmp_path / "whole")
    (tmp_path / "llava").mkdir()
    save_vlm(whole, processor.tokenizer, tmp_path / "llava")
    ids, picture = torch.tensor([[5, 6, 7]]), Image.new("RGB", (20, 30))
    conversation = Conversation("x", (Turn("human", f"{IMAGE}\nWhat?"), Turn("gpt", "Yes.")), 1)

    def use(model: Any) -> None:
        if model.config.image_token_id not in ids:  # else it stands for an image, which is not there
            assert model(ids).logits.shape[1] == 3

    def decoder() -> None:
        use(EEMLLM.from_parts(*parts))

    def encoder() -> None:
        found = TransformersVision.from_path(config.vision.path, select_layer=-1, policy=config.vision.policy)
        assert len(found(found.transform(picture)[None])[0]) == found.transform.num_tokens(20, 30)

    def tokenizer() -> None:
        made, _ = build_processor(config)
        with contextlib.suppress(SampleError):
            made.template.encode(conversation)

    def eemllm() -> None:
        use(EEMLLM.from_pretrained(tmp_path / "whole"))

    def llava() -> None:
        use(load_vlm(tmp_path / "llava")[0])

    config.vision.path = str(tmp_path / "encoder")
    plan: list[tuple[str, int, Callable, Callable[[], None]]] = [
        ("decoder/config.json", 70, bad_json, decoder),
        ("decoder/generation_config.json", 20, bad_json, decoder),
        ("decoder/model.safetensors", 40, bad_weights, decoder),
        ("encoder/config.json", 40, bad_json, encoder),
        ("encoder/preprocessor_config.json", 50, bad_json, encoder),
        ("encoder/model.safetensors", 20, bad_weights, encoder),
        ("decoder/tokenizer.json", 50, bad_bytes, tokenizer),
        ("decoder/tokenizer_config.json", 50, bad_json, tokenizer),
        ("whole/config.json", 40, bad_json, eemllm),
        ("llava/config.json", 20, bad_json, llava),
        ("llava/preprocessor_config.json", 20, bad_json, llava),
    ]
    draw, outcomes, unnamed = random.Random(SEED), Counter[str](), Counter[str]()
    for name, times, damage, try_it in plan:
        file = tmp_path / name
        content = file.read_bytes()
        try_it()
        for _ in range(times * TIMES):
            data = damage(draw, content)
            file.write_bytes(data)
            outcome = "used"
            try:
                with bounded((name, data[:3000])):
                    try_it()
            except UserError as error:
                told = str(error)
                named = (
                    told.startswith(("model.", "source: ", "EEMLLM."))
                    and str(file.parent) in told
                    and len(told) < 20_000
                )
                outcome = "refused" if named else "unnamed"
                unnamed.update([f"{name}: {told[:200]}"] if not named else [])
            except AssertionError as error:
                outcome = "unnamed"
                unnamed[f"{name}: {str(error)[:300]}"] += 1
            outcomes[f"{name.partition('/')[0]} {outcome}"] += 1
        file.write_bytes(content)
    shutil.rmtree(tmp_path / "whole")
    assert not unnamed, "\n".join(f"{count}: {text}" for text, count in unnamed.items())
    assert sum(count for name, count in outcomes.items() if "refused" in name) > 250 * TIMES, outcomes
    assert all(outcomes[f"{name.partition('/')[0]} used"] for name, *_ in plan), outcomes
