"""The best validation of a run so far, by which a checkpoint is kept beside the newest, and how long ago it was."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config.keys import Config

MONITORED = ("val_loss", "val_score")
"""What a validation finds, by its names in Lightning and in the log."""


class Best:
    """Compares validations: by their score if `eval.during_training` asks for one, else by their loss.

    Attributes:
        monitored: which of `MONITORED` it is.
        of: what is compared: that, and of which questions or packs.
        wanted: whether anybody asks which is best.
        value: the best score, or minus the lowest loss.
        step: of that validation; 0 = there was none.
        waited: validations since.
    """

    def __init__(self, config: Config) -> None:
        scored = config.eval.during_training is not None
        self.monitored, self.sign = ("val_score", 1) if scored else ("val_loss", -1)
        asked = (config.eval.during_training, config.eval.suite, config.eval.data, config.eval.metric) if scored else ()
        self.of = " ".join(map(str, (self.monitored, config.data.val, *asked)))
        self.patience = config.optim.patience
        self.wanted = scored or self.patience is not None
        self.value, self.step, self.waited = -math.inf, 0, 0

    def note(self, found: float, step: int) -> bool:
        """Whether a validation, which has found this, is better than all before; an equal one is not, since it took more steps."""
        better = self.sign * found > self.value
        if better:
            self.value, self.step = self.sign * found, step
        self.waited = 0 if better else self.waited + 1
        return better

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        return {"of": self.of, "value": self.value, "step": self.step, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        """Begin anew where a run is now compared by something else. Raises TypeError or KeyError for what `state` did not give."""
        value, step, waited = float(state["value"]), state["step"], state["waited"]
        if type(step) is not int or type(waited) is not int:
            raise TypeError(
                f"best: found {step!r:.99} and {waited!r:.99}, expected numbers of a step and of validations"
            )
        if state["of"] == self.of:
            self.value, self.step, self.waited = value, step, waited
