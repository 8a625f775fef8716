"""What autograd keeps of a forward pass, counted on fake tensors: no memory is taken."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def kept_for_backward(
    module: nn.Module, inputs: Callable[[], tuple[Tensor, ...]], *, half: bool = False
) -> int:
    """Bytes kept from module(*inputs()), each storage once, the module's own weights left out.

    module: on any device, the meta device too. inputs: makes its arguments, called among fake tensors. half:
    under bfloat16 autocast.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        state = {
            name: torch.empty(value.shape, dtype=value.dtype).requires_grad_(value.requires_grad)
            for name, value in named.items()
        }
        weights = {value.untyped_storage()._cdata for value in state.values()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in weights:
                kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
            torch.func.functional_call(module, state, inputs())
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
