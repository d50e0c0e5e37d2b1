"""Which parameters are samples of an average, and which states are those of one?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._numerics import wide_dtype, widen
from optax_superconv._trees import path_of


class AverageState(NamedTuple):
    """State of :func:`average_params` and of the averages that are made of it."""

    count: jax.Array  # (), int32
    num_samples: jax.Array  # (), int32
    total_weight: jax.Array  # (), float32; the average of a constant 1
    averages: dict[str, optax.Params]  # name to a tree like the parameters


class SnapshotState(NamedTuple):
    """State of :func:`lawa_params`."""

    count: jax.Array  # (), int32
    num_samples: jax.Array  # (), int32
    snapshots: dict[str, tuple[optax.Params, ...]]  # name to trees like the parameters


def is_averaged(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def is_finite(params: optax.Params) -> jax.Array:
    """Whether all that is averaged is finite, everywhere."""

    def largest(leaf: ArrayLike) -> jax.Array:
        size = jnp.abs(widen(leaf))
        # The leading axis first takes half of the time to compile, and less to run.
        return size.max(0, initial=0).max(initial=0) if size.ndim else size

    sizes = [largest(leaf) for leaf in jax.tree.leaves(params) if is_averaged(leaf)]
    dtype = wide_dtype(jnp.float32(0), *sizes)
    return jnp.isfinite(jnp.array([size.astype(dtype) for size in sizes])).all()


def kept(state: AverageState | SnapshotState, name: str) -> Any:
    """What the state keeps under a name, which must be its own."""
    (theirs,) = state[-1]
    rule = f"of an average named {name!r}"
    _checks.require(theirs == name, "state", rule, f"one named {theirs!r}")
    return state[-1][name]


def check_shape(keys: KeyPath, average: Any, leaf: Any) -> None:
    """Raises if a parameter has another shape than its average."""
    _checks.require(
        average.shape == leaf.shape,
        "state",
        f"of parameters of these shapes ({leaf.shape} at {path_of(keys)!r})",
        f"one of parameters of shape {average.shape}",
    )


def sampler(start_step: int, every: int, name: str) -> Callable[[jax.Array], jax.Array]:
    """Checks when samples are taken, and says whether the update at a count is one."""
    start_step = _checks.steps("start_step", start_step)
    every = _checks.steps("every", every, at_least=1)
    if not isinstance(name, str):
        raise TypeError(
            f"`name` must be a string, got {name!r} of type {type(name).__name__}."
        )
    return lambda count: (count >= start_step) & ((count - start_step) % every == 0)
