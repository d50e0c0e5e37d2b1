"""What was applied, and how is it read back?

A schedule knows what should be applied at a step; a log wants what was. So whatever
applies a hyperparameter records it in its own state, in float32 whatever the dtype of
the parameters, and one call finds all records in any optimizer state.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_superconv._trees import array_of, path_of


class AppliedHyperparams(NamedTuple):
    """The record: what the last update applied, before the first what it will apply."""

    values: dict[str, jax.Array]  # (), float32 each


class AppliedMultipliers(NamedTuple):
    """The record of a factor per group, which scales the rate of the same chain."""

    labels: dict[Any, None]  # the groups, sorted; keys are structure and not data
    values: jax.Array  # (groups,), float32


class GroupState(NamedTuple):
    """A state that serves some groups only; its records are named after each."""

    labels: dict[Any, None]
    frozen: jax.Array  # (), bool; whether the last update left these groups alone
    inner_state: Any


def value_at(value: optax.ScalarOrSchedule, count: jax.Array) -> jax.Array:
    """The value of a constant or a schedule at ``count``, in float32."""
    return jnp.asarray(value(count) if callable(value) else value, jnp.float32)


_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


class _Found(NamedTuple):
    """What a part of a state holds; a suffix says for which group, ``"/label"``."""

    entries: Sequence[tuple[str, str, jax.Array]] = ()  # name, suffix, value
    # Suffix, label of the group that has this state, record: not yet met a rate.
    multipliers: Sequence[tuple[str, Any, AppliedMultipliers]] = ()
    frozen: Sequence[tuple[str, jax.Array]] = ()  # suffix, flag: not yet met a rate


def _find(node: Any, suffix: str = "", group: Any = None) -> _Found:
    """All records at any depth; a factor meets the rate of the nearest chain around."""
    if isinstance(node, AppliedHyperparams):
        return _Found([(k, suffix, array_of(v)) for k, v in node.values.items()])
    if isinstance(node, AppliedMultipliers):
        return _Found([], [(suffix, group, node)])
    if isinstance(node, optax.PartitionState):
        states = node.inner_states.items()
        return _merge([_find(state, f"{suffix}/{k}") for k, state in states])
    if isinstance(node, GroupState):
        inside = _merge(
            [_find(node.inner_state, f"{suffix}/{k}", k) for k in node.labels]
        )
        flags = [(f"{suffix}/{k}", array_of(node.frozen)) for k in node.labels]
        return _Found(_freeze(inside.entries, flags)[0], inside.multipliers, flags)
    children = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    if isinstance(node, _INJECTED):
        values = {k: array_of(v) for k, v in node.hyperparams.items()}
        children = [AppliedHyperparams(values), node.inner_state]
    if len(children) == 1 and children[0] is node:
        return _Found()
    return _settle(_merge([_find(child, suffix, group) for child in children]))


def _merge(parts: list[_Found]) -> _Found:
    fields = zip(*parts, strict=True)
    return _Found(*(list(itertools.chain(*lists)) for lists in fields))


def _settle(found: _Found) -> _Found:
    """Factors times the rates that they meet here, and 0 for those of frozen groups."""
    entries, waiting = list(found.entries), []
    for suffix, group, record in found.multipliers:
        rates = [(at, rate) for name, at, rate in entries if name == "learning_rate"]
        # The rates of the same group or of one around it.
        around = [rate for at, rate in rates if f"{suffix}/".startswith(f"{at}/")]
        factors = _factors(suffix, group, record)
        if not around and not {at for at, _ in rates} & set(factors):
            waiting.append((suffix, group, record))
            continue
        for at, factor in factors.items():
            if any(at == of for of, _ in rates):
                entries = [
                    (name, of, value * factor)
                    if (name, of) == ("learning_rate", at)
                    else (name, of, value)
                    for name, of, value in entries
                ]
            elif around:
                entries = [
                    *entries,
                    *(("learning_rate", at, rate * factor) for rate in around),
                ]
            else:
                entries = [*entries, ("multiplier", at, factor)]
    entries, frozen = _freeze(entries, found.frozen)
    return _Found(entries, waiting, frozen)


def _factors(
    suffix: str, group: Any, record: AppliedMultipliers
) -> dict[str, jax.Array]:
    """Factor by suffix: of every label, or of the group alone that has this state."""
    values = array_of(record.values)
    return {
        suffix if label == group else f"{suffix}/{label}": values[..., k]
        for k, label in enumerate(record.labels)
        if label == group or group not in record.labels
    }


def _freeze(
    entries: Sequence[tuple[str, str, jax.Array]],
    frozen: Sequence[tuple[str, jax.Array]],
) -> tuple[list[tuple[str, str, jax.Array]], list[tuple[str, jax.Array]]]:
    """Sets the rates of frozen groups to 0; returns the flags that met no rate too."""
    entries, waiting = list(entries), []
    for suffix, flag in frozen:
        inside = [
            name == "learning_rate" and f"{at}/".startswith(f"{suffix}/")
            for name, at, _ in entries
        ]
        entries = [
            (name, at, jnp.where(flag, 0, value)) if here else (name, at, value)
            for (name, at, value), here in zip(entries, inside, strict=True)
        ]
        waiting += [] if any(inside) else [(suffix, flag)]
    return entries, waiting


def find_states(opt_state: Any, *kinds: type) -> dict[str, Any]:
    """The states of these kinds at any nesting, by their path."""
    found = jax.tree_util.tree_leaves_with_path(
        opt_state, is_leaf=lambda node: isinstance(node, kinds)
    )
    return {path_of(path): node for path, node in found if isinstance(node, kinds)}


def states_in(opt_state: Any) -> str:
    """For a message: which kinds of states there are."""
    kinds: dict[str, None] = {}

    def note(node: Any) -> bool:
        if hasattr(node, "_fields"):
            kinds[type(node).__name__] = None
        return False  # Go on inside.

    jax.tree.leaves(opt_state, is_leaf=note)
    return ", ".join(kinds) or f"a {type(opt_state).__name__}"


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
      Name to value, float32 arrays without axes (but those of a state made by
      ``vmap``): ``learning_rate``, ``momentum`` or
      ``b1``, ``weight_decay``, and whatever ``inject_hyperparams`` holds, in its dtype.
      Inside ``partition`` and :func:`gradual_unfreezing` the names are
      ``name/<label>``, and :func:`scale_by_group` adds ``learning_rate/<label>``, the
      rate times the group's multiplier (``multiplier/<label>`` where no chain around it
      records a rate). While a group is frozen its rate is 0. A name that occurs
      again, as where ``inject_hyperparams`` wraps one of our recipes, is numbered:
      ``name_2``, ``name_3``. Before the first update the values are those of step 0. A
      state without any of this gives ``{}``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.onecycle_sgd(1.0, total_steps=10)
      >>> applied = osc.read_hyperparams(tx.init(jnp.ones(3)))
      >>> print({name: round(float(value), 2) for name, value in applied.items()})
      {'weight_decay': 0.0, 'momentum': 0.95, 'learning_rate': 0.04}
    """
    found = _find(opt_state)
    alone = [
        ("multiplier", at, factor)
        for waiting in found.multipliers
        for at, factor in _factors(*waiting).items()
    ]
    numbered: dict[str, jax.Array] = {}
    for name, suffix, value in [*found.entries, *alone]:
        key, number = name + suffix, 1
        while key in numbered:
            number += 1
            key = f"{name}{suffix}_{number}"
        numbered[key] = value
    return numbered
