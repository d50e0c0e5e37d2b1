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
from optax_superconv.finders import _members, _runs, _steps
from optax_superconv.finders._steps import Optimizer

State = TypeVar("State")


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
      optimizer: ``"sgd"`` or ``"adamw"``, whose moments the state held: for
        :func:`suggest_learning_rate`. None if it held neither's, or both.
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    smoothed_losses: np.ndarray
    diverged: bool
    eval_losses: np.ndarray | None = None
    optimizer: Optimizer | None = None

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
    optimizer: Optimizer | None = None,
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
    curve = np.asarray(seen), np.asarray(smoothed)
    return RangeTestResult(rates, *curve, diverged, optimizer=optimizer)


def range_test(
    step_fn: Callable[..., tuple[State, jax.Array]],
    state: State,
    batches: Any,
    *,
    min_learning_rate: float = 1e-6,
    max_learning_rate: float = 10.0,
    num_steps: int = 100,
    eval_fn: Callable[[State], jax.Array] | None = None,
    accumulation_steps: int = 1,
    stacked: bool = False,
    pass_hyperparams: bool = False,
    smoothing: float = 0.98,
    divergence_factor: float = 4.0,
    patience: int = 10,
    progress: bool = False,
) -> RangeTestResult:
    r"""Trains while the learning rate climbs a ladder, on your own training step.

    .. math:: \eta_i = \eta_{\min} (\eta_{\max} / \eta_{\min})^{i / (N - 1)}

    The rate is set in the state, as by :func:`set_hyperparams`, and held there. So what
    is tested is the optimizer that will train, with its own momentum, decay and mask,
    and a schedule of its rate has no say. Your state survives, also where the step
    donates it, changes it in place, raises or is interrupted: a copy is trained.

    It stops early at the first loss that is infinite or NaN, and when the running
    average has stood for ``patience`` steps above

    .. math:: \text{best} + (\text{divergence\_factor} - 1)
              \max(|\text{first}|, \text{first} - \text{best}),

    which also holds for losses of 0 or below. A bump that recovers within ``patience``
    steps is a catapult, not divergence.

    The first step is made once more on another copy, at the highest rate: its new state
    must be another one. (It is looked at again until then.) Steps are dispatched one
    after another without waiting for the device, whose losses are looked at every 8
    steps, so ``step_fn`` may run for up to 15 steps past the one that diverged; the
    result does not hold these. On several CPU devices every step is waited for.

    Args:
      step_fn: ``(state, batch) -> (state, loss)``: your own training step, best jitted,
        of any framework. The loss is a scalar. The new state must have the structure,
        the shapes and the dtypes of the old one; it may be the old one, changed in
        place. With Flax NNX: ``lambda state, batch: (state, train_step(*state,
        batch))`` for a ``train_step(model, optimizer, batch)`` that returns the loss.
      state: Any pytree that holds the parameters and the optimizer state, such as
        ``(params, opt_state)``, a Linen ``TrainState``, ``(model, optimizer)`` of Flax
        NNX. It must have one ``learning_rate`` that :func:`set_hyperparams` sets: that
        of this package's optimizers, of a chain with its
        :func:`scale_by_learning_rate`, or a constant one of
        ``optax.inject_hyperparams(tx, hyperparam_dtype=jnp.float32)``. What can change
        in it must be arrays or objects of Flax NNX.
      batches: What holds batches, as a list, a tuple or a loader, starts again at its
        end; an iterator is consumed. A single batch goes in a list.
      min_learning_rate: The lowest rate, above 0; the first step takes it exactly.
      max_learning_rate: The highest rate, above ``min_learning_rate``; the last step
        takes it exactly.
      num_steps: Steps of the ladder, at least 2. What :func:`suggest_learning_rate`
        reads is better of 200.
      eval_fn: ``state -> loss``, taken after every update, best jitted: the held-out
        loss at each rate. Suggestions then read it in place of the training loss. It
        must not change the state, so in Flax NNX evaluate an :func:`nnx.view` or a
        copy: ``model.eval()`` would last. None takes no held-out loss.
      accumulation_steps: Batches at each rate, at least 1, whose losses are averaged:
        the micro-steps that ``optax.MultiSteps`` or your own step makes an update of.
      stacked: Whether ``batches`` is one pytree whose leaves have a leading axis of
        steps. It starts again at its end.
      pass_hyperparams: Whether ``step_fn`` is ``(state, learning_rate, batch)``, which
        sees the rate as a float32 scalar array, for a step whose state has no such
        dial. A rate that the state records all the same must be this one.
      smoothing: Decay of the running average, in [0, 1). The average is bias-corrected,
        so a constant loss smooths to itself from the first step.
      divergence_factor: The factor in the rule above, above 1.
      patience: Steps the average may stay that high, at least 1.
      progress: Whether to show a progress bar (needs rich).

    Returns:
      A :class:`RangeTestResult`; see :func:`suggest_learning_rate` for its use.

    Raises:
      ValueError: If the rate does not act: the state has no such dial, or two; the step
        does not react to it; a schedule, or the step itself, changes it; or
        ``optax.MultiSteps`` makes its updates of more or of fewer batches. If the first
        loss, or the first held-out loss, is not finite. If ``batches`` is a single one,
        or an iterator that ends too early.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> tx = osc.onecycle_sgd(0.1, total_steps=1000)
      >>> @jax.jit
      ... def step_fn(state, x):
      ...     w, opt_state = state
      ...     loss, grad = jax.value_and_grad(lambda w: ((w - x) ** 2).mean())(w)
      ...     updates, opt_state = tx.update(grad, opt_state, w)
      ...     return (optax.apply_updates(w, updates), opt_state), loss
      >>> w = jnp.zeros(())
      >>> result = osc.range_test(step_fn, (w, tx.init(w)), [jnp.ones(8)])
      >>> print(len(result.losses), f"{osc.suggest_learning_rate(result):.2f}")
      100 0.35

    References:
      Smith, `Cyclical Learning Rates for Training Neural Networks
      <https://arxiv.org/abs/1506.01186>`_, 2017 (section 3.3, with a linear ladder);
      Lewkowycz et al., `The large learning rate phase of deep learning: the catapult
      mechanism <https://arxiv.org/abs/2003.02218>`_, 2020.
    """
    form = _steps.form_of(step_fn, pass_hyperparams, accumulation_steps)
    if eval_fn is not None:
        _checks.function("eval_fn", eval_fn)
    num_steps = _checks.steps("num_steps", num_steps, at_least=2)
    ladder = _runs.geometric_ladder(min_learning_rate, max_learning_rate, num_steps)
    patience = _checks.steps("patience", patience, at_least=1)
    _checks.scalar("smoothing", smoothing, _checks.DECAY)
    above_1 = _checks.Rule("above 1", lambda x: x > 1)
    _checks.scalar("divergence_factor", divergence_factor, above_1)
    source = _batches.draw(batches, stacked)
    eval_losses: list[Any] = []

    def evaluate(state: State) -> None:
        if eval_fn is not None:
            eval_losses.append(eval_fn(state))
            _runs.settle(eval_losses[-1])
            if len(eval_losses) == 1:
                wanted = "`eval_fn` must return a loss that is"
                _runs.check_loss(wanted, eval_losses[0])

    members = _members.one_by_one(form, state, {}, ladder, observe=evaluate)
    alone = np.full(1, True)

    def advance(rung: int, batches: list[Any]) -> Any:
        return members.advance(rung, batches, alone)

    accumulated, title = form.accumulation_steps, "range test"
    seen = _runs.dispatch(title, num_steps, source, accumulated, advance, progress)
    result = read_curve(
        (_runs.means(losses)[0] for losses in seen),
        ladder,
        smoothing=smoothing,
        divergence_factor=divergence_factor,
        patience=patience,
        optimizer=_steps.optimizer_of(state),
    )
    _runs.check_first_loss(result.losses[0])
    members.check(num_steps)
    if eval_fn is None:
        return result
    held_out = np.asarray(eval_losses[: len(result.losses)], np.float64)
    rule = "finite after the first update, at `min_learning_rate`"
    _checks.require(np.isfinite(held_out[0]), "eval_fn", rule, held_out[0])
    return dataclasses.replace(result, eval_losses=held_out)
