"""How does a run begin anew, or come to its end?"""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks, _dials, _records, _settings, _trees
from optax_superconv._records import Place

# Optax exports no name for this state. An array would start the backend at import.
_DecayCount: type = type(
    jax.eval_shape(optax.add_decayed_weights(lambda count: count).init, ())
)
_COUNTED = (optax.ScaleByScheduleState, _DecayCount)


def restart_schedules(opt_state: Any) -> Any:
    """Begins all schedules anew, and keeps moments and averages.

    The next update is step 0 again of every schedule of this package's transformations,
    of ``optax.scale_by_schedule`` (so of Optax's own optimizers) and of
    ``optax.inject_hyperparams``; groups freeze and thaw again. What is held is
    released, and cooldowns are lifted. Adam's moments and their debiasing, momentum,
    averages of the parameters, records of gradient norms and the micro-steps of
    ``optax.MultiSteps`` go on.

    Args:
      opt_state: An optimizer state, or any pytree that holds one; see
        :func:`set_hyperparams`.

    Returns:
      The restarted state; see :func:`set_hyperparams`, also for what it shares.

    Raises:
      ValueError: If there is nothing in the state to restart.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.onecycle_adamw(0.1, total_steps=10)
      >>> params = jnp.ones((2, 2))
      >>> state = tx.init(params)
      >>> rates = []
      >>> for step in range(20):
      ...     state = osc.restart_schedules(state) if step == 10 else state
      ...     _, state = tx.update(params, state, params)
      ...     rates.append(float(osc.read_hyperparams(state)["learning_rate"]))
      >>> rates[:10] == rates[10:]
      True
    """
    _records.check_structured(opt_state)
    found = False

    def zero(leaf: Any, write: _settings.Write) -> Any:
        return write(leaf, jnp.zeros_like(_trees.array_of(leaf)))

    def change(place: Place, write: _settings.Write) -> Any:
        nonlocal found
        found, state = True, place.state
        state = state._replace(count=zero(state.count, write))
        if isinstance(state, optax.InjectStatefulHyperparamsState):
            clocks = {
                name: inner._replace(count=zero(inner.count, write))
                if hasattr(inner, "count")
                else inner
                for name, inner in state.hyperparams_states.items()
            }
            return state._replace(hyperparams_states=clocks)
        if hasattr(state, "holds"):
            dials = _records.dials_of(state)
            state = _settings.held(place, dict.fromkeys(dials), write)._replace(
                count=state.count
            )
        if hasattr(state, "ending"):
            idle = (zero(leaf, write) for leaf in state.ending)
            state = state._replace(ending=_dials.Cooldown(*idle))
        return state

    new_state = _settings.changed(opt_state, change, _COUNTED)
    _checks.require(
        found,
        "opt_state",
        "of an optimizer with schedules, such as `onecycle_adamw`",
        _records.states_in(opt_state),
    )
    return new_state


def start_cooldown(opt_state: Any, cooldown_steps: ArrayLike) -> Any:
    """Starts the cooldown of :func:`scale_by_learning_rate`, from the next update on.

    Any run can be told to finish now, whatever its schedule is. The next update, step
    k, applies the rate that it would have had; from there the rates of all groups fall
    over ``cooldown_steps`` to the end that :func:`scale_by_learning_rate` was given (0
    in the recipes), and stay there. That is the rate of ``with_cooldown(schedule, k +
    cooldown_steps, cooldown_steps)``, as if it had been planned from the start. Rates
    that are held fall from the held value, and their holds end.

    Called again, the rate goes on from where it is with the new length. (Called before
    every update, it would never fall.) Works wherever :func:`set_hyperparams` does;
    under ``optax.MultiSteps`` the steps are optimizer steps. One state forks into
    cooldowns of several lengths: ``jax.vmap(lambda n: start_cooldown(state,
    n))(lengths)`` has a leading axis.

    Args:
      opt_state: An optimizer state, or any pytree that holds one; see
        :func:`set_hyperparams`. Of several rates in it, as of ``optax.partition``, all
        cool down.
      cooldown_steps: Length of the cooldown in optimizer steps, at least 1: an int or
        an integer array, which may be traced. A traced length below 1 starts nothing,
        so ``start_cooldown(state, jnp.where(loss < 0.1, 100, 0))`` decides inside
        ``jit``. For a state with a leading axis, as of ``vmap``, give one length for
        all or an array of them.

    Returns:
      The state with its cooldown started; see :func:`set_hyperparams`, also for what it
      shares. :func:`read_hyperparams` reads ``cooldown``, the fraction that is over.

    Raises:
      ValueError: If no link of the state can cool down.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.sgd(0.1)
      >>> params = jnp.zeros(3)
      >>> state = osc.start_cooldown(tx.init(params), 10)
      >>> for _ in range(3):
      ...     updates, state = tx.update(params, state, params)
      >>> applied = osc.read_hyperparams(state)
      >>> print({name: round(float(value), 3) for name, value in applied.items()})
      {'momentum': 0.9, 'learning_rate': 0.055, 'cooldown': 0.2}

    References:
      Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations <https://arxiv.org/abs/2405.18392>`_, 2024, section 5 (cooldowns of
      several lengths from one run).
    """
    _records.check_structured(opt_state)
    length = _checked_length(cooldown_steps)
    found = False

    def change(place: Place, write: _settings.Write) -> Any:
        nonlocal found
        cooldown = getattr(place.state, "ending", None)
        if not isinstance(cooldown, _dials.Cooldown):
            return place.state
        found, pending = True, _trees.array_of(cooldown.pending)
        _checks.require(
            length.shape in ((), pending.shape),
            "cooldown_steps",
            f"a single number, or of the shape {pending.shape} of the state's count "
            "(to fork a state, use `jax.vmap(lambda n: start_cooldown(state, n))"
            "(lengths)`)",
            f"an array of shape {length.shape}",
        )
        holds = _dials.Holds(*map(_trees.array_of, place.state.holds))
        written = _dials.of_dials(
            jnp.any,
            _dials.bits(_settings.found_in(place.state)) != holds.written,
            _settings.shapes_in(place.state),
        )
        lifts = jnp.where(
            (length > 0)[..., None],
            holds.held | written,
            _trees.array_of(cooldown.lifts),
        )
        later = cooldown._replace(
            pending=write(cooldown.pending, jnp.where(length > 0, length, pending)),
            lifts=write(cooldown.lifts, lifts),
        )
        return place.state._replace(ending=later)

    new_state = _settings.changed(opt_state, change)
    _checks.require(
        found,
        "opt_state",
        "of an optimizer that ends with this package's `scale_by_learning_rate`",
        _records.states_in(opt_state),
    )
    return new_state


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
