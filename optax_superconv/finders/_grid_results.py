"""Which combination of a grid is the best, and by how much?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from optax_superconv import _checks
from optax_superconv.finders import _runs
from optax_superconv.finders._range_test import RangeTestResult, read_curve
from optax_superconv.finders._readings import smooth_curve
from optax_superconv.finders._steps import Optimizer


@dataclasses.dataclass(frozen=True, eq=False)
class GridTestResult:
    """The curves of a grid test; array axes come in the order of ``axes``.

    Attributes:
      axes: The values of each hyperparameter by name, float64 as given.
      learning_rates: (num_steps,) float32, the ladder; None in mode ``"constant"``.
      losses: (*grid, num_steps) float64, the loss at each step before its update; NaN
        after divergence.
      diverged: (*grid) bool, whether a curve ended early, by :func:`range_test`'s rule
        in mode ``"range"``, at a loss that is not finite in mode ``"constant"``.
      scores: (*grid) float64, lower is better; see :func:`grid_test`.
      best: The combination with the lowest score.
      margin: By how much the runner-up's score is higher, in the unit of the loss; NaN
        for a single combination, infinite if all others diverged.
      margin_in_errors: The margin in its standard errors. Below 2 or 3 the grid has
        not told the two apart. Another initialisation is not in these errors.
      optimizer: ``"sgd"``, ``"adamw"`` or None, as in :class:`RangeTestResult`.
    """

    axes: dict[str, np.ndarray]
    learning_rates: np.ndarray | None
    losses: np.ndarray
    diverged: np.ndarray
    scores: np.ndarray
    best: dict[str, float]
    margin: float
    margin_in_errors: float
    optimizer: Optimizer | None = None

    def __repr__(self) -> str:
        return _runs.summary(
            self,
            f"{self.losses.shape[-1]} steps of "
            + " x ".join(f"{len(axis)} {name}" for name, axis in self.axes.items()),
            f"margin {self.margin:.3g} ({self.margin_in_errors:.2g} standard errors), "
            f"best {named(self.best)}",
        )

    def curve(self, **combination: float) -> RangeTestResult:
        """The range test of one combination, for :func:`suggest_learning_rate`.

        Only a grid test with ``mode="range"`` has such curves.

        Args:
          **combination: A value of each axis, one of those in ``axes``, as in
            ``result.curve(**result.best)``.

        Returns:
          What :func:`range_test` returns for that combination.
        """
        if self.learning_rates is None:
            raise ValueError(
                "`curve` must be called on a grid test with mode='range', got one with "
                "mode='constant'."
            )
        _checks.require(
            set(combination) == set(self.axes),
            "combination",
            f"a value for each of {', '.join(map(repr, self.axes))}",
            f"{combination}",
        )
        index = []
        for name, axis in self.axes.items():
            # As the step sees them: a JAX array's values are float32 already.
            wanted = np.float32(combination[name])
            at = np.flatnonzero(axis.astype(np.float32) == wanted)
            rule = f"one of {axis.tolist()}"
            _checks.require(at.size > 0, name, rule, combination[name])
            index.append(int(at[0]))
        losses = self.losses[tuple(index)]
        return read_curve(losses, self.learning_rates, optimizer=self.optimizer)


def named(combination: Mapping[str, float]) -> str:
    """A combination for a reader."""
    return ", ".join(f"{name} = {value:.4g}" for name, value in combination.items())


def combination_at(axes: dict[str, np.ndarray], k: int) -> dict[str, float]:
    """The k-th combination of all."""
    index = np.unravel_index(k, tuple(map(len, axes.values())))
    return {
        name: float(axis[i])
        for (name, axis), i in zip(axes.items(), index, strict=True)
    }


def _lowest(curve: RangeTestResult) -> tuple[float, float]:
    """The lowest point of a smoothed curve, and its standard error."""
    try:
        smooth = smooth_curve(curve)
    except ValueError:  # Too short to be smoothed.
        return np.inf, np.inf
    lowest = smooth.values.argmin()
    return smooth.values[lowest], smooth.errors[lowest]


def _margins(
    scores: np.ndarray, errors: np.ndarray | None, losses: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(members,) by how much each is worse than the best, and the standard errors.

    ``errors`` are those of the scores; without them, losses of a step are compared.
    """
    best = scores.argmin()
    tail = losses[:, -_runs.tenth(losses) :]
    with np.errstate(invalid="ignore"):
        margins = scores - scores[best]
        if errors is not None:
            return margins, np.hypot(errors[best], errors)
        if tail.shape[1] < 10:
            return margins, np.full(len(scores), np.nan)
        apart = tail - tail[best]
        return margins, apart.std(axis=1, ddof=1) / np.sqrt(tail.shape[1])


def tied(result: GridTestResult) -> np.ndarray:
    """(*grid) bool: what is not told apart from the best, by less than 2 errors.

    Among them the best, and whatever has its score.
    """
    losses = result.losses.reshape(result.scores.size, -1)
    ladder = result.learning_rates
    errors = None
    if ladder is not None:
        errors = np.array([_lowest(read_curve(x, ladder))[1] for x in losses])
    margins, spread = _margins(result.scores.ravel(), errors, losses)
    return ((margins == 0) | (margins < 2 * spread)).reshape(result.scores.shape)


def compare(
    losses: np.ndarray,
    ladder: np.ndarray | None,
    axes: dict[str, np.ndarray],
    optimizer: Optimizer | None = None,
) -> GridTestResult:
    """Scores the members' losses, (members, num_steps)."""
    finite = np.isfinite(losses).sum(axis=1)
    diverged = finite < losses.shape[1]
    errors, advice = None, "(try lower learning rates)"
    if ladder is None:
        tail = losses[:, -_runs.tenth(losses) :]
        scores = np.where(diverged, np.inf, tail.mean(axis=1))
    else:
        scores, errors = np.full((2, len(losses)), np.inf)
        advice = "in its first 10 steps (lower `min_learning_rate`)"
        for k, member in enumerate(losses):
            curve = read_curve(member, ladder)
            member[len(curve.losses) :] = np.nan
            diverged[k] = curve.diverged
            scores[k], errors[k] = _lowest(curve)
    best, *others = scores.argsort(kind="stable").tolist()
    _checks.require(
        bool(np.isfinite(scores[best])),
        "grid",
        f"a grid with a combination that does not diverge {advice}",
        f"losses that cease to be finite after {finite.min()} to {finite.max()} steps",
    )
    margin = margin_in_errors = np.nan
    if others:
        margins, spread = _margins(scores, errors, losses)
        margin = margins[others[0]]
        with np.errstate(divide="ignore", invalid="ignore"):
            margin_in_errors = margin / spread[others[0]]
    shape = tuple(map(len, axes.values()))
    return GridTestResult(
        axes,
        ladder,
        losses.reshape(*shape, -1),
        diverged.reshape(shape),
        scores.reshape(shape),
        combination_at(axes, best),
        float(margin),
        float(margin_in_errors),
        optimizer,
    )
