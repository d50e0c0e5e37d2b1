"""In which dtype is it computed, in which is it kept, and how often is it computed?

Hyperparameters are float32, and what they act on is at least that; a result goes back
to the dtype of the leaf that it came from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

Weight = TypeVar("Weight", jax.Array, float)


def is_array(value: Any) -> bool:
    """Whether this has a shape and a dtype."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def is_abstract(value: Any) -> bool:
    """Whether this has nothing else, as what ``jax.eval_shape`` gives."""
    return isinstance(value, jax.ShapeDtypeStruct)


def wide_dtype(*values: ArrayLike) -> np.dtype:
    """The dtype of the values together, and at least float32."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*values)
    wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if wide else np.dtype(jnp.float32)


def widen(leaf: ArrayLike) -> jax.Array:
    """The leaf in 32 bits or more, so that float32 hyperparameters keep their value."""
    return jnp.asarray(leaf).astype(wide_dtype(leaf))


def narrow(wide: jax.Array, leaf: ArrayLike) -> jax.Array:
    """A result in the dtype of the leaf that it came from, if that is a float."""
    dtype = jnp.asarray(leaf).dtype
    return wide.astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else wide


def accumulator(leaf: ArrayLike, dtype: Any = None) -> jax.Array:
    """Zeros like the leaf in a real dtype, which is made complex for a complex leaf.

    None is the dtype of the leaf, but at least float32.
    """
    if dtype is not None and jnp.iscomplexobj(leaf):
        dtype = wide_dtype(np.zeros((), dtype), np.complex64(0))
    return jnp.zeros_like(leaf, dtype=dtype or wide_dtype(leaf))


def times(value: jax.Array, wide: jax.Array) -> jax.Array:
    """A hyperparameter times a widened leaf, in the leaf's dtype."""
    return value.astype(wide.dtype) * wide


def scale(factor: jax.Array, updates: optax.Updates) -> optax.Updates:
    """A float32 factor times each update, which keep their dtypes.

    A vector has a factor for each index of an update's leading axis.
    """

    def scaled(g: ArrayLike) -> jax.Array:
        wide = widen(g)
        along = factor.ndim and (-1, *(wide.ndim - 1) * (1,))
        return narrow(times(factor.reshape(along) if along else factor, wide), g)

    return jax.tree.map(scaled, updates)


def weight_after(weight: Weight, gain: Weight) -> Weight:
    """The running average of a constant 1, one step later.

    An average that begins at 0, divided by this, has no bias, however its gain moves.
    """
    return weight + gain * (1 - weight)


def increment(count: jax.Array) -> jax.Array:
    """The next count, which stays at the last int32."""
    # Optax annotates the result as loosely as the argument.
    return cast(jax.Array, optax.safe_increment(count))


def once(values: jax.Array, count: jax.Array) -> jax.Array:
    """A vector of numbers that a compiled update computes once, before its leaves.

    A kernel per leaf that takes one vector is cheaper than one that takes each number
    by itself, and XLA would compute cheap numbers anew in all of them. It does not
    repeat a division, and does not know that no count is negative and this one by 1.
    """
    return values / (1 + _sign(count).astype(values.dtype))


def elements(
    values: jax.Array, count: jax.Array, shapes: Sequence[tuple[int, ...]]
) -> list[jax.Array]:
    """The numbers and vectors of such a vector, by the same kernels for all numbers.

    A kernel that knew which number it takes could serve no other leaf, and there
    would be one per group to compile.
    """
    zero = _sign(count)

    def at(vector: jax.Array | np.ndarray, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(vector, (index,), (1,)).reshape(())

    def element(k: int) -> jax.Array:
        return once(at(values, at(np.array([k, k + 1], np.uint32), zero)), count)

    values = once(values, count)
    return [
        values[begin:end] if shape else element(begin)
        for begin, end, shape in _extents(shapes)
    ]


def joined(arrays: Iterable[jax.Array], axes: int = 0) -> jax.Array:
    """Numbers and vectors as one float32 vector, behind axes that all of them have."""
    flat = [
        array.astype(jnp.float32).reshape(*array.shape[:axes], -1) for array in arrays
    ]
    return jnp.concatenate(flat, -1) if flat else jnp.zeros(0, jnp.float32)


def split(values: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """The numbers and vectors that have been joined."""
    return [
        values[..., begin:end] if shape else values[..., begin]
        for begin, end, shape in _extents(shapes)
    ]


def _extents(
    shapes: Sequence[tuple[int, ...]],
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    ends = np.cumsum([math.prod(shape) for shape in shapes], dtype=int).tolist()
    return zip([0, *ends[:-1]], ends, shapes, strict=True)


def _sign(count: jax.Array) -> jax.Array:
    return count.astype(jnp.uint32) >> 31  # 0, as far as we know
