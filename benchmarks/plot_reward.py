"""docs/reward_studies.png: the reward model's studies in one picture, from benchmarks/results.

python -m benchmarks.plot_reward
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path("benchmarks/results")
CENTRES = (0.125, 0.375, 0.625, 0.875)


def with_interval(axes: Axes, xs: list[float], cells: list[list[float]], label: str) -> None:
    """Means joined by a line, intervals as bars; each cell (mean, low, high)."""
    means = [mean for mean, _, _ in cells]
    errors = [[mean - low for mean, low, _ in cells], [high - mean for mean, _, high in cells]]
    axes.errorbar(xs, means, yerr=errors, label=label, marker="o", markersize=4, capsize=3)


def panel(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("held-out accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def main() -> None:
    studies = json.loads((RESULTS / "reward_studies.json").read_text())
    tastes = json.loads((RESULTS / "personal_taste.json").read_text())
    rows = studies["rows"]
    figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for name, label in (("generator", "from the generator"), ("random", "fresh weights")):
        with_interval(grid[0, 0], CENTRES, rows[name]["by_sigma"], f"{label}, 3 seeds")
    panel(grid[0, 0], f"Backbone, {studies['steps']} steps of {studies['batch']} pairs", "sigma")
    for kept in (1, 2, 3, 4):
        with_interval(grid[0, 1], CENTRES, rows[f"{kept} blocks"]["by_sigma"], f"{kept} of 4 blocks")
    panel(grid[0, 1], "Blocks kept, one seed", "sigma")
    for name, points in studies["curves"].items():
        grid[1, 0].plot(
            [seen / 1000 for seen, _ in points], [value for _, value in points], marker="o", label=name
        )
    panel(grid[1, 0], "What is trained (192 held-out pairs on the way)", "thousand pairs seen")
    for name, cells in tastes["tastes"].items():
        with_interval(grid[1, 1], [int(size) for size in cells], list(cells.values()), name)
    grid[1, 1].set_xscale("symlog", linthresh=10)
    panel(grid[1, 1], "A new taste, head alone, 3 seeds", "personal pairs")
    out = Path("docs/reward_studies.png")
    figure.savefig(out, dpi=110)
    print(out)


if __name__ == "__main__":
    main()
