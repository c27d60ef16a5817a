"""A low-rank adapter for visual tokens before every layer from layer k on; everything else is EE-MLLM's.

I <- I + s * B(A I)        A: hidden -> r, B: r -> hidden, B begins at zero
"""

from dataclasses import dataclass

from torch import Tensor, nn

from lit_eemllm.core.stream import Stream
from lit_eemllm.mechanisms import Added, BlockCost, Mechanism, Sizes, register_mechanism


class Adapter(Added):
    def __init__(self, width: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x_Th: Tensor, x_Vh: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        update = self.up(
            self.down(x_Vh.to(self.down.weight.dtype))
        )  # trained weights are float32, states may be bfloat16
        return x_Th, x_Vh + self.scale * update.to(x_Vh.dtype)


@dataclass(frozen=True)
class Adapted(Mechanism):
    """Options: ``r`` the rank, ``k`` the first layer with an adapter, ``s`` the scale."""

    r: int = 8
    k: int = 0
    s: float = 1.0

    def block(self, layer: int, sizes: Sizes) -> nn.Module | None:
        return Adapter(sizes.hidden, self.r, self.s) if layer >= self.k else None

    def block_cost(self, layer: int, sizes: Sizes, text: int, visual: int) -> BlockCost:
        if layer < self.k:
            return BlockCost()
        return BlockCost(prefill=2 * 2 * visual * sizes.hidden * self.r)  # two products; none for a new token of text

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        found = super().problems(num_layers)
        if self.r < 1:
            found.append(("options.r", f"found {self.r}, expected at least 1"))
        if not 0 <= self.k <= num_layers:
            found.append(("options.k", f"found {self.k}, expected 0 to {num_layers}, the layers of this decoder"))
        return found


register_mechanism("adapted", Adapted())
