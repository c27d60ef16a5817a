"""Text sees every second visual token from layer k on; everything else is EE-MLLM's."""

from dataclasses import dataclass, replace

from lit_eemllm.core.select import Every
from lit_eemllm.core.table import LayerPlan
from lit_eemllm.mechanisms import Mechanism, register_mechanism


@dataclass(frozen=True)
class Skipping(Mechanism):
    """``model.mechanism.options.k``: the first layer in which text sees every second token."""

    k: int = 0

    def plan(self, layer: int, layers: int) -> LayerPlan:
        row = super().plan(layer, layers)
        return replace(row, seen=Every(2)) if layer >= self.k else row

    def problems(self, num_layers: int) -> list[tuple[str, str]]:
        found = super().problems(num_layers)
        if not 0 <= self.k <= num_layers:
            found.append(("options.k", f"found {self.k}, expected 0 to {num_layers}, the layers of this decoder"))
        return found


register_mechanism("skipping", Skipping())
