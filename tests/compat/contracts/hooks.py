"""Methods of ours that a library calls: it must have them itself."""

from __future__ import annotations

import importlib
from functools import partial

from . import contract

HOOKS = {
    "lightning": {
        "lit_eemllm.training.fsdp2.FSDP2": "model_to_device optimizer_state load_checkpoint setup_environment",
        "lit_eemllm.training.checkpoint.AtomicCheckpointIO": "save_checkpoint load_checkpoint",
        "lit_eemllm.training.guard.Checkpoints": "setup on_train_start on_train_batch_end on_validation_start on_validation_batch_end on_validation_end "
        "on_train_end state_dict load_state_dict",
        "lit_eemllm.evaluation.during.Asking": "on_train_start on_validation_epoch_end on_train_batch_end",
        "lit_eemllm.training.runlog.RunLog": "on_train_start on_train_batch_start on_train_batch_end on_validation_end on_train_end",
        "lit_eemllm.training.module.LitEEMLLM": "configure_model on_fit_start on_train_epoch_start on_train_batch_end training_step "
        "on_before_optimizer_step configure_gradient_clipping configure_optimizers lr_scheduler_step validation_step "
        "on_validation_epoch_end on_save_checkpoint on_load_checkpoint on_train_start",
        "lit_eemllm.data.module.ShardDataModule": "setup train_dataloader val_dataloader on_before_batch_transfer state_dict "
        "load_state_dict teardown on_exception",
    },
    "energon": {
        "lit_eemllm.data.task.PackTask": "decoder preencode_sample select_samples_to_pack postencode_sample pack_selected_samples "
        "build_batch",
    },
    "transformers": {
        "lit_eemllm.model.modeling.EEMLLM": "config_class base_model_prefix main_input_name _no_split_modules _init_weights train "
        "get_input_embeddings get_output_embeddings prepare_inputs_for_generation base_model",
        "lit_eemllm.model.modeling.EEMLLMConfig": "model_type sub_configs get_text_config",
        "lit_eemllm.model.cache.StreamCache": "get_seq_length reorder_cache batch_repeat_interleave batch_select_indices crop update",
    },
}  # fmt: skip


GONE = {
    "lightning": "lightning.pytorch.Callback.on_train_batch_end",
    "energon": "megatron.energon.TaskEncoder.select_samples_to_pack",
    "transformers": "transformers.PreTrainedModel._init_weights",
}
"""Of each, a hook without which its contract must fail."""


def hooks_are_called(library: str) -> None:
    for name, hooks in HOOKS[library].items():
        module, _, cls = name.rpartition(".")
        bases = getattr(importlib.import_module(module), cls).__mro__[1:]
        theirs = [base for base in bases if not base.__module__.startswith("lit_eemllm")]
        lost = [hook for hook in hooks.split() if not any(hook in vars(base) for base in theirs)]
        assert not lost, f"nothing calls {lost} of {name}"


for library in HOOKS:
    check = partial(hooks_are_called, library)
    check.__name__ = f"hooks_of_{library}_are_called"  # type: ignore[attr-defined]
    contract(library, "these hooks were called", lambda patch, name=GONE[library]: patch.delattr(name))(check)
