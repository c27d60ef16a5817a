"""`fit`: train, or continue a run."""

from __future__ import annotations

import gc
from argparse import Namespace
from typing import Any

from lit_eemllm.cli.common import config_of, takes_config, verb


def add(verbs: Any) -> None:
    examples = (
        "lit-eemllm fit configs/demo/ee_mllm.yaml optim.lr=1e-3 out=runs/mine",
        "lit-eemllm fit configs/demo/llava.yaml resume=auto",
    )
    takes_config(verb(verbs, "fit", _fit, "Train, or continue the run found in `out`.", *examples))


def _fit(args: Namespace) -> None:
    config = config_of(args)
    from lit_eemllm.training.fit import fit

    asking = None
    if config.asks:
        from lit_eemllm.evaluation.during import Asking

        asking = Asking(config)

    # What is imported by now stays, so the garbage collector need not know it. Else each loader process, and every validation
    # starts its own, walks half a million objects when it starts, and both sides copy the memory that they share: half a second.
    gc.collect()  # what nobody needs any more shall not stay
    gc.freeze()
    fit(config, asking)
