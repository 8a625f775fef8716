"""Every number of every command has a stated range; what is outside is refused in one line."""

import argparse
import ast
import copy
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from drm.ranges import Count, Positive, range_of
from training import encode_plan
from training.config import ConfigError, DRMConfig, argument, read_config
from training.evaluate import EvaluateConfig
from training.grpo.config import StepGRPOConfig

ROOT = Path(__file__).parents[2]
WHOLE = {
    DRMConfig: {
        "version": 1,
        "model": {"base": "base.safetensors"},
        "data": {"encoded": "encoded", "weights": {"hpdv3": 1.0}},
        "train": {"out": "run"},
        "encode": {"encoders": "sd3", "sources": [{"format": "jsonl", "path": "a.jsonl"}], "out": "encoded"},
    },
    StepGRPOConfig: {
        "version": 1,
        "model": {"base": "base.safetensors", "drm": "reward.safetensors", "vae": "vae"},
        "data": {"prompts": "train.txt", "encoded": "prompts"},
        "train": {"out": "run"},
        "grpo": {},
        "rollout": {},
        "evaluate": {"drms": {"other": "a.safetensors"}, "rivals": {"clip": "clip:a"}},
    },
    EvaluateConfig: {
        "version": 1,
        "benchmarks": {"hpdv3": {"path": "test.json"}},
        "models": ["a.safetensors"],
        "rivals": {"clip": "clip:a"},
        "sigmas": [0.0],
    },
}
NUMBERS = [math.nan, math.inf, -math.inf, -1, 0, 1, 2, 0.5, 10**10, 10**20, 10**400, "1e20", "1e-5"]
OTHERS = ["", " ", "a\0b", "some", None, True, [], [1, 2], [math.nan], ["", -1], {}, {"a": -1}, {"a": ""}]


def plain(hint: typing.Any) -> typing.Any:
    """The type without its range and without None."""
    while typing.get_origin(hint) in (typing.Annotated, types.UnionType, typing.Union):
        hint = next(inner for inner in typing.get_args(hint) if inner is not type(None))
    return hint


def leaves(cls: type, tree: dict, path: tuple = ()) -> Iterator[tuple[tuple, typing.Any]]:
    """(path, annotation) of every setting, those in sections and lists too."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        yield (*path, name), hint
        value = tree.get(name)
        if dataclasses.is_dataclass(plain(hint)) and value is not None:
            yield from leaves(plain(hint), value, (*path, name))
        elif isinstance(value, list) and dataclasses.is_dataclass(inner := typing.get_args(plain(hint))[0]):
            yield from leaves(inner, value[0], (*path, name, 0))


def changed(tree: dict, path: tuple, value: object) -> dict:
    tree = copy.deepcopy(tree)
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return tree


def has_numbers(hint: typing.Any) -> bool:
    return hint in (int, float) or any(has_numbers(inner) for inner in typing.get_args(hint))


def numbers_of(value: object) -> list[float]:
    if isinstance(value, dict | tuple | list):
        return [
            n for item in (value.values() if isinstance(value, dict) else value) for n in numbers_of(item)
        ]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def outcome(tree: dict, cls: type, file: Path, settings: Sequence[str] = ()) -> object:
    """The configuration of a command, or the sentence it is refused with."""
    file.write_text(yaml.safe_dump(tree))
    try:
        config = read_config(file, cls, settings)
        if cls is DRMConfig and config.encode:
            encode_plan.check(config.encode)
    except ConfigError as error:
        return str(error)
    return config


@pytest.mark.parametrize("cls", WHOLE)
def test_every_number_declares_its_range(cls: type):
    numbers = [(path, hint) for path, hint in leaves(cls, WHOLE[cls]) if has_numbers(hint)]
    assert len(numbers) > 5
    assert [path for path, hint in numbers if range_of(hint) is None] == []


def test_the_walk_sees_what_has_no_range():
    assert has_numbers(tuple[float, float])
    assert has_numbers(dict[str, int] | None)
    assert range_of(tuple[float, float]) is None


@pytest.mark.parametrize("cls", WHOLE)
def test_a_value_is_within_the_range_or_refused_in_one_line(cls: type, tmp_path: Path):
    accepted = 0
    for path, hint in leaves(cls, WHOLE[cls]):
        name, allowed = path[-1], range_of(hint)
        for value in NUMBERS + OTHERS:
            config = outcome(changed(WHOLE[cls], path, value), cls, tmp_path / "config.yaml")
            if isinstance(config, str):
                assert "\n" not in config
                assert str(name) in config
                continue
            accepted += 1
            got = config
            for key in path:
                got = got[key] if isinstance(got, tuple) else getattr(got, key)
            assert not allowed or all(number in allowed for number in numbers_of(got)), (path, value)
            assert not (isinstance(got, str) and (not got.strip() or "\0" in got)), (path, value)
            if allowed and value is not None and not isinstance(value, str | dict | list):
                assert got == value, f"{name} is {got}, written as {value}"
    assert accepted > 30


@pytest.mark.parametrize(
    ("cls", "setting", "sentence"),
    [
        (DRMConfig, "train.clip=-1", "train.clip is -1.0: wanted above 0 and at most 1,000,000 (1 is usual)"),
        (DRMConfig, "train.clip=0", "train.clip is 0.0: wanted above 0 and"),
        (DRMConfig, "train.learning_rate=nan", "train.learning_rate is nan: wanted above 0 and at most 1"),
        (DRMConfig, "train.steps=1e20", "train.steps is '1e20': wanted a whole number"),
        (DRMConfig, "train.epochs=.inf", "train.epochs is inf: wanted above 0"),
        (DRMConfig, "train.betas=[0.9,2]", "train.betas[1] is 2.0: wanted at least 0 and below 1"),
        (DRMConfig, "train.warmup=-5", "train.warmup is -5: wanted at least 0"),
        (DRMConfig, "train.workers=-1", "train.workers is -1: wanted at least 0"),
        (DRMConfig, "train.weight_decay=-1", "train.weight_decay is -1.0: wanted at least 0"),
        (DRMConfig, "model.lora_alpha=0", "model.lora_alpha is 0.0: wanted above 0"),
        (DRMConfig, "model.head_hidden=0", "model.head_hidden is 0: wanted at least 1"),
        (DRMConfig, "data.limit=-3", "data.limit is -3: wanted at least 1"),
        (DRMConfig, "data.weights={a: .nan}", "data.weights.a is nan: wanted at least 0"),
        (DRMConfig, "train.out=''", "train.out is '': wanted a text that is not empty"),
        (DRMConfig, "train.steps=[1", "'train.steps=[1' is not YAML"),
        (DRMConfig, "train.out=2001-13-01", "'train.out=2001-13-01' is not YAML"),
        (DRMConfig, "encode.resolution=0", "encode.resolution is 0: wanted a multiple of 16, at least 16"),
        (StepGRPOConfig, "rollout.cfg=.nan", "rollout.cfg is nan: wanted at least 1"),
        (StepGRPOConfig, "grpo.min_std=.inf", "grpo.min_std is inf: wanted at least 0"),
        (
            StepGRPOConfig,
            "rollout.resolution=1.6e10",
            "rollout.resolution is '1.6e10': wanted a whole number",
        ),
        (StepGRPOConfig, "grpo={noise_level: 2, kind: cps}", "grpo.noise_level is 2.0: CPS is defined from"),
        (EvaluateConfig, "benchmarks.hpdv3.limit=-1", "benchmarks.hpdv3.limit is -1: wanted at least 1"),
    ],
)
def test_the_sentence(cls: type, setting: str, sentence: str, tmp_path: Path):
    found = outcome(WHOLE[cls], cls, tmp_path / "config.yaml", [setting])
    assert isinstance(found, str)
    assert sentence in found
    assert "\n" not in found


def test_files_that_are_not_yaml_are_refused_in_one_line(tmp_path: Path):
    file = tmp_path / "config.yaml"
    for data in (b"a: [1,\nb: 2", b"a: 2001-13-01", b"a: " + b"9" * 5000, b"[" * 5000, b"\xff\xfe\x00"):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match="is not YAML") as error:
            read_config(file, DRMConfig)
        assert "\n" not in str(error.value)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(WHOLE[DRMConfig]), encoding="utf-8-sig")
    assert read_config(tmp_path / "config.yaml", DRMConfig).train.out == "run"


def test_no_command_takes_a_number_without_a_range():
    for path in (ROOT / "training").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                kinds = {ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "type"}
                assert not kinds & {"int", "float"}, f"{path}:{node.lineno}"


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e20", "", "some"])
def test_a_number_on_the_command_line_is_refused_in_one_line(value: str, capsys: pytest.CaptureFixture):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=argument(Count))
    parser.add_argument("--rate", type=argument(Positive))
    for option in ("--steps", "--rate"):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([f"{option}={value}"])
        assert stopped.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"argument {option}: it is {value!r}: wanted" in last
    assert parser.parse_args(["--steps=3", "--rate=1e-5"]) == argparse.Namespace(steps=3, rate=1e-5)
