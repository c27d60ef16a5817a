"""Where the numbers of a report come from: machine, versions and commit."""

from __future__ import annotations

import sys

from .. import __version__
from ..doctor import environment


def provenance(command: str | None = None) -> str:
    """Machine, versions and commit that the numbers come from, and the command, by default that of `lit-eemllm`."""
    about = environment("torch", "transformers", "lightning", "megatron-energon")
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['gpu'] or 'no GPU'}; "
        f"{', '.join(map(' '.join, about['versions'].items()))}; lit_eemllm {__version__}, commit {about['commit']}; "
        f"{command or 'lit-eemllm ' + ' '.join(sys.argv[1:])}"
    )
