"""What a reward model's training reads: one YAML file as frozen dataclasses.

    version: 1
    model:   the network and which part of it learns
    encode:  pictures and prompts to latents and embeddings, once (`python -m training.encode`)
    data:    which encoded folder is learned from, and in what mixture
    train:   batch, optimiser, loss, what is saved (`python -m training.train_drm`)

An unknown key is an error that names the nearest known one; a value of another type is an error that names
the key. `section.key=value` on the command line goes over the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml

from drm.ranges import Count, CountOrNone, Decay, Positive, Range, Seed, Share, check_ranges, range_of
from drm.text_files import EncodingError, read_text

VERSION = 1

# pixels: eight of the VAE, two of the network
Resolution = Annotated[int, Range(16, 8192, multiple=16)]
LearningRate = Annotated[float, Range(0, 1, above=True)]
WeightDecay = Annotated[float, Range(0, 100)]
Workers = Annotated[int, Range(0, 1024)]
Rank = Annotated[int, Range(1, 65536)]
Tokens = Annotated[int, Range(1, 4096)]
Weight = Annotated[float, Range(0, 1000)]


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key and what it may be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """`base`: an SD3 or SD3.5 checkpoint (one file or a diffusers folder), or a reward model to go on from,
    which then decides depth, tokens and head. `train`: all weights, a LoRA on the attention and the head, or
    the head alone. `random_backbone` keeps the base's shape and none of its weights. `coarse`:
    the side of a token over the base's; 2 makes four times fewer of them, for a model that scores several
    times as fast. `head`: on the tokens (conv), or the DRM authors' on the model's own last layers (conv_gn).
    `backbone`: kept in the file, or shared with the model that people sample with, and the head alone saved.
    """

    base: str
    num_kept: Annotated[int, Range(1, 1024)] = 21
    coarse: Annotated[int, Range(1, 64)] = 1
    head: Literal["conv", "conv_gn"] = "conv"
    head_hidden: Annotated[int, Range(1, 65536)] = 256
    train: Literal["full", "lora", "head"] = "full"
    backbone: Literal["own", "shared"] = "own"
    lora_rank: Rank = 64
    lora_alpha: Positive = 128.0
    random_backbone: bool = False
    gradient_checkpointing: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One published preference set. `images`: the root of its relative paths, else the folder of `path`.
    `weight`: how many times an epoch of the mixture goes through it. `min_confidence` is HPDv3's.
    """

    format: Literal["hpdv3", "pickapic", "imagereward", "hpdv2", "jsonl"]
    path: str
    images: str | None = None
    weight: Weight = 1.0
    min_confidence: Share = 0.95
    ties: Literal["drop", "soft"] = "drop"
    split: str | None = None
    limit: Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """`encoders`: a diffusers SD3 folder with vae, text encoders and tokenizers. `held_out`: share of the
    prompts, chosen by their hash, whose pairs are only evaluated on. `bad_rows`: share that may be unusable.
    `fit`: the centre square (Lanczos), or the whole picture pressed into a square (bicubic). `posterior`: of
    the VAE's, its mean or a sample that depends on `seed` and the picture's number.
    """

    encoders: str
    sources: tuple[SourceConfig, ...]
    out: str
    resolution: Resolution = 512
    fit: Literal["centre", "square"] = "centre"
    posterior: Literal["mean", "sample"] = "mean"
    t5_lengths: tuple[Tokens, ...] = (77, 256)
    batch_images: Count = 16
    batch_prompts: Count = 16
    shard_size: Count = 2048
    workers: Workers = 4
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    held_out: Share = 0.01
    bad_rows: Share = 0.02
    seed: Seed = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`encoded`: the folder `training.encode` wrote. `weights` by source name go over the sources' own.
    `drop_t5`: share of batches seen without T5, as people without it prompt. `limit`: use only so many pairs.
    """

    encoded: str
    weights: dict[str, Weight] = dataclasses.field(default_factory=dict)
    drop_t5: Share = 0.1
    limit: Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`global_batch` pairs a step over all processes, at most `micro_batch` at once on one. `steps` goes over
    `epochs`. `noise`: one for both sides of a pair, or one each. `sigma_draw`: uniform in the range `sigma`,
    or a logit-normal place in the base's own schedule of 1,000 steps, shifted by `shift` (3 for SD3.5-Medium,
    1 for Large). `ema` 0 keeps no averaged weights.
    """

    out: str
    epochs: Positive = 1.0
    steps: Count | None = None
    global_batch: Count = 128
    micro_batch: Count = 8
    learning_rate: LearningRate = 1e-5
    warmup: CountOrNone = 1000
    weight_decay: WeightDecay = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    clip: Positive = 1.0
    ema: Decay = 0.999
    loss: Literal["bradley-terry", "thurstone"] = "bradley-terry"
    noise: Literal["shared", "independent"] = "shared"
    sigma: tuple[Share, Share] = (0.0, 1.0)
    sigma_draw: Literal["uniform", "logit-normal"] = "uniform"
    shift: Positive = 3.0
    precision: Literal["bf16", "no"] = "bf16"
    save_every: Count = 500
    keep: Count = 2
    evaluate_every: Count | None = None
    held_out_pairs: CountOrNone = 2048
    workers: Workers = 2
    seed: Seed = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DRMConfig:
    """The whole file."""

    version: Annotated[int, Range(1, VERSION)]
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    encode: EncodeConfig | None = None
    licence: str = "unknown"
    name: str = "reward model"

    def __post_init__(self) -> None:
        _check(self)

    def hash(self) -> str:
        """sha256 of everything in it, the same for the same configuration."""
        tree = dataclasses.asdict(self)
        if self.model.backbone == "own":  # older runs go on under the hash they began with
            del tree["model"]["backbone"]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _can_share(model: ModelConfig) -> bool:
    return (model.train, model.head, model.coarse, model.random_backbone) == ("head", "conv", 1, False)


def _check(config: DRMConfig) -> None:
    if config.version != VERSION:
        raise ConfigError(
            f"version is {config.version}, this code reads {VERSION}: take the configuration of this release"
            " in training/configs and carry your values over"
        )
    check_numbers(config)
    low_high = config.train.sigma
    wrong = [
        (not low_high[0] < low_high[1], "train.sigma", low_high, "two growing numbers in 0 to 1"),
        (
            config.train.sigma_draw != "uniform" and low_high != (0.0, 1.0),
            "train.sigma",
            low_high,
            "[0, 1] unless train.sigma_draw is uniform",
        ),
        (
            config.model.backbone == "shared" and not _can_share(config.model),
            "model.backbone",
            "shared",
            "own, unless model.train is head, model.head conv, model.coarse 1 and random_backbone off",
        ),
        (
            config.model.coarse > 1 and config.model.head == "conv_gn",
            "model.coarse",
            config.model.coarse,
            "1 with model.head conv_gn, which reads the model's own last layers",
        ),
        (
            config.model.coarse > 1 and config.model.train != "full",
            "model.coarse",
            config.model.coarse,
            "1 unless model.train is full, because coarse tokens must be learned",
        ),
    ]
    for is_wrong, key, value, wanted in wrong:
        if is_wrong:
            raise ConfigError(f"{key} is {value}: wanted {wanted}")


def check_numbers(config: object, where: str = "") -> None:
    """ConfigError for a number out of its field's range or an empty text, see drm.ranges."""
    try:
        check_ranges(config, where)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def argument(hint: typing.Any) -> Callable[[str], int | float]:
    """The `type` of a command line's argument: a number of an annotated kind, in its range."""
    kind, allowed = typing.get_args(hint)[0], range_of(hint)

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: wanted {_readable(kind)}") from error
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"{text}: wanted {allowed}")
        return value

    return read


def read_config(path: str | Path, cls: type, overrides: Sequence[str] = ()) -> typing.Any:
    """The YAML file as an instance of the frozen dataclass `cls`; ConfigError in one sentence otherwise.

    overrides: "section.key=value", the value read as YAML.
    """
    path = Path(path)
    try:
        text = read_text(path)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except EncodingError as error:
        raise ConfigError(str(error)) from error
    tree = _yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}: wanted sections such as {_names(cls)}")
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign:
            raise ConfigError(f"{override!r} is no setting: write section.key=value")
        place = tree
        *sections, name = key.split(".")
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ConfigError(f"{key} is no setting: {'.'.join(sections)} holds a single value")
        place[name] = _yaml(text, f"{override!r}")
    return _build(tree, cls, "")


def _yaml(text: str, source: str) -> object:
    try:
        return yaml.safe_load(text)
    # A date with a 13th month and a number of 5,000 digits are plain ValueErrors.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{source} is not YAML ({' '.join(str(error).split())}): close every bracket and quotation mark"
        ) from error


def _names(cls: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def _build(tree: object, cls: type, where: str) -> typing.Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{where or 'the file'} is {tree!r}: wanted a section with {_names(cls)}")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{prefix}{key} is not a setting, the nearest is {prefix}{near}")
    for field in dataclasses.fields(cls):
        has_default = not (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if field.name not in tree and not has_default:
            raise ConfigError(f"{prefix}{field.name} is missing: give it a value")
    values = {key: _convert(value, hints[key], f"{prefix}{key}") for key, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:  # settings of drm check themselves and know nothing of configurations
        raise ConfigError(f"{prefix}{error}") from error


def _convert(value: object, hint: typing.Any, where: str) -> typing.Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(value, hint, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} is {value!r}: wanted one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(
                _convert(item, kind, f"{where}[{i}]")
                for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
            )
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    # YAML 1.1 takes 1e-5 for a text
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        value = _number(value)
    if hint is float and isinstance(value, float):
        return value
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ConfigError(f"{where} is {value!r}: wanted {_readable(hint)}")


def _number(value: float | str) -> float | str:
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return value


def _readable(hint: typing.Any) -> str:
    plain = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        several = f"{_readable(arguments[0])}s".removeprefix("a ")
        return f"a list of {several if arguments[-1] is Ellipsis else f'{len(arguments)} {several}'}"
    if typing.get_origin(hint) is dict:
        return f"a section that gives names {_readable(arguments[1])} each"
    return plain.get(hint, "a section")
