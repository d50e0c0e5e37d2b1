"""What was applied, and how is it read back?

A schedule knows what should be applied at a step; a log wants what was. So whatever
applies a hyperparameter records it in its own state, in float32 whatever the dtype of
the parameters, and one call finds all records in any optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks


class AppliedHyperparams(NamedTuple):
    """The record: what the last update applied, before the first what it will apply."""

    values: dict[str, jax.Array]  # (), float32 each


class ScheduledState(NamedTuple):
    """State of a transformation that has a single hyperparameter and no memory."""

    count: jax.Array  # type: ignore[assignment]  # (), int32
    applied: AppliedHyperparams


class AppliedMultipliers(NamedTuple):
    """The record of a factor per group, which scales the rate of the same chain."""

    labels: dict[Any, None]  # the groups, sorted
    values: jax.Array  # (groups,), float32


class GroupState(NamedTuple):
    """A state that serves some groups only; its records are named after each."""

    labels: dict[Any, None]
    frozen: jax.Array  # (), bool; whether the last update left these groups alone
    inner_state: Any


def value_at(value: optax.ScalarOrSchedule, count: jax.Array) -> jax.Array:
    """The value of a constant or a schedule at ``count``, in float32."""
    return jnp.asarray(value(count) if callable(value) else value, jnp.float32)


def wide_dtype(leaf: ArrayLike) -> np.dtype:
    """The leaf's dtype, and at least float32."""
    dtype = jnp.asarray(leaf).dtype
    wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if wide else np.dtype(jnp.float32)


def widen(leaf: ArrayLike) -> jax.Array:
    """The leaf in 32 bits or more, so that float32 hyperparameters keep their value."""
    return jnp.asarray(leaf).astype(wide_dtype(leaf))


def narrow(wide: jax.Array, leaf: ArrayLike) -> jax.Array:
    """A result in the dtype of the leaf that it came from, if that is a float."""
    dtype = jnp.asarray(leaf).dtype
    return wide.astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else wide


def times(value: jax.Array, wide: jax.Array) -> jax.Array:
    """A hyperparameter times a widened leaf, in the leaf's dtype."""
    return value.astype(wide.dtype) * wide


def scheduled_transform(
    name: str,
    value: optax.ScalarOrSchedule,
    apply: Callable[[jax.Array, optax.Updates, optax.Params | None], optax.Updates],
) -> optax.GradientTransformationExtraArgs:
    """Applies a recorded constant or schedule: ``apply(value, updates, params)``."""

    def init_fn(params: optax.Params) -> ScheduledState:
        del params
        count = jnp.zeros([], jnp.int32)
        return ScheduledState(count, AppliedHyperparams({name: value_at(value, count)}))

    def update_fn(
        updates: optax.Updates,
        state: ScheduledState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScheduledState]:
        del extra_args
        applied = value_at(value, state.count)
        return apply(applied, updates, params), ScheduledState(
            optax.safe_increment(state.count), AppliedHyperparams({name: applied})
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule, *, flip_sign: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Scales updates by the (negated) learning rate, and records the rate it applied.

    Optax's function of the same name and contract, for the end of any chain; put it in
    that one's place and :func:`read_hyperparams` reads the rate. Differs in this:

    1. The state is the same for a constant and for a schedule, so that a checkpoint of
       one loads into the other.
    2. The rate is float32 whatever the dtype of the updates, which keep theirs.

    Args:
      learning_rate: A number, or a schedule ``count -> rate``.
      flip_sign: Whether to multiply by minus the rate, as descent needs.

    Returns:
      The transformation. Its record is the rate itself, never negated.

    Raises:
      ValueError: If a constant rate is not finite.
      TypeError: If the rate is neither a number nor callable.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> schedule = lambda count: 0.1 / (count + 1)
      >>> tx = optax.chain(
      ...     optax.scale_by_lion(), osc.scale_by_learning_rate(schedule))
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state, params)
      >>> print(float(osc.read_hyperparams(state)["learning_rate"]))
      0.05000000074505806

    References:
      `Optax <https://optax.readthedocs.io>`_, ``scale_by_learning_rate``.
    """
    _checks.number_or_schedule("learning_rate", learning_rate)

    def apply(
        rate: jax.Array, updates: optax.Updates, params: optax.Params | None
    ) -> optax.Updates:
        del params
        factor = -rate if flip_sign else rate
        return jax.tree.map(lambda g: narrow(times(factor, widen(g)), g), updates)

    return scheduled_transform("learning_rate", learning_rate, apply)


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: Any
) -> optax.GradientTransformationExtraArgs:
    """``optax.add_decayed_weights`` that records the decay and keeps one structure."""
    _checks.number_or_schedule(
        "weight_decay", weight_decay, "finite and at least 0", _checks.non_negative
    )

    def apply(
        decay: jax.Array, updates: optax.Updates, params: optax.Params | None
    ) -> optax.Updates:
        if not callable(weight_decay) and _checks.is_zero(weight_decay):
            return updates  # Reads no parameters, so none need to be given.
        if params is None:
            raise ValueError(
                "`params` must be given to `update` to decay weights, got None."
            )

        def decayed(g: ArrayLike, p: ArrayLike) -> jax.Array:
            return narrow(widen(g) + times(decay, widen(p)), g)

        return jax.tree.map(decayed, updates, params)

    transform = scheduled_transform("weight_decay", weight_decay, apply)
    return transform if mask is None else optax.masked(transform, mask)


_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
_KNOWN = (
    AppliedHyperparams,
    AppliedMultipliers,
    GroupState,
    optax.PartitionState,
    *_INJECTED,
)


def _find_applied(tree: Any, suffix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Name, suffix and value of every record, and the records of groups themselves."""
    for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, _KNOWN)):
        if isinstance(node, AppliedHyperparams):
            yield from ((name, suffix, value) for name, value in node.values.items())
        elif isinstance(node, AppliedMultipliers):
            yield "", suffix, node
        elif isinstance(node, GroupState):
            yield "", suffix, node
            for label in node.labels:
                yield from _find_applied(node.inner_state, f"{suffix}/{label}")
        elif isinstance(node, _INJECTED):
            yield from (
                (name, suffix, value) for name, value in node.hyperparams.items()
            )
            yield from _find_applied(node.inner_state, suffix)
        elif isinstance(node, optax.PartitionState):
            for label, inner_state in node.inner_states.items():
                yield from _find_applied(inner_state, f"{suffix}/{label}")


def _array(value: Any) -> jax.Array:
    # A Flax NNX optimizer holds its state in Variables, which are pytrees.
    (leaf,) = jax.tree.leaves(value)
    return jnp.asarray(leaf)


def read_hyperparams(opt_state: Any) -> dict[str, jax.Array]:
    """Reads the hyperparameters that the last update applied, for a log line.

    Finds the records of this package's transformations, and the hyperparameters of
    ``optax.inject_hyperparams``, at any nesting: ``chain``, ``named_chain``,
    ``partition``, ``masked``, ``MultiSteps``, ``apply_if_finite``. Works inside and
    outside ``jit`` and does not wait for the device.

    Args:
      opt_state: An optimizer state, or any pytree that holds one: an
        ``nnx.Optimizer`` or its ``opt_state``, a Linen ``TrainState``. (Not
        ``nnx.state(optimizer)``, which keeps no trace of the transformations.)

    Returns:
      Name to value, 0-dimensional float32 arrays: ``learning_rate``, ``momentum`` or
      ``b1``, ``weight_decay``, and whatever ``inject_hyperparams`` holds, in its dtype.
      Inside ``partition`` and :func:`gradual_unfreezing` the names are
      ``name/<label>``, and :func:`scale_by_group` adds ``learning_rate/<label>``, the
      rate times the group's multiplier (``multiplier/<label>`` where its chain records
      no rate). While a group is frozen its rate is 0. A name that occurs again, as
      where ``inject_hyperparams`` wraps one of our recipes, is numbered: ``name_2``,
      ``name_3``. Before the first update the values are those of
      step 0. A state without any of this gives ``{}``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.onecycle_sgd(1.0, total_steps=10)
      >>> applied = osc.read_hyperparams(tx.init(jnp.ones(3)))
      >>> print({name: round(float(value), 2) for name, value in applied.items()})
      {'weight_decay': 0.0, 'momentum': 0.95, 'learning_rate': 0.04}
    """
    found: list[tuple[str, str, jax.Array]] = []  # name, suffix, value
    multipliers: list[tuple[str, AppliedMultipliers]] = []
    frozen: dict[str, jax.Array] = {}
    for name, suffix, value in _find_applied(opt_state):
        if isinstance(value, AppliedMultipliers):
            multipliers.append((suffix, value))
        elif isinstance(value, GroupState):
            flag = _array(value.frozen)
            for label in value.labels:
                frozen |= {f"/{label}{suffix}": flag, f"{suffix}/{label}": flag}
        else:
            found.append((name, suffix, _array(value)))
    for suffix, record in multipliers:
        values = _array(record.values)
        for k, label in enumerate(record.labels):
            found = _scale(found, suffix, f"/{label}", values[..., k])
    found = [
        (name, at, jnp.where(frozen[at], 0, value))
        if name == "learning_rate" and at in frozen
        else (name, at, value)
        for name, at, value in found
    ]
    numbered: dict[str, jax.Array] = {}
    for name, suffix, value in found:
        key, number = name + suffix, 1
        while key in numbered:
            number += 1
            key = f"{name}{suffix}_{number}"
        numbered[key] = value
    return numbered


def _scale(
    found: list[tuple[str, str, jax.Array]],
    suffix: str,
    label: str,
    multiplier: jax.Array,
) -> list[tuple[str, str, jax.Array]]:
    """Adds the rate that a group gets, or scales it if it has one of its own."""
    rates = [(at, rate) for name, at, rate in found if name == "learning_rate"]
    if any(at == suffix + label for at, _ in rates):
        return [
            (name, at, value * multiplier)
            if (name, at) == ("learning_rate", suffix + label)
            else (name, at, value)
            for name, at, value in found
        ]
    # The rates of the same chain, or of one around it.
    around = [rate for at, rate in rates if f"{suffix}/".startswith(f"{at}/")]
    if not around:
        return [*found, ("multiplier", label + suffix, multiplier)]
    return [
        *found,
        *(("learning_rate", label + suffix, rate * multiplier) for rate in around),
    ]
