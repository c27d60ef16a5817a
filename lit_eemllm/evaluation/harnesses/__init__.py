"""A trained model inside the evaluation suites of others: lmms-eval and VLMEvalKit. See docs/evaluation.md.

Neither is needed by anything else here; each module imports its own suite.
"""

from typing import Any


def lmms_eval_models() -> Any:
    """The entry point through which lmms-eval finds ``--model lit_eemllm``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    here = f"{__name__}.lmms_eval"
    return ModelManifest("lit_eemllm", f"{here}.LitEEMLLM", f"{here}.ChatLitEEMLLM")
