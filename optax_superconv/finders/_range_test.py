"""Which losses does each learning rate give? The range test.

It trains for a few steps while the learning rate climbs a geometric ladder. The loss
stays flat while the rate is too low to matter, falls, and at last blows up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_superconv import _batches, _checks
from optax_superconv._trees import shares_variables
from optax_superconv.finders import _runs

State = TypeVar("State")
Batch = TypeVar("Batch")


class RangeTestResult(NamedTuple):
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


def _scan(
    step: Callable[[Any, Any, Any, bool], tuple[Any, Any, Any]],
    state: Any,
    batches: Any,
    ladder: np.ndarray,
) -> tuple[np.ndarray, Any] | None:
    """Losses and held-out losses of one program; None for an untraceable step."""
    length = _batches.num_stacked(batches)

    def run(state: Any, batches: Any, rates: jax.Array) -> Any:
        def body(state: Any, scanned: Any) -> tuple[Any, Any]:
            count, rate = scanned
            batch = jax.tree.map(lambda leaf: leaf[count % length], batches)
            state, *losses = step(state, rate, batch, True)
            return state, losses

        return jax.lax.scan(body, state, (jnp.arange(len(rates)), rates))[1]

    state = jax.tree.map(_runs.strong, state)
    args = state, jax.tree.map(jnp.asarray, batches), ladder
    try:
        lowered = jax.jit(run).lower(*args)
    except Exception:  # A step that is wrong, not just untraceable, fails in the loop.
        return None
    return jax.device_get(lowered.compile()(*args))


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
    the one that diverged; the result does not hold these. On an accelerator, stacked
    batches and a state of arrays make it one :func:`jax.lax.scan` over all steps.

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
      progress: Whether to show a progress bar (needs rich); a scan shows none.

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
    _checks.scalar("smoothing", smoothing, _checks.DECAY_RULE, _checks.decay_rate)
    _checks.scalar("divergence_factor", divergence_factor, "above 1", lambda x: x > 1)
    source = _batches.draw(batches)

    average = _Average()
    losses: list[float] = []
    smoothed: list[float] = []

    def diverges(block: Iterable[jax.Array]) -> bool:
        nonlocal average
        for loss in map(float, block):
            average = _observe(average, loss, smoothing, divergence_factor)
            losses.append(loss)
            smoothed.append(average.total / average.weight)
            if not np.isfinite(loss) or average.steps_above >= patience:
                return True
        return False

    before = _runs.layout(state)

    def step(state: State, rate: Any, batch: Any, first: bool) -> tuple[Any, Any, Any]:
        result = step_fn(state, rate, batch)
        if first:
            _runs.check_step(result)
            _runs.check_layout(before, result[0])
        state, loss = result
        eval_loss = None if eval_fn is None else eval_fn(state)
        if first and eval_fn is not None:
            _runs.check_loss("`eval_fn` must return a loss that is", eval_loss)
        return state, loss, eval_loss

    eval_losses: Any = []
    scanned = None
    # XLA's convolutions crawl inside of loops on a CPU.
    if (
        jax.default_backend() != "cpu"
        and _batches.is_stacked(batches)
        and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
        and not shares_variables(state)
    ):
        scanned = _scan(step, state, batches, ladder)
    if scanned is not None:
        block, eval_losses = scanned
        diverged = diverges(block)
    else:
        state = _runs.copy_state(state)
        pending: list[jax.Array] = []
        diverged = False
        with _runs.progress_bar("range test", progress, num_steps) as advance:
            rates = jax.device_put(list(ladder))
            for rate, batch in zip(rates, source, strict=False):
                first = not eval_losses
                state, loss, eval_loss = step(state, rate, batch, first)
                pending.append(loss)
                eval_losses.append(eval_loss)
                advance()
                if len(pending) == 2 * _runs.BLOCK:
                    diverged = diverges(pending[: _runs.BLOCK])
                    del pending[: _runs.BLOCK]
                    if diverged:
                        break
        diverged = diverged or diverges(pending)
        if not diverged and len(eval_losses) < num_steps:
            raise _runs.ran_dry(num_steps, len(eval_losses))
    _runs.check_first_loss(losses[0])
    count = len(losses)
    if eval_fn is not None:
        _checks.require(
            np.isfinite(eval_losses[0]),
            "eval_fn",
            "finite after the first update, at `min_value`",
            eval_losses[0],
        )
    return RangeTestResult(
        ladder[:count],
        np.asarray(losses),
        np.asarray(smoothed),
        diverged,
        None if eval_fn is None else np.asarray(eval_losses[:count], np.float64),
    )
