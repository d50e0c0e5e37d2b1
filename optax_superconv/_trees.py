"""What is where in a tree of parameters, and what lies in a box?

A path is written ``encoder/block_3/attention/kernel``, whatever the containers are:
nested dicts, Flax's ``FrozenDict`` and ``nnx.State``, Equinox modules, Haiku's dicts,
named tuples, lists. An array that Flax keeps in a ``Variable`` or in a box with axis
names counts as one leaf without a name of its own, so that a path is the same when the
optimizer is initialised with Variables and updated with arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath, keystr, tree_map_with_path

from optax_superconv._checks import is_function, listed, require
from optax_superconv._numerics import is_abstract

Tree = TypeVar("Tree")
Names = tuple[str, ...]  # From the root to a leaf.
Labels = Any  # A tree of labels: the parameters' containers, or a prefix of them.
LabelFn = Callable[[optax.Params], Labels]


# --- leaves and boxes -----------------------------------------------------------------


def _is_a(node: Any, *names: str) -> bool:
    """Whether a class of Flax of such a name made this, found without Flax."""
    return any(
        base.__name__ in names and base.__module__.startswith("flax.")
        for base in type(node).__mro__
    )


def _is_any_box(node: Any) -> bool:
    return _is_a(node, "Variable", "AxisMetadata")


def is_box(node: Any) -> bool:
    """Whether this is one of Flax's boxes, and has its array in it."""
    return _is_any_box(node) and bool(jax.tree.leaves(node))


def is_hole(node: Any) -> bool:
    """Whether a leaf has been taken out here by ``optax.masked`` or ``partition``."""
    empty_box = _is_any_box(node) and not jax.tree.leaves(node)
    return empty_box or isinstance(node, optax.MaskedNode)


def is_position(node: Any) -> bool:
    """A box, or what stands where a leaf has been taken out."""
    return node is None or is_hole(node) or is_box(node)


def children_of(node: Any) -> list[Any]:
    """What lies directly in a node of a tree."""
    return jax.tree.leaves(node, is_leaf=lambda child: child is not node)


def array_of(leaf: Any) -> jax.Array:
    """The array of a leaf, out of its box if it has one, where it can be used.

    Of an abstract one there are zeros, for what is computed and goes nowhere.
    """
    (array,) = jax.tree.leaves(leaf)
    if is_abstract(array):
        return jnp.zeros(array.shape, array.dtype)
    array = jnp.asarray(array)
    if isinstance(array, jax.core.Tracer):
        return array
    device = next(iter(array.sharding.addressable_devices))
    home = device.default_memory().kind
    if array.sharding.memory_kind in (None, home):
        return array
    return jax.device_put(array, array.sharding.with_memory_kind(home))


def boxed_as(leaf: Any, array: jax.Array) -> Any:
    """The array in a new box like that of the leaf, or bare."""
    return jax.tree.map(lambda _: array, leaf)


def in_new_boxes(tree: Tree) -> Tree:
    """The same arrays in boxes of their own, which an owner may write into."""
    return jax.tree.map(lambda array: array, tree)


def is_variable(leaf: Any) -> bool:
    """Whether this is a box that its owner writes into."""
    return _is_a(leaf, "Variable")


def assigned(leaf: Any, value: Any) -> Any:
    """The leaf with another value: a Variable itself, all else anew."""
    if is_variable(leaf):
        leaf.set_value(value)
        return leaf
    return boxed_as(leaf, value)


def placed_as(array: jax.Array, leaf: Any) -> jax.Array:
    """The array with the dtype of a leaf's, on its devices and in its memory."""
    (old,) = jax.tree.leaves(leaf)
    if is_abstract(old):
        return old
    array = array.astype(jnp.result_type(old))
    traced = isinstance(array, jax.core.Tracer) or isinstance(old, jax.core.Tracer)
    if traced or not isinstance(old, jax.Array):
        return array
    same = array.sharding == old.sharding and array.committed == old.committed
    return array if same else jax.device_put(array, old.sharding)


def map_updates(
    function: Callable[..., Any],
    updates: optax.Updates,
    *rest: Any,
    otherwise: Callable[..., Any] = lambda *rest: None,
) -> Any:
    """``function(update, *rest)``; without an update, ``otherwise(*rest)``.

    A None among the updates stands for whatever the others have there, be it a subtree.
    """
    return jax.tree.map(
        lambda g, *r: otherwise(*r) if g is None else function(g, *r),
        updates,
        *rest,
        is_leaf=lambda node: node is None,
    )


def given_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """The parameters with None wherever there is no update."""
    return map_updates(lambda update, part: part, updates, params)


def is_graph_object(leaf: Any) -> bool:
    """Whether this is an object of Flax NNX, which as a leaf is no pytree."""
    return any(base.__module__.startswith("flax.nnx") for base in type(leaf).__mro__)


def is_fixed_module(leaf: Any) -> bool:
    """Whether this is a module of Linen, which never changes."""
    return _is_a(leaf, "Module") and not is_graph_object(leaf)


def all_leaves(tree: Any) -> list[Any]:
    """The leaves, with those of Flax NNX objects that are no pytrees."""
    leaves = jax.tree.leaves(tree)
    if any(map(is_graph_object, leaves)):
        from flax import nnx

        return jax.tree.leaves(nnx.split(tree)[1])
    return leaves


def copy_tree(tree: Tree, copied: Callable[[Any], Any]) -> Tree:
    """``copied(leaf)`` for each leaf; what Flax NNX objects share stays shared."""
    if _shares_variables(tree) or any(map(is_graph_object, jax.tree.leaves(tree))):
        from flax import nnx

        graph, leaves = nnx.split(tree)
        return nnx.merge(graph, jax.tree.map(copied, leaves))
    return jax.tree.map(copied, tree)


def _shares_variables(tree: Any) -> bool:
    """Whether a Variable occurs more than once, which a pytree would not know."""
    nodes = jax.tree.leaves(tree, is_leaf=is_box)
    variables = [id(node) for node in nodes if _is_a(node, "Variable")]
    return len(set(variables)) < len(variables)


def check_unshared(name: str, tree: Any, where: str, remedy: str) -> None:
    """Raises if a Variable occurs more than once."""
    rule = f"without Variables that Flax NNX objects share, {where}"
    rule = f"{rule} (split it with `nnx.split`, or {remedy})"
    require(not _shares_variables(tree), name, rule, "a shared one")


# --- paths ----------------------------------------------------------------------------


def path_of(keys: KeyPath) -> str:
    """The names from the root to here, ``a/b/c``."""
    return keystr(keys, simple=True, separator="/")


def named_leaves(
    tree: Any, is_leaf: Callable[[Any], bool] = is_box
) -> list[tuple[Names, Any]]:
    """Each leaf and its names."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(tuple(path_of((key,)) for key in keys), leaf) for keys, leaf in found]


def paths_of(tree: Any) -> list[str]:
    """The path of every leaf, in their order."""
    return ["/".join(names) for names, _ in named_leaves(tree)]


def map_with_paths(
    function: Callable[[str, Any], Any], tree: Any, *, holes: bool = False
) -> Any:
    """``function(path, leaf)`` of each leaf; with ``holes``, of None and masked too."""
    return tree_map_with_path(
        lambda keys, leaf: function(path_of(keys), leaf),
        tree,
        is_leaf=is_position if holes else is_box,
    )


def begins_of(names: Names) -> list[Names]:
    """From the root down to itself: ``()``, ``(a,)``, ``(a, b)``."""
    return [names[:k] for k in range(len(names) + 1)]


def outside(names: Iterable[Names], parents: set[Names]) -> list[Names]:
    """Of the names, those that are not at or below one of the parents."""
    return [name for name in names if not parents & {*begins_of(name)}]


def difference(lost: Collection[Names], new: Collection[Names]) -> str:
    """For a message: what is missing and what is new; empty if nothing is."""
    changes = {"without": lost, "with new": new}
    return " and ".join(
        f"{change} {listed(sorted(map('/'.join, names)))}"
        for change, names in changes.items()
        if names
    )


def is_unknown(tree: Any) -> bool:
    """Whether this is what ``optax.tree.map_params`` has in place of parameters."""
    return not jax.tree.leaves(tree) and not isinstance(tree, dict | list | tuple)


def is_masked(tree: Any) -> bool:
    """Whether leaves have been taken out by ``optax.masked`` or ``partition``."""
    return any(map(is_hole, jax.tree.leaves(tree, is_leaf=is_position)))


# --- trees of labels ------------------------------------------------------------------


def check_labels(labels: Iterable[Any], name: str = "param_labels") -> list[Any]:
    """Distinct labels, sorted; raises unless all are strings or all integers."""
    labels = list(labels)
    distinct = set(labels) if all(isinstance(x, Hashable) for x in labels) else {None}
    if not (
        all(isinstance(label, str) for label in distinct)
        or all(
            isinstance(label, int | np.integer) and not isinstance(label, bool)
            for label in distinct
        )
    ):
        raise TypeError(
            f"`{name}` must have labels that are all strings or all integers, got "
            f"{', '.join(sorted(set(map(repr, labels)))[:8])}."
        )
    return sorted(distinct)


def _parts(names: Names) -> Names:
    """The same where a key is a path itself, as in Haiku's dicts."""
    return tuple("/".join(names).split("/")) if names else ()


def labels_of(param_labels: Labels | LabelFn, params: Any) -> list[Any]:
    """A label per leaf of ``params``, in their order; a box is one leaf."""
    if not jax.tree.leaves(params, is_leaf=is_position):
        return []  # The placeholder of optax.tree.map_params is such a tree.

    tree = param_labels(params) if is_function(param_labels) else param_labels
    boxes, structure = jax.tree.flatten(tree, is_leaf=is_box)
    labels = [jax.tree.leaves(box)[0] for box in boxes]
    if structure != jax.tree.structure(params, is_leaf=is_box):
        labels = _labels_by_path(tree, labels, params)
    check_labels(labels)
    return labels


# Some libraries turn functions into pytrees, as which an Equinox module is labels.
_IS_TREE = " What can be called but is a pytree is read as one; trees of labels work."


def _labels_by_path(tree: Labels, labels: list[Any], params: Any) -> list[Any]:
    """The same where the labels are in other containers, or a prefix."""

    def is_leaf(node: Any) -> bool:
        return is_box(node) or not jax.tree.leaves(node)  # With what is empty.

    positions = [(_parts(names), leaf) for names, leaf in named_leaves(params, is_leaf)]
    places = [_parts(names) for names, _ in named_leaves(tree)]
    given = dict(zip(places, labels, strict=True))
    one_each = len(given) == len(places)
    require(one_each, "param_labels", "a label for each path", "several for one path")
    labels, lost = [], []
    for names, leaf in positions:
        label = next((given[b] for b in begins_of(names) if b in given), None)
        if jax.tree.leaves(leaf):
            labels.append(label)
            lost += [names] if label is None else []
    used = {begin for names, _ in positions for begin in begins_of(names)}
    # What is taken out may be a whole subtree of labels.
    holes = {names for names, leaf in positions if is_hole(leaf)}
    idle = [names for names in outside(given, holes) if names not in used]
    if lost or idle:
        reasons = [f"no label for {listed(map('/'.join, lost))}"] * bool(lost)
        reasons += [f"no parameter at {listed(map('/'.join, idle))}"] * bool(idle)
        raise ValueError(
            "`param_labels` must have the structure of the parameters, or be a prefix "
            f"of it, got {' and '.join(reasons)}. A function `params -> labels`, such "
            "as `label_by_path(rules)`, has the right structure by itself."
            + (_IS_TREE if callable(tree) else "")
        )
    return labels


def check_entries(
    name: str, by_label: Mapping[Any, Any], labels: list[Any], params: Any, hint: str
) -> None:
    """Raises unless each label has an entry in the dict, and each entry a parameter."""
    first = dict(zip(reversed(labels), reversed(paths_of(params)), strict=True))
    missing = [f"{k!r} ({first[k]} ...)" for k in sorted(first) if k not in by_label]
    if missing:
        rule = f"`{name}` must have every label{hint}"
        raise ValueError(f"{rule}, got none for {', '.join(missing[:8])}.")
    idle = [label for label in by_label if label not in first]
    if idle and labels and not is_masked(params):
        there = f"where the labels are {listed(sorted(first))}"
        raise ValueError(
            f"`{name}` must each have a parameter, got {listed(idle)}, {there}."
        )
