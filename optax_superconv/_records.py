"""What was applied, and where in an optimizer state is it recorded?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import optax

from optax_superconv import _trees
from optax_superconv._dials import Holds, in_order
from optax_superconv._numerics import is_abstract, is_array

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
            states = cast(dict[Any, Any], node.inner_states)
            inner = {  # In the order of a pytree's, which a new dict may not have.
                label: map_records(function, states[label], more, f"{suffix}/{label}")
                for label in sorted(states)
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


# Fields that stand beside a `count` in the states of links, here and in Optax.
_FIELDS = {"holds", "facts", "num_samples", "gradient_norms", "nu", "inner_state"}


def check_structured(opt_state: Any) -> None:
    """Raises if this is a state whose containers have become others, or is no state."""
    kinds: set[type] = set()

    def is_bare(node: Any) -> bool:
        if not (is_array(node) or _trees.is_box(node)):
            kinds.add(type(node))
        keys = {*node} if isinstance(node, Mapping) else set()
        return "count" in keys and not keys.isdisjoint(_FIELDS)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_bare)
    plain = (Mapping, list, int, float, str, type(None))
    known = {kind for kind in kinds if kind is tuple or issubclass(kind, plain)}
    if any(map(is_bare, nodes)) or (nodes and kinds == known):
        raise ValueError(
            "`opt_state` must be in the containers that `init` made, got "
            f"{', '.join(sorted(kind.__name__ for kind in known)) or 'an array'} in "
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
      ``vmap``, and of a group of stacked layers), in the order of the chain. Of an
      abstract state, as ``jax.eval_shape`` gives, they are abstract too:

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
      ValueError: If the containers of the state have become dicts and lists, as in a
        checkpoint that was restored without them, or if this is no state.

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
        (leaf,) = jax.tree.leaves(record[key])
        read[name] = leaf if is_abstract(leaf) else _trees.array_of(leaf)
    return read
