"""Finished samples for what learns on the forward process (forward_rl.py), by any sampler of ours.

    euler      x <- x + v(x, sigma) (sigma_next - sigma)
    best-of    of k trajectories of an item the one with the best score at sigma 0
    step-wise  of k continuations of every step the one with the best score there (stepwise.py)

A better collector is a better teacher: what it draws is what the policy is moved towards. Its samples still
differ in a group, or there is nothing to compare.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .flow import denoised_from_velocity
from .forward_rl import ForwardSettings, check_items, score_groups
from .grpo import GRPOSettings, Policy, Score
from .noise import candidate_noise
from .stepwise import sample_stepwise

# The step counter of further starts, which no schedule reaches.
_START_STEP = 0xFFFFFFFF


def _euler(policy: Policy, noise: Tensor, sigmas: Tensor) -> Tensor:
    x = noise.float()
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        x = x + policy(x, sigma).float() * (sigma_next - sigma)
    return x


@torch.no_grad()
def collect(
    policy: Policy,
    score: Score,
    noise: Tensor,
    sigmas: Tensor,
    settings: GRPOSettings,
    forward: ForwardSettings | None = None,
    *,
    seed: int,
    items: Sequence[int],
) -> tuple[Tensor, int]:
    """Finished samples (B, C, H, W) from noise (B, C, H, W) at sigmas[0], and how many latents went through
    the policy for them.

    sigmas: (N + 1,) falling to 0; items: numbers of the noise streams, (B,). policy, score: as in
    `grpo.roll_out`; a group of num_branches is scored in one call. forward: which sampler, and its k. In
    best-of the first trajectory starts from `noise`, the others from streams of their own. settings: noise
    level and kind of step-wise. A batch equals its items. Raises ValueError where numbers and latents differ.
    """
    forward = forward or ForwardSettings()
    check_items(noise, items)
    rivals, steps = forward.collector_branches, len(sigmas) - 1
    if forward.collector == "step-wise":
        found, _ = sample_stepwise(
            lambda x, sigma: denoised_from_velocity(x, policy(x, float(sigma)).float(), sigma),
            score,
            noise,
            sigmas,
            num_branches=rivals,
            noise_level=settings.noise_level,
            kind=settings.kind,
            seed=seed,
            item_ids=items,
        )
        return found, steps * len(noise)
    best = _euler(policy, noise, sigmas)
    if forward.collector == "euler":
        return best, steps * len(noise)
    most = score_groups(score, best, 0.0, settings.num_branches)
    for rival in range(1, rivals):
        start = candidate_noise(noise.shape[1:], seed, _START_STEP, items, [rival], noise.device)[:, 0]
        other = _euler(policy, start, sigmas)
        scores = score_groups(score, other, 0.0, settings.num_branches)
        better = scores > most
        best = torch.where(better.reshape(-1, 1, 1, 1), other, best)
        most = torch.where(better, scores, most)
    return best, rivals * steps * len(noise)
