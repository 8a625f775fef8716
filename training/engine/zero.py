"""ZeRO-2 through DeepSpeed: the weights whole on every process, gradients and optimiser shared out.

DeepSpeed's engine casts, cuts the gradient's norm and steps by itself. Weights stay in float32 here, as they
do under DDP and FSDP, and checkpoints hold the same tensors under the same names: a run goes on under any
launcher.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn


def is_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed was launched with."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def backward(engine: Any, loss: Tensor, last: bool) -> None:
    """Adds to the gradients, which are shared out; last: whether a step follows."""
    engine.set_gradient_accumulation_boundary(is_boundary=last)
    engine.backward(loss)


def step(engine: Any) -> float:
    """One step of the optimiser; the gradient's norm before it is cut. DeepSpeed takes no step when that is
    not finite.
    """
    engine.step()
    return float(engine.get_global_grad_norm())


def _learned(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def optimizer_state(module: nn.Module, optimizer: Any) -> dict:
    """{"state": name -> key -> tensor, "param_groups": [...]} as torch's get_optimizer_state_dict gives it,
    from all processes, which all take part. {"state": {}} before the first step.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    own, learned = optimizer.optimizer, _learned(module)
    (group,) = own.param_groups
    names = [name for name, _ in learned]
    groups = [{**{key: value for key, value in group.items() if key != "params"}, "params": names}]
    partition = own.state.get(group["params"][0], {})
    if not partition:
        return {"state": {}, "param_groups": groups}
    count = partition["step"].detach().cpu()
    return {
        "state": {
            name: {
                "step": count.clone(),
                "exp_avg": safe_get_full_optimizer_state(parameter, "exp_avg").cpu(),
                "exp_avg_sq": safe_get_full_optimizer_state(parameter, "exp_avg_sq").cpu(),
            }
            for name, parameter in learned
        },
        "param_groups": groups,
    }


def restore(module: nn.Module, optimizer: Any, state: dict[str, dict[str, Tensor]]) -> None:
    """Puts the optimiser's state of every weight by name in place, after the weights were put into module."""
    from deepspeed.utils import safe_set_full_optimizer_state

    optimizer.refresh_fp32_params()
    if not state:
        return
    own = optimizer.optimizer
    (partition,) = own.param_groups[0]["params"]
    learned = _learned(module)
    count = state[learned[0][0]]["step"]
    own.state[partition] = {
        "step": count.to(partition.device, torch.float32),
        "exp_avg": torch.zeros_like(partition),
        "exp_avg_sq": torch.zeros_like(partition),
    }
    # As after its first step: each weight is told where in the partition its state lies.
    optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in learned:
        for key in ("exp_avg", "exp_avg_sq"):
            safe_set_full_optimizer_state(parameter, state[name][key].to(partition), key)
