"""The table and the picture of benchmarks.step_grpo's runs.

    python -m benchmarks.step_grpo_report --runs runs/grpo --seeds 0 1 2

For each way and seed: updates, passes and seconds until the held-out reward is what GRPO with the same seed
ends with, as a share of what GRPO took; and the independent judge and the diversity there. Seconds were
measured while the machine did other work, side by side in one run for each seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np

from benchmarks.step_grpo import Setting
from drm.ranges import Seed
from training.config import LearningRate, argument
from training.engine.atomic import replace_atomically

mpl.use("Agg")
from matplotlib import pyplot as plt

WAYS = (("grpo", 4), ("step-grpo", 2), ("step-grpo", 4), ("step-grpo", 6))


def reached(rows: list[dict], level: float, name: str) -> float | None:
    """`name` of the row where the reward first is `level`, between two rows in proportion; None if never."""
    for before, after in itertools.pairwise(rows):
        if after["drm"] >= level:
            share = max(0.0, (level - before["drm"]) / (after["drm"] - before["drm"]))
            return before[name] + share * (after[name] - before[name])
    return None


def compare(runs: dict[tuple[str, int], list[dict]]) -> dict[str, dict]:
    """Of one seed: how many times fewer of GRPO's updates, passes and seconds each way took to GRPO's final
    reward, where it got there, and the judge and the diversity there and at its own end.
    """
    baseline = runs[WAYS[0]]
    level, found = baseline[-1]["drm"], {}
    for (way, k), rows in runs.items():
        names = ("updates", "passes", "seconds", "judge", "diversity")
        at = {name: reached(rows, level, name) for name in names}
        first, last = rows[0], rows[-1]
        found[f"{way} {k}"] = {
            "level": level,
            "last": last["drm"],
            "last_judge_change": last["judge"] - first["judge"],
            "last_diversity_change": last["diversity"] / first["diversity"] - 1,
            **dict(zip(("best_judge", "best_at"), best_judge(rows), strict=True)),
        }
        if at["passes"] is not None:
            found[f"{way} {k}"] |= {
                **{f"{n}_saved": baseline[-1][n] / at[n] for n in ("updates", "passes", "seconds") if at[n]},
                "judge_change": at["judge"] - first["judge"],
                "diversity_change": at["diversity"] / first["diversity"] - 1,
            }
    return found


def best_judge(rows: list[dict]) -> tuple[float, float]:
    """The judge's largest gain on the way, and the reward there: over-optimisation begins behind it."""
    best = max(rows, key=lambda row: row["judge"])
    return best["judge"] - rows[0]["judge"], best["drm"]


def spread(values: list[float]) -> list[float]:
    """Mean, least and most over seeds."""
    return [float(np.mean(values)), float(min(values)), float(max(values))]


def draw(all_runs: list[dict[tuple[str, int], list[dict]]], out: Path) -> None:
    figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    axes = {
        ("passes", "drm"): grid[0, 0],
        ("seconds", "drm"): grid[0, 1],
        ("drm", "judge"): grid[1, 0],
        ("drm", "diversity"): grid[1, 1],
    }
    for index, way in enumerate(WAYS):
        for (x, y), place in axes.items():
            for number, runs in enumerate(all_runs):
                label = f"{way[0]}, {'k' if way[0] != 'grpo' else 'G'} = {way[1]}" if number == 0 else None
                rows = runs[way]
                xs, ys = [row[x] for row in rows], [row[y] for row in rows]
                place.plot(xs, ys, color=f"C{index}", alpha=0.8, marker=".", label=label)
    names = {"drm": "held-out reward", "judge": "independent judge", "passes": "forward-backward passes"}
    for (x, y), place in axes.items():
        place.set_xlabel(names.get(x, x))
        place.set_ylabel(names.get(y, y))
        place.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/grpo"))
    parser.add_argument("--seeds", nargs="+", type=argument(Seed), default=[0, 1, 2])
    parser.add_argument(
        "--rates", nargs="+", type=argument(LearningRate), default=[1e-3], help="one, or one for each way"
    )
    parser.add_argument("--prompts", default="free")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/step_grpo.json"))
    args = parser.parse_args()
    all_runs, rates = [], dict(zip(WAYS, itertools.cycle(args.rates), strict=False))
    for seed in args.seeds:
        settings = {
            way: Setting(way=way[0], k=way[1], rate=rates[way], seed=seed, updates=0, prompts=args.prompts)
            for way in WAYS
        }
        all_runs.append(
            {way: json.loads((args.runs / f"{s.name}.json").read_text()) for way, s in settings.items()}
        )
    compared = [compare(runs) for runs in all_runs]
    table = {}
    for name in compared[0]:
        cells = [seed[name] for seed in compared]
        keys = dict.fromkeys(key for cell in cells for key in cell)
        table[name] = {key: spread([cell[key] for cell in cells if key in cell]) for key in keys}
        table[name]["seeds_that_reached"] = sum("passes_saved" in cell for cell in cells)
        print(name, {key: np.round(value, 3).tolist() for key, value in table[name].items()})
    args.results.parent.mkdir(parents=True, exist_ok=True)
    runs = {f"{way} {k}": [seed[way, k] for seed in all_runs] for way, k in WAYS}
    used = {f"{way} {k}": rate for (way, k), rate in rates.items()}
    result = {"rates": used, "prompts": args.prompts, "table": table, "runs": runs}
    replace_atomically(args.results, lambda path: path.write_text(json.dumps(result)))
    draw(all_runs, Path("docs/step_grpo.png"))


if __name__ == "__main__":
    main()
