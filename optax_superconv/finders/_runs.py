"""How does a finder run the caller's training step?

What the range test, the grid and the threshold share: how the caller's state survives,
what a step must return, and when its losses are looked at.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_superconv import _checks
from optax_superconv._numerics import is_array
from optax_superconv._trees import copy_tree

State = TypeVar("State")
Seen = TypeVar("Seen")

# Losses are looked at in blocks, one block behind the step that is dispatched, so that
# the device never waits for the host: what ends a run is seen at most 2 * BLOCK - 1
# steps late, and its result ends where it should have.
BLOCK = 8


def geometric_ladder(
    min_value: float,
    max_value: float,
    num_steps: int,
    names: tuple[str, str] = ("min_value", "max_value"),
) -> np.ndarray:
    """(num_steps,) float32 rates from ``min_value`` to ``max_value``, both exactly."""
    low = _checks.scalar(names[0], min_value, _checks.POSITIVE)
    high = _checks.scalar(names[1], max_value, _checks.POSITIVE)
    above = f"above `{names[0]}` ({min_value}) in float32"
    _checks.require(np.float32(high) > np.float32(low), names[1], above, max_value)
    num_steps = _checks.steps("num_steps", num_steps, at_least=2)
    ladder = np.geomspace(low, high, num_steps, dtype=np.float32)
    ladder[[0, -1]] = low, high
    return ladder


def copy_state(state: State, device: jax.Device | None = None) -> State:  # pyright: ignore[reportInvalidTypeForm]  # jaxlib has no stub
    """A state whose arrays may be donated, in place of the caller's."""
    copies: dict[int, jax.Array] = {}

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return leaf.copy()
        if not isinstance(leaf, jax.Array):
            return leaf
        if id(leaf) not in copies:
            # Compiles nothing, unlike `leaf.copy()`, and leaves the array where it is.
            copy = jax.device_put(leaf, device, may_alias=False)
            if getattr(copy, "weak_type", False):
                # What a step returns is not, and the step would be traced again.
                copy = copy.astype(copy.dtype)
            copies[id(leaf)] = copy
        return copies[id(leaf)]

    return copy_tree(state, copied)


def tenth(losses: np.ndarray) -> int:
    """A tenth of the steps, at least 1."""
    return max(1, losses.shape[-1] // 10)


def end_losses(losses: np.ndarray) -> np.ndarray:
    """(...,) means of the last tenths of (..., num_steps) losses; NaN if not finite."""
    ends = losses[..., -tenth(losses) :].mean(axis=-1)
    return np.where(np.isfinite(ends), ends, np.nan)


def noise(losses: np.ndarray) -> float:
    """Standard deviation of a loss around the trend of its run."""
    steps = np.diff(losses[np.isfinite(losses)])
    if not steps.size:
        return 0.0
    # A median of differences sees the noise and neither a fall nor an explosion.
    return float(1.4826 * np.median(np.abs(steps - np.median(steps))) / np.sqrt(2))


def _is_numeric(leaf: Any) -> bool:
    return is_array(leaf) or isinstance(leaf, int | float | complex)


def check_loss(wanted: str, loss: Any) -> None:
    """Raises unless a loss is a real scalar; ``wanted`` begins the message."""
    if not _is_numeric(loss):
        kind = type(loss).__name__
        raise TypeError(f"{wanted} a number, got a loss of type {kind}.")
    dtype, shape = jnp.result_type(loss), np.shape(loss)
    if shape or jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{wanted} a real scalar, got {dtype} of shape {shape}.")


def check_first_loss(loss: float) -> None:
    """Raises unless the loss of the state as it came is finite."""
    _checks.require(
        np.isfinite(loss),
        "step_fn",
        "given a state and a batch whose loss is finite before any update, whatever "
        "the rate",
        loss,
    )


def check_alike(
    name: str, rule: str, wanted: dict[str, Any], found: dict[str, Any]
) -> None:
    """Raises unless two trees hold the same at the same paths."""
    for path in {**wanted, **found}:
        old, new = (where.get(path, "nothing") for where in (wanted, found))
        _checks.require(old == new, name, f"{rule}, with {old} at {path}", new)


def layout(state: Any) -> tuple[dict[str, str], Any]:
    """What a step must not change: dtype and shape at each path, and the structure."""
    leaves = {
        f"state{jax.tree_util.keystr(path)}": (
            f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if _is_numeric(leaf)
    }
    return leaves, jax.tree.structure(state)


def check_step(before: tuple[dict[str, str], Any], result: Any) -> None:
    """Raises unless a step returned a real loss and a state laid out as ``before``."""
    wanted = "`step_fn` must return a pair (state, loss) with a loss that is"
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{wanted} a number, got a {type(result).__name__}.")
    check_loss(wanted, result[1])
    rule = "a function that returns a state like the one it is given"
    leaves, structure = layout(result[0])
    check_alike("step_fn", rule, before[0], leaves)
    # Other static data or another container, and the step would be compiled again.
    same = structure == before[1]
    _checks.require(same, "step_fn", f"{rule}, of structure {before[1]}", structure)


def dispatch(
    title: str,
    num_steps: int,
    source: Iterator[Any],
    advance: Callable[[int, Any], Seen],
    progress: bool,
) -> Iterator[Seen]:
    """What ``advance(step, batch)`` gives, at least ``BLOCK`` steps after its call."""
    steps: Iterable[int] = range(num_steps)
    _checks.flag("progress", progress)
    if progress:
        try:
            from rich.progress import track
        except ImportError as error:
            raise ImportError(
                "`progress=True` needs rich: pip install 'optax-superconv[progress]'."
            ) from error
        steps = track(steps, title)
    pending: list[Seen] = []
    count = 0
    for step, batch in zip(steps, source, strict=False):
        pending.append(advance(step, batch))
        count += 1
        if len(pending) == 2 * BLOCK:
            yield from pending[:BLOCK]
            del pending[:BLOCK]
    yield from pending
    if count < num_steps:
        raise ValueError(
            f"`batches` must yield a batch for each of `num_steps` ({num_steps}) steps,"
            f" got an iterator that ran dry after {count}. A sequence starts again at "
            "its end."
        )


def summary(result: Any, *lines: str) -> str:
    """The ``repr`` of a result: short lines."""
    shown = [textwrap.shorten(line, 70, placeholder=" ...") for line in lines]
    facts = ",\n  ".join(shown)
    return f"{type(result).__name__}({facts})"
