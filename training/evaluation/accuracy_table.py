"""What an evaluation leaves behind: the table as Markdown, everything as JSON, accuracy against sigma as PNG.

All three are written to a temporary name and renamed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path

from training.data.readers import Report
from training.engine.atomic import replace_atomically

FORMAT, VERSION = "drm-evaluation", 1
TITLES = {
    "imagereward": "ImageReward",
    "pickscore_official": "PickScore official",
    "pickscore_unique": "PickScore unique, no ties",
    "pickscore_test": "PickScore test, no ties",
    "hpdv2": "HPDv2",
    "hpdv3": "HPDv3",
    "pairs": "own pairs",
}
# Published preference accuracy in %: ImageReward, PickScore, HPDv2, HPDv3 (DRM, CVPR 2026).
PAPER = {
    "CLIP ViT-H/14": (57.1, 60.8, 65.1, 48.6),
    "Aesthetic Predictor": (57.4, 56.8, 76.8, 59.9),
    "ImageReward": (65.1, 61.1, 74.0, 58.6),
    "PickScore": (61.6, 70.5, 79.8, 65.6),
    "HPSv2": (65.7, 63.8, 83.3, 65.3),
    "MPS": (67.5, 63.1, 83.5, 64.3),
    "HPSv3-2B": (57.9, 63.6, 80.8, 66.3),
    "HPSv3-7B": (66.8, 72.8, 85.4, 76.9),
    "DRM": (64.1, 73.4, 82.2, 74.0),
}
LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow", "pyarrow")


def build(
    *,
    config: dict,
    scorers: list[dict],
    reports: dict[str, Report],
    results: list[dict],
    files: dict[str, dict[str, str]],
) -> dict:
    """The report as a JSON tree."""
    test_sets = {}
    for name, report in reports.items():
        tree = report.as_dict()
        (counts,) = tree["sources"].values()
        test_sets[name] = {**counts, "bad_rows": tree["bad_rows"], "files_sha256": files.get(name, {})}
    return {
        "format": FORMAT,
        "version": VERSION,
        "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": config,
        "scorers": scorers,
        "test_sets": test_sets,
        "results": results,
        "versions": {"python": platform.python_version(), **{n: _version(n) for n in LIBRARIES}},
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(tree: dict, out: Path) -> None:
    """evaluation.json and accuracy.png."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "evaluation.json", json.dumps(tree, indent=1, allow_nan=False) + "\n")
    replace_atomically(out / "accuracy.png", lambda temporary: plot(_as_asked(tree["results"]), temporary))


def write_text(path: Path, text: str) -> None:
    replace_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def table(tree: dict, paper: bool = False) -> str:
    """Rows of scorer and sigma, columns of test sets, in % with intervals; then the rows of each set."""
    shown = {(*_row(r), r["column"]): _percent(r) for r in tree["results"]}
    rows = [
        [*row, *(shown.get((*row, column), "-") for column in TITLES)]
        for row in dict.fromkeys(_row(r) for r in tree["results"])
    ]
    if paper:
        rows += [[f"{name} (published)", "", *_published(figures)] for name, figures in PAPER.items()]
    parts = [_aligned(["model", "sigma", *TITLES.values()], rows), "In %, with 95 % bootstrap intervals."]
    if paper:
        parts.append("(*) published without saying which of the three forms was counted.")
    return "\n\n".join([*parts, _rows_of_sets(tree)]) + "\n"


def _row(result: dict) -> tuple[str, str]:
    name = result["scorer"] + (", prompts swapped" if result.get("prompts_swapped") else "")
    return name, _sigma(result["sigma"])


def _as_asked(results: Sequence[dict]) -> list[dict]:
    return [result for result in results if not result.get("prompts_swapped")]


def _percent(result: dict) -> str:
    return " ".join(
        [f"{100 * result['accuracy']:.1f}", f"[{100 * result['low']:.1f}, {100 * result['high']:.1f}]"]
    )


def _published(figures: tuple[float, float, float, float]) -> list[str]:
    imagereward, pickscore, hpdv2, hpdv3 = (f"{figure:.1f}" for figure in figures)
    return [imagereward, f"{pickscore} (*)", "-", "-", hpdv2, hpdv3, "-"]


def _rows_of_sets(tree: dict) -> str:
    rows = []
    for name, counts in tree["test_sets"].items():
        bad, left = counts["bad"], counts["left_out"]
        why = ", ".join(f"{reason} ({number})" for reason, number in [*bad.items(), *left.items()])
        rows.append([name, counts["read"], counts["used"], sum(bad.values()), sum(left.values()), why])
    parts = [_aligned(["test set", "rows read", "used", "refused", "left out", "why"], rows)]
    per_column = {
        r["column"]: [r["counted"], r["prompts"], r["left_out"]] for r in _as_asked(tree["results"])
    }
    rows = [[TITLES[column], *numbers] for column, numbers in per_column.items()]
    parts.append(_aligned(["column", "averaged over", "prompts", "ties left out"], rows))
    chosen = [
        [r["scorer"], _sigma(r["sigma"]), f"{r['threshold']:g}"]
        for r in _as_asked(tree["results"])
        if r["column"] == "pickscore_official"
    ]
    if chosen:
        parts.append(_aligned(["model", "sigma", "tie threshold chosen on validation_unique"], chosen))
    return "\n\n".join(parts)


def _sigma(sigma: float | None) -> str:
    return "" if sigma is None else f"{sigma:g}"


def _aligned(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" if place != 1 else f"|-{line}-|" for place, line in enumerate(lines))


def plot(results: list[dict], path: Path) -> None:
    """A panel for each column: a line with its interval for each model, a dashed level for each baseline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [column for column in TITLES if any(r["column"] == column for r in results)]
    across = min(3, len(columns)) or 1
    down = max(1, -(-len(columns) // across))
    figure = Figure(figsize=(4.2 * across, 3.2 * down), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(r["scorer"] for r in results))
    for place, column in enumerate(columns):
        axes = figure.add_subplot(down, across, place + 1)
        for number, name in enumerate(names):
            own = [r for r in results if r["scorer"] == name and r["column"] == column]
            _draw(axes, own, name, f"C{number % 10}")
        axes.axhline(50, color="0.8", linewidth=1, zorder=0)
        axes.set(title=TITLES[column], xlabel="sigma", ylabel="accuracy, %", xlim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    if columns:
        figure.axes[0].legend(fontsize="small")
    figure.savefig(path, format="png", dpi=150)


def _draw(axes, own: list[dict], name: str, color: str) -> None:
    if own and own[0]["sigma"] is None:
        axes.axhline(100 * own[0]["accuracy"], color=color, linestyle="--", label=name)
        return
    own = sorted(own, key=lambda result: result["sigma"])
    sigma = [r["sigma"] for r in own]
    accuracy, low, high = ([100 * r[key] for r in own] for key in ("accuracy", "low", "high"))
    axes.plot(sigma, accuracy, "o-", color=color, markersize=4, label=name)
    if len(own) > 1:
        axes.fill_between(sigma, low, high, color=color, alpha=0.15, linewidth=0)
    else:
        axes.vlines(sigma, low, high, color=color)
