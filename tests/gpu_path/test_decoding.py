"""Prompts, cached tokens, questions and losses on a GPU: the numbers of a CPU, waiting where it is allowed and nowhere else."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import tiny
import torch
from lib.fake_cuda import on_fake_cuda
from lib.fake_cuda.cases import MECHANISMS
from torch.nn.functional import scaled_dot_product_attention

from lit_eemllm.attention import fused_attention, resolve_backend
from lit_eemllm.compat.transformers import CACHE
from lit_eemllm.errors import ConfigError

DOCUMENTS = [[3, 0, 4], [5], [2, 0, 1, 0, 3], [0, 2]]
HEADS, GROUPS = 2, 2  # of keys, and queries that share one, in tiny's llama-gqa


@contextmanager
def choices():
    """Of kernels of scaled dot-product attention: query rows, key heads, kernel."""
    from lib.fake_cuda import kernels

    made, choice = [], kernels.choice

    def remember(query, key, *args, **options):
        made.append((query.shape[2], key.shape[1], choice(query, key, *args, **options)))
        return made[-1][2]

    with patch.object(kernels, "choice", remember):
        yield made


def turns(model, cuda):
    """Logits of a prompt, of a token after it, and of a second turn of several tokens; what the model is told, and when."""
    inputs = tiny.prompt(model, DOCUMENTS)
    later = torch.arange(12).view(4, 3) + 5
    token, more = torch.tensor([[7], [8], [9], [10]]), later
    send = (lambda x: x.pin_memory().to("cuda", non_blocking=True)) if cuda else (lambda x: x)
    real = torch.cat([inputs["attention_mask"], torch.ones(4, 4, dtype=torch.long)], dim=1)
    length = inputs["input_ids"].shape[1]
    masks = [send(real[:, : length + n]) for n in (0, 1, 4)]
    first = {"pixel_values": inputs["pixel_values"], "use_cache": True}
    ids = [send(x) for x in (inputs["input_ids"], token, more)]
    cache = None
    for n in range(3):
        out = model(ids[n], attention_mask=masks[n], **(first if n == 0 else {CACHE: cache}))
        cache = out[CACHE]
        yield getattr(out.logits, "held", out.logits)


@pytest.mark.parametrize("mechanism", [*MECHANISMS, "dropping"])
@on_fake_cuda
@torch.inference_mode()
def test_prompts_and_tokens(mechanism):
    from lib.fake_cuda import kernels, steps
    from lib.fake_cuda.world import World

    model = steps.model(mechanism)
    true = list(turns(model, cuda=False))
    with World() as world, choices() as chosen:
        model = model.to("cuda")
        model._backend = steps.backend("sdpa", "exact", 16 if mechanism == "unrotated" else 8)
        asked = turns(model, cuda=True)
        for n, expected in enumerate(true):
            world.forget()
            chosen.clear()
            found = next(asked)
            seen = found > -1e9
            torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-4)
            assert steps.unexpected(world, steps.ANSWERING) == []
            assert {kernel for *_, kernel in chosen} == {kernels.EFFICIENT}
            if n == 1:  # a token: nothing is read from the device, and no image is looked at
                assert not world.notes and not world.launches["convolution.default"]
                assert {(rows, heads) for rows, heads, _ in chosen} <= {
                    (GROUPS, HEADS),
                    (1, 8),
                }  # keys are not repeated
                if mechanism not in ("flamingo", "sliding"):  # whose own layers have them
                    assert (
                        not world.launches["native_layer_norm.default"] + world.launches["gelu.default"]
                    )  # projectors


@on_fake_cuda
@torch.inference_mode()
def test_kernels_that_are_chosen_in_16_bits():
    """A prompt by the flash kernel, or the efficient one where a mask is needed; nothing by cuDNN unless it is asked for."""
    from lib.fake_cuda import kernels, steps
    from lib.fake_cuda.world import World

    found = {}
    for mechanism in ("llava", "ee_mllm"):
        for name in ("sdpa", "cudnn"):
            with World(), torch.autocast("cuda", torch.bfloat16), choices() as chosen:
                model = steps.model(mechanism).to("cuda")
                model._backend = steps.backend(name)
                chosen.clear()
                asked = turns(model, cuda=True)
                for n in ("prompt", "token"):
                    next(asked)
                    found[mechanism, name, n] = {kernel for *_, kernel in chosen}
                    chosen.clear()
    for mechanism in ("llava", "ee_mllm"):
        assert found[mechanism, "sdpa", "prompt"] == {kernels.FLASH, kernels.EFFICIENT}
        assert found[mechanism, "cudnn", "prompt"] == {kernels.CUDNN, kernels.FLASH}  # the encoder keeps its own
    assert {kernel for (*_, n), kernels in found.items() if n == "token" for kernel in kernels} == {kernels.EFFICIENT}
    assert torch.backends.cuda.cudnn_sdp_enabled()  # as it was


@on_fake_cuda
def test_questions(parts):
    """Of a batch twice: the second time no pixel is sent."""
    from lib.fake_cuda import steps
    from lib.fake_cuda.world import World
    from PIL import Image

    from lit_eemllm.evaluation.run import generated
    from lit_eemllm.inputs.conversation import Conversation, Turn
    from lit_eemllm.model.build import build
    from lit_eemllm.model.image_cache import ImageCache

    torch.manual_seed(0)
    model, processor = build(tiny.config(parts, "x", "out").model)
    texts = ("<image>\nWhat colour?\nA. red\nB. blue", "<image>\nWhat is it?\nA. a house\nB. a car", "Say it.")
    asked = [Conversation(text, (Turn("human", text),), text.count("<image>")) for text in texts]
    images = [[Image.new("RGB", (20, 30), colour)] for colour in ("red", "blue")] + [[]]
    true = generated(model.eval(), processor, asked, images, 4)
    encoded = []
    with World() as world:
        model = model.to("cuda")
        model.set_attention("sdpa", training=False)
        model.image_cache = ImageCache(1 << 30)
        for _ in range(2):
            world.forget()
            assert generated(model, processor, asked, images, 4) == true
            assert steps.unexpected(world, steps.ANSWERING) == []
            encoded.append(world.launches["convolution.default"])
    assert encoded == [1, 0]


@on_fake_cuda
def test_losses_of_validation():
    from lib.fake_cuda import steps
    from lib.fake_cuda.world import World

    from lit_eemllm.evaluation.loss import losses

    packs, model = [tiny.pack([[3, 0, 4], [2, 0, 3]], seed) for seed in range(3)], steps.model("ee_mllm")
    true = losses(model, packs, 3)
    assert len({*true.values()}) == 3
    with World() as world:
        model = model.to("cuda")
        model._backend = steps.backend("sdpa", "exact")
        world.forget()
        assert losses(model, packs, 3) == pytest.approx(true, rel=1e-5)
    assert steps.unexpected(world, steps.ANSWERING) == []
    assert sum(world.notes.values()) == 1


@on_fake_cuda
def test_values_are_not_copied_for_flash():
    """They are padded only where queries are wider (unrotated scores)."""
    from lib.fake_cuda import steps
    from lib.fake_cuda.world import World

    pads = {}
    for mechanism in ("ee_mllm", "unrotated"):
        with World() as world, torch.autocast("cuda", torch.bfloat16):
            model = steps.model(mechanism).to("cuda")
            model._backend = steps.backend("flash", "bfloat16", 16 if mechanism == "unrotated" else 8)
            batch = tiny.pack(steps.PACK).pin_memory().to("cuda")
            world.forget()
            model.packed_loss(batch)
            pads[mechanism] = world.launches["constant_pad_nd.default"]
    assert pads["ee_mllm"] == 0 < pads["unrotated"]


def test_the_choice_of_kernels_does_not_break_compilation():
    q, k, v = (torch.randn(1, heads, 3, 8) for heads in (4, 2, 2))
    mask = torch.ones(1, 3, 3).tril().bool()
    compiled = torch.compile(fused_attention, fullgraph=True, backend="eager")
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=0.3, enable_gqa=True)
    for attend in (compiled, fused_attention):
        torch.testing.assert_close(attend(q, k, v, mask, 0.3), expected, rtol=0, atol=1e-6)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_cudnn_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match="cudnn: needs a CUDA device, found cpu"):
        resolve_backend("cudnn", "cpu", torch.bfloat16)
