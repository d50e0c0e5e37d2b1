"""Up to which constant rate does training still converge?

Below the convergence threshold a run at a constant rate reaches a low loss; just above
it the loss settles higher, and from there fine-tuning at a small rate generalises best;
far above it nothing is learned. On a parabola of curvature L, gradient descent has its
threshold at 2 / L. The rate at which a range test diverges lies elsewhere: it spends
too few steps at each rate for a slow divergence to show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from optax_superconv import _batches, _checks
from optax_superconv.finders import _runs

State = TypeVar("State")
Batch = TypeVar("Batch")


class ThresholdResult(NamedTuple):
    """The convergence threshold, and the runs that bracket it, by rising rate.

    Attributes:
      threshold: The geometric middle of the last bracket, whose ends were both run.
      suggested_rate: 1.5 times the threshold.
      suggested_band: The threshold and twice the threshold.
      target_loss: What an end loss must reach to count as converged.
      rates: (n,) float32, those of the ladder and of the bisection.
      losses: (n, num_steps) float64, the loss at each step before its update; NaN after
        the first that is not finite.
      end_losses: (n,) float64, the mean of the last tenth; NaN where not finite.
      regimes: n labels: ``"too slow"``, ``"1"`` (converges), ``"2"`` (learns without
        converging; ``"2A"`` or ``"2B"`` after fine-tuning), ``"3"`` (learns nothing).
      finetuned_losses: (n, num_steps) float64 as ``losses``, at ``finetune_rate`` from
        the end of each finite run in regimes 2 and 3, otherwise NaN. None without
        fine-tuning.
    """

    threshold: float
    suggested_rate: float
    suggested_band: tuple[float, float]
    target_loss: float
    rates: np.ndarray
    losses: np.ndarray
    end_losses: np.ndarray
    regimes: tuple[str, ...]
    finetuned_losses: np.ndarray | None


class _Judge(NamedTuple):
    """What the ladder says about every run."""

    target: float
    untrained: float  # end losses from here up have learned nothing
    slowest: float  # rate that converges
    bracket: tuple[int, int]  # on the ladder

    def regime(self, rate: float, end: float) -> str:
        if end <= self.target:
            return "1"
        if not np.isfinite(end):
            return "3"
        if rate < self.slowest:
            return "too slow"
        return "2" if end < self.untrained else "3"


def _judge(losses: np.ndarray, ladder: np.ndarray, target: float | None) -> _Judge:
    """The target, and where on the ladder runs cease to reach it."""
    first, top = float(losses[0, 0]), len(ladder) - 1
    _runs.check_first_loss(first)
    if target is not None:
        rule = f"below the first loss ({first:.4g})"
        _checks.require(target < first, "target_loss", rule, target)
    ends = _runs.end_losses(losses)
    _checks.require(
        np.isfinite(ends).any(),
        "bounds",
        "low enough that some run does not diverge (lower `bounds[0]`)",
        f"losses that cease to be finite at every rate from {ladder[0]:.3g} up",
    )
    lowest = int(np.nanargmin(ends))
    best = float(ends[lowest])
    seen = f"a lowest end loss of {best:.4g} (at rate {ladder[lowest]:.3g}) "
    # A single loss is as noisy as its batch, so the start is a mean as the ends are;
    # unless the lowest rate learns as quickly as that.
    noise = 3 * _runs.noise(losses[0])
    start = max(float(losses[0, : _runs.tenth(losses)].mean()), first - noise)
    noise *= math.sqrt(2 / _runs.tenth(losses))
    higher = "raise `bounds[1]` or `num_steps`"
    remedy = {0: "lower `bounds[0]`", top: higher}.get(lowest, "raise `num_steps`")
    _checks.require(
        start - best > max(noise, 1e-6 * abs(start)),
        "bounds",
        "rates of which some learn within `num_steps` (lower `bounds[0]` if all are "
        f"too large; otherwise {higher})",
        f"{seen}against {start:.4g} at the start, no more than noise",
    )
    given = target is not None
    if target is None:
        target = start - 0.9 * (start - best)
    _checks.require(
        best <= target,
        "target_loss",
        f"reached at some rate ({remedy}, or `target_loss`)",
        f"{seen}for a target of {target:.4g}, which was never reached",
    )
    with np.errstate(invalid="ignore"):
        converged = ends <= target
        good = converged & (ends <= best + 1e-3 * (start - best))
    # The interval around the best rate; of equals the largest.
    low = high = int(np.flatnonzero(good)[-1])
    _checks.require(
        high > 0 or given,
        "bounds",
        "low enough that the lowest rate is not the best (lower `bounds[0]`, or give "
        "`target_loss`)",
        f"{seen}and higher ones at every other rate",
    )
    while reached := [k for k in (high + 1, high + 2) if k <= top and converged[k]]:
        high = reached[0]
    while reached := [k for k in (low - 1, low - 2) if k >= 0 and converged[k]]:
        low = reached[0]
    _checks.require(
        high < top,
        "bounds",
        "high enough that the top rate does not converge (raise `bounds[1]`)",
        f"an end loss of {ends[top]:.4g} at {ladder[top]:.3g}, which reaches the "
        f"target of {target:.4g}",
    )
    untrained = start - max(noise, 0.05 * (start - best))
    return _Judge(target, untrained, ladder[low], (high, high + 1))


def convergence_threshold(
    step_fn: Callable[[State, jax.Array, Batch], tuple[State, jax.Array]],
    state: State,
    batches: Any,
    *,
    num_steps: int,
    bounds: tuple[float, float] = (1e-5, 10.0),
    target_loss: float | None = None,
    num_rates: int = 16,
    rtol: float = 0.02,
    finetune_rate: float | None = None,
    progress: bool = False,
) -> ThresholdResult:
    r"""Finds the largest constant rate that still converges within ``num_steps``.

    Runs a geometric ladder of ``num_rates`` constant rates from ``bounds[0]`` to
    ``bounds[1]``, each for ``num_steps``, then bisects between the last that converges
    and the next until they lie within a factor of ``1 + rtol``. A run converges if the
    mean of the last tenth of its losses is at most the target. By default that is

    .. math:: \text{start} - 0.9\, (\text{start} - \text{best}),

    with the mean of the first tenth of the losses at the lowest rate (or the first loss
    less its noise, if that rate learns so quickly) and the lowest end loss of the
    ladder: nine tenths of the way down, whether the best is 1e-3 or 1e-30.

    Rates that are too small miss the target as well, so the rates that converge form an
    interval, and the threshold is its upper end. It is the interval around the lowest
    end loss; a single rate inside that misses the target does not end it, and rates
    that converge beyond two that do not are taken for luck.

    The threshold belongs to the budget: near it, training takes ever longer, and a
    larger ``num_steps`` finds a larger threshold. In Sadrtdinov et al.'s ResNet-18 runs
    it grew by 30 % for a 30-fold budget.

    Just above the threshold begins regime 2A, where training does not converge but
    fine-tuning at a small rate, or averaging the weights, generalises best. It is 0.4
    to 1.7 decades wide in Sadrtdinov et al.'s set-ups, and twice the threshold lies
    inside in all of them; hence ``suggested_band``. That 1.5 times the threshold is a
    good rate to train at before fine-tuning is our reading, not the paper's.

    Args:
      step_fn: ``(state, learning_rate, batch) -> (state, loss)``, as for
        :func:`range_test`: the caller's own training step, best jitted. The new state
        must have the structure, the shapes and the dtypes of the old one.
      state: Any pytree; the caller's survives. The ladder holds ``num_rates`` copies;
        with ``finetune_rate`` the end of every run is kept, about 6 more.
      batches: As for :func:`range_test`. A sequence or a stacked pytree starts at its
        beginning for every run, so that all rates see the same batches. An iterator is
        drawn on: the ladder's runs share its batches, each run of the bisection takes
        ``num_steps`` new ones, and so does the fine-tuning.
      num_steps: Steps of each run, at least 2.
      bounds: The lowest and the highest rate of the ladder: a pair, rising, above 0.
      target_loss: The end loss that counts as converged, below the first loss; None
        fixes it on the ladder, as above.
      num_rates: Rates of the ladder, at least 3.
      rtol: Relative width of the last bracket, at least 1e-6 (rates are float32). It is
        not how far a repeat would land: other batches or another initialisation move
        the threshold of a noisy run by more.
      finetune_rate: Above 0, and best in regime 1: trains the end states that did not
        converge for another ``num_steps`` at this rate, and calls those of regime 2
        that now reach the target ``"2A"`` and the others ``"2B"``. None trains no
        further.
      progress: Whether to show a progress bar (needs rich).

    Returns:
      A :class:`ThresholdResult`. A run learns nothing (regime 3) if its end loss is not
      finite, or not below the start (the first tenth of the losses at the lowest rate)
      by more than a twentieth of what the best run gained and 3 standard errors.

    Raises:
      ValueError: If no threshold is found between the bounds: nothing is learned, the
        target is never reached, the top rate converges, or the lowest rate is the best.
        The message names the end to move. A bound is never returned as a threshold. Or
        if the first loss is not finite, or if an iterator ends too early.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> curvatures = jnp.array([0.1, 1.0, 4.0])
      >>> @jax.jit
      ... def step_fn(w, learning_rate, batch):
      ...     loss_fn = lambda w: (curvatures * w**2).sum() / 2
      ...     loss, grad = jax.value_and_grad(loss_fn)(w)
      ...     return w - learning_rate * grad, loss
      >>> result = osc.convergence_threshold(
      ...     step_fn, jnp.ones(3), [None], num_steps=200)
      >>> print(f"{result.threshold:.2f}")  # 2 / 4.0
      0.50

    References:
      Sadrtdinov et al., `Where Do Large Learning Rates Lead Us?
      <https://arxiv.org/abs/2410.22113>`_, 2024.
    """
    _checks.function("step_fn", step_fn)
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(
            f"`bounds` must be a pair (lowest, highest) of rates, got {bounds!r}."
        )
    num_rates = _checks.steps("num_rates", num_rates, at_least=3)
    ladder = _runs.geometric_ladder(*bounds, num_rates, ("bounds[0]", "bounds[1]"))
    num_steps = _checks.steps("num_steps", num_steps, at_least=2)
    _checks.scalar("rtol", rtol, "at least 1e-6 and finite", lambda x: x >= 1e-6)
    if target_loss is not None:
        target_loss = _checks.scalar("target_loss", target_loss)
    if finetune_rate is not None:
        _checks.scalar("finetune_rate", finetune_rate, "above 0", lambda x: x > 0)
    spacing = math.log(ladder[1] / ladder[0]) / math.log1p(rtol)
    total = (1 + max(0, math.ceil(math.log2(spacing)))) * num_steps
    if finetune_rate is not None:
        total += num_steps

    with _runs.progress_bar("convergence threshold", progress, total) as tick:

        def train(states: list[Any], rates: np.ndarray) -> np.ndarray:
            """Losses at constant rates; the states are replaced by the last ones."""
            each = jax.device_put(list(rates.astype(np.float32)))
            return _runs.lockstep(
                _runs.sequential(step_fn, states, lambda _, member: each[member]),
                (len(states), num_steps),
                _batches.draw(batches),  # Starts again, unless it is an iterator.
                tick=tick,
            )

        states = [_runs.copy_state(state) for _ in ladder]
        losses = train(states, ladder)
        judge = _judge(losses, ladder, target_loss)
        keeps = finetune_rate is not None
        last: list[Any] = states if keeps else [None] * num_rates
        runs: list[tuple[Any, Any, Any]] = list(zip(ladder, losses, last, strict=True))
        (below, above), states = ladder[list(judge.bracket)], []
        while above / below > 1 + rtol:
            states = [_runs.copy_state(state)]
            rate = np.float32(math.sqrt(float(below) * float(above)))
            (curve,) = train(states, np.array([rate]))
            converges = _runs.end_losses(curve) <= judge.target
            below, above = (rate, above) if converges else (below, rate)
            runs.append((rate, curve, states[0] if keeps else None))

        runs.sort(key=lambda run: run[0])
        rates, losses = (np.array([run[k] for run in runs]) for k in (0, 1))
        ends = _runs.end_losses(losses)
        regimes = [judge.regime(*pair) for pair in zip(rates, ends, strict=True)]
        finetuned = None
        if finetune_rate is not None:
            finetuned = np.full_like(losses, np.nan)
            again = [
                k
                for k, regime in enumerate(regimes)
                if regime in ("2", "3") and np.isfinite(ends[k])
            ]
            if again:
                states = [runs[k][2] for k in again]
                finetuned[again] = train(states, np.full(len(again), finetune_rate))
            reaches = _runs.end_losses(finetuned) <= judge.target
            regimes = [
                regime + ("A" if reached else "B") if regime == "2" else regime
                for regime, reached in zip(regimes, reaches, strict=True)
            ]
    threshold = math.sqrt(float(below) * float(above))
    return ThresholdResult(
        threshold,
        1.5 * threshold,
        (threshold, 2 * threshold),
        judge.target,
        rates,
        losses,
        ends,
        tuple(regimes),
        finetuned,
    )
