"""Step-GRPO, and the GRPO it is measured against: policy gradients for a flow-matching model's stochastic
steps.

    A_i     = (r_i - mean) / (std + eps)                           inside one group, population std
    ratio_i = exp(log p_new(x'_i) - log p_old(x'_i))
    loss    = mean_i max(-A_i ratio_i, -A_i clip(ratio_i, 1 - c, 1 + c)) + beta KL
    KL      = mean (mean - mean_ref)^2 / (2 g^2)                   g^2 without dt

Step-GRPO's group is the k candidates drawn from one state at one step, each scored there (DRM, CVPR 2026);
GRPO's is G trajectories of one prompt, scored at the end, the advantage given to every step (Flow-GRPO,
2025). forward_rl.py has the methods that learn from finished samples, without trajectories.

Siblings share state and velocity, so one forward and backward of the policy serves all k of them. And because
their advantages are known at once, on-policy Step-GRPO learns in the very pass that draws them;
GRPO must walk to the end without gradients first, and then pass through every step of every trajectory again.

The policy is a callable (x (B, C, H, W), sigma float) -> velocity (B, C, H, W). `backward` takes a scalar
loss; it is called as soon as one is known.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from .branching import branch_step, philox4x32
from .ranges import Positive, Range, Share, check_ranges
from .sde import check_noise_level, first_below, transition, transition_log_prob

Policy = Callable[[Tensor, float], Tensor]
Score = Callable[[Tensor, float, Tensor], Tensor]
Backward = Callable[[Tensor], object]

# forward_rl.py has those that learn from finished samples.
FORWARD_METHODS = ("nft", "awm", "step-nft", "step-awm")
METHODS = ("step-grpo", "grpo", *FORWARD_METHODS)
CLIP_RANGE = {"sde": 1e-4, "cps": 1e-5}
# The noise stream that picks survivors, which no candidate has.
_SURVIVOR_BRANCH = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class GRPOSettings:
    """num_branches: k siblings, or G trajectories. clip_range: by kind when None. min_std: a group whose
    rewards
    differ less teaches nothing (k = 2 would get advantages of 1 whatever the gap). start, end: the window of
    steps learned from, as fractions. sibling: which candidate goes on. kl_weight: of the KL, or of
    the squared distance of velocities where there are no steps: in nft times 0.01, in awm times 0.1.
    """

    method: Literal["step-grpo", "grpo", "nft", "awm", "step-nft", "step-awm"] = "step-grpo"
    num_branches: Annotated[int, Range(2, 1024)] = 4  # one has no rival
    noise_level: Annotated[float, Range(0, 10, above=True)] = 0.7  # at 0 siblings are equal
    kind: Literal["sde", "cps"] = "sde"
    clip_range: Annotated[float, Range(0, 1, above=True)] | None = None
    advantage_clip: Positive = 5.0
    kl_weight: Annotated[float, Range(0, 1e6)] = 0.01
    min_std: Annotated[float, Range(0, 1e9)] = 1e-3
    start: Share = 0.0
    end: Share = 1.0
    sibling: Literal["random", "best"] = "random"

    def __post_init__(self) -> None:
        check_ranges(self)
        check_noise_level(self.noise_level, self.kind)
        wrong = [
            (self.method not in METHODS, "method", self.method, f"one of {', '.join(METHODS)}"),
            (not self.start < self.end, "the window", (self.start, self.end), "start below end"),
            (self.sibling not in ("random", "best"), "sibling", self.sibling, "random or best"),
        ]
        for is_wrong, name, value, wanted in wrong:
            if is_wrong:
                raise ValueError(f"{name} is {value}: wanted {wanted}")

    @property
    def clip(self) -> float:
        return CLIP_RANGE[self.kind] if self.clip_range is None else self.clip_range

    @property
    def is_forward(self) -> bool:
        """Whether it learns from finished samples, noised anew (forward_rl.py)."""
        return self.method in FORWARD_METHODS

    @property
    def trajectories(self) -> int:
        """Latents of one prompt side by side: siblings share one."""
        return 1 if self.method == "step-grpo" else self.num_branches

    def learns(self, step: int, steps: int) -> bool:
        """Whether step `step` of `steps` is in the window; the last, without noise, never is."""
        return step < steps - 1 and self.start <= step / steps < self.end


@dataclass
class Transitions:
    """One step of a roll-out: x (B, C, H, W), candidates (B, k, C, H, W), log_prob, advantages (B, k)."""

    step: int
    x: Tensor
    candidates: Tensor
    log_prob: Tensor
    advantages: Tensor


@dataclass
class Figures:
    """What one iteration saw. passes: latents through the policy with gradients; forwards: without."""

    rewards: list[Tensor] = field(default_factory=list)
    spreads: list[Tensor] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    ratio_error: float = 0.0
    clipped: list[float] = field(default_factory=list)
    groups: int = 0
    gated: int = 0
    passes: int = 0
    forwards: int = 0

    def summary(self) -> dict[str, float]:
        rewards = torch.cat([reward.flatten() for reward in self.rewards])
        return {
            "rewards/mean": rewards.mean().item(),
            "rewards/std": rewards.std(correction=0).item(),
            "spread": torch.cat(self.spreads).mean().item(),
            "kl": sum(self.kl) / max(1, len(self.kl)),
            "ratio_error": self.ratio_error,
            "clipped": sum(self.clipped) / max(1, len(self.clipped)),
            "gated": self.gated / max(1, self.groups),
            "passes": float(self.passes),
            "forwards": float(self.forwards),
        }


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(..., k) rewards -> (..., k): centred and divided by the population std of the last dimension plus
    eps.
    """
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    return centred / (rewards.std(dim=-1, correction=0, keepdim=True) + eps)


def gated_advantages(rewards: Tensor, settings: GRPOSettings, figures: Figures) -> Tensor:
    """Clipped advantages of groups (..., k), 0 in those whose std is below min_std, which are counted."""
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError(
            "the reward model gave NaN or infinity: nothing was learned from it; try it in float32"
        )
    spread = rewards.std(dim=-1, correction=0)
    open_ = spread >= settings.min_std
    figures.rewards.append(rewards.detach().cpu())
    figures.spreads.append(spread.detach().flatten().cpu())
    figures.groups += open_.numel()
    figures.gated += int((~open_).sum())
    advantages = group_advantages(rewards).clamp(-settings.advantage_clip, settings.advantage_clip)
    return advantages * open_.unsqueeze(-1)


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), elementwise."""
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def kl_to_reference(mean: Tensor, reference_mean: Tensor, std: Tensor, dt: float, kind: str) -> Tensor:
    """KL of two steps of equal noise, averaged over C, H, W: (..., C, H, W) -> (...). For the SDE, std^2 =
    -g^2 dt
    and dt is left out, as Flow-GRPO does; CPS has no dt in its noise.
    """
    variance = std**2 / (-dt if kind == "sde" else 1.0)
    return ((mean - reference_mean) ** 2 / (2 * variance)).mean(dim=(-3, -2, -1))


def _log_prob(candidates: Tensor, mean: Tensor, std: Tensor, kind: str) -> Tensor:
    """(B, k) of candidates (B, k, C, H, W) from means (B, C, H, W)."""
    return transition_log_prob(candidates, mean.unsqueeze(1), std.unsqueeze(1), kind)


def _loss(
    velocity: Tensor,
    reference: Tensor | None,
    transitions: Transitions,
    sigmas: Tensor,
    settings: GRPOSettings,
    figures: Figures,
) -> Tensor:
    """Mean loss of a step's groups, from one velocity for all siblings."""
    sigma, sigma_next = sigmas[transitions.step], sigmas[transitions.step + 1]
    arguments = (sigma, sigma_next, settings.noise_level, settings.kind, first_below(sigmas))
    mean, std = transition(transitions.x, velocity, *arguments)
    log_prob = _log_prob(transitions.candidates, mean, std, settings.kind)
    surrogate = clipped_surrogate(log_prob, transitions.log_prob, transitions.advantages, settings.clip)
    difference = (log_prob.detach() - transitions.log_prob).exp() - 1
    figures.ratio_error = max(figures.ratio_error, difference.abs().max().item())
    figures.clipped.append((difference.abs() > settings.clip).float().mean().item())
    loss = surrogate.mean()
    if reference is not None:
        reference_mean, _ = transition(transitions.x, reference, *arguments)
        dt = float(sigma_next - sigma)
        kl = kl_to_reference(mean, reference_mean, std, dt, settings.kind).mean()
        figures.kl.append(kl.item())
        loss = loss + settings.kl_weight * kl
    figures.passes += len(velocity)
    return loss


def _check_rollout(noise: Tensor, sigmas: Tensor, settings: GRPOSettings, items: Sequence[int]) -> None:
    if settings.is_forward:
        raise ValueError(
            f"method is {settings.method}: roll_out walks step-grpo and grpo; take forward_rl.learn_forward"
        )
    if len(sigmas) < 3:
        raise ValueError(
            f"{len(sigmas) - 1} steps: at least 2 are needed, the last has no noise to learn from"
        )
    if len(items) != len(noise):
        raise ValueError(f"{len(items)} item numbers for {len(noise)} latents: give one each")


def _draw(
    x: Tensor, velocity: Tensor, step: int, sigmas: Tensor, settings: GRPOSettings, seed: int, items, branches
) -> tuple[Tensor, Tensor]:
    """Candidates (B, len(branches), C, H, W) from detached velocity, and their log-probabilities."""
    sigma, sigma_next, velocity = sigmas[step], sigmas[step + 1], velocity.detach()
    settled = {"noise_level": settings.noise_level, "kind": settings.kind, "sigma_max": first_below(sigmas)}
    drawn = branch_step(
        x, velocity, sigma, sigma_next, seed=seed, step=step, items=items, branches=branches, **settled
    )
    # The transition as the loss computes it, on a GPU too: the ratio must start at exactly 1.
    mean, std = transition(x, velocity, sigma, sigma_next, **settled)
    return drawn.scored, _log_prob(drawn.scored, mean, std, settings.kind)


def _score_siblings(score: Score, candidates: Tensor, sigma_next: Tensor) -> Tensor:
    """(B, k) rewards, k candidates of one item a call, so that a score never depends on the batch."""
    rewards = [
        score(group, float(sigma_next), torch.full((len(group),), row, device=group.device))
        for row, group in enumerate(candidates)
    ]
    return torch.stack(rewards).to(candidates.device, torch.float32)


def _survivor(rewards: Tensor, settings: GRPOSettings, seed: int, step: int, items: Sequence[int]) -> Tensor:
    """Which sibling of each item goes on, (B,); a random one depends on the item, not on its batch."""
    if settings.sibling == "best":
        return rewards.argmax(dim=1)
    item = torch.tensor(list(items), dtype=torch.int64)
    zero, own = torch.zeros_like(item), torch.full_like(item, _SURVIVOR_BRANCH)
    bits, *_ = philox4x32(zero, zero + step, item, own, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    return (bits % rewards.shape[1]).to(rewards.device)


@dataclass(frozen=True)
class _RollOut:
    """What `roll_out` was given, and the figures that grow."""

    policy: Policy
    score: Score
    noise: Tensor
    sigmas: Tensor
    settings: GRPOSettings
    seed: int
    items: Sequence[int]
    backward: Backward
    reference: Policy | None
    on_step: Callable[[int, int], object] | None
    figures: Figures = field(default_factory=Figures)

    def learn(self, velocity: Tensor, transitions: Transitions, steps: int) -> None:
        """`backward` of one step's share of the loss. velocity: with gradients, at transitions.x."""
        frozen = None
        if self.reference and self.settings.kl_weight:
            with torch.no_grad():
                frozen = self.reference(transitions.x, float(self.sigmas[transitions.step])).float()
        loss = _loss(velocity, frozen, transitions, self.sigmas, self.settings, self.figures)
        self.backward(loss / steps)


def roll_out(
    policy: Policy,
    score: Score,
    noise: Tensor,
    sigmas: Tensor,
    settings: GRPOSettings,
    *,
    seed: int,
    items: Sequence[int],
    backward: Backward,
    reference: Policy | None = None,
    on_step: Callable[[int, int], object] | None = None,
) -> Figures:
    """One on-policy iteration of settings.method: pictures drawn and scored, and `backward` called with the
    loss of every step in the window, divided by their number. The old policy is the one that draws, so the
    ratio is exactly 1.

    noise: (B, C, H, W) at sigmas[0]; for GRPO the G = num_branches trajectories of a prompt side by side.
    sigmas: (N + 1,) falling to 0; items: numbers of the noise streams, (B,). score: (candidates (n, C, H, W),
    sigma, item_index (n,)) -> (n,). reference: the frozen policy, needed for KL. on_step: called with a step
    and their number. ValueError for fewer than 2 steps and for parts of groups.
    """
    _check_rollout(noise, sigmas, settings, items)
    run = _RollOut(policy, score, noise, sigmas, settings, seed, items, backward, reference, on_step)
    return _grpo(run) if settings.method == "grpo" else _step_grpo(run)


def _step_grpo(run: _RollOut) -> Figures:
    """Learns as it goes: at every step of the window one velocity with gradients, k candidates, their rewards
    at sigma_next, the loss; then a sibling goes on.
    """
    sigmas, settings, figures = run.sigmas, run.settings, run.figures
    x, steps = run.noise.float(), len(sigmas) - 1
    learned = [step for step in range(steps) if settings.learns(step, steps)]
    for step in range(max(learned, default=-1) + 1):
        if run.on_step:
            run.on_step(step, steps)
        with torch.set_grad_enabled(step in learned):
            velocity = run.policy(x, float(sigmas[step])).float()
        if step not in learned:
            x = x + velocity * (sigmas[step + 1] - sigmas[step])
            figures.forwards += len(x)
            continue
        branches = range(settings.num_branches)
        candidates, log_prob = _draw(x, velocity, step, sigmas, settings, run.seed, run.items, branches)
        with torch.no_grad():
            rewards = _score_siblings(run.score, candidates, sigmas[step + 1])
        advantages = gated_advantages(rewards, settings, figures)
        run.learn(velocity, Transitions(step, x, candidates, log_prob, advantages), len(learned))
        survivor = _survivor(rewards, settings, run.seed, step, run.items)
        x = candidates[torch.arange(len(x), device=x.device), survivor]
    return figures


@torch.no_grad()
def walk(
    policy: Policy, noise: Tensor, sigmas: Tensor, settings: GRPOSettings, *, seed: int, items: Sequence[int]
) -> tuple[Tensor, list[Transitions]]:
    """Trajectories to the end without gradients: the clean latents (B, C, H, W), and every step of the window
    with its one candidate and advantages still 0. Steps outside the window are Euler steps.
    """
    _check_rollout(noise, sigmas, settings, items)
    x, steps, path = noise.float(), len(sigmas) - 1, []
    for step in range(steps):
        velocity = policy(x, float(sigmas[step])).float()
        if not settings.learns(step, steps):
            x = x + velocity * (sigmas[step + 1] - sigmas[step])
            continue
        candidates, log_prob = _draw(x, velocity, step, sigmas, settings, seed, items, [0])
        path.append(Transitions(step, x, candidates, log_prob, torch.zeros_like(log_prob)))
        x = candidates[:, 0]
    return x, path


def _grpo(run: _RollOut) -> Figures:
    """Walks to the end, scores the clean latents at sigma 0, and gives every step its trajectory's
    advantage.
    """
    settings, figures, count = run.settings, run.figures, run.settings.num_branches
    if len(run.noise) % count:
        raise ValueError(f"{len(run.noise)} latents are no whole groups of {count}")
    final, path = walk(run.policy, run.noise, run.sigmas, settings, seed=run.seed, items=run.items)
    figures.forwards += len(final) * (len(run.sigmas) - 1)
    rows = torch.arange(len(final), device=final.device)
    with torch.no_grad():
        rewards = torch.cat([run.score(final[part], 0.0, part) for part in rows.split(count)]).float()
    advantages = gated_advantages(rewards.reshape(-1, count), settings, figures).reshape(-1, 1)
    for index, found in enumerate(path):
        if run.on_step:
            run.on_step(index, len(path))
        found.advantages = advantages
        run.learn(run.policy(found.x, float(run.sigmas[found.step])).float(), found, len(path))
    return figures


def std_against_ode(sigmas: Tensor, noise_level: float = 0.7, kind: str = "sde") -> list[float]:
    """Std of the stochastic path over the ODE's after each step but the last, for unit-variance Gaussian data
    with
    its exact velocity, which is linear in x: 1 where drift and noise balance.
    """
    one, ratios = torch.ones(1, 1, 1, 1), []
    stochastic = ordinary = 1.0
    for sigma, sigma_next in zip(sigmas[:-2].tolist(), sigmas[1:-1].tolist(), strict=True):
        velocity = (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2)  # E[noise - x0 | x] / x
        mean, std = transition(one, one * velocity, sigma, sigma_next, noise_level, kind, float(sigmas[1]))
        stochastic = math.hypot(float(mean) * stochastic, float(std))
        ordinary *= abs(1 + velocity * (sigma_next - sigma))
        ratios.append(stochastic / ordinary)
    return ratios
