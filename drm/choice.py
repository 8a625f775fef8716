"""Which of an item's candidates continues: (scores (B, k), ...) -> places (B,).

    greedy    argmax_j score_j
    softmax   argmax_j score_j / T + g_j with g_j standard Gumbel: a draw from softmax(score / T)

Every choice reads one item's row only, so that a batch equals its items.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import philox4x32, uint_to_uniform
from .presets import Branching

# The element counter of the softmax's noise, which no latent is large enough to reach.
_CHOICE_COUNTER = 0xFFFFFFFF


def greedy(scores: Tensor) -> Tensor:
    """The place of the highest score, the first among equals."""
    return scores.argmax(dim=1)


def softmax(scores: Tensor, temperature: float, seed: int, step: int, items: Sequence[int]) -> Tensor:
    """A draw from softmax(scores / temperature), a pure function of seed, step and each item's number."""
    return (scores / temperature + gumbel(seed, step, items, range(scores.shape[1]))).argmax(dim=1)


def choose(scores: Tensor, settings: Branching, step: int, items: Sequence[int]) -> Tensor:
    """What the settings say."""
    if settings.choice == "greedy":
        return greedy(scores)
    return softmax(scores, settings.temperature, settings.seed, step, items)


def gumbel(seed: int, step: int, items: Sequence[int], branches: Sequence[int]) -> Tensor:
    """Standard Gumbel noise (items, branches), float64, from the Philox stream of each branch's noise.

    A pure function of (seed, step, item, branch), so a choice does not depend on who else is drawn.
    """
    item = torch.tensor(list(items), dtype=torch.int64).reshape(-1, 1)
    branch = torch.tensor(list(branches), dtype=torch.int64).reshape(1, -1)
    counter, step_word = torch.tensor(_CHOICE_COUNTER), torch.tensor(step)
    key = int(seed) % 2**64
    bits, *_ = philox4x32(counter, step_word, item, branch, key & 0xFFFFFFFF, key >> 32)
    uniform = uint_to_uniform(bits.expand(len(item), branch.shape[1])).double()
    return -torch.log(-torch.log(uniform.clamp(1e-10, 1 - 1e-10)))
