"""Every number of every command has a range where its field is, and nothing outside it gets through."""

import copy
import dataclasses
import functools
import math
import operator
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from drm.ranges import Range, range_of
from training import encode, evaluate, prompts, train_drm, train_step_grpo
from training.config import ConfigError, DRMConfig, read_config
from training.evaluate import EvaluateConfig
from training.grpo.step_grpo_config import StepGRPOConfig

TRAINING = Path(encode.__file__).parent
COMMANDS = [DRMConfig, StepGRPOConfig, EvaluateConfig]
STRANGE = [math.nan, math.inf, -math.inf, -1, 0, 1e20, 10**400, "", "  ", "nan", "\0", "text", True, None]
STRANGE += [[], [1], [math.nan, math.nan], [-1, -1], ["", ""], {}, {"a": -1}, {"a": math.nan}, {"a": ""}]


def section_of(hint: object) -> type | None:
    """The dataclass in an annotation such as Section | None or tuple[Section, ...]."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    return next(filter(None, map(section_of, typing.get_args(hint))), None)


def fields(cls: type, place: tuple = ()) -> Iterator[tuple[tuple, object]]:
    """Keys from the file's top to every field that is no section, and its annotation."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        section = section_of(hint)
        if section is None:
            yield (*place, name), hint
        else:
            item = (0,) if typing.get_origin(hint) is tuple else ()
            yield from fields(section, (*place, name, *item))


def whole(cls: type) -> dict:
    """A file with every section, which can be read: the least it must say."""
    tree = {}
    for name, hint in typing.get_type_hints(cls).items():
        (field,) = [field for field in dataclasses.fields(cls) if field.name == name]
        section = section_of(hint)
        if section:
            tree[name] = [whole(section)] if typing.get_origin(hint) is tuple else whole(section)
        elif field.default is field.default_factory is dataclasses.MISSING:
            choices = typing.get_args(hint)
            tree[name] = choices[0] if choices else {int: 1, str: "x"}[hint]
    return tree


def ranges_in(hint: object) -> Iterator[Range | None]:
    """Of every number in an annotation, so also in its tuples; None for one without."""
    if hint in (int, float):
        yield None
    elif typing.get_origin(hint) is typing.Annotated:
        yield range_of(hint)
    else:
        for inner in typing.get_args(hint):
            yield from ranges_in(inner)


def numbers_in(value: object) -> Iterator[float]:
    if isinstance(value, dict | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


EVERY = [(cls, *field) for cls in COMMANDS for field in fields(cls)]
NAMES = [f"{cls.__name__}-{'.'.join(map(str, place))}" for cls, place, _ in EVERY]


@pytest.mark.parametrize(("cls", "place", "hint"), EVERY, ids=NAMES)
def test_a_number_declares_its_range(cls: type, place: tuple, hint: object):
    for allowed in ranges_in(hint):
        assert allowed is not None
        assert math.isfinite(allowed.low)
        assert math.isfinite(allowed.high)


def read(tree: dict, cls: type, place: tuple, folder: Path) -> tuple[object, str]:
    """What the configuration has at a place, and why it was refused instead."""
    try:
        found = read_config(_write(folder, tree), cls)
    except ConfigError as error:
        return None, str(error)
    for key in place:
        found = found[key] if isinstance(key, int) else getattr(found, key)
    return found, ""


@pytest.mark.parametrize(("cls", "place", "hint"), EVERY, ids=NAMES)
def test_a_strange_value_is_in_the_range_or_refused(cls: type, place: tuple, hint: object, tmp_path: Path):
    tree = whole(cls)
    assert read(tree, cls, place, tmp_path)[1] == ""
    for value in STRANGE:
        changed = copy.deepcopy(tree)
        section = functools.reduce(operator.getitem, place[:-1], changed)
        section[place[-1]] = value
        found, refusal = read(changed, cls, place, tmp_path)
        if refusal:
            assert "\n" not in refusal
            assert place[-1] in refusal or value == "\0", (value, refusal)
            continue
        assert all(number in range_of(hint) for number in numbers_in(found)), (value, found)
        assert not isinstance(found, str) or (found.strip() and found.isprintable()), value
        assert isinstance(value, list | dict) == isinstance(found, tuple | dict), (value, found)


def _write(folder: Path, tree: dict) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    "text", ["[1", "{a: ", "'", "a: b: c", "!!python/object:os.system x", "2020-13-45", "\t"]
)
def test_a_setting_that_is_not_yaml(text: str, tmp_path: Path):
    path = _write(tmp_path, whole(DRMConfig))
    with pytest.raises(ConfigError, match=r"^.*train\.steps.*$"):
        read_config(path, DRMConfig, [f"train.steps={text}"])
    path.write_text(f"train: {text}")
    with pytest.raises(ConfigError, match=r"^.+$"):
        read_config(path, DRMConfig)


@pytest.mark.parametrize(
    ("command", "cls", "settings"),
    [
        (train_drm, DRMConfig, ["train.clip=-1"]),
        (train_step_grpo, StepGRPOConfig, ["rollout.cfg=.nan"]),
        (encode, DRMConfig, ["encode.resolution=0"]),
        (encode, DRMConfig, ["encode.sources=[{format: jsonl, path: x, limit: -1}]"]),
        (evaluate, EvaluateConfig, ["resamples=[1"]),
        (evaluate, EvaluateConfig, ["--sigma", "nan"]),
        (prompts, None, ["x.txt", "--encoders", "x", "--out", "x", "--t5-length", "-3"]),
    ],
)
def test_commands_end_with_one_line(command, cls, settings: list[str], tmp_path: Path, capfd, monkeypatch):
    monkeypatch.setattr("os._exit", _leave)
    file = ["--config", str(_write(tmp_path, whole(cls)))] if cls else []
    try:
        status = command.main([*file, *settings])
    except SystemExit as stopped:
        status = stopped.code
    lines = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert status in (1, 2)
    assert len(lines) == 1, lines


def _leave(code: int) -> typing.NoReturn:
    raise SystemExit(code)


def test_arguments_that_are_numbers_have_a_range():
    bare = re.compile(r"type=(int|float)\b")
    files = [
        path for folder in ("training", "benchmarks") for path in (TRAINING.parent / folder).rglob("*.py")
    ]
    assert files
    assert [path.name for path in files if bare.search(path.read_text())] == []
