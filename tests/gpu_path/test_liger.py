"""liger-kernel's kernels, in Triton's interpreter on the CPU: a model with them learns what the one without learns."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DECODERS = ("llama-16", "qwen2", "qwen3", "mistral", "olmo2", "smollm3")
CASES = [f"{decoder}/{mechanism}" for decoder in DECODERS for mechanism in ("ee_mllm", "llava")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("liger_kernel") is None or find_spec("triton") is None,
        reason="needs liger-kernel and Triton, 300 MB; pip install 'lit_eemllm[liger]'",
    ),
]


@pytest.fixture(scope="module")
def found():
    """See `lib/interpreted.py`. Not of the forkserver, which has imported Triton already where bitsandbytes has."""
    ran = subprocess.run(
        [sys.executable, "-m", "lib.interpreted", *CASES],
        cwd=TESTS, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_liger_computes_what_the_plain_modules_do(found, case):
    """In float32, every gradient; seen of liger 0.8.5: 1.2e-7 for the loss and 2.6e-6 for gradients."""
    assert found[case]["loss"] <= 1e-6
    assert found[case]["gradients"] <= 1e-5
    norms = 4 if case.startswith("qwen3") else 2  # of each layer, and one after the last
    assert found[case]["kernels"] == ["LigerRMSNorm"] * (3 * norms + 1) + ["LigerSwiGLUMLP"] * 3


def test_a_pack_without_a_supervised_token_has_no_loss(found):
    assert found["without targets"] == [0, 0]


@pytest.mark.parametrize("case", CASES)
def test_the_next_model_is_transformers_own(found, case):
    """liger's functions replace the classes of transformers too; an evaluation in the same process must not get them."""
    assert not found[case]["next model"].startswith("Liger")
