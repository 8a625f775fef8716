"""Learning from preferences: Bradley-Terry, Thurstone, their accuracy, and scores calibrated across sigmas.

P(win over lose) = sigmoid(s_win - s_lose),   loss = -log P               (Bradley & Terry 1952)
P(win over lose) = Phi((s_win - s_lose) / sqrt(2 v)),   loss = 1 - sqrt(P)    (Thurstone 1927; the fidelity
                   of Tsai et al. 2007; v = 2 sigma^2 + 0.05 is DiNa-LRM's)
standard score   = (s - mean(sigma)) / std(sigma)                         mean and std kept for bins of sigma
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    score_win: Tensor, score_lose: Tensor, label: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Mean of -log sigmoid(score_win - score_lose) over pairs (B,): a scalar.

    label: (B,) probability y that the winner is the preferred one, 1 when not given, 0.5 for a soft tie; the
    loss is then the cross-entropy -y log P - (1 - y) log(1 - P). weight: (B,) weights of a weighted mean.
    """
    margin = score_win - score_lose
    losses = -logsigmoid(margin)
    if label is not None:
        # -y log P - (1 - y) log(1 - P), and log P - log(1 - P) is the margin.
        losses = losses + (1 - _like("label", label, margin)) * margin
    return _weighted_mean(losses, weight)


def thurstone_loss(
    score_win: Tensor,
    score_lose: Tensor,
    sigma: float | Tensor,
    label: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean fidelity loss 1 - sqrt(P) of pairs (B,) noised to sigma (one number or (B,)): a scalar.

    Each side's score varies by v = 2 sigma^2 + 0.05, so a margin counts for less in noise. label, weight: as
    for bradley_terry_loss; a soft label y gives 1 - sqrt(y P) - sqrt((1 - y) (1 - P)).
    """
    margin = score_win - score_lose
    variance = 2 * torch.as_tensor(sigma, dtype=margin.dtype, device=margin.device) ** 2 + 0.05
    if variance.numel() != 1:
        variance = _like("sigma", variance, margin)
    z = margin / (2 * variance).sqrt()
    # Through the logarithm, because sqrt(P) itself has an infinite slope where P underflows to zero.
    root_win, root_lose = (torch.exp(0.5 * torch.special.log_ndtr(side)) for side in (z, -z))
    if label is None:
        return _weighted_mean(1 - root_win, weight)
    label = _like("label", label, margin)
    return _weighted_mean(1 - label.sqrt() * root_win - (1 - label).sqrt() * root_lose, weight)


def _like(name: str, values: Tensor, scores: Tensor) -> Tensor:
    if values.shape != scores.shape:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, the scores {tuple(scores.shape)}: give one each"
        )
    return values.to(scores)


def _weighted_mean(losses: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return losses.mean()
    weight = _like("weight", weight, losses)
    return (weight * losses).sum() / weight.sum()


def preference_accuracy(score_win: Tensor, score_lose: Tensor) -> float:
    """Share of pairs (B,) ranked right; a tie counts one half. ValueError without pairs."""
    if score_win.numel() == 0:
        raise ValueError("there are no pairs to take the accuracy of")
    right = (score_win > score_lose).double() + 0.5 * (score_win == score_lose).double()
    return right.mean().item()


def accuracy_by_sigma(
    score_win: Tensor, score_lose: Tensor, sigma: Tensor, num_bins: int = 4
) -> list[float | None]:
    """Accuracy in each of num_bins equal parts of [0, 1], from low sigma to high; None where no pair is."""
    bins = _bin_of(sigma, num_bins)
    found = []
    for index in range(num_bins):
        inside = bins == index
        found.append(preference_accuracy(score_win[inside], score_lose[inside]) if inside.any() else None)
    return found


def calibration(scores: Tensor, sigma: Tensor, num_bins: int = 10) -> dict[str, list[float]]:
    """Mean and population std of scores (N,) over equal bins of their sigmas (N,).

    Returns {"sigma": bin centres, "mean": ..., "std": ...} for the bins that hold at least two scores, ready
    for a checkpoint's header. ValueError when no bin does.
    """
    bins, scores = _bin_of(sigma, num_bins), scores.double()
    table: dict[str, list[float]] = {"sigma": [], "mean": [], "std": []}
    for index in range(num_bins):
        inside = scores[bins == index]
        if len(inside) < 2:
            continue
        table["sigma"].append((index + 0.5) / num_bins)
        table["mean"].append(inside.mean().item())
        table["std"].append(inside.std(correction=0).item())
    if not table["sigma"]:
        raise ValueError(
            f"{len(scores)} scores leave fewer than two in every one of {num_bins} bins: score more"
        )
    return table


def standard_score(scores: Tensor, sigma: float, table: dict[str, list[float]]) -> Tensor:
    """Scores taken at sigma, in stds from their mean there, interpolated between the table's bin centres."""
    mean, std = (interpolate(sigma, table["sigma"], table[name]) for name in ("mean", "std"))
    return (scores - mean) / max(std, 1e-6)


def _bin_of(sigma: Tensor, num_bins: int) -> Tensor:
    return (sigma * num_bins).long().clamp(0, num_bins - 1)


def interpolate(x: float, xs: list[float], ys: list[float]) -> float:
    """y at x by straight lines between the points of ascending xs, and level beyond them."""
    if x <= xs[0]:
        return ys[0]
    for left in range(len(xs) - 1):
        if x <= xs[left + 1]:
            weight = (x - xs[left]) / (xs[left + 1] - xs[left])
            return ys[left] + weight * (ys[left + 1] - ys[left])
    return ys[-1]
