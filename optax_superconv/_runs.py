"""How does a finder run the caller's training step?

What the range test, the grid and the threshold share: where batches come from, how the
caller's state survives, and what a step must return.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_superconv import _checks

State = TypeVar("State")


def geometric_ladder(min_value: float, max_value: float, num_steps: int) -> np.ndarray:
    """(num_steps,) float32 rates from ``min_value`` to ``max_value``, both exactly."""
    float32 = np.finfo(np.float32)
    low, high = (
        _checks.scalar(
            name,
            value,
            "above 0 and finite in float32",
            lambda x: (x >= float32.tiny) & (x <= float32.max),
        )
        for name, value in (("min_value", min_value), ("max_value", max_value))
    )
    above = f"above `min_value` ({min_value})"
    _checks.require(high > low, "max_value", above, max_value)
    num_steps = _checks.steps("num_steps", num_steps, at_least=2)
    ladder = np.geomspace(low, high, num_steps, dtype=np.float32)
    ladder[[0, -1]] = low, high
    return ladder


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def is_stacked(batches: Any) -> bool:
    """Whether ``batches`` is one pytree whose leaves hold a batch per step.

    Lists and iterators hold batches, and so do tuples unless all of their elements are
    arrays, as in ``(inputs, targets)``; a mapping, an array or any other pytree node
    is stacked.
    """
    if isinstance(batches, list | range | Iterator):
        return False
    if isinstance(batches, tuple):
        return bool(batches) and all(map(_is_array, batches))
    return not jax.tree_util.all_leaves([batches]) or (
        _is_array(batches) and np.ndim(batches) > 0
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
        return _slices(batches, num_stacked(batches))
    if isinstance(batches, Iterator):
        return batches
    if not isinstance(batches, Iterable):
        raise TypeError(
            "`batches` must be a sequence, an iterator or a stacked pytree of batches "
            f"(a single batch goes in a list), got a {type(batches).__name__}."
        )
    return _repeats(batches)


def ran_dry(num_steps: int, steps_run: int) -> ValueError:
    """The error for an iterator that ended too soon."""
    return ValueError(
        f"`batches` must yield a batch for each of `num_steps` ({num_steps}) steps,"
        f" got an iterator that ran dry after {steps_run}. A sequence starts again"
        " at its end."
    )


def copy_state(state: State) -> State:
    """A state whose arrays may be donated, in place of the caller's."""
    copies: dict[int, jax.Array] = {}

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return leaf.copy()
        if not isinstance(leaf, jax.Array):
            return leaf
        if id(leaf) not in copies:
            # Compiles nothing, unlike `leaf.copy()`, and leaves the array where it is.
            copies[id(leaf)] = jax.device_put(leaf, may_alias=False)
        return copies[id(leaf)]

    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and any(
        isinstance(leaf, nnx.Variable)
        for leaf in jax.tree.leaves(
            state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )
    ):
        # A pytree would not know that two Flax NNX objects share a Variable.
        graph, leaves = nnx.split(state)
        return nnx.merge(graph, jax.tree.map(copied, leaves))
    return jax.tree.map(copied, state)


def check_step(result: Any) -> None:
    """Raises unless a step returned ``(state, loss)`` with a real scalar loss."""
    wanted = "`step_fn` must return a pair (state, loss) with a loss that is"
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{wanted} a number, got a {type(result).__name__}.")
    loss = result[1]
    try:
        # None would pass for a number.
        dtype, shape = jnp.result_type("" if loss is None else loss), np.shape(loss)
    except (TypeError, ValueError):
        raise TypeError(
            f"{wanted} a number, got a loss of type {type(loss).__name__}."
        ) from None
    if shape or jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{wanted} a real scalar, got {dtype} of shape {shape}.")


@contextlib.contextmanager
def progress_bar(title: str, show: bool, total: int) -> Iterator[Callable[[], None]]:
    """Yields what to call after each step."""
    if not show:
        yield lambda: None
        return
    try:
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError(
            "`progress=True` needs rich: pip install 'optax-superconv[progress]'."
        ) from error
    with Progress() as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
