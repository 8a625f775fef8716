"""What a number of a settings dataclass may be, written where the field is, and the one check of all of them.

clip: Annotated[float, Range(0, 1e6, above=True)] = 1.0
-> "clip is -1: wanted above 0 and at most 1,000,000 (1 is usual)"
"""

import dataclasses
import math
import typing
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Range:
    """low to high, both included; above: low is not, below: high is not. multiple: only multiples of it."""

    low: float
    high: float
    above: bool = False
    below: bool = False
    multiple: int = 1

    def __contains__(self, number: float) -> bool:
        """False for NaN, and for an infinity, because both ends are finite."""
        after_low = number > self.low if self.above else number >= self.low
        before_high = number < self.high if self.below else number <= self.high
        return after_low and before_high and (self.multiple == 1 or number % self.multiple == 0)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {_plain(self.low)}"
        high = f"{'below' if self.below else 'at most'} {_plain(self.high)}"
        return f"{f'a multiple of {self.multiple}, ' * (self.multiple > 1)}{low} and {high}"


Count = Annotated[int, Range(1, 10**9)]
CountOrNone = Annotated[int, Range(0, 10**9)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, below=True)]
Positive = Annotated[float, Range(0, 1e6, above=True)]


def range_of(hint: Any) -> Range | None:
    """The range that an annotation declares, for the numbers in it wherever they are."""
    for extra in getattr(hint, "__metadata__", ()):
        if isinstance(extra, Range):
            return extra
    found = (range_of(inner) for inner in typing.get_args(hint))
    return next((one for one in found if one is not None), None)


def check_ranges(settings: Any, where: str = "") -> None:
    """ValueError, in one sentence, for the first number of a dataclass, and of those in it, that is out of
    its field's range, or the first text that is empty. where: what is put before a field's name.
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{where}{field.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
        else:
            _check(value, range_of(hints[field.name]), name, field.default)


def _check(value: Any, allowed: Range | None, name: str, usual: Any = None) -> None:
    if isinstance(value, str):
        if not value.strip() or "\0" in value:
            raise ValueError(f"{name} is {value!r}: wanted a text that is not empty")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(item, allowed, f"{name}.{key}")
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            if dataclasses.is_dataclass(item):
                check_ranges(item, f"{name}[{number}].")
            else:
                _check(item, allowed, f"{name}[{number}]")
    elif allowed is not None and _is_number(value) and value not in allowed:
        example = f" ({_plain(usual)} is usual)" if _is_number(usual) else ""
        raise ValueError(f"{name} is {value}: wanted {allowed}{example}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(number: float) -> str:
    whole = math.isfinite(number) and number == int(number)
    return f"{int(number):,}" if whole else f"{number:g}"
