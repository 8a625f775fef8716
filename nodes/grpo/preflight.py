"""What is checked before Step-GRPO's first update: a failed check stops with its figure and what to change.

caches    nothing on the MODEL hands out the network's outputs of other steps
ratio     exp(log p_new - log p_old) of a step walked twice, or a sample matched twice, is exactly 1
variance  the stochastic path's std over the ODE's, drm.grpo.std_against_ode; only where there is such a path
memory    what autograd will hold, measured on a smaller picture, against what is free
spread    rewards of siblings differ, and a gradient reaches the LoRA
"""

from collections.abc import Callable

import comfy.model_management as mm
import comfy.model_patcher
import torch
from torch import Tensor

from ..trunk import token_grid
from .comfy_policy import ComfyPolicy, graph_bytes
from .inputs import Training

LEAST_STD, MOST_STD = 0.7, 1.5
GB = 1 << 30
# Gradient and Adam's two moments of a float32 matrix, and the old policy's of nft and awm.
BYTES_A_VALUE, BYTES_OF_OLD = 12, 4
# The key under which each wraps the sampling.
CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}


def check_caches(model: comfy.model_patcher.ModelPatcher) -> None:
    """ValueError for a MODEL with ComfyUI's caches: they take all calls for steps of one picture, and would
    answer for one prompt with the output, and the graph, of another.
    """
    own = model.model_options.get("transformer_options", {}).get("wrappers", {})
    keys = {key for wrappers in (*model.wrappers.values(), *own.values()) for key in wrappers}
    if found := [name for key, name in CACHES.items() if key in keys]:
        raise ValueError(
            f"{' and '.join(found)} on the MODEL gives out the outputs of other steps, wanted each computed:"
            " take patches and accelerators off it"
        )


def check_variance(sigmas: Tensor, training: Training) -> str:
    from ...drm.grpo import std_against_ode

    settings = training.settings
    ratio = std_against_ode(sigmas.cpu(), settings.noise_level, settings.kind)[-1]
    if not LEAST_STD <= ratio <= MOST_STD:
        raise ValueError(
            f"the stochastic path ends with {ratio:.2f} times the ODE's std, wanted {LEAST_STD} to"
            f" {MOST_STD}: its pictures would be noisier than those you draw later; lower noise_level or"
            " take more steps"
        )
    return f"std of the stochastic path over the ODE's: {ratio:.3f}"


def check_ratio(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, sigmas: Tensor, training) -> str:
    """Asks for the first velocity twice, without and with gradients, and compares log p."""
    settings, sigma = training.settings, float(sigmas[0])
    with torch.no_grad():
        first = velocity(noise, sigma)
    second = velocity(noise, sigma).detach()
    log_probs = _matched if settings.is_forward else _walked
    old, new = log_probs(first, second, noise, sigmas, training)
    error = (torch.exp(new - old) - 1).abs().max().item()
    if error != 0:
        what = "noised sample matched" if settings.is_forward else "step walked"
        raise ValueError(
            f"the same {what} twice differs: the probability ratio is off 1 by {error:.2e}, wanted 0;"
            " the MODEL gives different output with and without gradients, take patches and accelerators"
            " off it"
        )
    return "probability ratio before the first update: exactly 1"


def _walked(
    first: Tensor, second: Tensor, noise: Tensor, sigmas: Tensor, training: Training
) -> tuple[Tensor, Tensor]:
    """log p of candidates that the first velocity draws, by both."""
    from ...drm.branching import branch_candidates
    from ...drm.sde import transition, transition_log_prob

    settings = training.settings
    step = sigmas[0], sigmas[1], settings.noise_level, settings.kind, sigmas[1]
    mean, std = transition(noise, first, *step)
    candidates = branch_candidates(mean, std, training.seed, 0, [0] * len(noise), range(2))
    other, other_std = transition(noise, second, *step)
    return (
        transition_log_prob(candidates, mean.unsqueeze(1), std.unsqueeze(1), settings.kind),
        transition_log_prob(candidates, other.unsqueeze(1), other_std.unsqueeze(1), settings.kind),
    )


def _matched(
    first: Tensor, second: Tensor, noise: Tensor, sigmas: Tensor, training: Training
) -> tuple[Tensor, Tensor]:
    """log p of a sample of zeros under all of its noise, by both velocities."""
    from ...drm.forward_rl import matching_log_prob

    old, new = (matching_log_prob(velocity, noise, float(sigmas[0])) for velocity in (first, second))
    return old, new


def check_memory(
    policy: ComfyPolicy, prompt: int, noise: Tensor, text_length: int, values: int, training: Training
) -> str:
    """Forecasts memory, and has the policy spare some where that is enough. values: numbers in the LoRA."""
    free = mm.get_free_memory(policy.device)
    a_value = BYTES_A_VALUE + BYTES_OF_OLD * training.settings.is_forward
    fixed = a_value * values + policy.guider.inner_model.memory_required([training.group, *noise.shape[1:]])
    needed = fixed + _graph(policy, prompt, noise, text_length) * training.group
    first = needed
    while needed > free and policy.smaller(training.group):
        needed = fixed + _graph(policy, prompt, noise, text_length) * (policy.largest or training.group)
    if needed > free:
        raise ValueError(
            f"training needs about {first / GB:.1f} GB beside the models, {needed / GB:.1f} GB with"
            f" everything spared, and {free / GB:.1f} GB are free: choose a smaller width and height or a"
            " smaller rank, or close other programs"
        )
    spared = "" if needed == first else f" (sparing memory, {first / GB:.2f} GB without)"
    return f"memory: about {needed / GB:.2f} GB beside the models{spared}, {free / GB:.1f} GB free"


def _graph(policy: ComfyPolicy, prompt: int, noise: Tensor, text_length: int) -> float:
    """Bytes of one picture's graph, from a picture of a quarter of its size."""
    height, width = (max(2, length // 4 * 2) for length in noise.shape[-2:])
    small = noise[:1, :, :height, :width].contiguous()
    measured = graph_bytes(lambda: policy.velocity(prompt, small, 1.0), policy.network)
    grids = (token_grid(policy.network, *x.shape[-2:]) for x in (noise, small))
    tokens, small_tokens = (rows * columns + text_length for rows, columns in grids)
    if policy.recompute:  # what one block holds while it is computed again
        policy.recompute = False
        whole = graph_bytes(lambda: policy.velocity(prompt, small, 1.0), policy.network)
        policy.recompute = True
        measured += whole / len(policy.blocks)
    return measured * tokens / small_tokens


def check_learning(summary: dict[str, float], gradients: list[Tensor | None], training: Training) -> str:
    """summary: of a roll-out that left these gradients."""
    settings, spread = training.settings, summary["spread"]
    if summary["gated"] == 1:
        raised = "" if settings.is_forward else "noise_level or "
        raise ValueError(
            f"the rewards of siblings differ by {spread:.2g} (std), wanted at least {settings.min_std:.2g}:"
            f" nothing can be learned from them; raise {raised}num_branches, or choose another DRM"
        )
    norm = sum(float(gradient.norm()) for gradient in gradients if gradient is not None)
    if not norm > 0 or norm == float("inf"):
        raise ValueError(
            f"the gradient that reaches the LoRA is {norm}: something on the MODEL hides or breaks its"
            " attention layers (a compiled or replaced block); take it off"
        )
    return f"reward {summary['rewards/mean']:+.3f}, spread among siblings {spread:.3f} (std)"
