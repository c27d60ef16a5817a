"""A program: models with liger-kernel's kernels, in Triton's interpreter on the CPU, against the same without, as JSON.

It needs TRITON_INTERPRET=1 before Triton is imported, so a process of its own. Arguments: cases, as ``decoder/mechanism``.
"""

import json
import sys
from unittest.mock import patch

import liger_kernel.ops.rms_norm
import numpy as np
import tiny
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

PACK = [[3, 0, 4], [2, 0, 1, 0, 3], [7], [0, 2]]


@triton.jit
def rsqrt(x):  # the kernel's is of a library for GPUs
    return 1.0 / tl.sqrt(x)


def argument(value, convert=interpreter._implicit_cvt):
    """Of a kernel: a float is a number of Triton there, but one of Python, without a type to cast, in the interpreter."""
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    return convert(value)


def step(model, batch):
    model.zero_grad()
    loss = model.packed_loss(batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fused(model):
    with patch.object(torch.cuda, "is_available", lambda: True):
        model.use_liger()
    return model


def compare(decoder, mechanism):
    """Errors of the loss and of the worst gradient, relative to the loss and to the largest gradient."""
    model, batch = tiny.model(decoder, mechanism), tiny.pack(PACK)
    head = model.language_model.lm_head
    head.bias = torch.nn.Parameter(torch.linspace(-1, 1, head.out_features))  # as some families have
    loss, gradients = step(model, batch)
    found, same = step(fused(model), batch)
    assert same.keys() == gradients.keys()
    largest = max(g.abs().max() for g in gradients.values())
    return {
        "loss": ((found - loss).abs() / loss).item(),
        "gradients": max((same[name] - g).abs().max() / largest for name, g in gradients.items()).item(),
        "kernels": sorted(m._get_name() for m in model.language_model.modules() if m._get_name().startswith("Liger")),
        "next model": type(tiny.model(decoder).language_model.model.norm).__name__,
    }


def without_targets():
    """Loss and largest gradient of a pack in which no token is supervised."""
    model, batch = fused(tiny.model()), tiny.pack(PACK)
    batch.target_rows, batch.targets = batch.target_rows[:0], batch.targets[:0]
    loss, gradients = step(model, batch)
    return [loss.item(), max(g.abs().max().item() for g in gradients.values())]


if __name__ == "__main__":
    liger_kernel.ops.rms_norm.rsqrt, interpreter._implicit_cvt = rsqrt, argument
    found = {case: compare(*case.split("/")) for case in sys.argv[1:]}
    print(json.dumps(found | {"without targets": without_targets()}))
