"""What Step-wise Sampling costs and gives on the demo family: every measure added in turn, and at equal time.

    python -m benchmarks.stepwise                               # every way: 200 prompts, a seed each
    python -m benchmarks.stepwise --seeds 2 --keep --ways "k = 1" "k = 2" "k = 4" "k = 6" "k = 8" \
        "best of 2" "best of 3" "best of 4" fast balanced thorough      # two seeds each, in their place
    python -m benchmarks.stepwise --ways "k = 4" --set end=0.5 --prompts 100 --out study.json

Every way of sampling starts from the same noise with the same prompts, batch by batch side by side, so its
time divided by plain sampling's is a ratio measured in one run. How pictures are judged: benchmarks.judging.
Differences are paired with plain sampling, prompt by prompt. Passes count forwards of the generator's four
blocks; scoring costs three quarters of one for every candidate, times the reward model's share of the
generator's tokens. "Outside" is the share of the time spent
in neither network.

`default_k4` compares the default of the node (the preset `balanced`) with greedy k = 4 at every step,
scored naively: its time over plain sampling's, and its share of that gain in reward and with the judge.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.judging import KINDS, Prompt, asked_prompts, drm_scorer, embed, interval, measure
from drm import DRM, flow, load_drm, stepwise
from drm.presets import PRESETS, Branching
from drm.ranges import Count, Range
from drm.scoring import Scorer
from training.config import argument
from training.demo import text
from training.demo.export import REWARD, Family, load_family
from training.demo.generator import SHIFT, guided_denoise, initial_noise
from training.engine.atomic import replace_atomically

SCORE_CHUNK = 96
BLOCKS, LATENT = 4, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One way of sampling. settings None is plain Euler; runs: best of so many plain ones; naive: every
    candidate is scored by itself, nothing is shared.
    """

    name: str
    settings: Branching | None = None
    runs: int = 1
    naive: bool = False


def all_ways() -> list[Way]:
    """Everything the tables show: naive costs, each measure in turn, then ways to compare at equal time."""
    ways = [Way(name="plain")]
    ways += [Way(name=f"k = {k}", settings=Branching(num_branches=k), naive=True) for k in (1, 2, 4, 6)]
    measures = {
        "k = 4, shared": {},
        "k = 4, first half": {"end": 0.5},
        "k = 4, to 80 %": {"end": 0.8},
        "k = 4, 10 to 90 %": {"start": 0.1, "end": 0.9},
        "k = 4, 30 to 80 %": {"start": 0.3, "end": 0.8},
        "k = 4, every 2nd": {"stride": 2},
        "k = 8, every 4th": {"num_branches": 8, "stride": 4},
        "k = 8": {"num_branches": 8},
    }
    ways += [Way(name=name, settings=Branching(**changes)) for name, changes in measures.items()]
    ways += [Way(name=f"best of {n}", runs=n) for n in (2, 3, 4)]
    warm = Branching(choice="softmax", temperature=0.5, stride=3)
    ways.append(Way(name="softmax 0.5, every 3rd", settings=warm))
    return ways + [Way(name=name, settings=Branching(preset=name)) for name in PRESETS]


@dataclasses.dataclass
class Timed:
    """A callable that adds up its own seconds."""

    work: Callable
    seconds: float = 0.0

    def __call__(self, *arguments):
        begun = time.perf_counter()
        result = self.work(*arguments)
        self.seconds += time.perf_counter() - begun
        return result


@dataclasses.dataclass
class Sampled:
    """Latents (B, ...) of one way, what they took, and what was spent on them."""

    latents: torch.Tensor
    seconds: float
    outside: float
    passes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What all ways have in common."""

    steps: int
    cfg: float
    batch: int


class Bench:
    """The family, with its reward model once in float32 under autocast and once in bfloat16 as nodes load
    it.
    """

    def __init__(self, family: Family, fast: DRM, setting: Setting) -> None:
        self.family, self.fast, self.setting = family, fast, setting
        self.plain: dict[tuple[int, ...], Sampled] = {}
        self.share = token_share(fast)

    def scorer(self, captions: list[str], naive: bool) -> Timed:
        if naive:
            return Timed(drm_scorer(self.family, captions))
        scorer = Timed(Scorer(self.fast, *embed(self.family, captions)))
        scorer.dtype = self.fast.backbone.dtype
        return scorer

    def once(self, captions: list[str], seeds: list[int], way: Way) -> Sampled:
        """One run of a batch."""
        denoise = Timed(
            guided_denoise(self.family.generator, self.family.tokenizer, captions, self.setting.cfg)
        )
        score = self.scorer(captions, way.naive)
        begun = time.perf_counter()
        latents, trace = stepwise.sample_stepwise(
            denoise,
            score,
            initial_noise(seeds),
            flow.schedule(self.setting.steps, SHIFT),
            settings=way.settings or Branching(num_branches=1, noise_level=0.0),
            item_ids=seeds,
            chunk_size=SCORE_CHUNK,
        )
        seconds = time.perf_counter() - begun
        networks = denoise.seconds + score.seconds
        calls = trace.spent["denoise"] * (1 if self.setting.cfg == 1 else 2)
        return Sampled(
            latents,
            seconds,
            seconds - networks,
            calls + self.share * scored_passes(trace.spent["scored"]) / len(seeds),
        )

    def best_of(self, captions: list[str], seeds: list[int], way: Way) -> Sampled:
        """The best finished latent of `runs` plain ones, by the reward model at sigma 0. Ways that draw the
        same ones share them, and their time.
        """
        drawn = []
        for i in range(way.runs):
            others = tuple(seed + 1_000_000 * i for seed in seeds)
            if others not in self.plain:
                self.plain[others] = self.once(captions, list(others), way)
            drawn.append(self.plain[others])
        begun, index = time.perf_counter(), torch.arange(len(captions))
        score = self.scorer(captions, naive=False)
        table = torch.stack([score(run.latents, 0.0, index) for run in drawn])
        latents = torch.stack([run.latents for run in drawn])[table.argmax(0), index]
        choosing = time.perf_counter() - begun
        passes = sum(run.passes for run in drawn) + self.share * way.runs * (BLOCKS - 1) / BLOCKS
        seconds, outside = (sum(getattr(run, name) for run in drawn) for name in ("seconds", "outside"))
        return Sampled(latents, seconds + choosing, outside, passes)

    def sample(self, captions: list[str], seeds: list[int], way: Way) -> Sampled:
        return (self.best_of if way.runs > 1 else self.once)(captions, seeds, way)


def token_share(drm: DRM) -> float:
    """Tokens of picture and text that the reward model sees, over the generator's."""
    rows, columns = drm.backbone.token_grid(LATENT, LATENT)
    return (rows * columns + text.LENGTH) / ((LATENT // 2) ** 2 + text.LENGTH)


def scored_passes(candidates: int) -> float:
    """Forwards of the whole generator that scoring so many candidates takes, but for its fewer tokens."""
    return candidates * (BLOCKS - 1) / BLOCKS


def run(bench: Bench, prompts: list[Prompt], ways: list[Way], seeds_each: int) -> list[dict]:
    """One row for each way; the first must be plain sampling."""
    captions = [prompt.caption for prompt in prompts for _ in range(seeds_each)]
    seeds, batch = [7 + 13 * i for i in range(len(captions))], bench.setting.batch
    short = Bench(bench.family, bench.fast, dataclasses.replace(bench.setting, steps=2))
    for way in ways:
        short.sample(captions[:batch], seeds[:batch], way)
    made: dict[str, list[Sampled]] = {way.name: [] for way in ways}
    for first in tqdm(range(0, len(captions), batch), desc="sampling", mininterval=20):
        part = slice(first, first + batch)
        for way in ways:
            made[way.name].append(bench.sample(captions[part], seeds[part], way))
        bench.plain.clear()
    latents = {name: torch.cat([part.latents for part in parts]) for name, parts in made.items()}
    figures = {name: measure(bench.family, found, prompts, seeds_each) for name, found in latents.items()}
    learned = np.array([prompt.learned for prompt in prompts])
    return [row(way, made, figures, ways[0].name, learned) for way in ways]


def row(way: Way, made: dict[str, list[Sampled]], figures: dict, plain: str, learned: np.ndarray) -> dict:
    """One way's figures with intervals; the judge's also of the prompts that the reward model learned from
    and of the others, by the mask `learned` (P,).
    """
    rng = np.random.default_rng(0)
    parts, values = made[way.name], figures[way.name]
    seconds = sum(part.seconds for part in parts)
    found = {"way": way.name, "settings": describe(way), "pictures": sum(len(p.latents) for p in parts)}
    found["time_ratio"] = seconds / sum(part.seconds for part in made[plain])
    found["outside"] = sum(part.outside for part in parts) / seconds
    found["passes"] = float(np.mean([part.passes for part in parts]))
    found |= {key: interval(value, rng) for key, value in values.items()}
    for key in ("drm", "judge", "judge_first"):
        found[f"{key}_gain"] = interval(values[key] - figures[plain][key], rng)
    for name, some in (("learned", learned), ("new", ~learned)):
        if some.any():
            found[f"judge_gain_{name}"] = interval((values["judge"] - figures[plain]["judge"])[some], rng)
    return found


def describe(way: Way) -> dict:
    """A way as plain values."""
    settings = None if way.settings is None else dataclasses.asdict(way.settings.chosen())
    return {"runs": way.runs, "naive": way.naive, "settings": settings}


def merged(before: list[dict], rows: list[dict]) -> list[dict]:
    """Earlier rows with those of the same name replaced; each one's ratios are to plain sampling in its own
    run.
    """
    new = {found["way"]: found for found in rows}
    kept = [new.pop(found["way"], found) for found in before]
    return kept + list(new.values())


def default_k4(rows: list[dict]) -> dict[str, float]:
    """The node's default against greedy k = 4 at every step."""
    by_name = {found["way"]: found for found in rows}
    default, full = by_name["balanced"], by_name["k = 4"]
    return {
        "time_ratio": default["time_ratio"],
        "gain_share": default["drm_gain"][0] / full["drm_gain"][0],
        "judge_gain": default["judge_gain"][0],
        "full_time_ratio": full["time_ratio"],
        "full_judge_gain": full["judge_gain"][0],
    }


def changed(way: Way, name: str, value: str) -> Way:
    """A branching way with another value of one of its settings."""
    if way.settings is None:
        return way
    typed = type(getattr(way.settings, name))(value)
    return dataclasses.replace(way, settings=dataclasses.replace(way.settings.chosen(), **{name: typed}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--prompts", type=argument(Count), default=200)
    parser.add_argument("--of", choices=KINDS, default="free", help="see benchmarks.judging")
    parser.add_argument("--seeds", type=argument(Count), default=1, help="pictures a prompt")
    parser.add_argument("--batch", type=argument(Count), default=32)
    parser.add_argument("--steps", type=argument(Count), default=20)
    parser.add_argument("--cfg", type=argument(Annotated[float, Range(1, 1000)]), default=1.5)
    parser.add_argument("--ways", nargs="+", metavar="NAME", help="only these; plain is always there")
    parser.add_argument("--keep", action="store_true", help="keep other ways of --out's rows")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change branching ways")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stepwise.json"))
    args = parser.parse_args()

    family = load_family(args.models)
    fast = load_drm(args.models / REWARD, dtype=torch.bfloat16).requires_grad_(False)
    prompts = asked_prompts(family, args.of, args.prompts)
    ways = [way for way in all_ways() if not args.ways or way.name in ("plain", *args.ways)]
    for change in args.set:
        ways = [changed(way, *change.split("=")) for way in ways]
    setting = Setting(steps=args.steps, cfg=args.cfg, batch=args.batch)
    rows = run(Bench(family, fast, setting), prompts, ways, args.seeds)
    if args.keep:
        rows = merged(json.loads(args.out.read_text())["rows"], rows)
    report = {
        "setting": dataclasses.asdict(setting),
        "prompts": len(prompts),
        "of": args.of,
        "device": "CPU, 2 cores",
        "rows": rows,
    }
    if {"balanced", "k = 4"} <= {found["way"] for found in rows}:
        report["default_k4"] = default_k4(rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(args.out, lambda temporary: temporary.write_text(json.dumps(report, indent=1)))
    print(f"{len(prompts)} prompts x {args.seeds} seeds, {setting}\n\n{as_markdown(rows)}\n\n-> {args.out}")


def as_markdown(rows: list[dict]) -> str:
    """The table people read."""

    def cell(values: list[float], scale: float = 1, digits: int = 2) -> str:
        mean, low, high = (f"{scale * v:.{digits}f}" for v in values)
        return f"{mean} ({low} to {high})"

    lines = [
        "| sampling | time / plain | passes | DRM gain | judge: probability, % | gain over plain, points "
        "| judge: first, % | diversity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in rows:
        cells = [
            found["way"],
            f"{found['time_ratio']:.2f}",
            f"{found['passes']:.0f}",
            cell(found["drm_gain"]),
            cell(found["judge"], 100, 1),
            cell(found["judge_gain"], 100, 1),
            cell(found["judge_first"], 100, 1),
            cell(found["diversity"], 1, 3) if "diversity" in found else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
