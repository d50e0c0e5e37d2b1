"""In which dtype is it computed, in which is it kept, and how often is it computed?

Hyperparameters are float32, and what they act on is at least that; a result goes back
to the dtype of the leaf that it came from.
"""

from __future__ import annotations

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


def times(value: jax.Array, wide: jax.Array) -> jax.Array:
    """A hyperparameter times a widened leaf, in the leaf's dtype."""
    return value.astype(wide.dtype) * wide


def scale(factor: jax.Array, updates: optax.Updates) -> optax.Updates:
    """A float32 factor times each update, which keep their dtypes."""
    return jax.tree.map(lambda g: narrow(times(factor, widen(g)), g), updates)


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


def elements(values: jax.Array, count: jax.Array) -> list[jax.Array]:
    """The elements of such a vector for leaves that use one each, by the same kernels.

    A kernel that knew which element it takes could serve no other leaf, and there
    would be one per group to compile.
    """
    zero = _sign(count)

    def at(vector: jax.Array | np.ndarray, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(vector, (index,), (1,)).reshape(())

    values = once(values, count)
    places = [at(np.array([k, k + 1], np.uint32), zero) for k in range(len(values))]
    return [once(at(values, place), count) for place in places]


def _sign(count: jax.Array) -> jax.Array:
    return count.astype(jnp.uint32) >> 31  # 0, as far as we know
