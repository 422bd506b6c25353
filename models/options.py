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
    """One option: a row of the table of options.

    name: on the command line, with two hyphens before it, and in a config file.
    type: int, float, bool, or another function of the text that is given.
    default: the value if none is given.
    choices: the values that a word may have; (): any.
    low, high: the range of a number, which has a `low` always; high: None for that of LARGEST.
    open_below: whether a number has to be more than `low`.
    also: other values that a number may have, outside the range.
    resumable: whether a resumed run may change it.
    """

    name: str
    type: Callable[[str], Any]
    default: Any
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    open_below: bool = False
    also: tuple[float, ...] = ()
    resumable: bool = False

    def problem(self, value: Any) -> str:
        """Say what is wrong with a value; "" if it is allowed.

        value: of this option.
        """
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
