"""When does the decay begin, if that is decided while the run goes on?

A later rise of the rate undoes the gain of a decay. So it is best to decide late when
to decay: when the loss no longer falls, the data run out, or a result is due. The start
and the length of the cooldown are therefore data in the optimizer's state. Nothing is
traced again, checkpoints carry the decision, and ``jax.vmap`` can fork one state into
cooldowns of several lengths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._dials import (
    AppliedHyperparams,
    find_states,
    states_in,
    value_at,
)
from optax_superconv._numerics import increment, scale
from optax_superconv._trees import array_of, boxed_as, in_new_boxes
from optax_superconv.schedules._phases import Shape, check_positive, check_shape, move
from optax_superconv.transforms._link import link


class TriggeredCooldownState(NamedTuple):
    """State of :func:`triggered_cooldown`."""

    count: jax.Array  # (), int32
    start_step: jax.Array  # (), int32; the last int32 before the trigger
    cooldown_steps: jax.Array  # (), int32; 0 before the trigger
    applied: AppliedHyperparams  # cooldown, learning_rate


def triggered_cooldown(
    schedule: optax.ScalarOrSchedule,
    *,
    end_value: ArrayLike = 0.0,
    shape: Shape = "1-sqrt",
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by minus the learning rate, which decays when you say so.

    Stands where ``optax.scale_by_learning_rate`` would, at the end of a chain. The rate
    follows ``schedule`` until :func:`start_cooldown` is called on the state. From the
    next update on, step k, it falls from its value there (0 at the start of a warm-up)
    to ``end_value`` in the n steps that the call asked for,

    .. math:: \eta_t = E + (\eta_k - E)\, g\Big(\frac{k + n - t}{n}\Big),

    and stays there. That is the rate of ``with_cooldown(schedule, k + n, n)``, as if it
    had been planned from the start.

    Args:
      schedule: The rate before the cooldown: a finite number, or a schedule
        ``count -> rate``, such as a warm-up that ends in a constant.
      end_value: Rate at the end of the cooldown, finite.
      shape: Shape of the cooldown; see :class:`Phase`. ``"exponential"`` needs an
        ``end_value`` above 0, and a constant ``schedule`` above 0. If a schedule is at
        0 when the cooldown starts, the rate goes to ``end_value`` at once.

    Returns:
      The transformation. :func:`read_hyperparams` reads ``learning_rate`` and
      ``cooldown``, the fraction of the cooldown that is over: 0 before it, 1 after it.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> tx = optax.chain(
      ...     optax.scale_by_adam(), osc.triggered_cooldown(0.1, shape="linear"))
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> for step in range(6):
      ...     if step == 2:
      ...         state = osc.start_cooldown(state, 4)
      ...     updates, state = tx.update(params, state, params)
      ...     applied = osc.read_hyperparams(state)
      ...     print(*(round(float(value), 3) for value in applied.values()))
      0.0 0.1
      0.0 0.1
      0.0 0.1
      0.25 0.075
      0.5 0.05
      0.75 0.025

    References:
      Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations <https://arxiv.org/abs/2405.18392>`_, 2024, section 3;
      Ren, Ma and Ying, `Understanding the Generalization Benefits of Late Learning Rate
      Decay <https://arxiv.org/abs/2401.11600>`_, 2024.
    """
    _checks.number_or_schedule("schedule", schedule)
    _checks.number("end_value", end_value)
    check_shape("shape", shape)
    if shape == "exponential":
        check_positive("end_value", end_value)
        if not callable(schedule):
            check_positive("schedule", schedule)

    def init_fn(params: optax.Params) -> TriggeredCooldownState:
        del params
        count = jnp.zeros([], jnp.int32)
        start = jnp.full([], _checks.MAX_STEPS, jnp.int32)
        rate = value_at(schedule, count)
        return TriggeredCooldownState(
            count, start, jnp.zeros([], jnp.int32), _record(jnp.zeros([]), rate)
        )

    def update_fn(
        updates: optax.Updates,
        state: TriggeredCooldownState,
        params: optax.Params | None,
    ) -> tuple[optax.Updates, TriggeredCooldownState]:
        del params
        count, start, steps = state.count, state.start_step, state.cooldown_steps
        stable = value_at(schedule, jnp.minimum(count, start))
        end = jnp.asarray(end_value, jnp.float32)
        elapsed = jnp.clip(count - start, 0, steps)
        # Nothing falls geometrically from 0.
        origin = (
            stable if shape != "exponential" else jnp.where(stable > 0, stable, end)
        )
        rate = jnp.where(elapsed > 0, move(origin, end, shape, elapsed, steps), stable)
        length = jnp.maximum(steps, 1).astype(jnp.float32)
        fraction = elapsed.astype(jnp.float32) / length
        return scale(-rate, updates), TriggeredCooldownState(
            increment(count), start, steps, _record(fraction, rate)
        )

    return link(init_fn, update_fn)


def _record(fraction: jax.Array, rate: jax.Array) -> AppliedHyperparams:
    fraction = fraction.astype(jnp.float32)
    return AppliedHyperparams({"cooldown": fraction, "learning_rate": rate})


def _checked_length(cooldown_steps: Any) -> jax.Array:
    """The length as int32; if it is not traced, at least 1."""
    traced = isinstance(cooldown_steps, jax.core.Tracer)
    if not traced and np.ndim(cooldown_steps) == 0:
        cooldown_steps = _checks.steps("cooldown_steps", cooldown_steps, at_least=1)
    dtype = jnp.asarray(cooldown_steps).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            "`cooldown_steps` must be a whole number of steps, got an array of dtype "
            f"{dtype}."
        )
    if not traced:
        most = _checks.MAX_STEPS
        lengths, rule = np.asarray(cooldown_steps), f"at least 1 and at most {most}"
        holds = (lengths >= 1) & (lengths <= most)
        _checks.require(holds.all(), "cooldown_steps", rule, cooldown_steps)
    return jnp.asarray(cooldown_steps, jnp.int32)


def _is_running(state: TriggeredCooldownState) -> bool:
    """Whether a cooldown is known to have been started."""
    steps = array_of(state.cooldown_steps)
    known = not isinstance(steps, jax.core.Tracer) and steps.size > 0
    return known and bool(jnp.all(steps > 0))


def _started(
    state: TriggeredCooldownState, length: jax.Array
) -> TriggeredCooldownState:
    count, start, steps = map(
        array_of, (state.count, state.start_step, state.cooldown_steps)
    )
    _checks.require(
        length.shape in ((), count.shape),
        "cooldown_steps",
        f"a single number, or of the shape {count.shape} of the state's count (to fork "
        "a state, use `jax.vmap(lambda n: start_cooldown(state, n))(lengths)`)",
        f"an array of shape {length.shape}",
    )
    idle = (steps == 0) & (length > 0)
    return in_new_boxes(state)._replace(
        start_step=boxed_as(state.start_step, jnp.where(idle, count, start)),
        cooldown_steps=boxed_as(state.cooldown_steps, jnp.where(idle, length, steps)),
    )


def start_cooldown(opt_state: Any, cooldown_steps: ArrayLike) -> Any:
    """Starts the cooldown of :func:`triggered_cooldown`, from the next update on.

    Works at any nesting, inside and outside ``jit``, on a mesh, and for the
    ``opt_state`` of an ``nnx.Optimizer``, whose Variables keep their type
    (``optimizer.opt_state = start_cooldown(optimizer.opt_state, 100)``). Under
    ``optax.MultiSteps`` the steps are optimizer steps. Only two integers of the state
    change, so no program is traced again.

    One state forks into cooldowns of several lengths:
    ``jax.vmap(lambda n: start_cooldown(state, n))(lengths)`` has a leading axis.

    Args:
      opt_state: An optimizer state, or any pytree that holds one, such as a Linen
        ``TrainState``. Of several triggers in it, as of ``optax.partition``, all start
        that have not been started.
      cooldown_steps: Length of the cooldown in optimizer steps, at least 1: an int or
        an integer array, which may be traced. A traced length below 1 starts nothing,
        so ``start_cooldown(state, jnp.where(loss < 0.1, 100, 0))`` decides inside
        ``jit``. For a state with a leading axis, as of ``vmap``, give one length for
        all or an array of them.

    Returns:
      The state with its cooldown started, to be used in place of the one given, which
      is left as it was (of an ``nnx.Optimizer`` too: a new one is returned). Under
      tracing, a cooldown that has been started before stays as it is, and so do those
      of a state with a leading axis, unless all have been started.

    Raises:
      ValueError: If there is no trigger in the state, or if all cooldowns of a concrete
        state have been started before.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.late_decay_sgd(0.1, None)
      >>> state = tx.init(jnp.zeros(3))
      >>> state = osc.start_cooldown(state, 10)
      >>> updates, state = tx.update(jnp.ones(3), state, jnp.zeros(3))
      >>> updates, state = tx.update(jnp.ones(3), state, jnp.zeros(3))
      >>> print(osc.read_hyperparams(state)["cooldown"].round(3))
      0.1

    References:
      Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations <https://arxiv.org/abs/2405.18392>`_, 2024, section 5 (cooldowns of
      several lengths from one run).
    """
    length = _checked_length(cooldown_steps)
    found = find_states(opt_state, TriggeredCooldownState)
    _checks.require(
        bool(found),
        "opt_state",
        "of an optimizer with a `triggered_cooldown`, such as `late_decay_adamw`, in "
        "the containers that `init` made",
        states_in(opt_state),
    )

    (path, state), *_ = found.items()
    _checks.require(
        not all(map(_is_running, found.values())),
        "opt_state",
        "one whose cooldown has not been started",
        f"one{f' at {path!r}' if path else ''} that cools down since step "
        f"{array_of(state.start_step)} over {array_of(state.cooldown_steps)} steps",
    )

    def is_trigger(node: Any) -> bool:
        return isinstance(node, TriggeredCooldownState)

    return jax.tree.map(
        lambda node: _started(node, length) if is_trigger(node) else node,
        opt_state,
        is_leaf=is_trigger,
    )
