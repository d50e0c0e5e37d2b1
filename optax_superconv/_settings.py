"""How is a dial set?

What is set is data in the optimizer's state: nothing is traced again, checkpoints carry
the decision, and ``jax.vmap`` forks one state into several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_superconv import _checks, _dials, _records, _trees
from optax_superconv._numerics import joined, split
from optax_superconv._records import Place

# Of dials, by the first part of their names.
_RULES = {
    **dict.fromkeys(("momentum", "b1", "b2"), _checks.DECAY),
    **dict.fromkeys(("weight_decay", "eps", "multiplier"), _checks.NON_NEGATIVE),
}
_REMEDIES = {
    "cooldown": "`start_cooldown` starts one and `restart_schedules` lifts it",
    "frozen": "it follows from `thaw_steps`, which `restart_schedules` begins anew",
}


Write = Callable[[Any, jax.Array], Any]
Values = Mapping[str, jax.Array | None]  # By key of a record; None releases.


def changed(
    opt_state: Any,
    change: Callable[[Place, Write], Any],
    more: tuple[type, ...] = (),
) -> Any:
    """The state with ``change(place, write)`` in place of each state with a record.

    Variables are written where they are; if there are no others, their owner is
    returned as it is.
    """
    rebuilt = False

    def write(leaf: Any, value: jax.Array) -> Any:
        nonlocal rebuilt
        rebuilt = rebuilt or not _trees.is_variable(leaf)
        return _trees.assigned(leaf, _trees.placed_as(value, leaf))

    def replaced(place: Place) -> Any:
        state = change(place, write)
        # A dict of its own, which can be written into without a change to a fork.
        records = ("hyperparams", "dials", "facts")
        own = {
            name: {**getattr(state, name)} for name in records if hasattr(state, name)
        }
        return state._replace(**own)

    new_state = _records.map_records(replaced, opt_state, more)
    return new_state if rebuilt else opt_state


def rule_of(name: str) -> _checks.Rule:
    """What the values of a dial must be."""
    return _RULES.get(name.partition("/")[0], _checks.FINITE)


def _form(state: Any, key: str) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a value in a record."""
    if isinstance(state, _records.INJECTED):
        old = _trees.array_of(state.hyperparams[key])
        return old.shape, old.dtype
    batch = _trees.array_of(state.holds.held).shape[:-1]
    return (*batch, *shapes_in(state)[key]), jnp.float32


def _checked_value(
    name: str, value: Any, key: str, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    """The value as it will be applied, in the shape of the record."""
    rule = rule_of(key)
    if _checks.number(name, value, rule) is not None:
        # Once more as it is applied: what is below 1 may be 1 in float32.
        with np.errstate(over="ignore"):
            narrow = np.asarray(value).astype(dtype)
        _checks.number(name, narrow, rule)
        whole = jnp.issubdtype(dtype, jnp.inexact) or np.all(narrow == value)
        integer = f"a whole number, as the one before is of dtype {dtype}"
        _checks.require(whole, name, integer, value)
        value = narrow
    array = jnp.asarray(value)
    fits = array.ndim <= len(shape) and all(
        n in (1, m) for n, m in zip(array.shape[::-1], shape[::-1], strict=False)
    )
    rule_of_shape = f"a number or an array that broadcasts to the shape {shape}"
    _checks.require(fits, name, rule_of_shape, f"one of shape {array.shape}")
    return jnp.broadcast_to(array, shape).astype(dtype)


def held(place: Place, values: Values, write: Write) -> Any:
    """One of our states that holds these values, or none where there is None."""
    state, shapes = place.state, shapes_in(place.state)
    written, flags, old = map(_trees.array_of, state.holds)
    found = found_in(state)
    parts = dict(zip(shapes, split(old, [*shapes.values()]), strict=True))
    parts.update({key: x for key, x in values.items() if x is not None})
    new = joined(parts.values(), old.ndim - 1)
    sizes = [math.prod(shape) for shape in shapes.values()]
    mine = np.repeat([name in values for name in shapes], sizes)
    are_held = np.repeat([values.get(name) is not None for name in shapes], sizes)
    holds = _dials.Holds(
        # What has been written into the record before is not looked at again.
        jnp.where(mine, _dials.bits(found), written),
        jnp.where(mine, are_held, flags),
        new,
    )
    state = state._replace(holds=_dials.Holds(*map(write, state.holds, holds)))
    if hasattr(state, "ending"):  # What is set now outranks what was decided before.
        lifts = jnp.where(mine, False, _trees.array_of(state.ending.lifts))
        ending = state.ending._replace(lifts=write(state.ending.lifts, lifts))
        state = state._replace(ending=ending)
    return state


def shapes_in(state: Any) -> _dials.Shapes:
    """The shapes of a record, without the axes of a ``vmap``."""
    record, axes = _records.dials_of(state), _trees.array_of(state.holds.held).ndim - 1
    return {
        name: _trees.array_of(record[name]).shape[axes:]
        for name in _dials.in_order(record)
    }


def found_in(state: Any) -> jax.Array:
    """The record as one vector, in float32 whatever has been written there."""
    record, held = _records.dials_of(state), _trees.array_of(state.holds.held)
    names = _dials.in_order(record)
    found = joined((_trees.array_of(record[k]) for k in names), held.ndim - 1)
    rule = "with records of the shapes that `init` gave them"
    shapes = ", ".join(f"{k} {jnp.shape(record[k])}" for k in names)
    _checks.require(found.shape == held.shape, "opt_state", rule, shapes)
    return found


def _check_injected(state: Any, key: str, value: Any) -> None:
    """Raises if ``optax.inject_hyperparams`` would not keep to what is set."""
    scheduled = key in getattr(state, "hyperparams_states", {})
    rule = "a hyperparameter that `optax.inject_hyperparams` does not overwrite"
    because = f"{key!r}, which is set at every update from the schedule given to it"
    _checks.require(not scheduled, "values", rule, because)
    if value is None:
        raise ValueError(
            f"`values` must have a number for {key!r}, a constant of "
            "`optax.inject_hyperparams`, got None: no schedule follows."
        )


def _injected(place: Place, values: Values, write: Write) -> Any:
    """A state of ``optax.inject_hyperparams`` with these values."""
    old = place.state.hyperparams
    new = {key: write(old[key], cast(jax.Array, x)) for key, x in values.items()}
    return place.state._replace(hyperparams={**old, **new})


def set_hyperparams(opt_state: Any, values: Mapping[str, ArrayLike | None]) -> Any:
    """Sets hyperparameters by the names that :func:`read_hyperparams` gives them.

    A value is held from the next update on, in place of its schedule or constant, until
    it is set anew or released with None; the schedule's count goes on meanwhile. A held
    ``learning_rate`` is multiplied by the multipliers of groups, but for those whose
    ``learning_rate/<label>`` is held itself. A rate that is set during a cooldown
    outranks it, and None returns to it. Until the next update
    :func:`read_hyperparams` gives what was applied last.

    Works at any nesting, inside and outside ``jit``, ``vmap`` and ``scan``, on a mesh.
    Values take the dtype and the sharding of those before, so no program is traced
    again. ``jax.vmap(lambda rate: set_hyperparams(state, {"learning_rate": rate}))``
    forks a state into one per rate (pure states only).

    ``optax.tree.set(state, learning_rate=rate)`` and a write into the dict of a state,
    ``state[-1].hyperparams["learning_rate"] = rate``, hold a rate too, unchecked. A
    written value that is just the one applied last cannot be seen there.

    Args:
      opt_state: An optimizer state, or any pytree that holds one, such as a Linen
        ``TrainState``. Variables, as in an ``nnx.Optimizer``, are written in place.
      values: Name to value: a number, an array that broadcasts to what is read, or None
        to follow the schedule again. A constant of ``optax.inject_hyperparams`` can be
        set but not released, and one that it schedules can be neither.

    Returns:
      The state with the values set, to be used in place of the one given. It shares all
      other arrays with it: before a step that donates one of the two, copy it
      (``jax.tree.map(jnp.copy, state)``).

    Raises:
      ValueError: If the state does not hold such a name (the names that it holds are
        listed), or if the name is one of a fact (``cooldown``, ``frozen/<label>``).

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.onecycle_sgd(1.0, total_steps=10)
      >>> params = jnp.ones(3)
      >>> state = osc.set_hyperparams(tx.init(params), {"learning_rate": 0.5})
      >>> _, state = tx.update(params, state, params)
      >>> print(float(osc.read_hyperparams(state)["learning_rate"]))
      0.5
      >>> state = osc.set_hyperparams(state, {"learning_rate": None})
      >>> _, state = tx.update(params, state, params)
      >>> print(round(float(osc.read_hyperparams(state)["learning_rate"]), 2))
      0.28
    """
    _records.check_structured(opt_state)
    if not isinstance(values, Mapping):
        raise TypeError(
            "`values` must be a dict from name to value, got "
            f"{values!r} of type {type(values).__name__}."
        )
    places = _records.places_in(opt_state)
    entries = {entry.name: entry for entry in _records.entries_in(places)}
    dials = ", ".join(name for name, entry in entries.items() if entry.is_dial)
    wanted: list[dict[str, jax.Array | None]] = [{} for _ in places]
    for name, value in values.items():
        if name not in entries:
            rule = f"names that the state holds ({dials or 'none'})"
            raise ValueError(f"`values` must have {rule}, got {name!r}.")
        _, place, key, is_dial = entries[name]
        if not is_dial:
            remedy = _REMEDIES[key.partition("/")[0]]
            raise ValueError(
                f"`values` must have names of dials ({dials}), got {name!r}, which "
                f"cannot be set: {remedy}."
            )
        if isinstance(places[place].state, _records.INJECTED):
            _check_injected(places[place].state, key, value)
        if value is not None:
            shape, dtype = _form(places[place].state, key)
            value = _checked_value(f"values[{name!r}]", value, key, shape, dtype)
        wanted[place][key] = value
    order = iter(wanted)

    def change(place: Place, write: Write) -> Any:
        mine = next(order)
        if not mine:
            return place.state
        is_injected = isinstance(place.state, _records.INJECTED)
        return (_injected if is_injected else held)(place, mine, write)

    return changed(opt_state, change)
