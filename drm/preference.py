"""Learning from preferences: the Bradley-Terry model, its accuracy, and calibration of scores across sigmas.

P(win over lose) = sigmoid(s_win - s_lose),   loss = -log P               (Bradley & Terry 1952)
standard score   = (s - mean(sigma)) / std(sigma)                         mean and std kept for bins of sigma
"""

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(score_win: Tensor, score_lose: Tensor) -> Tensor:
    """Mean of -log sigmoid(score_win - score_lose) over pairs (B,): a scalar."""
    return -logsigmoid(score_win - score_lose).mean()


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
    mean, std = (_interpolate(sigma, table["sigma"], table[name]) for name in ("mean", "std"))
    return (scores - mean) / max(std, 1e-6)


def _bin_of(sigma: Tensor, num_bins: int) -> Tensor:
    return (sigma * num_bins).long().clamp(0, num_bins - 1)


def _interpolate(x: float, xs: list[float], ys: list[float]) -> float:
    if x <= xs[0]:
        return ys[0]
    for left in range(len(xs) - 1):
        if x <= xs[left + 1]:
            weight = (x - xs[left]) / (xs[left + 1] - xs[left])
            return ys[left] + weight * (ys[left + 1] - ys[left])
    return ys[-1]
