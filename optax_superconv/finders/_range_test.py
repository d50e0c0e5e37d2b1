"""Which losses does each learning rate give? The range test.

It trains for a few steps while the learning rate climbs a geometric ladder. The loss
stays flat while the rate is too low to matter, falls, and at last blows up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np

from optax_superconv import _batches, _checks
from optax_superconv._numerics import weight_after
from optax_superconv.finders import _runs

State = TypeVar("State")
Batch = TypeVar("Batch")


@dataclasses.dataclass(frozen=True, eq=False)
class RangeTestResult:
    """The curve of a range test; NumPy arrays as long as the steps that count.

    Attributes:
      learning_rates: (n,) float32, the rates of the ladder that were applied.
      losses: (n,) float64, the loss at each step before its update. The last may be
        infinite or NaN, no other.
      smoothed_losses: (n,) float64, their bias-corrected running average.
      diverged: Whether the test ended because the loss diverged.
      eval_losses: (n,) float64, what ``eval_fn`` gave after each step's update; None
        without it.
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    smoothed_losses: np.ndarray
    diverged: bool
    eval_losses: np.ndarray | None = None

    def __repr__(self) -> str:
        rates, losses = self.learning_rates, self.losses
        return _runs.summary(
            self,
            f"{len(rates)} steps from {rates[0]:.3g} to {rates[-1]:.3g}",
            f"losses from {losses[0]:.4g} down to {np.fmin.reduce(losses):.4g}, "
            + ("diverged" if self.diverged else "not diverged"),
        )


def read_curve(
    losses: Iterable[Any],
    ladder: np.ndarray,
    *,
    smoothing: float = 0.98,
    divergence_factor: float = 4.0,
    patience: int = 10,
) -> RangeTestResult:
    """The curve up to where it ends; takes no loss after that one."""
    total = weight = first = 0.0
    best, steps_above, diverged = np.inf, 0, False
    seen: list[float] = []
    smoothed: list[float] = []
    for loss in map(float, losses):
        total += (1 - smoothing) * (loss - total)
        weight = weight_after(weight, 1 - smoothing)
        seen.append(loss)
        smoothed.append(total / weight)
        best = min(best, smoothed[-1])
        first = smoothed[0]
        bound = best + (divergence_factor - 1) * max(abs(first), first - best)
        steps_above = steps_above + 1 if smoothed[-1] > bound else 0
        diverged = not np.isfinite(loss) or steps_above >= patience
        if diverged:
            break
    rates = ladder[: len(seen)]
    return RangeTestResult(rates, np.asarray(seen), np.asarray(smoothed), diverged)


def range_test(
    step_fn: Callable[[State, jax.Array, Batch], tuple[State, jax.Array]],
    state: State,
    batches: Any,
    *,
    min_value: float = 1e-6,
    max_value: float = 10.0,
    num_steps: int = 100,
    eval_fn: Callable[[State], jax.Array] | None = None,
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
        array; the loss is a scalar. The new state must have the structure, the shapes
        and the dtypes of the old one. It may donate its state.
      state: Any pytree. Its arrays are copied once, so the caller's survive, also in
        Flax NNX objects that the step changes in place.
      batches: A list (or anything else that can be iterated again) starts again at its
        end; an iterator is consumed. Or stacked batches: a pytree of arrays with a
        leading axis of steps, which starts again as well. A tuple of arrays, as in
        ``(inputs, targets)``, is such a pytree.
      min_value: The lowest rate, above 0; the first step takes it exactly.
      max_value: The highest rate, above ``min_value``; the last step takes it exactly.
      num_steps: Steps of the ladder, at least 2.
      eval_fn: ``state -> loss``, taken after every update, best jitted: the held-out
        loss at each rate. Suggestions then read it in place of the training loss. It
        must not change the state, so in Flax NNX evaluate an :func:`nnx.view` or a
        copy: ``model.eval()`` would last. None takes no held-out loss.
      smoothing: Decay of the running average, in [0, 1). The average is bias-corrected,
        so a constant loss smooths to itself from the first step.
      divergence_factor: The factor in the rule above, above 1.
      patience: Steps the average may stay that high, at least 1.
      progress: Whether to show a progress bar (needs rich).

    Returns:
      A :class:`RangeTestResult`; see :func:`suggest_learning_rate` for its use.

    Raises:
      ValueError: If the first loss, or the first held-out loss, is not finite, or if an
        iterator ends too early (the message says how early).

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
      100 0.16

    References:
      Smith, `Cyclical Learning Rates for Training Neural Networks
      <https://arxiv.org/abs/1506.01186>`_, 2017 (section 3.3, with a linear ladder);
      Lewkowycz et al., `The large learning rate phase of deep learning: the catapult
      mechanism <https://arxiv.org/abs/2003.02218>`_, 2020.
    """
    _checks.function("step_fn", step_fn)
    if eval_fn is not None:
        _checks.function("eval_fn", eval_fn)
    ladder = _runs.geometric_ladder(min_value, max_value, num_steps)
    patience = _checks.steps("patience", patience, at_least=1)
    _checks.scalar("smoothing", smoothing, _checks.DECAY)
    above_1 = _checks.Rule("above 1", lambda x: x > 1)
    _checks.scalar("divergence_factor", divergence_factor, above_1)
    rates = jax.device_put(list(ladder))
    state = _runs.copy_state(state)
    before = _runs.layout(state)
    eval_losses: list[jax.Array] = []

    def advance(step: int, batch: Batch) -> jax.Array:
        nonlocal state
        result = step_fn(state, rates[step], batch)
        if step == 0:
            _runs.check_step(before, result)
        state, loss = result
        if eval_fn is not None:
            eval_losses.append(eval_fn(state))
            if step == 0:
                wanted = "`eval_fn` must return a loss that is"
                _runs.check_loss(wanted, eval_losses[0])
        return loss

    source = _batches.draw(batches)
    result = read_curve(
        _runs.dispatch("range test", len(ladder), source, advance, progress),
        ladder,
        smoothing=smoothing,
        divergence_factor=divergence_factor,
        patience=patience,
    )
    _runs.check_first_loss(result.losses[0])
    if eval_fn is None:
        return result
    held_out = np.asarray(eval_losses[: len(result.losses)], np.float64)
    rule = "finite after the first update, at `min_value`"
    _checks.require(np.isfinite(held_out[0]), "eval_fn", rule, held_out[0])
    return dataclasses.replace(result, eval_losses=held_out)
