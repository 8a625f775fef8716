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

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from drm.text_files import EncodingError, read_text

VERSION = 1


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key and what it may be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """`base`: an SD3 or SD3.5 checkpoint (one file or a diffusers folder), or a reward model to go on from,
    which then decides depth, tokens and head. `train`: all weights, a LoRA on the attention and the head, or
    the head alone. `random_backbone` keeps the base's shape and none of its weights. `coarse`:
    the side of a token over the base's; 2 makes four times fewer of them, for a model that scores several
    times as fast.
    """

    base: str
    num_kept: int = 21
    coarse: int = 1
    head_hidden: int = 256
    train: Literal["full", "lora", "head"] = "full"
    lora_rank: int = 64
    lora_alpha: float = 128.0
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
    weight: float = 1.0
    min_confidence: float = 0.95
    ties: Literal["drop", "soft"] = "drop"
    split: str | None = None
    limit: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """`encoders`: a diffusers SD3 folder with vae, text encoders and tokenizers. `held_out`: share of the
    prompts, chosen by their hash, whose pairs are only evaluated on. `bad_rows`: share that may be unusable.
    """

    encoders: str
    sources: tuple[SourceConfig, ...]
    out: str
    resolution: int = 512
    t5_lengths: tuple[int, ...] = (77, 256)
    batch_images: int = 16
    batch_prompts: int = 16
    shard_size: int = 2048
    workers: int = 4
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    held_out: float = 0.01
    bad_rows: float = 0.02
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`encoded`: the folder `training.encode` wrote. `weights` by source name go over the sources' own.
    `drop_t5`: share of batches seen without T5, as people without it prompt. `limit`: use only so many pairs.
    """

    encoded: str
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    drop_t5: float = 0.1
    limit: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`global_batch` pairs a step over all processes, at most `micro_batch` at once on one. `steps` goes over
    `epochs`. `sigma`: the range noise is drawn from, uniformly. `ema` 0 keeps no averaged weights.
    """

    out: str
    epochs: float = 1.0
    steps: int | None = None
    global_batch: int = 128
    micro_batch: int = 8
    learning_rate: float = 1e-5
    warmup: int = 1000
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    ema: float = 0.999
    loss: Literal["bradley-terry", "thurstone"] = "bradley-terry"
    sigma: tuple[float, float] = (0.0, 1.0)
    precision: Literal["bf16", "no"] = "bf16"
    save_every: int = 500
    keep: int = 2
    evaluate_every: int | None = None
    held_out_pairs: int = 2048
    workers: int = 2
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DRMConfig:
    """The whole file."""

    version: int
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
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def _check(config: DRMConfig) -> None:
    if config.version != VERSION:
        raise ConfigError(
            f"version is {config.version}, this code reads {VERSION}: take the configuration of this release"
            " in training/configs and carry your values over"
        )
    train, low_high = config.train, config.train.sigma
    wrong = [
        (train.global_batch < 1, "train.global_batch", train.global_batch, "at least 1"),
        (train.micro_batch < 1, "train.micro_batch", train.micro_batch, "at least 1"),
        (not 0 <= low_high[0] < low_high[1] <= 1, "train.sigma", low_high, "two growing numbers in 0 to 1"),
        (not 0 <= train.ema < 1, "train.ema", train.ema, "0 (none) to below 1"),
        (train.learning_rate <= 0, "train.learning_rate", train.learning_rate, "above 0"),
        (train.steps is not None and train.steps < 1, "train.steps", train.steps, "at least 1"),
        (train.epochs <= 0, "train.epochs", train.epochs, "above 0"),
        (train.save_every < 1, "train.save_every", train.save_every, "at least 1"),
        (train.keep < 1, "train.keep", train.keep, "at least 1"),
        (not 0 <= config.data.drop_t5 <= 1, "data.drop_t5", config.data.drop_t5, "0 to 1"),
        (config.model.num_kept < 1, "model.num_kept", config.model.num_kept, "at least 1"),
        (config.model.coarse < 1, "model.coarse", config.model.coarse, "1 (the base's tokens) or more"),
        (
            config.model.coarse > 1 and config.model.train != "full",
            "model.coarse",
            config.model.coarse,
            "1 unless model.train is full, because coarse tokens must be learned",
        ),
        (config.model.lora_rank < 1, "model.lora_rank", config.model.lora_rank, "at least 1"),
    ]
    for is_wrong, key, value, wanted in wrong:
        if is_wrong:
            raise ConfigError(f"{key} is {value}: wanted {wanted}")


def read_config(path: str | Path, cls: type, overrides: Sequence[str] = ()) -> typing.Any:
    """The YAML file as an instance of the frozen dataclass `cls`; ConfigError in one sentence otherwise.

    overrides: "section.key=value", the value read as YAML.
    """
    import yaml

    path = Path(path)
    try:
        tree = yaml.safe_load(read_text(path))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except EncodingError as error:
        raise ConfigError(str(error)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
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
        place[name] = yaml.safe_load(text)
    return _build(tree, cls, "")


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
    return cls(**{key: _convert(value, hints[key], f"{prefix}{key}") for key, value in tree.items()})


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
    if hint is float and isinstance(value, str):  # YAML 1.1 takes 1e-5 for a text
        value = _number(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ConfigError(f"{where} is {value!r}: wanted {_readable(hint)}")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _readable(hint: typing.Any) -> str:
    plain = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if typing.get_origin(hint) is tuple:
        return f"a list of {_readable(typing.get_args(hint)[0])}s".replace("of a ", "of ")
    return plain.get(hint, str(hint))
