r"""The published Doppler table: a search for the setting that it was measured in.

Of the table in "Adaptive estimation and learning under temporal distribution shift" the figures are
known, second hand. Not known are the form of the signal, its length and scale, the values that are
scored, the treatment of the ends, and the constant of the threshold. For every signal, length and
choice of scored values the scale is set by the table's own whole average, and thresholds and ends
are searched: for each line of the table alone, and for all lines of the wavelets together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pywt
import torch

from lightning_nna.drift.aligator import Aligator
from lightning_nna.drift.bounds import theory_threshold
from lightning_nna.drift.estimators import MEDIAN_OF_NORMAL
from lightning_nna.drift.windows import AdaptiveRollingWindow
from recipes.benchmark.grid import Run
from recipes.benchmark.report import line, ruled
from recipes.benchmark.rows import Row, select

SIGMAS = (0.2, 0.5, 1.0)
#: Squared errors by method and whether the noise is known, one for each of :data:`SIGMAS`.
PUBLISHED: dict[tuple[str, bool], tuple[float, float, float]] = {
    ("average", True): (0.511, 0.509, 0.508),
    ("haar", True): (0.068, 0.155, 0.155),
    ("db8", True): (0.007, 0.032, 0.129),
    ("average", False): (0.512, 0.512, 0.514),
    ("arw", False): (0.384, 0.400, 0.407),
    ("aligator", False): (0.234, 0.235, 0.235),
    ("haar", False): (0.053, 0.065, 0.088),
    ("db8", False): (0.020, 0.044, 0.129),
}
# The whole average has no setting: the scale is chosen by it.
_SEARCHED = tuple(key for key in PUBLISHED if key[0] != "average")
#: Settings that serve all lines of the wavelets.
TOGETHER = {
    "joint": "one setting for all",
    "separate": "a threshold of its own for measured noise",
    "theory": "the threshold of the theory",
}
_TITLES = {
    "average": "whole average",
    "haar": "Haar",
    "db8": "DB8",
    "arw": "ARW",
    "aligator": "Aligator",
}
WAVELETS = ("haar", "db8")
#: Values that are scored: the newest one, the newest one of every prefix, all of a series at once.
SCORED = {"newest": "newest value", "prefixes": "all prefixes", "series": "whole series at once"}
LENGTHS: dict[str, tuple[int, ...]] = {
    "newest": (100, 128, 200, 256, 500, 512, 1000, 1024, 2048),
    "prefixes": (256, 512, 1024),
    "series": (256, 512, 1024),
}
#: Draws of the noise.
DRAWS = {"newest": 500, "prefixes": 20, "series": 10}
# Prefixes of a series that are scored, and draws for estimators that are slower.
_PREFIXES, _SLOW_DRAWS = 32, 50
_SLOW_LENGTHS = (256, 512, 1024)
MODES = ("symmetric", "reflect", "constant", "smooth", "zero", "periodic", "periodization")
#: Thresholds, in standard deviations of the noise; that of the theory comes on top.
THRESHOLDS = tuple(np.arange(1.0, 7.01, 0.5).tolist())
_DELTA = 0.1
#: A cell is reproduced within this relative error.
TOLERANCE = 0.1

Course = Callable[[np.ndarray], np.ndarray]


def _doppler(t: np.ndarray) -> np.ndarray:
    """Return the Doppler signal of Donoho and Johnstone (1994)."""
    return np.asarray(np.sqrt(t * (1 - t)) * np.sin(2.1 * np.pi / (t + 0.05)))


def _chirp(t: np.ndarray) -> np.ndarray:
    """Return the Doppler signal without its envelope."""
    return np.asarray(np.sin(2.1 * np.pi / (t + 0.05)))


def _tibshirani(t: np.ndarray) -> np.ndarray:
    """Return the Doppler signal of Tibshirani (2014), but for its mean."""
    return np.asarray(np.sin(4 / np.maximum(t, 1e-9)))


#: Signals on the times 1/n, 2/n, … 1.
COURSES: dict[str, Course] = {
    "√(t(1-t)) sin(2.1π/(t+0.05))": _doppler,
    "sin(2.1π/(t+0.05))": _chirp,
    "sin(4/t)": _tibshirani,
}
#: Order of the values: the high frequencies are the oldest, or the newest.
REVERSED = {"": False, ", reversed": True}
CASES = tuple(name + suffix for name in COURSES for suffix in REVERSED)


def course(case: str, n: int) -> np.ndarray:
    """Return the values of a signal, the newest last, not scaled."""
    name, comma, _ = case.partition(", reversed")
    values = COURSES[name](np.arange(1, n + 1) / n)
    return values[::-1].copy() if comma else values


def ends(scored: str, n: int) -> list[int]:
    """List the lengths of the prefixes whose newest value is scored."""
    return list(range(n // _PREFIXES, n + 1, n // _PREFIXES)) if scored == "prefixes" else [n]


def average_error(theta: np.ndarray, scored: str) -> float:
    """Return the squared error of the whole average without noise."""
    if scored == "series":
        return float(theta.var())
    errors = [theta[:end].mean() - theta[end - 1] for end in ends(scored, len(theta))]
    return float(np.square(errors).mean())


def scaled(case: str, n: int, scored: str) -> tuple[np.ndarray, float]:
    """Scale a signal so that its whole average has the published error; return the scale, too."""
    theta = course(case, n)
    target = np.mean([PUBLISHED["average", known] for known in (True, False)])
    scale = float(np.sqrt(target / average_error(theta, scored)))
    return scale * theta, scale


@dataclass(frozen=True)
class Transform:
    """A wavelet transform of a length, by PyWavelets.

    Attributes:
        wavelet: Name of the wavelet.
        mode: Extension of the ends.
        n: Number of values.
    """

    wavelet: str
    mode: str
    n: int

    def analyze(self, y: np.ndarray) -> list[np.ndarray]:
        """Return averages and details, the coarsest first."""
        level = pywt.dwt_max_level(self.n, pywt.Wavelet(self.wavelet).dec_len)
        parts = pywt.wavedec(y, self.wavelet, mode=self.mode, level=level, axis=-1)
        return [np.asarray(part) for part in parts]

    def synthesize(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Return the values of averages and details, along the last axis."""
        values = pywt.waverec(list(parts), self.wavelet, mode=self.mode, axis=-1)
        return np.asarray(values)[..., : self.n]


@cache
def newest_weights(transform: Transform) -> tuple[np.ndarray, ...]:
    """Return the weights of all coefficients in the newest value, part by part."""
    sizes = [part.shape[-1] for part in transform.analyze(np.zeros((1, transform.n)))]
    borders = np.cumsum([0, *sizes])
    weights = []
    for size, border in zip(sizes, borders, strict=False):
        units = np.zeros((size, borders[-1]))
        units[:, border : border + size] = np.eye(size)
        parts = np.split(units, borders[1:-1], axis=1)
        weights.append(transform.synthesize(parts)[:, -1])
    return tuple(weights)


def soft(x: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    """Shrink toward zero."""
    return np.asarray(np.sign(x) * np.maximum(np.abs(x) - threshold, 0.0))


#: Whether averages are thresholded, threshold in standard deviations, whether the noise is known.
Choice = tuple[bool, float, bool]


def errors_of_transform(
    transform: Transform, theta: np.ndarray, noise: np.ndarray, scored: str
) -> dict[Choice, list[float]]:
    """Compute the squared errors of every threshold, for each of :data:`SIGMAS`.

    Args:
        transform: Transform of the series.
        theta: True series, shape ``(n,)``.
        noise: Standard normal noise, shape ``(draws, n)``.
        scored: Key of :data:`SCORED`; of prefixes this is one.
    """
    truth, standard = transform.analyze(theta[None]), transform.analyze(noise)
    whole = scored == "series"
    weights = None if whole else newest_weights(transform)
    target = theta if whole else theta[-1]
    errors: dict[Choice, list[float]] = {}
    for sigma in SIGMAS:
        parts = [a + sigma * b for a, b in zip(truth, standard, strict=True)]
        measured = np.median(np.abs(parts[-1]), axis=-1, keepdims=True) / MEDIAN_OF_NORMAL
        if weights is not None:
            reach = [np.abs(weight) > 1e-12 for weight in weights]
            parts = [part[:, index] for part, index in zip(parts, reach, strict=True)]
            ahead = [weight[index] for weight, index in zip(weights, reach, strict=True)]
        for threshold, known in itertools.product(thresholds(transform.n), (True, False)):
            limit = threshold * (sigma if known else measured)
            details = [soft(part, limit) for part in parts[1:]]
            for shrinks in (False, True):
                every = [soft(parts[0], limit) if shrinks else parts[0], *details]
                if weights is None:
                    value = transform.synthesize(every)
                else:
                    value = sum(part @ weight for part, weight in zip(every, ahead, strict=True))
                mse = float(np.square(value - target).mean())
                errors.setdefault((shrinks, threshold, known), []).append(mse)
    return errors


def thresholds(n: int) -> list[float]:
    """List the thresholds that are searched, in standard deviations."""
    return [*THRESHOLDS, theory_threshold(n, delta=_DELTA)]


def distance(errors: Sequence[float], published: Sequence[float]) -> float:
    """Return the mean absolute logarithm of the ratios of errors to published ones."""
    return float(np.abs(np.log(np.maximum(errors, 1e-12) / np.array(published))).mean())


#: Errors by wavelet, mode of the ends, and choice.
Found = Mapping[tuple[str, str], Mapping[Choice, Sequence[float]]]


def search(scored: str, case: str, n: int) -> Found:
    """Compute the errors of all wavelets, ends and thresholds."""
    theta, _ = scaled(case, n, scored)
    noise = np.random.default_rng(7).standard_normal((DRAWS[scored], n))
    found: dict[tuple[str, str], Mapping[Choice, Sequence[float]]] = {}
    for wavelet, mode in itertools.product(WAVELETS, MODES):
        # At a power of two Haar has no ends to extend.
        if wavelet == "haar" and n & (n - 1) == 0 and scored != "prefixes" and mode != MODES[0]:
            found[wavelet, mode] = found[wavelet, MODES[0]]
            continue
        each = [
            errors_of_transform(Transform(wavelet, mode, end), theta[:end], noise[:, :end], scored)
            for end in ends(scored, n)
        ]
        # The threshold of the theory depends on the length: choices are matched by position.
        found[wavelet, mode] = {
            choice: np.mean([list(prefix.values())[number] for prefix in each], axis=0).tolist()
            for number, choice in enumerate(each[-1])
        }
    return found


def slow_errors(estimator: Any, scored: str, theta: np.ndarray, noise: np.ndarray) -> list[float]:
    """Compute the squared errors of an estimator that measures the noise itself."""
    errors = []
    for sigma in SIGMAS:
        y = torch.from_numpy(theta + sigma * noise)
        times = torch.tensor(ends(scored, len(theta))) - 1
        values = estimator.estimate_at(y, times, estimator.noise_at_every_time(y)[:, times]).value
        errors.append(float((values - torch.from_numpy(theta)[times]).square().mean()))
    return errors


#: Estimators other than wavelets, with the settings that are searched.
RIVALS: dict[str, list[tuple[dict[str, float], Callable[[], Any]]]] = {
    "arw": [
        (
            {"constant": constant, "bound": bound},
            partial(AdaptiveRollingWindow, constant=constant, bound=bound),
        )
        for constant, bound in (
            *((c, 0.0) for c in (0.5, 1.0, 2.0, 4.0)),
            (1.0, 1.0),
            (1.0, 3.0),
            (1.0, 10.0),
        )
    ],
    "aligator": [
        ({"rate": rate}, partial(Aligator, rate=rate)) for rate in (0.005, 0.02, 0.1, 0.5)
    ],
}


@dataclass(frozen=True)
class DopplerRun(Run):
    """The search for one length and choice of scored values, over all signals.

    Attributes:
        scored: Key of :data:`SCORED`.
        n: Number of values of the series.
        table: Name of the table.
    """

    scored: str
    n: int
    table: str = "doppler"

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Values that identify the rows of this run, one mapping for each signal and method."""
        methods = ["average", *WAVELETS, *TOGETHER]
        methods += RIVALS if self.n in _SLOW_LENGTHS and self.scored != "series" else []
        shared = super().keys[0]
        return [{**shared, "case": case, "method": name} for case in CASES for name in methods]

    def rows(self) -> Iterator[Row]:
        """Yield the nearest choices of every signal."""
        for key in self.keys:
            theta, scale = scaled(key["case"], self.n, self.scored)
            if key["method"] == "average":
                found = search(self.scored, key["case"], self.n)
                row: dict[str, Any] = {"lines": _average_lines(theta, self.scored)}
            elif key["method"] in WAVELETS:
                row = {"lines": _nearest_lines(found, key["method"])}
            elif key["method"] in RIVALS:
                row = {"lines": _rival_lines(key["method"], theta, self.scored)}
            else:
                row = _joint(found, key["method"], self.n)
            yield {**key, "scale": scale, **row}


def runs() -> list[DopplerRun]:
    """List the grid."""
    return [DopplerRun(scored, n) for scored in SCORED for n in LENGTHS[scored]]


def _line(method: str, known: bool, mse: Sequence[float], **setting: Any) -> dict[str, Any]:
    """Compare the errors of a setting with a line of the table."""
    return {
        "sigma_known": known,
        "mse": list(mse),
        "distance": distance(mse, PUBLISHED[method, known]),
        **setting,
    }


def _average_lines(theta: np.ndarray, scored: str) -> list[dict[str, Any]]:
    """Return the whole average's expected errors, which are the same in both lines."""
    n = len(theta)
    variance = 1 / n if scored == "series" else np.mean([1 / end for end in ends(scored, n)])
    errors = [average_error(theta, scored) + sigma**2 * float(variance) for sigma in SIGMAS]
    return [_line("average", known, errors) for known in (True, False)]


def _nearest_lines(found: Found, wavelet: str) -> list[dict[str, Any]]:
    """Return the nearest choice for each of the two lines of a wavelet."""
    lines = []
    for known in (True, False):
        every = [
            _line(wavelet, known, mse, mode=mode, threshold=choice[1], averages=choice[0])
            for (name, mode), choices in found.items()
            for choice, mse in choices.items()
            if name == wavelet and choice[2] == known
        ]
        lines.append(min(every, key=lambda each: each["distance"]))
    return lines


def _joint(found: Found, method: str, n: int) -> dict[str, Any]:
    """Return the choice that is nearest in all four lines of the wavelets together.

    Args:
        found: Errors of all choices.
        method: Key of :data:`TOGETHER`.
        n: Number of values of the series.
    """
    every = thresholds(n)
    pairs: dict[str, list[tuple[float, float]]] = {
        "joint": [(threshold, threshold) for threshold in every],
        "separate": list(itertools.product(every, every)),
        "theory": [(every[-1], every[-1])],
    }
    best: dict[str, Any] = {}
    for mode, averages, pair in itertools.product(MODES, (False, True), pairs[method]):
        lines = [
            {
                "method": name,
                "threshold": threshold,
                **_line(name, known, found[name, mode][averages, threshold, known]),
            }
            for name in WAVELETS
            for known, threshold in zip((True, False), pair, strict=True)
        ]
        total = float(np.mean([each["distance"] for each in lines]))
        if not best or total < best["distance"]:
            best = {"distance": total, "mode": mode, "averages": averages, "lines": lines}
    return best


def _rival_lines(method: str, theta: np.ndarray, scored: str) -> list[dict[str, Any]]:
    """Return the nearest setting of an estimator that is told no noise."""
    noise = np.random.default_rng(8).standard_normal((_SLOW_DRAWS, len(theta)))
    lines = [
        _line(method, False, slow_errors(make(), scored, theta, noise), **setting)
        for setting, make in RIVALS[method]
    ]
    return [min(lines, key=lambda each: each["distance"])]


def _relative(row: Row, method: str) -> list[float]:
    """Return the relative errors of a line's cells."""
    published = PUBLISHED[method, row["sigma_known"]]
    return [mse / each - 1 for mse, each in zip(row["mse"], published, strict=True)]


def _lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the nearest settings of single lines, each with its method, signal and length."""
    return [
        {**{name: row[name] for name in ("scored", "case", "n", "scale", "method")}, **each}
        for row in select(rows, table="doppler")
        if row["method"] not in TOGETHER
        for each in row["lines"]
    ]


def _is_near(row: Row, method: str) -> bool:
    """Return whether every cell of a line is reproduced."""
    return all(abs(error) <= TOLERANCE for error in _relative(row, method))


def _cells(row: Row, method: str) -> list[str]:
    """Format the published errors, those of a setting, and the relative errors."""
    return [
        " / ".join(f"{each:.3f}" for each in PUBLISHED[method, row["sigma_known"]]),
        " / ".join(f"{each:.3f}" for each in row["mse"]),
        " / ".join(f"{error:+.0%}" for error in _relative(row, method)),
    ]


def _setting(row: Row) -> str:
    """Describe thresholds and ends of a setting."""
    if "rate" in row:
        return f"rate {row['rate']:g}"
    if "bound" in row:
        return f"constant {row['constant']:g}, M = {row['bound']:g}"
    if "threshold" not in row:
        return "-"
    return f"{_threshold(row['threshold'], row['n'])}, {_ends(row)}"


def _threshold(threshold: float, n: int) -> str:
    constant = 2 * threshold / theory_threshold(n, delta=_DELTA)
    return f"{threshold:.2f} (c = {constant:.2f})"


def _ends(row: Row) -> str:
    return f"{row['mode']}, averages {'too' if row['averages'] else 'not'}"


def _title(method: str, known: bool) -> str:
    return f"{_TITLES[method]}, noise {'known' if known else 'measured'}"


def single_lines(rows: Sequence[Row]) -> list[str]:
    """Format the nearest setting for each line of the published table."""
    every = _lines(rows)
    if not every:
        return []
    titles = ["line", "published", "nearest", "relative errors", "scored", "signal", "n", "scale"]
    formatted = ruled([*titles, "threshold and ends"])
    for method, known in _SEARCHED:
        if selected := select(every, method=method, sigma_known=known):
            best = min(selected, key=lambda each: float(each["distance"]))
            setting = [SCORED[best["scored"]], best["case"], best["n"], f"{best['scale']:.2f}"]
            formatted.append(
                line(_title(method, known), *_cells(best, method), *setting, _setting(best))
            )
    return formatted


def _nearest(rows: Sequence[Row], method: str) -> Row | None:
    """Return the row of all signals and lengths that is nearest."""
    every = select(rows, table="doppler", method=method)
    return min(every, key=lambda each: float(each["distance"])) if every else None


def joint_lines(rows: Sequence[Row], method: str) -> list[str]:
    """Format the setting that is nearest in all lines of the wavelets, and the others at it.

    Args:
        rows: All rows.
        method: Key of :data:`TOGETHER`.
    """
    best = _nearest(rows, method)
    if best is None:
        return []
    formatted = ruled(["line", "published", "here", "relative errors"])
    others = [
        each
        for each in select(_lines(rows), **{name: best[name] for name in ("scored", "case", "n")})
        if each["method"] not in WAVELETS
    ]
    for name, known in PUBLISHED:
        for each in select([*best["lines"], *others], method=name, sigma_known=known):
            formatted.append(line(_title(name, known), *_cells(each, name)))
    return formatted


def joint_setting(rows: Sequence[Row], method: str) -> str:
    """Describe the setting of :func:`joint_lines`."""
    best = _nearest(rows, method)
    if best is None:
        return "-"
    known, measured = (
        next(each["threshold"] for each in best["lines"] if each["sigma_known"] == told)
        for told in (True, False)
    )
    limits = _threshold(known, best["n"])
    if measured != known:
        limits += f" where the noise is known, else {_threshold(measured, best['n'])}"
    return (
        f"{SCORED[best['scored']]}, {best['case']}, n = {best['n']}, scale {best['scale']:.2f}, "
        f"threshold {limits}, {_ends(best)}"
    )


def checks(rows: Sequence[Row]) -> list[str]:
    """Count the lines that a setting reproduces, alone and together."""
    every = _lines(rows)
    if not every:
        return []
    best = [
        min(selected, key=lambda each: float(each["distance"]))
        for method, known in _SEARCHED
        if (selected := select(every, method=method, sigma_known=known))
    ]
    near = sum(_is_near(each, each["method"]) for each in best)
    found = {method: _nearest(rows, method) for method in TOGETHER}
    counts = {
        method: sum(_is_near(each, each["method"]) for each in row["lines"])
        for method, row in found.items()
        if row is not None
    }
    verdict = "reproduced" if 4 in counts.values() else "not reproduced"
    texts = [f"{counts[method]} of 4 with {TOGETHER[method]}" for method in counts]
    return [
        f"- The published Doppler table: {near} of {len(best)} lines within {TOLERANCE:.0%} in "
        f"every cell with a setting of their own; lines of the wavelets: {'; '.join(texts)} "
        f"({verdict})."
    ]
