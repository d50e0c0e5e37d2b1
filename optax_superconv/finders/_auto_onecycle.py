"""Which peak, which weight decay? One cycle of a given length, and no other number.

A range test says where to look. Where it says nothing, or too little, short cycles on
the same batches say the rest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, get_args

import jax
import numpy as np

from optax_superconv import _batches, _checks, _records
from optax_superconv.finders import _auto_results, _members, _runs, _steps
from optax_superconv.finders._auto_results import AutoOneCycleResult, ShortCycles
from optax_superconv.finders._range_test import RangeTestResult, range_test
from optax_superconv.finders._steps import RATE, Form, Optimizer
from optax_superconv.finders._suggestions import suggest_learning_rate
from optax_superconv.schedules._onecycle import onecycle

State = TypeVar("State")

DECAY = "weight_decay"
MOMENTUM: dict[Optimizer, str] = {"adamw": "b1", "sgd": "momentum"}

# The best constant peaks on the tasks of benchmarks/range_test_quality.py that were
# there to choose.
USUAL: dict[Optimizer, float] = {"adamw": 0.016, "sgd": 0.16}

# Three short cycles of such a part of the run are spared from the range test: SGD makes
# them always, AdamW where the test suggests nothing.
PARTS: dict[Optimizer, int] = {"adamw": 40, "sgd": 20}
RANGE_STEPS, LEAST_RANGE_STEPS, LEAST_CYCLE_STEPS = 200, 20, 10

# Peak rate x weight decay x steps: the weights shrink by about exp(-1/2) in a run.
KAPPA = 1.0


class _Asked(NamedTuple):
    """What is to be trained, and on what."""

    form: Form
    state: Any
    source: Iterator[Any]
    total_steps: int
    optimizer: Optimizer
    has_decay: bool  # whether the state has a dial for it
    progress: bool
    calls: list[int]  # of the step, in one place

    def used(self) -> int:
        """Training steps until now, those that were made twice included."""
        return -(-self.calls[0] // self.form.accumulation_steps)

    def decay_for(self, peak: Any) -> Any:
        """The decay that makes the same product of peak, decay and steps."""
        # SGD's is coupled, so its momentum repeats it, some ten times.
        coupled = 0.1 if self.optimizer == "sgd" else 1.0
        kappa = KAPPA * min(1.0, self.total_steps / 100)  # At most 1 % in a step.
        return kappa * coupled / (peak * self.total_steps)


class _Found(NamedTuple):
    """A peak, and how it came about."""

    peak: float
    range_test: RangeTestResult | None
    short_cycles: ShortCycles | None
    reasons: tuple[str, ...]


def _counted(form: Form, calls: list[int]) -> Form:
    """The form, whose step counts."""

    def step(*args: Any) -> Any:
        calls[0] += 1
        return form.step(*args)

    return form._replace(step=step)


def _range_test(asked: _Asked, num_steps: int) -> RangeTestResult:
    return range_test(
        lambda state, batch: asked.form.step(state, {}, batch),
        asked.state,
        asked.source,
        num_steps=num_steps,
        accumulation_steps=asked.form.accumulation_steps,
        progress=asked.progress,
    )


def _short_cycles(asked: _Asked, peaks: np.ndarray, num_steps: int) -> ShortCycles:
    """A one cycle at each peak, side by side."""
    count, size = np.arange(num_steps), len(peaks)
    rate, momentum = (np.asarray(path(count)) for path in onecycle(1.0, num_steps))
    values = {
        RATE: np.float32(np.outer(peaks, rate)),
        MOMENTUM[asked.optimizer]: np.broadcast_to(momentum, (size, num_steps)),
    }
    if asked.has_decay:
        values[DECAY] = np.float32(asked.decay_for(peaks))
    members = _members.one_by_one(asked.form, asked.state, values)
    title, form, source = "short cycles", asked.form, asked.source
    losses = _members.train(
        title, num_steps, source, form, size, members, asked.progress
    )
    ends = losses[:, num_steps // 2 :].mean(axis=1)
    scores = np.where(np.isfinite(losses).all(axis=1), ends, np.inf)
    return ShortCycles(np.asarray(peaks, np.float32), losses, scores)


def _check_learns(test: RangeTestResult, cycles: ShortCycles, suggests: bool) -> None:
    """Raises unless the best short cycle ends, and where nothing else tells, learns."""
    first = test.losses[: max(3, len(test.losses) // 10)]
    last = cycles.losses.shape[1] - cycles.losses.shape[1] // 2
    doubt = 3 * _runs.noise(test.losses) * math.sqrt(1 / len(first) + 1 / last)
    level = np.inf if suggests else float(np.median(first)) - doubt
    _checks.require(
        bool(cycles.scores.min() < level),
        "step_fn",
        "a step that lowers the loss at some rate, within the steps of the probes "
        "(a larger `budget` has more)",
        f"({_auto_results.told_of(test)} {_auto_results.told_of_cycles(cycles)})",
    )


def _probed(asked: _Asked, allowed: int) -> _Found:
    """What so many steps tell."""
    kind = asked.optimizer
    part = max(LEAST_CYCLE_STEPS, asked.total_steps // PARTS[kind])
    spared = 3 * part + 1  # The first step is made twice, to see that the rate acts.
    if allowed - spared < 50:  # Fewer do not make a range test.
        spared = 0
    test = _range_test(asked, min(RANGE_STEPS, allowed - spared - 1))
    reasons = [_auto_results.told_of(test)]
    suggested = None
    try:
        suggested = suggest_learning_rate(test, optimizer=kind)
        reasons.append(
            f"It suggests {suggested:.3g}, by {_auto_results.METHODS[kind]}."
        )
    except ValueError as error:
        reasons.append(f"It suggests no rate: {error}")
    left = allowed - asked.used() - 1
    if suggested is not None and (kind == "adamw" or left < 3 * part):
        return _Found(suggested, test, None, (*reasons, _auto_results.ONE_TEST))
    longest = max(LEAST_CYCLE_STEPS, asked.total_steps // 20)
    size, step = min(5, max(3, left // longest)), 1.0
    if suggested is not None:
        size, step = (5, 0.25) if size == 5 else (3, 0.5)
    num_steps = min(left // size, longest)
    # No rate above the one that diverged.
    ceiling = float(test.learning_rates[-1]) if test.diverged else np.inf
    if num_steps < LEAST_CYCLE_STEPS:
        _check_usual(test, kind, ceiling)
        warnings.warn(
            f"`budget` leaves {allowed} steps to the probes. {' '.join(reasons)} So the"
            " peak is a usual one. Short cycles would need "
            f"{3 * LEAST_CYCLE_STEPS} steps more at least.",
            stacklevel=3,
        )
        return _Found(USUAL[kind], test, None, (*reasons, _auto_results.USUALLY))
    decades = step * (np.arange(size) - (size - 1) / 2)
    top = (suggested or USUAL[kind]) * 10.0 ** decades[-1]
    if suggested is None:
        top = min(top, ceiling)
    cycles = _short_cycles(asked, top * 10.0 ** (decades - decades[-1]), num_steps)
    _check_learns(test, cycles, suggested is not None)
    reasons.append(_auto_results.told_of_cycles(cycles))
    peak = float(cycles.peak_learning_rates[cycles.scores.argmin()])
    return _Found(peak, test, cycles, tuple(reasons))


def _check_usual(test: RangeTestResult, optimizer: Optimizer, ceiling: float) -> None:
    """Raises unless the usual peak lies below divergence."""
    _checks.require(
        USUAL[optimizer] < ceiling,
        "budget",
        "large enough for short cycles, where a range test suggests no rate and "
        f"diverges below the usual one, {USUAL[optimizer]}",
        f"one that was used up ({_auto_results.told_of(test)})",
    )


def auto_onecycle(
    step_fn: Callable[..., tuple[State, jax.Array]],
    state: State,
    batches: Any,
    total_steps: int,
    *,
    optimizer: Optimizer | None = None,
    budget: float = 0.25,
    accumulation_steps: int = 1,
    stacked: bool = False,
    progress: bool = False,
) -> AutoOneCycleResult:
    r"""Chooses the numbers of one cycle by a few short probes of your own step.

    The length is yours to say. The peak rate is measured:

    * by a range test of at most 200 steps (see :func:`range_test`), read as
      :func:`suggest_learning_rate` does;
    * with SGD, then by three or five cycles of a 20th of the run, at that rate and up
      to half a decade below and above it, side by side on the same batches. The peak is
      the one with the lowest mean loss in its second half. (Not where the budget would
      leave less than 50 steps to the range test);
    * with either, where the range test suggests no rate, as on a plateau that no rate
      leaves within its steps, by three to five such cycles a decade apart, around a
      usual peak and below divergence.

    The weight decay is :math:`\lambda = 1 / (\eta T)` for a peak :math:`\eta` and
    :math:`T` steps, and for SGD, whose momentum repeats it, a tenth of that: so the
    run forgets about as much of its weights at any rate and length.

    Warm-up and momentum are those of :func:`onecycle`. It learns from nothing but what
    it is given: no held-out loss. What the probes used is not taken off
    ``total_steps``.

    Args:
      step_fn: ``(state, batch) -> (state, loss)``, as for :func:`range_test`.
      state: As for :func:`range_test`, with one dial ``learning_rate`` and one
        ``b1`` (AdamW) or ``momentum`` (SGD). If it has a ``weight_decay``, as that of
        ``adamw(1e-3)`` and ``sgd(0.1, weight_decay=1e-4)``, one is chosen in its place.
        Yours survives; for short cycles there are up to five copies.
      batches: As for :func:`range_test`; in the order of training, best shuffled.
      total_steps: Optimizer steps of the run to come, at least 1.
      optimizer: ``"sgd"`` or ``"adamw"``. None is what the state tells by its moments.
      budget: What the probes may cost, as a fraction of ``total_steps``, at least 0; if
        above, at least 20 steps. 0 measures nothing: the peak is then a usual one,
        0.016 for AdamW, 0.16 for SGD, which may be off tenfold and more. A rate that
        does not act at first, as where all gradients are 0, costs steps beyond.
      accumulation_steps: Batches of each step; as for :func:`range_test`.
      stacked: Whether ``batches`` has a leading axis of steps; as for
        :func:`range_test`.
      progress: Whether to show progress bars (needs rich).

    Returns:
      An :class:`AutoOneCycleResult`: train with its ``tx``, or make an optimizer of
      your own of its schedules. Print its ``report()``.

    Raises:
      ValueError: If the probes cannot be made of what they may cost (the message names
        the least run that would do); if no rate lowers the loss (the message shows the
        evidence); and as :func:`range_test`.

    Warns:
      UserWarning: If the range test suggests no rate, and took what short cycles would
        need. The peak is then as without a budget, if that did not diverge.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> tx = osc.adamw(1e-3)
      >>> @jax.jit
      ... def step_fn(state, x):
      ...     w, opt_state = state
      ...     loss, grad = jax.value_and_grad(lambda w: ((w - x) ** 2).mean())(w)
      ...     updates, opt_state = tx.update(grad, opt_state, w)
      ...     return (optax.apply_updates(w, updates), opt_state), loss
      >>> w = jnp.zeros(())
      >>> result = osc.auto_onecycle(step_fn, (w, tx.init(w)), [jnp.ones(8)], 1000)
      >>> print(f"{result.hyperparams['peak_learning_rate']:.2f}", result.steps_used)
      0.49 174

    References:
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018; Wang and Aitchison, `How to set
      AdamW's weight decay as you scale model and dataset size
      <https://arxiv.org/abs/2405.13698>`_, 2024 (the product of rate, decay and steps).
    """
    calls = [0]
    form = _steps.form_of(step_fn, False, accumulation_steps)
    form = _counted(form, calls)
    total_steps = _checks.steps("total_steps", total_steps, at_least=1)
    budget = _checks.scalar("budget", budget, _checks.NON_NEGATIVE)
    if optimizer is None:
        optimizer = _steps.optimizer_of(state)
        if optimizer is None:
            raise ValueError(
                "`state` must tell its optimizer by its moments (`mu` and `nu`, or "
                "`trace`), got neither, or both: give `optimizer='sgd'` or "
                "`optimizer='adamw'`, whichever is nearer to yours."
            )
    _checks.choice("optimizer", optimizer, get_args(Optimizer))
    knobs, moved = _steps.knobs_in(state), MOMENTUM[optimizer]
    _checks.require(
        moved in knobs,
        "state",
        f"one with a dial {moved!r}, which moves against the rate (that of `osc.adamw` "
        "or `osc.sgd`, of `osc.scale_by_scheduled_adam` or `osc.scheduled_trace` in a "
        "chain, or of `optax.inject_hyperparams`)",
        f"one that holds {', '.join(knobs) or 'none'}",
    )
    has_decay = DECAY in knobs
    _steps.check_dials(state, knobs, [RATE, moved, *[DECAY] * has_decay])
    allowed = math.floor(budget * total_steps + 1e-6)
    _checks.require(
        budget == 0 or allowed >= LEAST_RANGE_STEPS,
        "total_steps",
        f"at least {math.ceil(LEAST_RANGE_STEPS / (budget or 1) - 1e-6)}, of which "
        f"`budget` ({budget}) leaves {LEAST_RANGE_STEPS} to the probes (`budget=0` "
        "needs none)",
        total_steps,
    )
    source = _batches.draw(batches, stacked)
    _checks.flag("progress", progress)
    asked = _Asked(
        form, state, source, total_steps, optimizer, has_decay, progress, calls
    )
    found = _Found(USUAL[optimizer], None, None, (_auto_results.USUALLY,))
    if budget:
        found = _probed(asked, allowed)
    grouped = any(name.startswith(f"{RATE}/") for name in knobs)
    reasons = (
        *found.reasons,
        *[_auto_results.DECAYED] * has_decay,
        *[_auto_results.GROUPED] * grouped,
    )
    hyperparams = {
        "peak_learning_rate": _short(found.peak),
        "warmup_steps": round(0.3 * total_steps),
        "max_momentum": 0.95,
        "base_momentum": 0.85,
        DECAY: _short(asked.decay_for(_short(found.peak))) if has_decay else 0.0,
    }
    if optimizer == "adamw":
        held = _records.read_hyperparams(state)
        hyperparams |= {x: float(str(held[x])) for x in ("b2", "eps") if x in held}
    return AutoOneCycleResult(
        total_steps,
        optimizer,
        hyperparams,
        asked.used(),
        found.range_test,
        found.short_cycles,
        reasons,
    )


def _short(value: float) -> float:
    """To four digits: more would claim too much."""
    return float(f"{value:.4g}")
