"""Which rate do range tests suggest, and how sure is that?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from optax_superconv import _checks
from optax_superconv.finders import _readings
from optax_superconv.finders._range_test import RangeTestResult
from optax_superconv.finders._readings import Method
from optax_superconv.finders._steps import Optimizer

# By whose moments the state held: of the methods those with the least regret of one
# cycle, on the tasks of benchmarks/range_test_quality.py that were there to choose.
DEFAULTS: dict[Optimizer, Method] = {"adamw": "knee", "sgd": "middle"}


def _suggestions(
    name: str, results: Sequence[RangeTestResult], method: Method
) -> np.ndarray:
    """What each curve suggests; reports the curves that hold no suggestion."""
    found: list[float] = []
    reasons: list[str] = []
    for result in results:
        try:
            found.append(_readings.suggest(result, method))
        except ValueError as error:
            reasons.append(str(error))
    why = max(reasons, key=reasons.count, default="")  # One cause, one remedy.
    holding = f"range tests of which one holds a suggestion ({why})"
    _checks.require(bool(found), name, holding, f"{len(reasons)} without")
    if reasons:
        warnings.warn(
            f"{len(reasons)} of {len(results)} range tests hold no suggestion and are "
            f"left out: {why}",
            stacklevel=3,
        )
    return np.asarray(found)


def as_results(name: str, value: Any) -> list[RangeTestResult]:
    """One result or a sequence of them, as a list."""
    if isinstance(value, RangeTestResult):
        return [value]
    wrong: list[Any] = [value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        wrong = [item for item in value if not isinstance(item, RangeTestResult)]
    if wrong:
        raise TypeError(
            f"`{name}` must be a RangeTestResult or a sequence of them, got a "
            f"{type(wrong[0]).__name__}."
        )
    _checks.require(len(value) > 0, name, "at least one range test's", "none")
    return list(value)


def method_for(
    name: str,
    results: Sequence[RangeTestResult],
    method: Method | None,
    optimizer: Optimizer | None,
) -> Method:
    """The method that is asked for, or the default of whose rates these are."""
    if optimizer is not None:
        _checks.choice("optimizer", optimizer, get_args(Optimizer))
    if method is not None:
        _checks.choice("method", method, get_args(Method))
        return method
    told: list[Optimizer | None] = [result.optimizer for result in results]
    if optimizer is None and len(set(told)) == 1:
        optimizer = told[0]
    if optimizer is None:
        seen = " and ".join(sorted({str(one) for one in told}))
        raise ValueError(
            f"`{name}` must tell whose rates it holds, got range tests with optimizer "
            f"{seen}: give `optimizer='sgd'` or `optimizer='adamw'`, whichever is "
            "nearer to yours, or a `method`."
        )
    return DEFAULTS[optimizer]


def suggest_learning_rate(
    result: RangeTestResult | Sequence[RangeTestResult],
    *,
    method: Method | None = None,
    optimizer: Optimizer | None = None,
) -> float:
    """Reads a peak rate for one cycle off the curve of a range test.

    By default ``"knee"`` for AdamW and ``"middle"`` for SGD, which did best on the
    tasks that chose between the methods, best of a test of 200 steps.

    All methods read a centred smoothing of the losses in the log of the rate, so a
    suggestion neither lags nor depends on the test's ``smoothing``. Its width follows
    the noise, but for the knee, and it ends where the losses climb above their start.

    * ``"knee"``: where the loss, smoothed with a kernel of 0.8 decades, has done nine
      tenths of its fall, from its highest point before the minimum down to the minimum.
      It is on the low side: an explosion close to the fall draws it down.
    * ``"halfway"``: where the loss has done half of its fall.
    * ``"steepest"``: where the loss falls fastest per decade of the rate.
    * ``"minimum"``: a tenth of the rate at which the loss is lowest. Where the loss
      still falls at the end of the ladder, that end is taken for the minimum.
    * ``"middle"``: the geometric middle of ``"minimum"`` and ``"divergence"``. Where
      nothing diverges (batch norms often see to that), of a tenth of the first rate at
      which the loss is, but for noise, as low as it gets, and of the last before half
      of the fall is lost again; that may be the highest rate tried, so take the default
      ladder, which ends at 10. Raises if the loss still falls at the end.
    * ``"divergence"``: the last rate before the loss, having been lowest, climbs beyond
      its noise above where it started, or ceases to be finite. An upper limit rather
      than a rate to train at.

    One cycle at that peak ended at 1.14 (the worst task 1.77) times the held-out loss
    of one cycle at the best of 21 peaks with AdamW, and at 1.16 (the worst task 1.79)
    with SGD: geometric means over the 8 and 5 tasks of
    ``benchmarks/range_test_quality.py`` that did not choose. The best constant rate
    was at 1.36 and 1.89. The rate is too high for a run that overfits in the end, and
    too low where the loss first falls a little and learns later, as in regression
    without noise: neither shows in a few steps. One more run at three times the rate
    tells. A test of 100 steps is misread more often, where batches are noisy or the
    loss falls late.

    Args:
      result: Result of :func:`range_test`, or a sequence of at least one. The
        suggestion is then the median of theirs. What follows a loss that is not finite
        is ignored. Held-out losses are read if the test took them.
      method: One of the six above. None is the default of the optimizer.
      optimizer: ``"sgd"`` or ``"adamw"``, whichever is nearer to yours. None is what
        the results tell: those of states with Adam's two moments (``mu``, ``nu``), or
        with momentum (``trace``).

    Returns:
      The suggested rate, a float.

    Raises:
      ValueError: If the curve holds no suggestion: it has fewer than 10 finite losses,
        it is flat, it rises from the start, or (with ``"middle"`` and ``"divergence"``)
        nothing diverged. The message says what to change. If neither ``method`` nor
        ``optimizer`` is given, and the results do not tell the optimizer.

    Warns:
      UserWarning: If some of several results hold no suggestion, for instance because
        they diverge at once. They are left out, and the message says how many.

    Examples:
      >>> import numpy as np
      >>> import optax_superconv as osc
      >>> rates = np.geomspace(1e-6, 1.0, 61)
      >>> losses = 2 - 1 / (1 + (1e-3 / rates) ** 2)  # Half-way down at 1e-3.
      >>> result = osc.RangeTestResult(rates, losses, losses, False)
      >>> print(f"{osc.suggest_learning_rate(result, optimizer='adamw'):.4f}")
      0.0138
      >>> print(f"{osc.suggest_learning_rate(result, method='halfway'):.4f}")
      0.0010
      >>> print(f"{osc.suggest_learning_rate(result, method='minimum'):.4f}")
      0.1000

    References:
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018 (section 4.1). The methods of `fastai
      <https://docs.fast.ai/callback.schedule.html>`_ of similar names read a running
      average, which lags.
    """
    results = as_results("result", result)
    method = method_for("result", results, method, optimizer)
    if isinstance(result, RangeTestResult):
        return _readings.suggest(result, method)
    return float(np.median(_suggestions("result", results, method)))


def suggest_interval(
    results: Sequence[RangeTestResult],
    *,
    method: Method | None = None,
    optimizer: Optimizer | None = None,
    level: float = 0.9,
) -> tuple[float, float]:
    """How far the suggestions of repeated range tests spread.

    The repeats differ in what a training run's repeats would: initialisation, order of
    the batches. The interval lies between the quantiles ``(1 - level) / 2`` and
    ``(1 + level) / 2`` of their suggestions; with few repeats that is nearly their
    whole range, and less than what more of them would show.

    Args:
      results: Results of :func:`range_test`, at least 2 that hold a suggestion.
      method: Method of :func:`suggest_learning_rate`. None is that of the optimizer.
      optimizer: None is what the results tell; see :func:`suggest_learning_rate`.
      level: The share of suggestions inside, above 0 and at most 1.

    Returns:
      The low and the high end, floats.

    Warns:
      UserWarning: If some results hold no suggestion, for instance because they diverge
        at once. They are left out, and the message says how many.

    Examples:
      >>> import numpy as np
      >>> import optax_superconv as osc
      >>> rates, rng = np.geomspace(1e-6, 1.0, 61), np.random.default_rng(0)
      >>> results = []
      >>> for _ in range(5):
      ...     losses = 2 - 1 / (1 + (1e-3 / rates) ** 2) + 0.1 * rng.normal(size=61)
      ...     results.append(osc.RangeTestResult(rates, losses, losses, False))
      >>> low, high = osc.suggest_interval(results, optimizer="adamw")
      >>> print(low < osc.suggest_learning_rate(results, optimizer="adamw") < high)
      True
    """
    _checks.scalar("level", level, _checks.FRACTION)
    tests = as_results("results", results)
    method = method_for("results", tests, method, optimizer)
    found = _suggestions("results", tests, method)
    two = "at least 2 range tests that hold a suggestion"
    _checks.require(len(found) >= 2, "results", two, len(found))
    outside = (1 - level) / 2
    low, high = np.quantile(found, [outside, 1 - outside])
    return float(low), float(high)
