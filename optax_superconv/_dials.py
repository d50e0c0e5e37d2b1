"""What was applied, how is it read back, and who decides it?

A schedule knows what should be applied at a step; a log wants what was. So whatever
applies a hyperparameter records it in its own state, in float32 whatever the dtype of
the parameters, and one call finds all records in any optimizer state. A record is a
dial too: what is set there, or written into it, is held in place of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from optax_superconv import _trees
from optax_superconv._numerics import joined, once, split

Record = dict[str, jax.Array]  # (), float32 each; what the last update applied
Shapes = dict[str, tuple[int, ...]]  # of a record, in its order: (), or (layers,)


class Cooldown(NamedTuple):
    """The cooldown of a rate, and of the rates of its groups."""

    pending: jax.Array  # (), int32; the length of one that starts at the next update
    lifts: jax.Array  # (numbers,), bool; what was held when that was decided
    start_step: jax.Array  # (), int32
    cooldown_steps: jax.Array  # (), int32; 0 before the first
    origin: jax.Array  # (numbers,), float32; the rates at the start
    end: jax.Array  # (numbers,), float32


class Holds(NamedTuple):
    """Who decides the values of a record: their schedules, or whoever set them."""

    written: jax.Array  # (numbers,), uint32; the bits that the last update wrote
    held: jax.Array  # (numbers,), bool
    values: jax.Array  # (numbers,), float32; what is applied while held


# --- in the links ---------------------------------------------------------------------


def value_at(
    value: optax.ScalarOrSchedule, count: jax.Array, most_axes: int = 0
) -> jax.Array:
    """The value of a constant or a schedule at ``count``, in float32."""
    number = jnp.asarray(value(count) if callable(value) else value, jnp.float32)
    if number.ndim > most_axes:
        raise TypeError(
            "A hyperparameter must be a single number at each step, got one of shape "
            f"{number.shape} from {value!r}."
        )
    return number


def bits(values: jax.Array) -> jax.Array:
    """What is compared, since no value equals a NaN."""
    return jax.lax.bitcast_convert_type(values, jnp.uint32)


def in_order(names: Iterable[str]) -> list[str]:
    """Names as a vector has them: a dict forgets how it was made, and 10 is after 2."""

    def key(name: str) -> tuple[str, int, str]:
        kind, _, label = name.partition("/")
        return kind, len(label) if label.isdigit() else 0, label

    return sorted(names, key=key)


def written(
    shapes: Shapes, values: Sequence[jax.Array], holds: Holds
) -> tuple[Record, Holds]:
    """A new record, and what it is compared with later."""
    # As bits, so that it is no second name for the same buffer: donation needs that.
    record = dict(zip(shapes, values, strict=True))
    return record, holds._replace(written=bits(joined(values)))


def opened(shapes: Shapes, values: jax.Array) -> tuple[Record, Holds]:
    """The record before the first update, and nothing held."""
    idle = jnp.zeros(len(values), bool)
    holds = Holds(idle, idle, jnp.zeros_like(values))
    return written(shapes, split(values, [*shapes.values()]), holds)


def of_dials(
    decide: Callable[..., jax.Array], flags: jax.Array, shapes: Shapes
) -> jax.Array:
    """For all numbers of a dial, whether any or all of them have a flag."""
    if not any(shapes.values()):
        return flags
    parts = split(flags, [*shapes.values()])
    decided = [
        jnp.broadcast_to(decide(part, -1, keepdims=True), part.shape) if shape else part
        for part, shape in zip(parts, shapes.values(), strict=True)
    ]
    return joined(decided, flags.ndim - 1) > 0


def noticed(
    shapes: Shapes,
    record: Mapping[str, Any],
    holds: Holds,
    base: jax.Array,
    given: Sequence[Any],
) -> Holds:
    """Holds what is found in the record if the last update did not write it.

    ``given`` are the constants or schedules that would otherwise decide, or None, and
    ``base`` their values now. A traced constant is the dial of whoever traces it, as
    ``optax.inject_hyperparams`` does, so nothing is looked for.
    """
    if sorted(record) != sorted(shapes):
        raise ValueError(
            "`state` must be of this optimizer, whose hyperparameters are "
            f"{', '.join(shapes)}, got one with {', '.join(sorted(record))}."
        )
    if base.shape != holds.held.shape:
        raise ValueError(
            "`state` must be of this optimizer, whose hyperparameters have "
            f"{len(base)} numbers, got one with {len(holds.held)}."
        )
    sizes = [math.prod(shape) for shape in shapes.values()]
    watched = [not isinstance(value, jax.core.Tracer) for value in given]
    constant = [not (value is None or callable(value)) for value in given]
    found = joined(
        jnp.broadcast_to(jnp.asarray(record[name]), shape)
        for name, shape in shapes.items()
    )
    changed = of_dials(jnp.any, bits(found) != holds.written, shapes)
    changed = changed & np.repeat(watched, sizes)
    # A constant that is written back is released, not held.
    own = of_dials(jnp.all, bits(found) == bits(base), shapes)
    own = own & np.repeat(constant, sizes)
    return holds._replace(
        held=jnp.where(changed, ~own, holds.held),
        values=jnp.where(changed, found, holds.values),
    )


def applied(
    given: Mapping[str, optax.ScalarOrSchedule],
    count: jax.Array,
    record: Mapping[str, Any],
    holds: Holds,
) -> tuple[list[jax.Array], Record, Holds]:
    """The values to apply at ``count``, in order of their names, and their record."""
    shapes: Shapes = dict.fromkeys(in_order(given), ())
    base = joined(value_at(given[name], count) for name in shapes)
    holds = noticed(shapes, record, holds, base, [given[name] for name in shapes])
    values = [*once(jnp.where(holds.held, holds.values, base), count)]
    return values, *written(shapes, values, holds)


def first(
    given: Mapping[str, optax.ScalarOrSchedule],
) -> tuple[jax.Array, Record, Holds]:
    """A count of 0, and the record and holds before the first update."""
    count, names = jnp.zeros([], jnp.int32), in_order(given)
    values = joined(value_at(given[name], count) for name in names)
    return count, *opened(dict.fromkeys(names, ()), values)


# --- in a state -----------------------------------------------------------------------

INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def dials_of(state: Any) -> dict[str, Any]:
    """The record in a state that has one: ``hyperparams`` or ``dials``."""
    return getattr(state, "hyperparams", None) or getattr(state, "dials", {})


RECORDS = ("hyperparams", "dials", "holds")  # Fields of a state.


def has_record(node: Any) -> bool:
    """Whether this is a state with a record."""
    return isinstance(node, INJECTED) or (
        isinstance(node, tuple)
        and (isinstance(getattr(node, "holds", None), Holds) or hasattr(node, "facts"))
    )


class Place(NamedTuple):
    """A state with a record, somewhere in an optimizer state."""

    state: Any
    suffix: str  # of its names: the labels of the partitions around it, "/label"


def map_records(
    function: Callable[[Place], Any],
    tree: Any,
    more: tuple[type, ...] = (),
    suffix: str = "",
) -> Any:
    """Each state with a record replaced, at any nesting, from the outside inwards.

    Likewise states of ``more`` kinds.
    """

    def is_stop(node: Any) -> bool:
        return has_record(node) or isinstance(node, (optax.PartitionState, *more))

    def replaced(node: Any) -> Any:
        if _trees.is_box(node):
            (content,) = _trees.children_of(node)
            new = map_records(function, content, more, suffix)
            return node if new is content else _trees.assigned(node, new)
        if isinstance(node, optax.PartitionState):
            inner = {
                label: map_records(function, state, more, f"{suffix}/{label}")
                for label, state in node.inner_states.items()
            }
            return node._replace(inner_states=inner)
        if not is_stop(node):
            return node
        node = function(Place(node, suffix))
        if hasattr(node, "inner_state"):
            inner_state = map_records(function, node.inner_state, more, suffix)
            node = node._replace(inner_state=inner_state)
        return node

    return jax.tree.map(
        replaced, tree, is_leaf=lambda node: is_stop(node) or _trees.is_box(node)
    )


def places_in(opt_state: Any) -> list[Place]:
    """The states with a record, in order."""
    found: list[Place] = []

    def note(place: Place) -> Any:
        found.append(place)
        return place.state

    map_records(note, opt_state)
    return found


class Entry(NamedTuple):
    """A value in a record."""

    name: str
    place: int  # among the places
    key: str  # in the record
    is_dial: bool  # a fact cannot be set


def entries_in(places: Sequence[Place]) -> Iterator[Entry]:
    """The entries of all records, each by a name of its own."""
    taken: set[str] = set()
    for k, place in enumerate(places):
        facts = getattr(place.state, "facts", {})
        keys = [(key, True) for key in in_order(dials_of(place.state))]
        for key, is_dial in keys + [(key, False) for key in in_order(facts)]:
            name, slash, label = key.partition("/")
            full = unique = f"{name}{place.suffix}{slash}{label}"
            number = 0
            while unique in taken:
                number += 1
                unique = f"{full}_{number}"
            taken.add(unique)
            yield Entry(unique, k, key, is_dial)


def states_in(opt_state: Any) -> str:
    """For a message: which kinds of states there are."""
    kinds: dict[str, None] = {}

    def note(node: Any) -> bool:
        if hasattr(node, "_fields"):
            kinds[type(node).__name__] = None
        return False  # Go on inside.

    jax.tree.leaves(opt_state, is_leaf=note)
    return ", ".join(kinds) or f"a {type(opt_state).__name__}"


def check_structured(opt_state: Any) -> None:
    """Raises if this is a state whose containers have become dicts and lists."""

    def is_bare(node: Any) -> bool:
        keys = {*node} if isinstance(node, Mapping) else set()
        ours = "count" in keys and keys & {"holds", "facts", "num_samples"}
        return bool(ours) or {"hyperparams", "inner_state"} <= keys

    nodes = jax.tree.leaves(opt_state, is_leaf=is_bare)
    if any(map(is_bare, nodes)):
        raise ValueError(
            "`opt_state` must be in the containers that `init` made, got dicts in "
            "their place, as of a checkpoint that was restored without them. Restore "
            "it into the structure of `tx.init(params)`, or merge what was split."
        )


def read_hyperparams(opt_state: Any) -> dict[str, jax.Array]:
    """Reads the hyperparameters that the last update applied, for a log line.

    Finds the records of this package's transformations, and the hyperparameters of
    ``optax.inject_hyperparams``, at any nesting: ``chain``, ``named_chain``,
    ``partition``, ``masked``, ``MultiSteps``, ``apply_if_finite``. Works inside and
    outside ``jit`` and does not wait for the device. What is read here can be set; see
    :func:`set_hyperparams`.

    Args:
      opt_state: An optimizer state, or any pytree that holds one: an
        ``nnx.Optimizer`` or its ``opt_state``, a Linen ``TrainState``. (Not
        ``nnx.state(optimizer)``, which keeps no trace of the transformations.)

    Returns:
      Name to value, float32 arrays without axes (but those of a state made by
      ``vmap``), in the order of the chain:

      * ``learning_rate``, and ``learning_rate/<label>`` of groups; ``momentum``, or
        ``b1``, ``b2`` and ``eps``; ``weight_decay``; ``multiplier/<label>`` of
        :func:`scale_by_group`; whatever ``inject_hyperparams`` holds, in its dtype;
      * facts, which cannot be set: ``cooldown``, the fraction of a cooldown that is
        over, and ``frozen/<label>``, a bool, of :func:`gradual_unfreezing`. A frozen
        group reports the rate that it would have.

      Inside ``partition`` and :func:`gradual_unfreezing` the names are
      ``name/<label>``. A name that occurs again, as where ``inject_hyperparams`` wraps
      one of our recipes, is numbered: ``name_1``, ``name_2``. Before the first update
      the values are those of step 0. A state without any of this, such as that of
      ``optax.adam``, gives ``{}``.

    Raises:
      ValueError: If the containers of the state have become dicts, as in a checkpoint
        that was restored without them.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.onecycle_sgd(1.0, total_steps=10)
      >>> applied = osc.read_hyperparams(tx.init(jnp.ones(3)))
      >>> print({name: round(float(value), 2) for name, value in applied.items()})
      {'momentum': 0.95, 'learning_rate': 0.04, 'cooldown': 0.0}
    """
    check_structured(opt_state)
    places = places_in(opt_state)
    read: dict[str, jax.Array] = {}
    for name, place, key, is_dial in entries_in(places):
        state = places[place].state
        record = dials_of(state) if is_dial else state.facts
        read[name] = _trees.array_of(record[key])
    return read
