"""The paper's accuracy table for one or several reward models, beside any baseline scorer.

    python -m training.evaluate --config training/configs/evaluate.yaml --models a.safetensors b.safetensors
    python -m training.evaluate --config ... --baseline PickScore=pickscore:models/PickScore_v1 --paper
    python -m training.evaluate --config ... --sigma 0 0.25 0.5 0.75 --out runs/by_sigma

Columns: ImageReward, PickScore in its three forms, HPDv2 and HPDv3, each counted as it was published
(evaluation/protocols.py) with 95 % bootstrap intervals; a test set that is not given or not there is a "-".
Each scorer has one more row, `prompts swapped`: the same pictures under another prompt of similar length, at
the first sigma. What a scorer loses there is what it owes to the prompt.
Pictures are encoded to latents at `resolution`, clean or noised to each sigma, prompts as long as each
model's header says. In --out:

    table.md          what is printed          evaluation.json    everything: counts, thresholds, hashes
    accuracy.png      accuracy against sigma   scores/            every score; start again and it goes on
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch

from drm import DRMFileError
from drm.checkpoint import load_whole_drm, read_header
from drm.ranges import Count, Range, Seed, Share
from training.config import ConfigError, Resolution, Workers, argument, check_numbers, read_config
from training.data.readers import Ranking, ReaderError
from training.evaluation import accuracy_table, baselines, picture_scores, protocols, test_sets
from training.evaluation.test_sets import COLUMNS, BenchmarkError, BenchmarksConfig

if TYPE_CHECKING:
    from training.data.encoders import SD3Encoders

VERSION = 1


class EvaluationError(RuntimeError):
    """There is nothing to evaluate, or no way to; the message says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`encoders`: a diffusers SD3 folder (for `models`). `baselines`: name to clip:FOLDER, pickscore:FOLDER
    or module:function. `fit`: see training.config.EncodeConfig. `bad_rows`: share of a test set that may be
    unusable.
    """

    version: Annotated[int, Range(1, VERSION)]
    benchmarks: BenchmarksConfig
    models: tuple[str, ...] = ()
    baselines: dict[str, str] = dataclasses.field(default_factory=dict)
    encoders: str | None = None
    out: str = "runs/evaluation"
    sigmas: tuple[Share, ...] = (0.0, 0.25, 0.5, 0.75)
    resolution: Resolution = 512
    fit: Literal["centre", "square"] = "centre"
    batch: Count = 16
    workers: Workers = 4
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    bad_rows: Share = 0.02
    resamples: Annotated[int, Range(1, 10**6)] = 2000
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        wrong = [
            (not self.sigmas, "sigmas", self.sigmas, "at least one"),
            (len(set(self.sigmas)) < len(self.sigmas), "sigmas", self.sigmas, "each once"),
        ]
        for is_wrong, key, value, wanted in wrong:
            if is_wrong:
                raise ConfigError(f"{key} is {value}: wanted {wanted}")


def evaluate(config: EvaluateConfig) -> dict:
    """Scores what is not scored yet, counts, writes --out and returns the report (evaluation.json)."""
    rankings, reports = test_sets.read_benchmarks(config.benchmarks, config.bad_rows)
    device = _device(config.device)
    scorers, encoders, facts = load_scorers(config, device)
    jobs = picture_scores.jobs_of(ranking for ones in rankings.values() for ranking in ones)
    score_all = functools.partial(
        picture_scores.score_all,
        folder=Path(config.out) / "scores",
        encoders=encoders,
        resolution=config.resolution,
        fit=config.fit,
        seed=config.seed,
        batch_size=config.batch,
        workers=config.workers,
    )
    books, bad = score_all(jobs, scorers)
    digests = {job.key: job.digest for job in jobs}
    rankings = test_sets.drop_unscored(
        rankings, reports, lambda prompt, picture: bad.get(digests[prompt, picture.key])
    )
    for report in reports.values():
        report.check(config.bad_rows)
    results = [
        result
        for scorer in scorers
        for sigma in scorer.sigmas
        for result in count_all(config, rankings, scorer.name, sigma, books[scorer.name], digests)
    ]
    swapped = {name: test_sets.with_other_prompts(ones) for name, ones in rankings.items()}
    jobs = picture_scores.jobs_of(ranking for ones in swapped.values() for ranking in ones)
    books, _ = score_all(jobs, [dataclasses.replace(s, sigmas=s.sigmas[:1]) for s in scorers])
    digests = {job.key: job.digest for job in jobs}
    results += [
        {**result, "prompts_swapped": True}
        for scorer in scorers
        for result in count_all(config, swapped, scorer.name, scorer.sigmas[0], books[scorer.name], digests)
    ]
    tree = accuracy_table.build(
        config=dataclasses.asdict(config),
        scorers=facts,
        reports=reports,
        results=results,
        files=test_sets.files_of(config.benchmarks),
    )
    accuracy_table.write(tree, Path(config.out))
    return tree


def count_all(
    config: EvaluateConfig,
    rankings: dict[str, list[Ranking]],
    name: str,
    sigma: float | None,
    book: picture_scores.Scores,
    digests: dict[tuple[str, str], str],
) -> list[dict]:
    """One result for each column whose test sets are there."""

    def score(ranking: Ranking) -> list[float]:
        return [book[digests[ranking.prompt, picture.key], sigma] for picture in ranking.pictures]

    results = []
    for column, needed in COLUMNS.items():
        if not all(rankings.get(benchmark) for benchmark in needed):
            continue
        try:
            credits, threshold = test_sets.count(column, rankings, score)
        except protocols.ProtocolError as error:
            raise EvaluationError(f"{column}: {error}") from error
        low, high = protocols.bootstrap_interval(credits, resamples=config.resamples, seed=config.seed)
        results.append(
            {
                "scorer": name,
                "sigma": sigma,
                "column": column,
                "accuracy": credits.accuracy,
                "low": low,
                "high": high,
                "prompts": len(credits.right),
                "counted": int(credits.counted.sum()),
                "left_out": credits.skipped,
                "threshold": threshold,
            }
        )
    return results


def model_names(paths: Sequence[str]) -> list[str]:
    """The files' names, with their folder's where two are called the same (each run's reward.safetensors)."""
    stems = [Path(path).stem for path in paths]
    return [
        f"{Path(path).resolve().parent.name}/{stem}" if stems.count(stem) > 1 else stem
        for path, stem in zip(paths, stems, strict=True)
    ]


def load_scorers(
    config: EvaluateConfig, device: torch.device
) -> tuple[list[picture_scores.Scorer], SD3Encoders | None, list[dict]]:
    """Models and baselines, the encoders when there are models, and the facts about each for the report."""
    names = model_names(config.models)
    if not names and not config.baselines:
        raise EvaluationError("there is nothing to evaluate: give --models, --baseline, or both")
    for name in names:
        if [*names, *config.baselines].count(name) > 1:
            raise EvaluationError(f"two scorers are called {name}: rename a file or a baseline")
    if config.models and config.encoders is None:
        raise EvaluationError("models need `encoders`, a diffusers SD3 folder with VAE and text encoders")
    headers = [read_header(path) for path in config.models]  # before anything large is read
    functions = {name: baselines.load_baseline(spec, str(device)) for name, spec in config.baselines.items()}
    dtype = _dtype(config.dtype, device)
    encoders = _load_encoders(config, device, dtype) if config.models else None
    scorers: list[picture_scores.Scorer] = []
    facts: list[dict] = []
    for name, path, header in zip(names, config.models, headers, strict=True):
        scorer, fact = _model_scorer(config, name, path, header, encoders)
        scorers.append(scorer)
        facts.append(fact)
    for name, function in functions.items():
        mark = baselines.fingerprint(config.baselines[name])
        scorers.append(picture_scores.BaselineScorer(name=name, fingerprint=mark, function=function))
        facts.append({"name": name, "kind": "baseline", "spec": config.baselines[name], "fingerprint": mark})
    return scorers, encoders, facts


def _load_encoders(config: EvaluateConfig, device: torch.device, dtype: torch.dtype) -> SD3Encoders:
    from training.data.encoders import EncoderError, SD3Encoders

    try:
        encoders = SD3Encoders.from_folder(config.encoders, device=device, dtype=dtype)
        encoders.latent_shape(config.resolution)
    except EncoderError as error:
        raise EvaluationError(str(error)) from error
    if not encoders.has_t5:
        print(f"{config.encoders} has no T5: models see zeros in its place", file=sys.stderr)
    return encoders


def _model_scorer(
    config: EvaluateConfig, name: str, path: str, header: dict, encoders: SD3Encoders
) -> tuple[picture_scores.ModelScorer, dict]:
    (clip_length, _) = encoders.prompt_shapes(())["clip"]
    t5_length = picture_scores.t5_length(header.get("text_length"), clip_length)
    sha256, encoded_by = test_sets.file_sha256(Path(path)), _encoders_fingerprint(encoders)
    dtype = str(encoders.dtype).removeprefix("torch.")
    how = [sha256, encoded_by, t5_length, config.resolution, config.seed, dtype, encoders.device.type]
    if config.fit != "centre":  # scores of before this was a setting stay good
        how.append(config.fit)
    scorer = picture_scores.ModelScorer(
        name=name,
        fingerprint=hashlib.sha256(json.dumps([*how, torch.__version__]).encode()).hexdigest(),
        model=load_whole_drm(path, device=encoders.device, dtype=encoders.dtype),
        sigmas=config.sigmas,
        t5_length=t5_length,
        device=encoders.device,
    )
    return scorer, {
        "name": name,
        "kind": "model",
        "path": path,
        "sha256": sha256,
        "text_length": header.get("text_length"),
        "t5_length": t5_length,
        "encoders": encoders.describe(),
        "dtype": dtype,
        "device": encoders.device.type,
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise EvaluationError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, name)


def _encoders_fingerprint(encoders: SD3Encoders) -> str:
    """The encoders' own hash and the times of their weights: what was scored with others is scored again."""
    times = sorted((str(p), p.stat().st_mtime_ns) for p in encoders.folder.glob("*/*.safetensors"))
    return hashlib.sha256(json.dumps([encoders.describe()["hash"], times]).encode()).hexdigest()


def _baseline(text: str) -> tuple[str, str]:
    name, sign, spec = text.partition("=")
    if not (name and sign and spec):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no baseline: write NAME=clip:FOLDER or NAME=module:function"
        )
    return name, spec


def _read(args: argparse.Namespace) -> EvaluateConfig:
    config = read_config(args.config, EvaluateConfig, args.settings)
    changes = {
        "models": None if args.models is None else tuple(args.models),
        "baselines": {**config.baselines, **dict(args.baseline)} if args.baseline else None,
        "sigmas": None if args.sigma is None else tuple(args.sigma),
        "encoders": args.encoders,
        "out": args.out,
    }
    return dataclasses.replace(config, **{key: value for key, value in changes.items() if value is not None})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the test sets' places")
    parser.add_argument("--models", nargs="+", metavar="FILE", help="reward models (.safetensors)")
    parser.add_argument(
        "--encoders", metavar="FOLDER", help="diffusers SD3 folder: VAE, text encoders, tokenizers"
    )
    parser.add_argument("--baseline", action="append", default=[], type=_baseline, metavar="NAME=SPEC")
    parser.add_argument(
        "--sigma", nargs="+", type=argument(Share), metavar="S", help="noise levels, 0 (clean) to 1"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where table, JSON, figure and scores go")
    parser.add_argument("--paper", action="store_true", help="print the published rows beside")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="go over the file")
    args = parser.parse_intermixed_args(arguments)
    try:
        config = _read(args)
        tree = evaluate(config)
        table = accuracy_table.table(tree, paper=args.paper)
        accuracy_table.write_text(Path(config.out) / "table.md", table)
    except (
        ConfigError,
        ReaderError,
        DRMFileError,
        BenchmarkError,
        EvaluationError,
        baselines.BaselineError,
        picture_scores.ScoringError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error}; what is scored so far is kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
