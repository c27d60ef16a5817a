"""What is used of bitsandbytes itself."""

from __future__ import annotations

import pytest
import torch

from . import compat, contract


def larger_blocks(patch):
    import bitsandbytes as bnb

    right = bnb.optim.AdamW8bit.init_state

    def init_state(self, group, p, *place):
        right(self, group, p, *place)
        self.state[p] = {name: x[:1] if name.startswith("absmax") else x for name, x in self.state[p].items()}

    patch.setattr(bnb.optim.AdamW8bit, "init_state", init_state)
    patch.setattr(bnb.optim.AdamW8bit, "update_step", lambda *_: None)


@contract("bitsandbytes", "AdamW8bit has a byte for each moment, and a float32 scale for each 256", larger_blocks)
def eight_bits_have_scales():
    bnb = pytest.importorskip("bitsandbytes")
    module, weights = compat("bitsandbytes"), [torch.nn.Parameter(torch.ones(shape)) for shape in ((70, 60), (65, 63))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = bnb.optim.AdamW8bit(weights)
    optimizer.step()
    for number, weight in enumerate(weights):
        found = {name: (x.shape, x.dtype) for name, x in optimizer.state[weight].items() if name != "step"}
        assert found == {name: (x.shape, x.dtype) for name, x in module.adamw8bit_moments(weight).items()}
        assert module.adamw8bit_state(optimizer.state_dict()["state"][number]).keys() == optimizer.state[weight].keys()
    assert {optimizer.state[w]["state1"].dtype for w in weights} == {torch.uint8, torch.float32}
