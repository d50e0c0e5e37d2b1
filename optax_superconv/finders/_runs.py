"""How does a finder run the caller's training step?

What the range test, the grid and the threshold share: where batches come from, how the
caller's state survives, and what a step must return.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_superconv import _checks
from optax_superconv._batches import is_array
from optax_superconv._trees import copy_tree

State = TypeVar("State")

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
    float32 = np.finfo(np.float32)
    low, high = (
        _checks.scalar(
            name,
            value,
            "above 0 and finite in float32",
            lambda x: (x >= float32.tiny) & (x <= float32.max),
        )
        for name, value in zip(names, (min_value, max_value), strict=True)
    )
    above = f"above `{names[0]}` ({min_value}) in float32"
    _checks.require(np.float32(high) > np.float32(low), names[1], above, max_value)
    num_steps = _checks.steps("num_steps", num_steps, at_least=2)
    ladder = np.geomspace(low, high, num_steps, dtype=np.float32)
    ladder[[0, -1]] = low, high
    return ladder


def ran_dry(num_steps: int, steps_run: int) -> ValueError:
    """The error for an iterator that ended too soon."""
    return ValueError(
        f"`batches` must yield a batch for each of `num_steps` ({num_steps}) steps,"
        f" got an iterator that ran dry after {steps_run}. A sequence starts again"
        " at its end."
    )


def jaxpr_of(step_fn: Any, example: tuple[Any, ...]) -> Any:
    """The jaxpr of a step that takes these arguments; None if it cannot be traced."""
    try:
        return jax.make_jaxpr(jax.jit(step_fn))(*jax.tree.map(strong, example)).jaxpr
    except Exception:  # A step that is wrong, not just untraceable, fails when run.
        return None


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def strong(leaf: Any) -> jax.Array:
    """An array whose dtype is its own, not a Python number's."""
    return jnp.asarray(leaf, None if is_key(leaf) else jnp.result_type(leaf))


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


def check_loss(wanted: str, loss: Any) -> None:
    """Raises unless a loss is a real scalar; ``wanted`` begins the message."""
    try:
        if loss is None:  # It would pass for a number.
            raise TypeError
        dtype, shape = jnp.result_type(loss), np.shape(loss)
    except (TypeError, ValueError):
        raise TypeError(
            f"{wanted} a number, got a loss of type {type(loss).__name__}."
        ) from None
    if shape or jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{wanted} a real scalar, got {dtype} of shape {shape}.")


def check_step(result: Any) -> None:
    """Raises unless a step returned ``(state, loss)`` with a real scalar loss."""
    wanted = "`step_fn` must return a pair (state, loss) with a loss that is"
    if not isinstance(result, tuple) or len(result) != 2:
        count = f" of {len(result)}" if isinstance(result, tuple) else ""
        raise TypeError(f"{wanted} a number, got a {type(result).__name__}{count}.")
    check_loss(wanted, result[1])


def check_first_loss(loss: float) -> None:
    """Raises unless the loss of the state as it came is finite."""
    _checks.require(
        np.isfinite(loss),
        "step_fn",
        "given a state and a batch whose loss is finite before any update, whatever "
        "the rate",
        loss,
    )


def layout(state: Any) -> tuple[Any, dict[str, str]]:
    """What a step must not change: the structure, and each leaf's dtype and shape."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    numeric = int | float | complex  # And bool, which is an int.
    return structure, {
        jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
        for path, leaf in leaves
        if is_array(leaf) or isinstance(leaf, numeric)
    }


def check_layout(before: tuple[Any, dict[str, str]], state: Any) -> None:
    """Raises unless a step returned a state laid out as the one it was given."""
    structure, leaves = layout(state)
    rule = "`step_fn` must return a state like the one it is given"
    if structure != before[0]:
        changed = [f"no state{path}" for path in before[1].keys() - leaves.keys()]
        changed += [f"a new state{path}" for path in leaves.keys() - before[1].keys()]
        what = ", ".join(sorted(changed)[:3]) or f"{structure}"
        raise ValueError(f"{rule} in structure, got one with {what[:300]}.")
    for path, kind in before[1].items():
        if leaves.get(path) != kind:
            where = f"state{path} "
            raise ValueError(
                f"{rule} ({where}is {kind}), got {leaves.get(path, 'no array')}."
            )


def sequential(
    step_fn: Callable[[Any, Any, Any], Any],
    states: list[Any],
    hyperparams: Callable[[int, int], Any],
    devices: Sequence[jax.Device] = (),  # pyright: ignore[reportInvalidTypeForm]  # jaxlib has no stub
) -> Callable[[int, Any, Sequence[int]], list[Any]]:
    """One step of each member, dispatched one after another; advances ``states``.

    Args:
      step_fn: ``(state, hyperparams, batch) -> (state, loss)``.
      states: One per member, replaced as they are trained.
      hyperparams: ``(step, member) -> hyperparams``.
      devices: Where the members live in turn; empty leaves the batches where they are.

    Returns:
      ``advance`` for :func:`lockstep`.
    """
    before = layout(states[0])

    def advance(step: int, batch: Any, members: Sequence[int]) -> list[Any]:
        placed: dict[int, Any] = {} if devices else {0: batch}
        losses: list[Any] = []
        for member in members:
            where = member % len(devices) if devices else 0
            if where not in placed:
                placed[where] = jax.tree.map(
                    lambda x, d=devices[where]: (
                        jax.device_put(x, d) if is_array(x) else x
                    ),
                    batch,
                )
            result = step_fn(states[member], hyperparams(step, member), placed[where])
            if step == 0 and not losses:
                check_step(result)
                check_layout(before, result[0])
            states[member], loss = result
            losses.append(loss)
        return losses

    return advance


def lockstep(
    advance: Callable[[int, Any, Sequence[int]], Any],
    shape: tuple[int, int],
    source: Iterator[Any],
    *,
    drop: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Trains several members on the same batches; returns their losses.

    Args:
      advance: ``(step, batch, members) -> losses``, one per member.
      shape: (members, steps).
      source: Yields the batches, one for each step.
      drop: Whether to leave out members whose loss was not finite. They are looked for
        as in the range test, so that the device does not wait for the host.
      tick: Called after each step.

    Returns:
      (members, steps) float64, NaN after a member's first loss that is not finite.
    """
    num_members, num_steps = shape
    losses = np.full(shape, np.nan)
    running = np.arange(num_members)
    pending: list[tuple[int, np.ndarray, Any]] = []
    alive = np.full(num_members, True)

    def look(block: list[tuple[int, np.ndarray, Any]]) -> None:
        for step, members, values in block:
            values = np.asarray(jax.device_get(values), np.float64)[: len(members)]
            seen = alive[members]
            losses[members[seen], step] = values[seen]
            alive[members] &= np.isfinite(values)

    steps_run = 0
    for step, batch in zip(range(num_steps), source, strict=False):
        pending.append((step, running, advance(step, batch, running.tolist())))
        steps_run += 1
        tick()
        if len(pending) == 2 * BLOCK:
            look(pending[:BLOCK])
            del pending[:BLOCK]
            if not alive.any():
                break
            if drop:
                running = np.flatnonzero(alive)
    look(pending)
    if alive.any() and steps_run < num_steps:
        raise ran_dry(num_steps, steps_run)
    return losses


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
