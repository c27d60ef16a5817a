"""DeepSpeed's ZeRO stages 1 and 2, with ordinary checkpoints: every rank keeps a share of the optimiser's states, and in stage 2 of
the gradients. Weights stay whole. The rest of the project sees neither engine nor flat buffers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..compat.deepspeed import compile_nothing, gradient_shares, is_shared_out, link_states
from ..compat.lightning import Stepping
from ..errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

MOMENTS = ("exp_avg", "exp_avg_sq")


class Trained(nn.Module):
    """All that DeepSpeed may see of a model: its trained parameters. It would broadcast and move the others, quantised ones too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ParameterList(p for p in module.parameters() if p.requires_grad)
        self.whole = [module]  # not as a submodule

    def train(self, mode: bool = True) -> Trained:
        self.whole[0].train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.whole[0](*args, **kwargs)


class DeepSpeed(Stepping):
    """Data parallel over all processes: Lightning accumulates, DeepSpeed's engine sums over ranks, divides and steps.

    (Lightning's `DeepSpeedStrategy` leaves accumulation and clipping to the engine too, so that nobody can weigh gradients by
    their tokens in between, writes a folder of pickles per checkpoint, and starts on CUDA only.)

    Args:
        stage: of ZeRO, 1 or 2.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, stage: int) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                f"trainer.strategy=deepspeed_stage_{stage} needs the package deepspeed: pip install 'lit-eemllm[deepspeed]'"
            )
        super().__init__()
        self.stage = stage

    def configure_ddp(self) -> None:
        """The engine stands in for it; that is made with the optimiser."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        device = self.root_device  # which it would choose by itself, and on Slurm not find
        os.environ |= {"DS_ACCELERATOR": device.type, "LOCAL_RANK": str(self.local_rank)}
        import deepspeed

        if device.type == "cpu":
            compile_nothing()
        super().setup_optimizers(trainer)
        (optimizer,) = self.optimizers
        self._groups: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        numel = sum(parameter.numel() for group in self._groups for parameter in group)
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # asked for, and used for its log alone
            "zero_optimization": {
                "stage": self.stage,
                "compute_grad_norm": False,
                "reduce_bucket_size": min(numel, 500_000_000),  # elements of a buffer, by default so many
            },
            "gradient_clipping": 0.0,  # not 1.0, its default: here the norm of the token mean is clipped
            "zero_allow_untested_optimizer": True,  # torch's AdamW
            # it ends Lightning's autocast and begins its own
            "torch_autocast": {"enabled": self.precision_plugin.precision == "bf16-mixed", "dtype": "bfloat16"},
        }
        deepspeed.utils.logger.setLevel("WARNING")
        deepspeed.init_distributed(self.backend_name, auto_mpi_discovery=False)
        assert isinstance(self.model, nn.Module)
        self.model, zero, _, _ = deepspeed.initialize(
            args=SimpleNamespace(device_rank=device.index or 0),
            model=Trained(self.model),
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )
        self.optimizers = [zero]

    def teardown(self) -> None:
        """As `ModelParallelStrategy`: what is shared out stays on its device, where the ranks can gather it for a last save."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    @property
    def engine(self) -> Any:
        return self.model

    # --- one optimiser step ---

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around passes that are not the last of their step."""
        self.engine.set_gradient_accumulation_boundary(False)
        yield
        self.engine.set_gradient_accumulation_boundary(True)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        assert self.lightning_module is not None
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self.engine.backward(closure_loss, scale_wrt_gas=False)  # Lightning has divided it
        return self.precision_plugin.post_backward(closure_loss, self.lightning_module)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        result = self.closure_result(optimizer, closure)
        self.engine.step()
        return result

    def gradients(self) -> list[Tensor]:
        """This rank's share, disjoint from those of the others, between the backward pass and the step; to change in place."""
        return gradient_shares(self.engine.optimizer)

    # --- checkpoints ---

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As torch's AdamW would give it, with whole tensors, on rank 0; nothing on the others. A collective call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        adamw = self.engine.optimizer.optimizer
        link_states(self.engine.optimizer)
        state: dict[int, dict[str, Tensor]] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for group, parameters in zip(adamw.param_groups, self._groups, strict=True):
            (share,) = group["params"]
            numbers = range(first, first := first + len(parameters))
            groups.append({**group, "params": list(numbers)})
            for number, parameter in zip(numbers, parameters, strict=True) if adamw.state[share] else ():
                moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                if self.is_global_zero:
                    step = adamw.state[share]["step"].clone()  # what shared its memory would be loaded so
                    state[number] = {"step": step, **{key: moment.cpu() for key, moment in moments.items()}}
        return {"state": state, "param_groups": groups} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        (saved,) = checkpoint["optimizer_states"]
        zero, state = self.engine.optimizer, saved["state"]
        for group, old in zip(zero.optimizer.param_groups, saved["param_groups"], strict=True):
            (share,) = group["params"]
            group.update({key: value for key, value in old.items() if key != "params"})
            step = state[old["params"][0]]["step"]  # of all: every parameter has a gradient in every step
            zero.optimizer.state[share] = {"step": step.clone(), **{key: torch.zeros_like(share) for key in MOMENTS}}
        link_states(self.engine.optimizer)
        for old, parameters in zip(saved["param_groups"], self._groups, strict=True):
            for number, parameter in zip(old["params"], parameters, strict=True):
                for key in MOMENTS:
                    safe_set_full_optimizer_state(parameter, state[number][key].to(parameter.device), key)


def full_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Of a step, before the optimiser uses it. A collective call where ZeRO shares it out."""
    if not is_shared_out(parameter):
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    whole: Tensor = safe_get_full_grad(parameter)
    return whole
