"""How do hyperparameters reach the caller's step?

They are set in the state that the step is given, as dials of its optimizer, or passed
to the step as an argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_superconv import _checks, _records, _trees

RATE = "learning_rate"

# Values of a ladder that are put where the state is at a time.
AT_ONCE = 1000

Optimizer = Literal["sgd", "adamw"]

# ``(state, hyperparams, batch) -> (state, loss)``
Step = Callable[[Any, Mapping[str, Any], Any], Any]


class Form(NamedTuple):
    """How a finder calls the caller's step."""

    step: Step
    in_state: bool  # whether hyperparameters are set in the state
    accumulation_steps: int  # steps at each rate


class Knob(NamedTuple):
    """Where a dial is in a state."""

    path: tuple[int, ...]  # from the root, which child of each node
    key: str  # in the record there
    index: int | None  # in the vector of what is held; None in `inject_hyperparams`


def form_of(
    step_fn: Any,
    pass_hyperparams: bool | None,
    accumulation_steps: Any,
    passed: str = RATE,
) -> Form:
    """The caller's step, checked for its arguments; None if none may be passed."""
    _checks.function("step_fn", step_fn)
    offered = pass_hyperparams is not None
    if offered:
        _checks.flag("pass_hyperparams", pass_hyperparams)
    steps = _checks.steps("accumulation_steps", accumulation_steps, at_least=1)
    names = ("state", passed, "batch") if pass_hyperparams else ("state", "batch")
    try:
        signature = inspect.signature(step_fn)
    except (TypeError, ValueError):
        signature = None  # Of some compiled functions.
    if signature is not None:
        try:
            signature.bind(*names)
        except TypeError:
            advice = (
                "give `pass_hyperparams=False` for one without hyperparameters"
                if pass_hyperparams
                else f"`pass_hyperparams=True` for (state, {passed}, batch); "
                * offered
                + "one that changes its objects in place goes in `lambda state, batch: "
                "(state, train_step(*state, batch))`"
            )
            raise TypeError(
                f"`step_fn` must take ({', '.join(names)}), got a function of "
                f"{signature} ({advice})."
            ) from None

    def step(state: Any, hyperparams: Mapping[str, Any], batch: Any) -> Any:
        if not pass_hyperparams:
            return step_fn(state, batch)
        given = hyperparams[RATE] if passed == RATE else hyperparams
        return step_fn(state, given, batch)

    return Form(step, not pass_hyperparams, steps)


# --- where the dials are --------------------------------------------------------------


def walk(
    node: Any, is_wanted: Callable[[Any], bool], path: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """The wanted nodes of a tree, and where they are."""
    if is_wanted(node):
        yield path, node
    for k, child in enumerate(_trees.children_of(node)):
        if child is not node:
            yield from walk(child, is_wanted, (*path, k))


def node_at(tree: Any, path: tuple[int, ...]) -> Any:
    for k in path:
        tree = _trees.children_of(tree)[k]
    return tree


def replaced(tree: Any, path: tuple[int, ...], change: Callable[[Any], Any]) -> Any:
    """The tree with a changed node; Variables on the way are written in place."""
    if not path:
        return change(tree)
    children, treedef = jax.tree.flatten(tree, is_leaf=lambda node: node is not tree)
    old = children[path[0]]
    children[path[0]] = replaced(old, path[1:], change)
    if children[path[0]] is old:
        return tree
    if _trees.is_box(tree):
        return _trees.assigned(tree, children[0])
    return jax.tree.unflatten(treedef, children)


def knobs_in(state: Any) -> dict[str, Knob]:
    """The dials of a state by name, without those that another one decides."""
    places = _records.places_in(state)
    found = list(walk(state, _records.has_record))  # In the order of the places.
    injected = [
        (path, node.hyperparams)
        for path, node in found
        if isinstance(node, _records.INJECTED)
    ]
    knobs: dict[str, Knob] = {}
    for name, place, key, is_dial in _records.entries_in(places):
        path, node = found[place]
        decided = any(
            path != above and path[: len(above)] == above and key in names
            for above, names in injected
        )
        if is_dial and not decided:
            index = None
            if not isinstance(node, _records.INJECTED):
                index = _index_of(key, node)
            knobs[name] = Knob(path, key, index)
    return knobs


def _index_of(key: str, node: Any) -> int:
    """Of a dial, in the vector of its record."""
    axes = np.ndim(_trees.array_of(node.holds.held)) - 1
    index = 0
    for name in _records.in_order(_records.dials_of(node)):
        if name == key:
            return index
        shape = np.shape(_trees.array_of(_records.dials_of(node)[name]))[axes:]
        index += int(np.prod(shape, dtype=int))
    raise AssertionError(key)


def optimizer_of(state: Any) -> Optimizer | None:
    """Whose rates these are: told by the moments that the state holds."""

    def moments_of(node: Any) -> set[str]:
        return {"mu", "nu", "trace"} & set(getattr(node, "_fields", ()))

    found = [moments_of(node) for _, node in walk(state, lambda n: bool(moments_of(n)))]
    known: tuple[tuple[Optimizer, set[str]], ...]
    known = ("adamw", {"mu", "nu"}), ("sgd", {"trace"})
    for optimizer, moments in known:
        if found and all(held == moments for held in found):
            return optimizer
    return None  # No moments, those of another optimizer, or of several.


def recorded(state: Any, knob: Knob) -> Any:
    return _records.dials_of(node_at(state, knob.path))[knob.key]


def check_dials(
    state: Any, knobs: Mapping[str, Knob], names: Iterable[str], may_pass: bool = True
) -> None:
    """Raises unless the state has one dial of each name, in float32."""
    held = ", ".join(knobs) or "none"
    kind = _records.states_in(state)
    for name in names:
        if name not in knobs:
            raise ValueError(
                f"`state` must hold a dial {name!r} to be set, got one that holds "
                f"{held} ({kind}). Take an optimizer that has it: `osc.adamw(...)`, "
                "`osc.scale_by_learning_rate` at the end of a chain, or "
                "`optax.inject_hyperparams(tx, hyperparam_dtype=jnp.float32)(...)`."
                + " Or give `pass_hyperparams=True`, and a step that takes it."
                * may_pass
            )
        rule = f"with one dial {name!r}"
        rule += ", or `pass_hyperparams=True` with a step that takes it" * may_pass
        _checks.require(f"{name}_1" not in knobs, "state", rule, held)
        node = node_at(state, knobs[name].path)
        _checks.require(
            knobs[name].key not in getattr(node, "hyperparams_states", {}),
            "state",
            f"with a {name!r} that can be set: give `optax.inject_hyperparams` a "
            "number, or take an optimizer of this package, whose schedules give way",
            "a schedule in `optax.inject_hyperparams`, which overwrites it",
        )
    check_precision(state, knobs)


def check_precision(state: Any, knobs: Mapping[str, Knob]) -> None:
    """Raises where ``inject_hyperparams`` rounds what it holds to the parameters'."""
    for name, knob in knobs.items():
        (leaf,) = jax.tree.leaves(recorded(state, knob))
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
            raise ValueError(
                f"`state` must hold {name!r} in float32, got {dtype}, in which rates "
                "are coarse and a b2 of 0.999 is 1: give `optax.inject_hyperparams` "
                "`hyperparam_dtype=jnp.float32`."
            )


# --- setting a dial -------------------------------------------------------------------


def _put(values: np.ndarray, like: Any) -> list[jax.Array]:
    """An array of each row, where another one is."""
    if not isinstance(like, jax.Array) or not like.committed:
        return jax.device_put(list(values))
    if like.is_fully_addressable:
        return jax.device_put(list(values), like.sharding)
    return [
        jax.make_array_from_callback(row.shape, like.sharding, row.__getitem__)
        for row in values
    ]


def writer(state: Any, knob: Knob, ladder: np.ndarray) -> Callable[..., Any]:
    """``(state, rung) -> state`` with this value, for a state where it is held.

    Where the dial is, is known, and the values are where it is: so this costs little.
    """

    def leaf_of(node: Any) -> Any:
        return node.hyperparams[knob.key] if knob.index is None else node.holds.values

    old = np.asarray(_trees.array_of(leaf_of(node_at(state, knob.path))))
    rows = np.repeat(old[None], len(ladder), axis=0)
    rungs = ladder.reshape(-1, *(1,) * (old.ndim - 1)).astype(old.dtype)
    if knob.index is None:
        rows[:] = ladder.reshape(-1, *(1,) * old.ndim)
    else:
        rows[..., knob.index] = rungs
    placed: dict[Any, tuple[int, list[jax.Array]]] = {}

    def row(array: Any, rung: int) -> jax.Array:
        """As an array; a long ladder is no list of as many."""
        where = getattr(array, "sharding", None), getattr(array, "committed", False)
        block = rung // AT_ONCE
        if where not in placed or placed[where][0] != block:
            part = rows[block * AT_ONCE : (block + 1) * AT_ONCE]
            placed[where] = block, _put(part, array)
        return placed[where][1][rung % AT_ONCE]

    def write(state: Any, rung: int) -> Any:
        def change(node: Any) -> Any:
            leaf = leaf_of(node)
            (array,) = jax.tree.leaves(leaf)
            new = _trees.assigned(leaf, row(array, rung))
            if new is leaf:
                return node
            if knob.index is None:
                return node._replace(hyperparams={**node.hyperparams, knob.key: new})
            return node._replace(holds=node.holds._replace(values=new))

        return replaced(state, knob.path, change)

    return write
