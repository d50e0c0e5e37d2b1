"""Which peak? The range test, and what its curve suggests.

A range test trains for a few steps while the learning rate climbs a geometric ladder.
The loss stays flat while the rate is too low to matter, falls, and at last blows up. A
suggestion is a point of that curve. It is read from a smoothing without lag, not from
the running average that decides when to stop: that one trails the loss by decades of
the rate.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np

from optax_superconv import _checks

Method = Literal["valley", "steepest", "minimum", "divergence"]
State = TypeVar("State")
Batch = TypeVar("Batch")

# The losses are looked at in blocks, one block behind the step that is dispatched, so
# that the device never waits for the host: a stop is seen at most 2 * _BLOCK - 1 steps
# late, and the result ends where it should have.
_BLOCK = 8

# Standard deviation, in decades of the rate, of the kernel that smooths a curve. On a
# fall of 1.8 within two decades with noise of 0.2 and 12 points per decade, the valley
# then spreads over a factor of 1.76 (5 to 95 %), against 2.3 at 0.15.
_BANDWIDTH = 0.35
_MIN_POINTS = 10


class RangeTestResult(NamedTuple):
    """The curve of a range test; NumPy arrays as long as the steps that count.

    Attributes:
      learning_rates: (n,) float32, the rates of the ladder that were applied.
      losses: (n,) float64, the loss at each step before its update. The last may be
        infinite or NaN, no other.
      smoothed_losses: (n,) float64, their bias-corrected running average.
      diverged: Whether the test ended because the loss diverged.
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    smoothed_losses: np.ndarray
    diverged: bool


class _Average(NamedTuple):
    """The running average of the losses, and how long it has stood too high."""

    total: float = 0.0
    weight: float = 0.0
    first: float = np.nan
    best: float = np.inf
    steps_above: int = 0


def _observe(
    average: _Average, loss: float, smoothing: float, divergence_factor: float
) -> _Average:
    """The average after one more loss."""
    total = smoothing * average.total + (1 - smoothing) * loss
    weight = smoothing * average.weight + (1 - smoothing)
    smoothed = total / weight
    first = average.first if average.weight else smoothed
    best = min(average.best, smoothed)
    bound = best + (divergence_factor - 1) * max(abs(first), first - best)
    steps_above = average.steps_above + 1 if smoothed > bound else 0
    return _Average(total, weight, first, best, steps_above)


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches from their start again and again."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        _checks.require(not empty, "batches", "at least one batch", "none")


@contextlib.contextmanager
def _progress_bar(show: bool, total: int) -> Iterator[Callable[[], None]]:
    """Yields what to call after each step."""
    if not show:
        yield lambda: None
        return
    try:
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError(
            "`progress=True` needs rich: pip install 'optax-superconv[progress]'."
        ) from error
    with Progress() as bar:
        task = bar.add_task("range test", total=total)
        yield lambda: bar.advance(task)


def _copy(state: State) -> State:
    """A state whose arrays may be donated, in place of the caller's."""
    copies: dict[int, jax.Array] = {}

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return leaf.copy()
        if not isinstance(leaf, jax.Array):
            return leaf
        if id(leaf) not in copies:
            # Compiles nothing, unlike `leaf.copy()`, and leaves the array where it is.
            copies[id(leaf)] = jax.device_put(leaf, may_alias=False)
        return copies[id(leaf)]

    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and any(
        isinstance(leaf, nnx.Variable)
        for leaf in jax.tree.leaves(
            state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )
    ):
        # A pytree would not know that two Flax NNX objects share a Variable.
        graph, leaves = nnx.split(state)
        return nnx.merge(graph, jax.tree.map(copied, leaves))
    return jax.tree.map(copied, state)


def _check_step(result: Any) -> None:
    wanted = "`step_fn` must return a pair (state, loss) with a loss that is"
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{wanted} a number, got a {type(result).__name__}.")
    loss = result[1]
    try:
        # None would pass for a number.
        dtype, shape = jnp.result_type("" if loss is None else loss), np.shape(loss)
    except (TypeError, ValueError):
        raise TypeError(
            f"{wanted} a number, got a loss of type {type(loss).__name__}."
        ) from None
    if shape or jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{wanted} a real scalar, got {dtype} of shape {shape}.")


def range_test(
    step_fn: Callable[[State, jax.Array, Batch], tuple[State, jax.Array]],
    state: State,
    batches: Iterable[Batch],
    *,
    min_value: float = 1e-6,
    max_value: float = 10.0,
    num_steps: int = 100,
    smoothing: float = 0.98,
    divergence_factor: float = 4.0,
    patience: int = 10,
    progress: bool = False,
) -> RangeTestResult:
    r"""Trains while the learning rate climbs from ``min_value`` to ``max_value``.

    .. math:: \eta_i = \eta_{\min} (\eta_{\max} / \eta_{\min})^{i / (N - 1)}

    It stops early at the first loss that is infinite or NaN, and when the running
    average has stood for ``patience`` steps above

    .. math:: \text{best} + (\text{divergence\_factor} - 1)
              \max(|\text{first}|, \text{first} - \text{best}),

    which also holds for losses of 0 or below. A bump that recovers within ``patience``
    steps is a catapult, not divergence.

    The steps are dispatched one after another without waiting for the device, whose
    losses are looked at every 8 steps, so ``step_fn`` may run for up to 15 steps past
    the one that diverged; the result does not hold these.

    Args:
      step_fn: ``(state, learning_rate, batch) -> (state, loss)``: the caller's own
        training step, best jitted, of any framework. The rate is a float32 scalar
        array; the loss is a scalar. It may donate its state.
      state: Any pytree. Its arrays are copied once, so the caller's survive, also in
        Flax NNX objects that the step changes in place.
      batches: A sequence (or anything that can be iterated again) starts again at its
        end; an iterator is consumed.
      min_value: The lowest rate, above 0; the first step takes it exactly.
      max_value: The highest rate, above ``min_value``; the last step takes it exactly.
      num_steps: Steps of the ladder, at least 2.
      smoothing: Of the running average, in [0, 1). It is bias-corrected, so a constant
        loss smooths to itself from the first step.
      divergence_factor: How far the average may rise, above 1.
      patience: Steps the average may stay that high, at least 1.
      progress: Whether to show a progress bar (needs rich).

    Returns:
      A :class:`RangeTestResult`; see :func:`suggest_learning_rate` for its use.

    Raises:
      ValueError: For arguments outside the ranges above, a loss that is no scalar, or
        an iterator that runs dry (says after how many steps).
      TypeError: For arguments of the wrong kind, or a ``step_fn`` that returns no pair.
      ImportError: With ``progress=True`` where rich is missing.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> @jax.jit
      ... def step_fn(w, learning_rate, x):
      ...     loss, grad = jax.value_and_grad(lambda w: ((w - x) ** 2).mean())(w)
      ...     return w - learning_rate * grad, loss
      >>> result = osc.range_test(step_fn, jnp.zeros(()), [jnp.ones(8)])
      >>> print(len(result.losses), f"{osc.suggest_learning_rate(result):.2f}")
      100 0.03

    References:
      Smith, `Cyclical Learning Rates for Training Neural Networks
      <https://arxiv.org/abs/1506.01186>`_, 2017 (section 3.3, with a linear ladder);
      Lewkowycz et al., `The large learning rate phase of deep learning: the catapult
      mechanism <https://arxiv.org/abs/2003.02218>`_, 2020.
    """
    _checks.function("step_fn", step_fn)
    in_float32 = "above 0 and finite in float32"
    float32 = np.finfo(np.float32)
    low, high = (
        _checks.scalar(
            name, value, in_float32, lambda x: (x >= float32.tiny) & (x <= float32.max)
        )
        for name, value in (("min_value", min_value), ("max_value", max_value))
    )
    above = f"above `min_value` ({min_value})"
    _checks.require(high > low, "max_value", above, max_value)
    num_steps = _checks.steps("num_steps", num_steps, at_least=2)
    patience = _checks.steps("patience", patience, at_least=1)
    _checks.scalar("smoothing", smoothing, _checks.DECAY_RULE, _checks.decay_rate)
    _checks.scalar("divergence_factor", divergence_factor, "above 1", lambda x: x > 1)
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise TypeError(
            "`batches` must be a sequence or an iterator of batches (a single batch "
            f"goes in a list), got a {type(batches).__name__}."
        )

    ladder = np.geomspace(low, high, num_steps, dtype=np.float32)
    ladder[[0, -1]] = low, high
    average = _Average()
    losses: list[float] = []
    smoothed: list[float] = []

    def diverges(block: list[jax.Array]) -> bool:
        nonlocal average
        for loss in map(float, block):
            average = _observe(average, loss, smoothing, divergence_factor)
            losses.append(loss)
            smoothed.append(average.total / average.weight)
            if not np.isfinite(loss) or average.steps_above >= patience:
                return True
        return False

    state = _copy(state)
    source = batches if isinstance(batches, Iterator) else _endless(batches)
    pending: list[jax.Array] = []
    diverged = False
    steps_run = 0
    with _progress_bar(progress, num_steps) as advance:
        rates = jax.device_put(list(ladder))
        for rate, batch in zip(rates, source, strict=False):
            result = step_fn(state, rate, batch)
            if steps_run == 0:
                _check_step(result)
            state, loss = result
            pending.append(loss)
            steps_run += 1
            advance()
            if len(pending) == 2 * _BLOCK:
                diverged = diverges(pending[:_BLOCK])
                del pending[:_BLOCK]
                if diverged:
                    break
    diverged = diverged or diverges(pending)
    if not diverged and steps_run < num_steps:
        raise ValueError(
            f"`batches` must yield a batch for each of `num_steps` ({num_steps}) steps,"
            f" got an iterator that ran dry after {steps_run}. A sequence starts again"
            " at its end."
        )
    return RangeTestResult(
        ladder[: len(losses)], np.asarray(losses), np.asarray(smoothed), diverged
    )


class _Curve(NamedTuple):
    """A range test's losses without noise and without lag."""

    log_rates: np.ndarray  # (n,), decades
    values: np.ndarray  # (n,)
    slopes: np.ndarray  # (n,), per decade
    errors: np.ndarray  # (n,), standard errors of the values
    losses: np.ndarray  # (n,), as they were
    start: float  # level of the first losses
    noise: float  # standard deviation of a loss


def smooth_curve(result: RangeTestResult) -> _Curve:
    """Local linear regression of the finite losses on the log of the rate.

    Centred, so without lag; linear, so without bias where the curve begins and ends;
    and with losses capped above the start by a quarter of the fall, so that an
    explosion does not reach back.
    """
    bad = np.flatnonzero(~np.isfinite(result.losses))
    n = int(bad[0]) if bad.size else len(result.losses)
    _checks.require(
        n >= _MIN_POINTS,
        "result",
        f"a curve of at least {_MIN_POINTS} finite losses (run the range test with more"
        " `num_steps`, or a lower `min_value` or `max_value`)",
        f"{n}",
    )
    losses = np.asarray(result.losses[:n], np.float64)
    log_rates = np.log10(np.asarray(result.learning_rates[:n], np.float64))
    start = float(np.median(losses[: max(3, n // 10)]))
    capped = np.minimum(losses, start + 0.25 * max(start - losses.min(), 0.0))

    distance = log_rates - log_rates[:, None]
    bandwidth = max(_BANDWIDTH, float(np.median(np.diff(log_rates))))
    kernel = np.exp(-0.5 * (distance / bandwidth) ** 2)
    s0, s1, s2 = ((kernel * distance**k).sum(axis=1, keepdims=True) for k in range(3))
    determinant = s0 * s2 - s1**2
    to_values = kernel * (s2 - s1 * distance) / determinant
    to_slopes = kernel * (s0 * distance - s1) / determinant
    # A median of differences sees the noise and neither the fall nor the explosion.
    steps = np.diff(capped)
    noise = 1.4826 * np.median(np.abs(steps - np.median(steps))) / np.sqrt(2)
    return _Curve(
        log_rates,
        to_values @ capped,
        to_slopes @ capped,
        noise * np.sqrt((to_values**2).sum(axis=1)),
        losses,
        start,
        float(noise),
    )


def suggest_learning_rate(
    result: RangeTestResult,
    *,
    method: Method = "valley",
) -> float:
    """Reads a learning rate off the curve of a range test.

    All methods read a centred smoothing of the losses in the log of the rate, so a
    suggestion neither lags nor depends on the test's ``smoothing``.

    * ``"valley"``: where the loss has fallen half of the way, from its highest point
      before the minimum down to the minimum. The steadiest under noise, and by far the
      most cautious: for one-cycle SGD on digits it lies 26 to 41 times below the rate
      of the lowest loss, which is Smith's reading of the curve and does best there.
    * ``"steepest"``: where the loss falls fastest per decade of the rate.
    * ``"minimum"``: a tenth of the rate at which the loss is lowest, so Smith's reading
      is ten times this. Where the loss still falls at the end of the ladder, that end
      is taken for the minimum.
    * ``"divergence"``: the last rate before the loss, having been lowest, climbs beyond
      its noise above where it started, or ceases to be finite. An upper limit rather
      than a rate to train at.

    Args:
      result: Of :func:`range_test`. What follows a loss that is not finite is ignored.
      method: One of the above.

    Returns:
      The suggested rate, a float.

    Raises:
      ValueError: If the curve holds no suggestion, saying what to change: it has fewer
        than 10 finite losses, it is flat, it rises from the start, or (with
        ``"divergence"``) nothing diverged. Or for an unknown method.
      TypeError: If ``result`` is no :class:`RangeTestResult`.

    Examples:
      >>> import numpy as np
      >>> import optax_superconv as osc
      >>> rates = np.geomspace(1e-6, 1.0, 61)
      >>> losses = 2 - 1 / (1 + (1e-3 / rates) ** 2)  # Half-way down at 1e-3.
      >>> result = osc.RangeTestResult(rates, losses, losses, False)
      >>> print(f"{osc.suggest_learning_rate(result):.4f}")
      0.0010
      >>> print(f"{osc.suggest_learning_rate(result, method='minimum'):.4f}")
      0.1000

    References:
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018 (section 4.1); the names of the methods
      are `fastai's <https://docs.fast.ai/callback.schedule.html>`_.
    """
    _checks.choice("method", method, get_args(Method))
    if not isinstance(result, RangeTestResult):
        raise TypeError(
            f"`result` must be a RangeTestResult, got a {type(result).__name__}."
        )
    curve = smooth_curve(result)
    log_rates, values = curve.log_rates, curve.values
    lowest = int(values.argmin())
    if method == "divergence":
        # Not from the smoothing, which sees a jump late.
        fall = curve.start - curve.losses.min()
        level = curve.start + max(0.25 * fall, 6 * curve.noise)
        above = np.flatnonzero(curve.losses[lowest:] > level)
        _checks.require(
            above.size > 0 or result.diverged,
            "result",
            "a range test that diverged (run it with a higher `max_value`)",
            f"one that reached {result.learning_rates[-1]:.3g} without diverging",
        )
        last = lowest + above[0] - 1 if above.size else len(values) - 1
        _checks.require(
            last >= len(values) // 10,
            "result",
            "a range test that starts below divergence (run it with a lower "
            "`min_value`)",
            "one that rises from the start",
        )
        return float(10 ** log_rates[last])

    highest = int(values[: lowest + 1].argmax())
    fall = values[highest] - values[lowest]
    doubt = 5 * np.hypot(curve.errors[highest], curve.errors[lowest])
    if not fall > max(doubt, 1e-6 * np.abs(values).max()):
        rises = values.max() - values[0] > max(doubt, 1e-6 * np.abs(values).max())
        raise ValueError(
            "`result` must be a curve with a fall in it, got one that "
            + (
                "rises from the start: run the range test with a lower `min_value`."
                if rises
                else "is flat: run the range test with a higher `max_value`, or with "
                "more `num_steps` where noise hides the fall."
            )
        )
    if method == "minimum":
        return float(10 ** log_rates[lowest] / 10)
    falling = slice(highest, lowest + 1)
    if method == "steepest":
        return float(10 ** log_rates[falling][curve.slopes[falling].argmin()])
    half = values[lowest] + 0.5 * fall
    last = highest + int(np.flatnonzero(values[falling] >= half)[-1])
    pair = [last + 1, last]  # np.interp wants rising values.
    return float(10 ** np.interp(half, values[pair], log_rates[pair]))
