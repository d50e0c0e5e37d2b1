"""How do several runs train side by side, on the same batches?

The members of a grid and the rates of a threshold's ladder: from one state, each with
hyperparameters of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_superconv._numerics import is_array
from optax_superconv.finders import _runs

# ``(step, batch, alive) -> losses``, at least one per member. Those that are not alive
# have diverged.
Advance = Callable[[int, Any, np.ndarray], Any]


def _strong(leaf: Any) -> jax.Array:
    """An array whose dtype is its own, not a Python number's."""
    return jnp.asarray(leaf, jnp.result_type(leaf))


def _put(tree: Any, where: Any) -> Any:
    """The arrays of a tree on a device or a sharding; None leaves them."""
    if where is None:
        return tree
    return jax.tree.map(lambda x: jax.device_put(x, where) if is_array(x) else x, tree)


def one_by_one(
    step_fn: Callable[..., Any],
    state: Any,
    values: dict[str, np.ndarray],
    ladder: np.ndarray | None = None,
    devices: Sequence[Any] = (None,),
) -> Advance:
    """The living members' steps, dispatched one after another.

    Args:
      step_fn: ``(state, hyperparams, batch) -> (state, loss)``.
      state: Where all members start.
      values: (members,) float32, the constant hyperparameters by name.
      ladder: (steps,) float32, the learning rate if it climbs.
      devices: Where the members live in turn; None is where the state is.
    """
    num_members = len(next(iter(values.values())))
    places = [devices[k % len(devices)] for k in range(num_members)]
    states = [_runs.copy_state(state, place) for place in places]
    fixed = [
        {name: jax.device_put(column[k], place) for name, column in values.items()}
        for k, place in enumerate(places)
    ]
    climbing = {} if ladder is None else {"learning_rate": list(ladder)}
    rates = {place: jax.device_put(climbing, place) for place in places}
    before = _runs.layout(state)

    def advance(step: int, batch: Any, alive: np.ndarray) -> list[Any]:
        batches = {place: _put(batch, place) for place in rates}
        losses: list[Any] = [np.nan] * num_members
        for k in np.flatnonzero(alive):
            rate = {name: rungs[step] for name, rungs in rates[places[k]].items()}
            hyperparams = fixed[k] | rate
            result = step_fn(states[k], hyperparams, batches[places[k]])
            if step == k == 0:
                _runs.check_step(before, result)
            states[k], losses[k] = result
        return losses

    return advance


def together(
    step_fn: Callable[..., Any],
    state: Any,
    values: dict[str, np.ndarray],
    ladder: np.ndarray | None = None,
    devices: Sequence[Any] = (None,),
) -> Advance:
    """The steps of all members at once, under ``vmap``; as :func:`one_by_one`."""
    num_members = len(next(iter(values.values())))
    padding = -num_members % len(devices)
    members = each = None
    if devices[0] is not None:
        mesh = jax.sharding.Mesh(np.array(devices), ("members",))
        spec = jax.sharding.PartitionSpec
        members = jax.sharding.NamedSharding(mesh, spec("members"))
        each = jax.sharding.NamedSharding(mesh, spec())
    hyperparams = {
        name: jax.device_put(np.pad(column, (0, padding), mode="edge"), members)
        for name, column in values.items()
    }
    climbing = {} if ladder is None else {"learning_rate": list(ladder)}
    rates = jax.device_put(climbing, each)
    before = _runs.layout(state)

    def start_fn(state: Any) -> Any:
        shape = (num_members + padding,)
        return jax.tree.map(
            lambda x: jnp.broadcast_to(_strong(x), shape + np.shape(x)), state
        )

    @partial(jax.jit, donate_argnums=0)
    def advance_fn(states: Any, hyperparams: Any, rate: Any, batch: Any) -> Any:
        def member_fn(state: Any, hyperparams: Any) -> Any:
            result = step_fn(state, hyperparams | rate, batch)
            _runs.check_step(before, result)
            return jax.tree.map(_strong, result)

        return jax.vmap(member_fn)(states, hyperparams)

    states = jax.jit(start_fn, out_shardings=members)(_put(state, each))

    def advance(step: int, batch: Any, alive: np.ndarray) -> jax.Array:
        nonlocal states
        del alive  # All take the step: what has diverged costs nothing.
        rate = {name: rungs[step] for name, rungs in rates.items()}
        batch = _put(batch, each)
        states, losses = advance_fn(states, hyperparams, rate, batch)
        return losses

    return advance


def train(
    title: str,
    shape: tuple[int, int],
    source: Iterator[Any],
    advance: Advance,
    progress: bool,
) -> np.ndarray:
    """Losses of (members, steps), NaN after a member's first that is not finite."""
    losses = np.full(shape, np.nan)
    alive = np.full(shape[0], True)

    def step_fn(step: int, batch: Any) -> Any:
        return advance(step, batch, alive)

    for step, values in enumerate(
        _runs.dispatch(title, shape[1], source, step_fn, progress)
    ):
        values = np.asarray(jax.device_get(values), np.float64)[: shape[0]]
        losses[alive, step] = values[alive]
        alive &= np.isfinite(values)
        if not alive.any():
            break
    return losses
