"""Up to which constant rate does training still converge?

Below the convergence threshold a run at a constant rate reaches a low loss; just above
it the loss settles higher, and from there fine-tuning at a small rate generalises best;
far above it nothing is learned. On a parabola of curvature L, gradient descent has its
threshold at 2 / L. The rate at which a range test diverges lies elsewhere: it spends
too few steps at each rate for a slow divergence to show.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from optax_superconv import _batches, _checks
from optax_superconv.finders import _members, _runs, _steps
from optax_superconv.finders._steps import Optimizer

State = TypeVar("State")


@dataclasses.dataclass(frozen=True, eq=False)
class ThresholdResult:
    """The convergence threshold, and the runs that bracket it, by rising rate.

    Attributes:
      threshold: The geometric middle of the last bracket, whose ends were both run.
      rate_before_fine_tuning: 1.5 times the threshold: a constant rate to try before
        fine-tuning or averaging, and no peak for a schedule. Runs at it need not end
        well; see :func:`convergence_threshold`.
      band_before_fine_tuning: The threshold and twice the threshold. Both stay below
        the lowest rate above the threshold that learned nothing.
      target_loss: What an end loss must reach to count as converged.
      rates: (n,) float32, those of the ladder and of the bisection.
      losses: (n, num_steps) float64, the loss at each step before its update; NaN after
        the first that is not finite.
      end_losses: (n,) float64, the mean of the last tenth; NaN where not finite.
      regimes: n labels: ``"too slow"``, ``"1"`` (converges), ``"2"`` (learns without
        converging), ``"3"`` (learns nothing).
      optimizer: ``"sgd"``, ``"adamw"`` or None, as in :class:`RangeTestResult`.
    """

    threshold: float
    rate_before_fine_tuning: float
    band_before_fine_tuning: tuple[float, float]
    target_loss: float
    rates: np.ndarray
    losses: np.ndarray
    end_losses: np.ndarray
    regimes: tuple[str, ...]
    optimizer: Optimizer | None = None

    def __repr__(self) -> str:
        rates = self.rates
        counts = collections.Counter(self.regimes).items()
        return _runs.summary(
            self,
            f"threshold {self.threshold:.4g}, target loss {self.target_loss:.4g}",
            f"{len(rates)} rates from {rates[0]:.3g} to {rates[-1]:.3g}: "
            + ", ".join(f"{count} {label!r}" for label, count in counts),
        )


def _judge(
    losses: np.ndarray, ladder: np.ndarray, target: float | None
) -> tuple[float, float, int, int]:
    """What the ladder's runs say.

    Returns:
      The target; the end loss from which up nothing was learned; the first and the
      last place of the interval that converges.
    """
    first, top = float(losses[0, 0]), len(ladder) - 1
    _runs.check_first_loss(first)
    given = target is not None
    if target is not None:
        rule = f"below the first loss ({first:.4g})"
        _checks.require(target < first, "target_loss", rule, target)
    ends = np.nan_to_num(_runs.end_losses(losses), nan=np.inf)
    lowest = int(ends.argmin())
    best = float(ends[lowest])
    _checks.require(
        best < np.inf,
        "min_learning_rate",
        "low enough that some run does not diverge: lower it",
        f"losses that cease to be finite at every rate from {ladder[0]:.3g} up",
    )
    seen = f"a lowest end loss of {best:.4g} (at rate {ladder[lowest]:.3g})"
    # A single loss is as noisy as its batch, so the start is a mean as the ends are;
    # unless the lowest rate learns as quickly as that.
    noise = 3 * _runs.noise(losses[0])
    start = max(float(losses[0, : _runs.tenth(losses)].mean()), first - noise)
    noise *= math.sqrt(2 / _runs.tenth(losses))
    doubt = max(noise, 1e-6 * abs(start))
    if start - best <= doubt:
        rises = ends > start + doubt
        if rises[0]:
            name, rule = "min_learning_rate", "low enough to learn at: lower it"
        elif rises.any():
            name, rule = "num_steps", "long enough to leave the plateau at the start"
            rule += " at some rate below divergence: raise it"
        else:
            name, rule = "max_learning_rate", "high enough to learn at: raise it"
        raise ValueError(
            f"`{name}` must be {rule}, got {seen} after a first loss of {first:.4g}, no"
            " more than noise."
        )
    if target is None:
        target = start - 0.9 * (start - best)
    remedy = {0: "lower `min_learning_rate`", top: "raise `max_learning_rate`"}
    _checks.require(
        best <= target,
        "target_loss",
        f"reached at some rate: {remedy.get(lowest, 'raise `num_steps`')}",
        f"{seen}, never {target:.4g}",
    )
    converged = ends <= target
    # Of rates that are as good as the best the largest, and the interval around it.
    good = converged & (ends <= best + 1e-3 * (start - best))
    low = high = int(np.flatnonzero(good)[-1])
    _checks.require(
        high > 0 or given,
        "min_learning_rate",
        "so low that it is not the best: lower it",
        f"{seen} and higher ones at every other rate",
    )
    # A single rate that misses the target does not end it.
    while converged[high + 1 : high + 3].any():
        high += 1
    while converged[max(low - 2, 0) : low].any():
        low -= 1
    _checks.require(
        high < top,
        "max_learning_rate",
        "so high that it does not converge: raise it",
        f"an end loss of {ends[top]:.4g} at {ladder[top]:.3g}, which reaches the "
        f"target of {target:.4g}",
    )
    return target, start - max(noise, 0.05 * (start - best)), low, high


def convergence_threshold(
    step_fn: Callable[..., tuple[State, jax.Array]],
    state: State,
    batches: Any,
    *,
    num_steps: int,
    min_learning_rate: float = 1e-5,
    max_learning_rate: float = 10.0,
    target_loss: float | None = None,
    num_rates: int = 16,
    rtol: float = 0.02,
    accumulation_steps: int = 1,
    stacked: bool = False,
    pass_hyperparams: bool = False,
    progress: bool = False,
) -> ThresholdResult:
    r"""Finds the largest constant rate that still converges within ``num_steps``.

    Runs a geometric ladder of ``num_rates`` constant rates from ``min_learning_rate``
    to ``max_learning_rate``, each for ``num_steps``, then bisects between the last that
    converges and the next until they lie within a factor of ``1 + rtol``. A run
    converges if the mean of the last tenth of its losses is at most the target. By
    default that is

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

    Just above the threshold, training does not converge, but fine-tuning at a small
    rate, or averaging the weights, generalises best: the paper's regime 2A. It is 0.4
    to 1.7 decades wide in Sadrtdinov et al.'s set-ups, and twice the threshold lies
    inside in all of them; hence ``band_before_fine_tuning``. That 1.5 times the
    threshold is a good rate to train at before fine-tuning is our reading, not the
    paper's. Such a rate is far too high for the peak of one cycle.

    Args:
      step_fn: ``(state, batch) -> (state, loss)``, your own training step, as for
        :func:`range_test`.
      state: As for :func:`range_test`, with one ``learning_rate``; yours survives. The
        ladder holds ``num_rates`` copies.
      batches: As for :func:`range_test`. What starts again does so for every run, so
        that all rates see the same batches. An iterator is drawn on: the ladder's runs
        share its batches, and each run of the bisection takes ``num_steps`` new ones.
      num_steps: Steps of each run, at least 2.
      min_learning_rate: The lowest rate of the ladder, above 0.
      max_learning_rate: The highest rate of the ladder, above the lowest.
      target_loss: The end loss that counts as converged, below the first loss; None
        fixes it on the ladder, as above.
      num_rates: Rates of the ladder, at least 3.
      rtol: Relative width of the last bracket, at least 1e-6 (rates are float32). It is
        not how far a repeat would land: other batches or another initialisation move
        the threshold of a noisy run by more.
      accumulation_steps: Batches of each step; as for :func:`range_test`.
      stacked: Whether ``batches`` has a leading axis of steps; as for
        :func:`range_test`.
      pass_hyperparams: Whether ``step_fn`` is ``(state, learning_rate, batch)``; as for
        :func:`range_test`.
      progress: Whether to show a progress bar, one per run (needs rich).

    Returns:
      A :class:`ThresholdResult`. A run learns nothing (regime 3) if its end loss is not
      finite, or not below the start (the first tenth of the losses at the lowest rate)
      by more than a twentieth of what the best run gained and 3 standard errors.

    Raises:
      ValueError: If no threshold is found between these rates: nothing is learned, the
        target is never reached, the top rate converges, or the lowest rate is the best.
        The message names what to change. An end is never returned as a threshold. If
        the rate does not act, as for :func:`range_test`; if the first loss is not
        finite; if ``batches`` is a single one, or an iterator that ends too early.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> import optax
      >>> curvatures = jnp.array([0.1, 1.0, 4.0])
      >>> tx = osc.sgd(0.1, momentum=0.0)
      >>> @jax.jit
      ... def step_fn(state, batch):
      ...     w, opt_state = state
      ...     loss_fn = lambda w: (curvatures * w**2).sum() / 2
      ...     loss, grad = jax.value_and_grad(loss_fn)(w)
      ...     updates, opt_state = tx.update(grad, opt_state, w)
      ...     return (optax.apply_updates(w, updates), opt_state), loss
      >>> w = jnp.ones(3)
      >>> result = osc.convergence_threshold(
      ...     step_fn, (w, tx.init(w)), [None], num_steps=200)
      >>> print(f"{result.threshold:.2f}")  # 2 / 4.0
      0.50

    References:
      Sadrtdinov et al., `Where Do Large Learning Rates Lead Us?
      <https://arxiv.org/abs/2410.22113>`_, 2024.
    """
    form = _steps.form_of(step_fn, pass_hyperparams, accumulation_steps)
    num_rates = _checks.steps("num_rates", num_rates, at_least=3)
    ladder = _runs.geometric_ladder(min_learning_rate, max_learning_rate, num_rates)
    num_steps = _checks.steps("num_steps", num_steps, at_least=2)
    rule = _checks.Rule("at least 1e-6 and finite", lambda x: x >= 1e-6)
    _checks.scalar("rtol", rtol, rule)
    if target_loss is not None:
        target_loss = _checks.scalar("target_loss", target_loss)

    def train(title: str, rates: np.ndarray) -> np.ndarray:
        """Losses at constant rates."""
        source = _batches.draw(batches, stacked)  # Starts again, or goes on.
        members = _members.one_by_one(form, state, {_steps.RATE: rates})
        return _members.train(
            title, num_steps, source, form, len(rates), members, progress
        )

    rates, losses = ladder, train("ladder of rates", ladder)
    target, untrained, low, high = _judge(losses, ladder, target_loss)
    below, above = map(float, ladder[high : high + 2])
    while above / below > 1 + rtol:
        rate = np.array([math.sqrt(below * above)], np.float32)
        curve = train("bisection", rate)
        if _runs.end_losses(curve)[0] <= target:
            below = float(rate[0])
        else:
            above = float(rate[0])
        rates, losses = np.append(rates, rate), np.append(losses, curve, axis=0)

    order = rates.argsort()
    rates, losses = rates[order], losses[order]
    ends = _runs.end_losses(losses)
    told = [ends <= target, ~np.isfinite(ends), rates < ladder[low], ends < untrained]
    regimes = np.select(told, ["1", "3", "too slow", "2"], "3")
    threshold = math.sqrt(below * above)
    beyond = rates[(rates > threshold) & (regimes == "3")]
    limit = float(beyond[0]) if beyond.size else math.inf
    large = 1.5 * threshold if 1.5 * threshold < limit else math.sqrt(threshold * limit)
    return ThresholdResult(
        threshold,
        large,
        (threshold, min(2 * threshold, limit)),
        target,
        rates,
        losses,
        ends,
        tuple(regimes.tolist()),
        _steps.optimizer_of(state),
    )
