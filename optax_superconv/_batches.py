"""Where do batches come from?

A sequence or a stacked pytree starts again at its end, an iterator is consumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from optax_superconv import _checks
from optax_superconv._numerics import is_array


def is_stacked(batches: Any) -> bool:
    """Whether ``batches`` is one pytree whose leaves hold a batch per step.

    Lists and iterators hold batches, and so do tuples unless all of their elements are
    arrays, as in ``(inputs, targets)``; a mapping, an array or any other pytree node
    is stacked.
    """
    if isinstance(batches, list | range | Iterator):
        return False
    if isinstance(batches, tuple):
        return bool(batches) and all(map(is_array, batches))
    return not jax.tree_util.all_leaves([batches]) or (
        is_array(batches) and np.ndim(batches) > 0
    )


def num_stacked(batches: Any) -> int:
    """How many batches a stacked pytree holds; its leaves must agree."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batches)]
    lengths = {shape[:1] for shape in shapes}
    _checks.require(
        len(lengths) == 1 and lengths != {()} and lengths != {(0,)},
        "batches",
        "a pytree of arrays with one leading axis of steps, at least 1 (batches that "
        "are not stacked go in a list)",
        f"leaves of shapes {shapes}",
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


def draw(batches: Any) -> Iterator[Any]:
    """The batches one by one; whatever can be iterated again does so at its end."""
    if is_stacked(batches):
        if type(batches) is tuple and any(np.ndim(leaf) < 2 for leaf in batches):
            raise ValueError(
                "`batches` must be stacked along a leading axis of steps, before that "
                "of examples, if it is a tuple of arrays (a single batch goes in a "
                f"list), got arrays of shapes {[np.shape(leaf) for leaf in batches]}."
            )
        return _slices(batches, num_stacked(batches))
    if isinstance(batches, Iterator):
        return batches
    if not isinstance(batches, Iterable) or is_array(batches):  # Without axes.
        raise TypeError(
            "`batches` must be a sequence, an iterator or a stacked pytree of batches "
            f"(a single batch goes in a list), got a {type(batches).__name__}."
        )
    return _repeats(batches)
