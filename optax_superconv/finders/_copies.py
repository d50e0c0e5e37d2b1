"""How does the caller's state survive?

A finder trains copies of it. What cannot be copied and may change is refused.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import numbers
import types
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_superconv import _trees
from optax_superconv.finders._runs import is_numeric

State = TypeVar("State")

_COMPILED = type(jax.jit(lambda: None))
_IMMUTABLE = (
    *(numbers.Number, str, bytes, range, slice, type(None), enum.Enum),
    *(np.generic, np.dtype, np.ufunc, jnp.ufunc, jax.sharding.Sharding),
    *(type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType),
    *(_COMPILED, jax.custom_jvp, jax.custom_vjp),
)


def _is_immutable(leaf: Any) -> bool:
    """Whether sharing a leaf that is no array is as good as a copy."""
    if isinstance(leaf, functools.partial):
        parts = [leaf.func, *leaf.args, *leaf.keywords.values()]
        return all(map(_is_immutable, parts))
    if isinstance(leaf, tuple | frozenset):
        return all(map(_is_immutable, leaf))
    if isinstance(leaf, types.MethodType):
        return _is_immutable(leaf.__self__)
    parameters: Any = getattr(leaf, "__dataclass_params__", None)
    if parameters is not None and parameters.frozen:
        names = [field.name for field in dataclasses.fields(leaf)]
        return all(_is_immutable(getattr(leaf, name)) for name in names)
    return isinstance(leaf, _IMMUTABLE) or _trees.is_fixed_module(leaf)


def check_copied(state: Any) -> None:
    """Raises if the state holds what a training step could change behind a copy."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = isinstance(leaf, jax.Array | np.ndarray)
        if not (array or _trees.is_graph_object(leaf) or _is_immutable(leaf)):
            raise TypeError(
                "`state` must hold arrays, modules and what cannot change, so that "
                f"yours survives, got a {type(leaf).__name__} at "
                f"state{jax.tree_util.keystr(keys)}. Keep it out of the state, or make "
                "an array of it."
            )


def check_arrays(state: Any) -> None:
    """Raises if the state holds what cannot have an axis of members."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not is_numeric(leaf):
            raise TypeError(
                "`state` must hold nothing but arrays and numbers with "
                f"`vectorize=True`, got a {type(leaf).__name__} at "
                f"state{jax.tree_util.keystr(keys)}."
            )


def copy_state(state: State, device: Any = None) -> State:
    """A state whose arrays may be donated, in place of the caller's.

    Compiles nothing, unlike ``leaf.copy()``, and leaves arrays where they are: on a
    mesh, in a memory, in one of several processes; or moves them to a ``device``.
    """
    copies: dict[int, jax.Array] = {}

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return leaf.copy()
        if not isinstance(leaf, jax.Array):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = _copied_array(leaf, device)
        return copies[id(leaf)]

    return _trees.copy_tree(state, copied)


def _copied_array(leaf: jax.Array, device: Any) -> jax.Array:
    if leaf.is_fully_addressable:
        copy = jax.device_put(leaf, device, may_alias=False)
    elif jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _copied_array(jax.random.key_data(leaf), device)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    else:  # `device_put` does not know the other processes' parts.
        parts = [
            jax.device_put(part.data, part.data.sharding, may_alias=False)
            for part in leaf.addressable_shards
        ]
        copy = jax.make_array_from_single_device_arrays(
            leaf.shape, leaf.sharding, parts
        )
    if getattr(copy, "weak_type", False):
        # What a step returns is not, and the step would be traced again.
        copy = copy.astype(copy.dtype)
    return copy
