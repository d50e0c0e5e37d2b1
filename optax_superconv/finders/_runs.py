"""How does a finder run the caller's training step?

What the range test, the grid and the threshold share: what a step must return, and when
its losses are looked at.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from optax_superconv import _checks
from optax_superconv._numerics import is_array

Seen = TypeVar("Seen")

# Losses are looked at in blocks, one block behind the step that is dispatched, so that
# the device never waits for the host: what ends a run is seen at most 2 * BLOCK - 1
# steps late, and its result ends where it should have.
BLOCK = 8


def geometric_ladder(
    min_learning_rate: float, max_learning_rate: float, num_rates: int
) -> np.ndarray:
    """(num_rates,) float32 rates from the lowest to the highest, both exactly."""
    names = "min_learning_rate", "max_learning_rate"
    low = _checks.scalar(names[0], min_learning_rate, _checks.POSITIVE)
    high = _checks.scalar(names[1], max_learning_rate, _checks.POSITIVE)
    above = f"above `{names[0]}` ({min_learning_rate}) in float32"
    good = np.float32(high) > np.float32(low)
    _checks.require(good, names[1], above, max_learning_rate)
    ladder = np.geomspace(low, high, num_rates, dtype=np.float32)
    ladder[[0, -1]] = low, high
    return ladder


def tenth(losses: np.ndarray) -> int:
    """A tenth of the steps, at least 1."""
    return max(1, losses.shape[-1] // 10)


def end_losses(losses: np.ndarray) -> np.ndarray:
    """(...,) means of the last tenths of (..., num_steps) losses; NaN if not finite."""
    ends = losses[..., -tenth(losses) :].mean(axis=-1)
    return np.where(np.isfinite(ends), ends, np.nan)


def noise(losses: np.ndarray) -> float:
    """Standard deviation of a loss around the trend of its run."""
    finite = losses[np.isfinite(losses)]
    steps = np.diff(finite)
    if steps.size < 2:
        return 0.0
    # A median of differences sees the noise and neither a fall nor an explosion.
    spread = 1.4826 * np.median(np.abs(steps - np.median(steps))) / np.sqrt(2)
    # It is 0 where two batches take turns, or rounding leaves few values; second
    # differences, of which the highest fifth is left out, are not.
    bends = np.sort(np.abs(np.diff(steps)))[: max(1, round(0.8 * (steps.size - 1)))]
    # Seven tenths of what they say, since more than a fifth may belong to an explosion.
    least = 0.7 * np.sqrt(np.mean(bends**2)) / (0.662 * np.sqrt(6))
    return float(max(spread, least))


def is_numeric(leaf: Any) -> bool:
    return is_array(leaf) or isinstance(leaf, int | float | complex)


def check_loss(wanted: str, loss: Any) -> None:
    """Raises unless a loss is a real scalar; ``wanted`` begins the message."""
    if not is_numeric(loss):
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
        if is_numeric(leaf)
    }
    return leaves, jax.tree.structure(state)


def check_step(before: tuple[dict[str, str], Any], result: Any) -> None:
    """Raises unless a step returned a real loss and a state laid out as ``before``."""
    wanted = "`step_fn` must return a pair (state, loss) with a loss that is"
    if not isinstance(result, tuple) or len(result) != 2:
        advice = " What it returns beside the loss goes into the state, or is dropped."
        advice *= isinstance(result, tuple)
        raise TypeError(f"{wanted} a number, got a {type(result).__name__}.{advice}")
    if result[1] is None:
        raise TypeError(
            f"{wanted} a number, got a loss of type NoneType: does your step return it?"
        )
    check_loss(wanted, result[1])
    rule = "a function that returns a state like the one it is given"
    leaves, structure = layout(result[0])
    check_alike("step_fn", rule, before[0], leaves)
    # Other static data or another container, and the step would be compiled again.
    same = structure == before[1]
    _checks.require(same, "step_fn", f"{rule}, of structure {before[1]}", structure)


def settle(result: Any) -> None:
    """Waits for a step whose loss is on several CPU devices.

    They share the cores, and the parts of steps that are on their way together may wait
    for one another until XLA gives up.
    """
    loss = result[1] if isinstance(result, tuple) and len(result) == 2 else result
    if isinstance(loss, jax.Array) and not isinstance(loss, jax.core.Tracer):
        devices = loss.sharding.device_set
        if len(devices) > 1 and next(iter(devices)).platform == "cpu":
            jax.block_until_ready(loss)


def means(losses: list[Any]) -> np.ndarray:
    """The means over the batches of a rung, on the host; a list has one per member."""
    rows = [
        list(map(float, row)) if isinstance(row, list) else np.asarray(row)
        for row in losses
    ]
    with np.errstate(invalid="ignore"):  # Of infinities with both signs.
        return np.mean(np.asarray(rows, np.float64), axis=0)


def dispatch(
    title: str,
    num_steps: int,
    source: Iterator[Any],
    accumulation_steps: int,
    advance: Callable[[int, list[Any]], Seen],
    progress: bool,
) -> Iterator[Seen]:
    """What ``advance(step, batches)`` gives, some steps after its call."""
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
    block = max(1, BLOCK // accumulation_steps)
    pending: list[Seen] = []
    for step in steps:
        batches = list(itertools.islice(source, accumulation_steps))
        if len(batches) < accumulation_steps:
            yield from pending
            wanted = f"{num_steps} steps of the {title}"
            if accumulation_steps > 1:
                wanted += f" ({accumulation_steps} for each)"
            drawn = step * accumulation_steps + len(batches)
            raise ValueError(
                f"`batches` must yield a batch for each of the {wanted}, got an "
                f"iterator that ran dry after {drawn}. A sequence starts again at its "
                "end."
            )
        pending.append(advance(step, batches))
        if len(pending) == 2 * block:
            jax.block_until_ready(pending[block - 1])  # Wakes up once, not for each.
            yield from pending[:block]
            del pending[:block]
    yield from pending


def summary(result: Any, *lines: str) -> str:
    """The ``repr`` of a result: short lines."""
    shown = [textwrap.shorten(line, 70, placeholder=" ...") for line in lines]
    facts = ",\n  ".join(shown)
    return f"{type(result).__name__}({facts})"
