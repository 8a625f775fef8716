"""docs/stepwise.png: what every way of sampling gives for its time, from benchmarks/results/stepwise.json.

python -m benchmarks.stepwise_plot
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

PANELS = {
    "drm_gain": ("What the reward model says", "gain in reward", 1),
    "judge_gain": ("What the independent judge says", "gain in the judge's probability, points", 100),
}
CURVES = ("greedy, every step", "best of N", "presets")


def curve_of(row: dict) -> str | None:
    """Which curve a way belongs to; None stands alone."""
    name = row["way"]
    if name in ("fast", "balanced", "thorough"):
        return "presets"
    if name.startswith("best of"):
        return "best of N"
    if row["settings"]["naive"] and row["settings"]["k"] > 1:
        return "greedy, every step"
    return None


def draw(rows: list[dict], axes: Axes, key: str) -> None:
    """One panel: gains with intervals over time, ways of one curve joined, the others named."""
    title, label, scale = PANELS[key]
    members = {curve: [row for row in rows if curve_of(row) == curve] for curve in CURVES}
    for curve, found in members.items():
        _bars(axes, sorted(found, key=lambda row: row["time_ratio"]), key, scale, label=curve, marker="o")
    alone = [row for row in rows if curve_of(row) is None and row["settings"]["k"] > 1]
    _bars(axes, alone, key, scale, label="one measure each", marker="x", linestyle="none", color="grey")
    if key == "drm_gain":
        for row in alone:
            place = row["time_ratio"], scale * row[key][0]
            name = row["way"].removeprefix("k = 4, ")
            axes.annotate(name, place, xytext=(5, -2), textcoords="offset points", fontsize=6, color="grey")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title=title, xlabel="time / plain sampling", ylabel=label)
    axes.grid(alpha=0.3)


def _bars(axes: Axes, rows: list[dict], key: str, scale: float, **style) -> None:
    cells = [[scale * value for value in row[key]] for row in rows]
    means = [mean for mean, _, _ in cells]
    errors = [[mean - low for mean, low, _ in cells], [high - mean for mean, _, high in cells]]
    axes.errorbar([row["time_ratio"] for row in rows], means, yerr=errors, capsize=3, alpha=0.8, **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/stepwise.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/stepwise.png"))
    args = parser.parse_args()
    report = json.loads(args.results.read_text())
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axes, key in zip(panels, PANELS, strict=True):
        draw(report["rows"], axes, key)
    panels[0].legend(fontsize=8)
    pictures = sorted({row["pictures"] for row in report["rows"]})
    each = " or ".join(map(str, pictures))
    figure.suptitle(f"{report['prompts']} prompts, {each} pictures a way, 95 % intervals", fontsize=10)
    figure.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
