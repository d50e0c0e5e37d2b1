"""Which peak, which weight decay? One cycle of a given length, and no other number.

A range test says where to look. Where it says nothing, or too little, short cycles on
the same batches say the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import jax

from optax_superconv import _batches, _checks, _records
from optax_superconv.finders import _auto_probes, _auto_results, _steps
from optax_superconv.finders._auto_probes import (
    DECAY,
    LEAST_RANGE_STEPS,
    MOMENTUM,
    Asked,
)
from optax_superconv.finders._auto_results import AutoOneCycleResult
from optax_superconv.finders._steps import RATE, Optimizer

State = TypeVar("State")


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
      :func:`suggest_learning_rate` does. With AdamW, if it decays weights, the peak is
      three times that, unless the test saw divergence at such a rate;
    * with SGD, then by three or five cycles of a 20th of the run, at that rate and up
      to half a decade below and above it, side by side on the same batches. The peak is
      the one with the lowest mean loss in its second half. (Not where the budget would
      leave less than 50 steps to the range test);
    * with either, where the range test suggests no rate, as on a plateau that no rate
      leaves within its steps, by three to five cycles a decade apart, of a 40th to a
      20th of the run (at least 10 steps), around a usual peak and not above the rate at
      which divergence was seen.

    The weight decay is :math:`\lambda = \kappa / (\eta T)` for a peak :math:`\eta` and
    :math:`T` steps, with :math:`\kappa = \min(5, T / 400)` for AdamW, or 1 in place of
    5 where no range test suggests a rate; for SGD, whose momentum repeats the decay,
    it is a tenth of :math:`\min(1, T / 400)`. So the run forgets about as much of its
    weights at any rate, and none forgets them within 400 steps.

    Warm-up and momentum are those of :func:`onecycle`. It learns from nothing but what
    it is given: no held-out loss. What the probes used is not taken off
    ``total_steps``.

    Args:
      step_fn: ``(state, batch) -> (state, loss)``, as for :func:`range_test`.
      state: As for :func:`range_test`, with one dial ``learning_rate`` and one
        ``b1`` (AdamW) or ``momentum`` (SGD). If it has a ``weight_decay``, as that of
        ``adamw(1e-3)`` and ``sgd(0.1, weight_decay=1e-4)``, one is chosen in its place;
        one of 0 stays 0. Yours survives; for short cycles there are up to six copies.
      batches: As for :func:`range_test`; in the order of training, best shuffled.
      total_steps: Optimizer steps of the run to come, at least 1.
      optimizer: ``"sgd"`` or ``"adamw"``. None is what the state tells by its moments.
      budget: What the probes may cost, as a fraction of ``total_steps``, at least 0; if
        above, at least 20 steps (below 50, few suggest a rate). 0 measures nothing: the
        peak is then a usual one, 0.016 for AdamW, 0.16 for SGD, which may be off
        tenfold and more. A rate that does not act at first, as where all gradients are
        0, costs steps beyond.
      accumulation_steps: Batches of each step; as for :func:`range_test`.
      stacked: Whether ``batches`` has a leading axis of steps; as for
        :func:`range_test`.
      progress: Whether to show progress bars (needs rich).

    Returns:
      An :class:`AutoOneCycleResult`: train with its ``tx``, or make an optimizer of
      your own of its schedules. Print its ``report()``.

    Raises:
      ValueError: If the probes cannot be made of what they may cost (the message names
        the least run that would do); if no rate lowers the loss and the usual one
        raises it (the message shows the evidence); and as :func:`range_test`.

    Warns:
      UserWarning: If the range test suggests no rate and short cycles tell none, as it
        took what they need, or no loss falls by more than its noise. The peak is then
        as without a budget, unless that does harm.

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
      1.48 174

    References:
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018; Wang and Aitchison, `How to set
      AdamW's weight decay as you scale model and dataset size
      <https://arxiv.org/abs/2405.13698>`_, 2024 (the product of rate, decay and steps).
    """
    calls = [0]
    form = _steps.form_of(step_fn, None, accumulation_steps)
    form = _auto_probes.counted(form, calls)
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
    names = [RATE, moved, *[DECAY] * (DECAY in knobs)]
    _steps.check_dials(state, knobs, names, may_pass=False)
    held = _records.read_hyperparams(state)
    has_decay = DECAY in knobs and float(held[DECAY]) != 0
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
    asked = Asked(
        form, state, source, total_steps, optimizer, has_decay, progress, calls
    )
    found = _auto_probes.probed(asked, allowed)
    peak, decay, reasons = _short(found.peak), 0.0, list(found.reasons)
    if has_decay:
        decay = _auto_probes.decay_for(peak, total_steps, optimizer, found.kappas)
        decay = _short(decay)
        reasons.append(_auto_results.told_of_decay(peak * decay * total_steps))
    if any(name.startswith(f"{RATE}/") for name in knobs):
        reasons.append(_auto_results.GROUPED)
    hyperparams = {
        "peak_learning_rate": peak,
        "warmup_steps": round(0.3 * total_steps),
        "max_momentum": 0.95,
        "base_momentum": 0.85,
        DECAY: decay,
    }
    if optimizer == "adamw":
        hyperparams |= {x: float(str(held[x])) for x in ("b2", "eps") if x in held}
    return AutoOneCycleResult(
        total_steps,
        optimizer,
        hyperparams,
        asked.used(),
        found.range_test,
        found.short_cycles,
        tuple(reasons),
    )


def _short(value: float) -> float:
    """To four digits: more would claim too much."""
    return float(f"{value:.4g}")
