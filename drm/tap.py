"""What leaves some blocks of a network on the way through it; the pass ends behind the last of them.

    outputs = tap(blocks, (4, 8, 12), lambda: network(x, t, ...))        outputs[4], outputs[8], outputs[12]

Forward hooks do it, so the network's own code runs, with whatever surrounds it: casts, offloading, patches.
Nothing of it remains afterwards.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class _Reached(BaseException):
    """Ends a pass behind the last tapped block. No Exception, because what surrounds a network may catch
    those.
    """


def tap(
    blocks: Sequence[nn.Module], numbers: Sequence[int], run: Callable[[], object]
) -> dict[int, Tensor | tuple[Tensor | None, ...]]:
    """What leaves the blocks of these numbers (1 is the first) during run(), by number, as copies.

    run: calls the network once; it does not return, because the pass ends behind the last of the blocks.
    Raises ValueError for numbers that are not among the blocks, RuntimeError when run() returned before.
    """
    wanted = sorted(set(numbers))
    if not wanted or not 1 <= wanted[0] <= wanted[-1] <= len(blocks):
        raise ValueError(f"blocks {list(numbers)} are to be read: wanted some of 1 to {len(blocks)}")
    found: dict[int, Tensor | tuple[Tensor | None, ...]] = {}
    handles = []
    try:
        for number in wanted:
            handles.append(blocks[number - 1].register_forward_hook(_keep(found, number, wanted[-1])))
        run()
    except _Reached:
        return found
    finally:
        for handle in handles:
            handle.remove()
    raise RuntimeError(
        f"the network was left without passing its block {wanted[-1]}: a patch or cache on the model answers"
        " in its place, take it off"
    )


def _keep(found: dict, number: int, last: int) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: object) -> None:
        # Some networks and ControlNets go on adding to what left a block, in place.
        found[number] = _copy(output)
        if number == last:
            raise _Reached

    return hook


def _copy(output: object) -> object:
    if isinstance(output, Tensor):
        return output.clone(memory_format=torch.contiguous_format)
    if isinstance(output, (tuple, list)):
        return tuple(_copy(part) for part in output)
    return output
