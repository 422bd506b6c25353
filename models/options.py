"""The form of an option. Its rows are in models/__init__.py and utils/settings.py."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

# What a value may be an instance of, by the option's type.
TYPES: dict[Any, Any] = {int: Integral, float: Real, bool: bool, str: str}
LARGEST: dict[Any, float] = {int: 2**31 - 1, float: 1e30}       # `high` by the type of a number


@dataclass(frozen=True)
class Option:
    """One option: a row of the table of options."""

    name: str                       # on the command line, after two hyphens, and in a config file
    type: Callable[[str], Any]      # int, float, bool, or another function of the text
    default: Any
    choices: tuple[str, ...] = ()   # the values that a word may have; (): any
    low: float | None = None        # a number always has one
    high: float | None = None       # None: that of LARGEST
    open_below: bool = False        # whether a number has to be more than `low`
    also: tuple[float, ...] = ()    # other values of a number, outside the range
    resumable: bool = False         # whether a resumed run may change it

    def problem(self, value: Any) -> str:
        """What is wrong with a value; "" if it is allowed."""
        kind = TYPES.get(self.type)
        if kind and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            return f"must be of type {self.type.__name__}, not {value!r}"
        if self.choices and value not in self.choices:
            return f"invalid choice: {value!r} (choose from {', '.join(self.choices)})"
        if self.low is None or value in self.also:
            return ""
        high = LARGEST[self.type] if self.high is None else self.high
        if value <= high and (value > self.low if self.open_below else value >= self.low):
            return ""
        bound = (f"at most {high}" if value > high else
                 f"more than {self.low}" if self.open_below else f"at least {self.low}")
        return f"must be {bound}{''.join(f' or {v}' for v in self.also)}, not {value}"
