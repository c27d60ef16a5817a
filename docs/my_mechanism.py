"""A mechanism of one's own: text sees fewer visual tokens the deeper the layer, and learned scales weigh what it sees.

    lit-eemllm explain --import docs/my_mechanism.py --shape vicuna-7b model.mechanism.preset=thinning --out thinning.png
    lit-eemllm fit my_config.yaml --import docs/my_mechanism.py model.mechanism.preset=thinning model.mechanism.options.scaled=2

Layers of the first half are EE-MLLM's. In the second half text sees every second visual token, in the last quarter no token is
left. Before the first `scaled` layers a module multiplies each channel of the visual states, beginning at 1::

    I <- I * s_l

docs/mechanisms.md explains every line.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lit_eemllm.core.select import NOTHING, Every
from lit_eemllm.core.stream import Stream
from lit_eemllm.core.table import LayerPlan
from lit_eemllm.mechanisms import Added, BlockCost, Mechanism, Sizes, register_mechanism


class Scale(Added):
    """Learned factors of the channels of visual states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.factors)

    def forward(self, x_Th: Tensor, x_Vh: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        return x_Th, x_Vh * self.factors.to(x_Vh.dtype)


@dataclass(frozen=True)
class Thinning(Mechanism):
    """Its fields are keys: ``model.mechanism.options.scaled``, beside those that all mechanisms have."""

    scaled: int = 1

    def plan(self, layer: int, layers: int) -> LayerPlan:
        row = super().plan(layer, layers)
        if layer >= layers - layers // 4:
            return replace(row, tokens=NOTHING)
        return replace(row, seen=Every(2)) if layer >= layers // 2 else row

    def block(self, layer: int, sizes: Sizes) -> nn.Module | None:
        return Scale(sizes.hidden) if layer < self.scaled else None

    def block_cost(self, layer: int, sizes: Sizes, text: int, visual: int) -> BlockCost:
        return BlockCost()  # no product of matrices, which is all that is counted

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        found = super().problems(num_layers)
        if not 0 <= self.scaled <= num_layers:
            found.append(
                ("options.scaled", f"found {self.scaled}, expected 0 to {num_layers}, the layers of this decoder")
            )
        return found


register_mechanism("thinning", Thinning())
