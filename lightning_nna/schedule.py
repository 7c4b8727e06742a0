r"""A number that changes over a training run: ``Schedule``.

Between two times it goes from ``start`` to ``end``; before and after it is constant. With
:math:`t` the fraction of that stretch that has passed, the shapes are

.. math::
    \text{linear: } a + (b - a)\,t, \qquad
    \text{cosine: } a + (b - a)\,\tfrac{1 - \cos \pi t}{2}, \qquad
    \text{geometric: } a\,(b / a)^t, \qquad
    \text{cubic: } b + (a - b)(1 - t)^3,

and ``"step"`` jumps to ``end`` at ``until``.

Reference:
    The cubic shape is that of Zhu and Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Shape = Literal["linear", "cosine", "geometric", "cubic", "step"]
_SHAPES: tuple[Shape, ...] = ("linear", "cosine", "geometric", "cubic", "step")


@dataclass(frozen=True)
class Schedule:
    """Value over optimizer steps.

    A time is a count of optimizer steps if it is an ``int``, and a fraction of the whole run if it
    is a ``float``: ``until=500`` is step 500, ``until=0.5`` the middle of the run.

    Args:
        start: Value up to ``begin``.
        end: Value from ``until`` on; None for that of ``start``.
        begin: Time at which the change begins.
        until: Time at which it ends.
        shape: ``"linear"``, ``"cosine"``, ``"geometric"`` (equal factors in equal times),
            ``"cubic"`` (fast at first) or ``"step"``.

    Raises:
        ValueError: If a fraction is not in [0, 1], a step is negative, it ends before it begins, a
            geometric schedule has a value that is not positive, or ``shape`` is unknown.

    Example:
        >>> ramp = Schedule(1.0, 16.0, until=0.5, shape="geometric")
        >>> ramp.at(0, total=100), ramp.at(25, total=100), ramp.at(100, total=100)
        (1.0, 4.0, 16.0)
    """

    start: float
    end: float | None = None
    begin: int | float = 0
    until: int | float = 1.0
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        if self.shape not in _SHAPES:
            raise ValueError(f"shape must be one of {list(_SHAPES)}, got {self.shape!r}")
        for name in ("begin", "until"):
            require_time(name, getattr(self, name))
        if type(self.begin) is type(self.until) and self.begin > self.until:
            raise ValueError(
                f"a schedule ends before it begins: begin is {self.begin}, until is {self.until}"
            )
        if self.shape == "geometric" and min(self.start, self.last) <= 0:
            raise ValueError(
                f"a geometric schedule needs positive values, got {self.start} to {self.last}"
            )

    @property
    def last(self) -> float:
        """Value from ``until`` on."""
        return self.start if self.end is None else self.end

    @property
    def needs_total(self) -> bool:
        """True if the length of the run must be known."""
        times = (self.begin, self.until)
        return self.start != self.last and any(isinstance(t, float) and t > 0 for t in times)

    def at(self, step: int, *, total: float = math.inf) -> float:
        """Compute the value at an optimizer step.

        Args:
            step: Number of optimizer steps so far.
            total: Number of optimizer steps of the whole run.

        Raises:
            ValueError: If a time is a fraction of the run and ``total`` is not finite.
        """
        if self.start == self.last:
            return self.start
        if self.needs_total and not math.isfinite(total):
            raise ValueError(
                "a schedule in fractions of a run needs its length: set max_steps or max_epochs of "
                "the Trainer, or give begin and until in steps (ints)"
            )
        begin, until = step_of(self.begin, total), step_of(self.until, total)
        if step >= until:
            return self.last
        if step <= begin:
            return self.start
        fraction = (step - begin) / (until - begin)
        if self.shape == "geometric":
            return self.start * (self.last / self.start) ** fraction
        if self.shape == "step":
            return self.start
        if self.shape == "cubic":
            fraction = 1 - (1 - fraction) ** 3
        if self.shape == "cosine":
            fraction = (1 - math.cos(math.pi * fraction)) / 2
        return self.start + (self.last - self.start) * fraction

    @classmethod
    def of(cls, value: Schedule | Mapping[str, Any] | float) -> Schedule:
        """Convert what a user may write for a schedule: one, its keys, or a number.

        Args:
            value: Schedule, a mapping of its keyword arguments, or a constant.


        Example:
            >>> Schedule.of(0.5).at(10)
            0.5
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, Mapping):
            return cls(**value)
        return cls(float(value))


def step_of(time: int | float, total: float) -> float:
    """Convert a time to a count of optimizer steps.

    Args:
        time: Time: an int counts steps, a float is a fraction of the run.
        total: Number of optimizer steps of the run.

    Example:
        >>> step_of(7, 100), step_of(0.5, 100)
        (7, 50.0)
    """
    return time if isinstance(time, int) or time == 0 else time * total


def require_time(name: str, time: int | float) -> None:
    """Raise unless ``time`` is a count of steps or a fraction of a run.

    Args:
        name: Name of the argument, for the message.
        time: Time: an int counts steps, a float is a fraction of the run.

    Raises:
        ValueError: Names what is wrong.
    """
    if isinstance(time, bool) or time < 0:
        raise ValueError(f"{name} must be at least 0, got {time}")
    if isinstance(time, float) and time > 1:
        raise ValueError(
            f"{name} is a fraction of the run if it is a float, at most 1.0, got {time}"
            "; steps are ints"
        )


def require_end(name: str, time: int | float, total: float) -> None:
    """Raise if ``time`` is a fraction of a run without an end.

    Args:
        name: Name of the argument, for the message.
        time: Time: an int counts steps, a float is a fraction of the run.
        total: Number of optimizer steps of the run.

    Raises:
        ValueError: Names the argument.
    """
    if not math.isfinite(step_of(time, total)):
        raise ValueError(
            f"{name}={time} is a fraction of a run that has no end: set max_steps or max_epochs of "
            "the Trainer, or give a step (an int)"
        )
