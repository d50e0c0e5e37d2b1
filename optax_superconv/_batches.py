"""Where do batches come from?

What holds batches starts again at its end, an iterator is consumed. A single batch is
refused: cut into single examples it would train, and tell another story.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_superconv import _checks
from optax_superconv._numerics import is_array

_REMEDY = (
    "put a single batch in a list, `[batch]`, or give `stacked=True` with one pytree "
    "whose leaves have a leading axis of steps"
)


def draw(batches: Any, stacked: bool) -> Iterator[Any]:
    """The batches one by one; whatever can be iterated again does so at its end."""
    _checks.flag("stacked", stacked)
    if stacked:
        return _slices(batches, num_stacked(batches))
    got = single(batches)
    _checks.require(not got, "batches", f"several ({_REMEDY})", got)
    if not isinstance(batches, Iterable):
        raise TypeError(
            "`batches` must be a sequence, a loader that can be iterated again, or an "
            f"iterator ({_REMEDY}), got a {type(batches).__name__}."
        )
    return batches if isinstance(batches, Iterator) else _repeats(batches)


def single(batches: Any) -> str:
    """For a message: what these are if they are a single batch; empty otherwise."""
    kind = type(batches)
    if kind in (list, tuple):
        some = [_kind_of(batch) for batch in batches[:2]]
        parts = kind is tuple and bool(batches) and all(map(is_array, batches))
        shapes = [jax.tree.map(np.shape, batch) for batch in batches[:2]]
        got = f"a single {kind.__name__} of parts of shapes {shapes}"
        return got if parts or any(x != some[0] for x in some) else ""
    is_node = not jax.tree_util.all_leaves([batches])
    one = is_node or is_array(batches) or isinstance(batches, str | bytes)
    name = "array" if is_array(batches) else kind.__name__
    return "" if isinstance(batches, Iterator) or not one else f"a single {name}"


def _kind_of(batch: Any) -> Any:
    """What batches have in common: structure, and of each leaf rank and kind."""
    leaves, treedef = jax.tree.flatten(batch)
    kinds = [
        (np.ndim(x), jnp.issubdtype(x.dtype, jnp.inexact)) if is_array(x) else None
        for x in leaves
    ]
    return [treedef, *kinds]


def num_stacked(batches: Any) -> int:
    """How many batches a stacked pytree holds; its leaves must agree."""
    leaves = jax.tree.leaves(batches)
    shapes: list[tuple[int, ...]] = [
        np.shape(leaf) if is_array(leaf) else () for leaf in leaves
    ]
    lengths = {shape[:1] for shape in shapes}
    _checks.require(
        len(lengths) == 1 and lengths != {()} and lengths != {(0,)},
        "batches",
        "with `stacked=True` a pytree of arrays with one leading axis of steps, at "
        "least 1",
        f"a {type(batches).__name__} with leaves of shapes {shapes}",
    )
    return int(lengths.pop()[0])


def _slices(batches: Any, length: int) -> Iterator[Any]:
    while True:
        for k in range(length):
            yield jax.tree.map(lambda leaf, k=k: leaf[k], batches)


def _repeats(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        _checks.require(not empty, "batches", "at least one batch", "none")
