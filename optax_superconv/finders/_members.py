"""How do several runs train side by side, on the same batches?

The members of a grid, the rates of a threshold's ladder, or a single range test: from
one state, each with hyperparameters of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_superconv import _settings
from optax_superconv._numerics import is_array
from optax_superconv.finders import _acts, _copies, _runs, _steps
from optax_superconv.finders._steps import RATE, Form

Values = dict[str, np.ndarray]  # (members,) float32, hyperparameters by name


class Members(NamedTuple):
    """Several runs, and what they are asked.

    Attributes:
      advance: ``(rung, batches, alive) -> losses``, a list for each of the batches of
        at least one loss per member. Those that are not alive have diverged.
      check: ``(rungs)``: raises if after so many at most the rate did not act.
    """

    advance: Callable[[int, list[Any], np.ndarray], Any]
    check: Callable[[int], None]


def _strong(leaf: Any) -> jax.Array:
    """An array whose dtype is its own, not a Python number's."""
    return jnp.asarray(leaf, jnp.result_type(leaf))


def _put(tree: Any, where: Any) -> Any:
    """The arrays of a tree on a device or a sharding; None leaves them."""
    if where is None:
        return tree
    return jax.tree.map(lambda x: jax.device_put(x, where) if is_array(x) else x, tree)


class _Watch:
    """Whether the runs react to the rate, and apply what they are given."""

    def __init__(
        self, form: Form, state: Any, values: Values, ladder: np.ndarray | None
    ) -> None:
        self.form, self.values, self.ladder = form, values, ladder
        self.knobs = _steps.knobs_in(state)
        self.counted = _acts.micro_steps(state)
        names = [*values] + [RATE] * (ladder is not None)
        if form.in_state:
            _steps.check_dials(state, self.knobs, names)
        else:
            _steps.check_precision(state, self.knobs)
        if ladder is not None:
            self.ends = float(ladder[0]), float(ladder[-1])
        else:
            rates = values.get(RATE, np.zeros(1))
            self.ends = float(rates.min()), float(rates.max())
        recorded = RATE in self.knobs and f"{RATE}_1" not in self.knobs
        varied = self.ends[0] < self.ends[1]
        self.looks = varied and (form.in_state or not recorded)

    def other(self, rate: np.ndarray) -> np.ndarray:
        """The highest rate, or the lowest in place of that."""
        low, high = self.ends
        return np.where(rate == np.float32(high), low, high).astype(np.float32)

    def look(self, result: Any, other: Any) -> None:
        """Takes the same step at another rate for an answer."""
        self.looks = not _acts.react(result, other)

    def compare(self, state: Any, rung: int, members: Any = ...) -> None:
        """Raises if the state of a run, or of all, has applied anything else."""
        due = slice(rung + 1)
        wanted = {
            name: column[members, None] if column.ndim == 1 else column[members, due]
            for name, column in self.values.items()
        }
        if self.ladder is not None:
            wanted[RATE] = self.ladder[due]
        _acts.check_applied(state, self.knobs, wanted, self.form.in_state)

    def count(self, state: Any) -> None:
        """Raises if the first rung was no update of ``optax.MultiSteps``."""
        steps = self.form.accumulation_steps
        _acts.check_accumulation(self.counted, _acts.micro_steps(state), steps)

    def conclude(self) -> None:
        if self.looks:
            _acts.check_reacted(self.form.in_state, *self.ends)


def one_by_one(
    form: Form,
    state: Any,
    values: Values,
    ladder: np.ndarray | None = None,
    devices: Sequence[Any] = (None,),
    observe: Callable[[Any], None] | None = None,
) -> Members:
    """The living members' steps, dispatched one after another.

    Args:
      form: The step, and how it takes hyperparameters.
      state: Where all members start.
      values: The hyperparameters by name; may be empty for a single member. Here they
        may be (members, rungs), of a dial in the state that moves.
      ladder: (rungs,) float32, the learning rate if it climbs.
      devices: Where the members live in turn; None is where the state is.
      observe: Is shown each state at the end of each rung.
    """
    _copies.check_copied(state)
    watch = _Watch(form, state, values, ladder)
    num_members = len(next(iter(values.values()), [None]))
    places = [devices[k % len(devices)] for k in range(num_members)]
    states = [_copies.copy_state(state, place) for place in places]
    moving = {name: column for name, column in values.items() if column.ndim == 2}
    fixed = [
        {
            name: jax.device_put(column[k], place)
            for name, column in values.items()
            if name not in moving
        }
        for k, place in enumerate(places)
    ]
    climbing = {} if ladder is None or form.in_state else {RATE: list(ladder)}
    rates = {place: jax.device_put(climbing, place) for place in places}
    before = _runs.layout(states[0])
    writers: list[list[Callable[..., Any]]] = [[] for _ in range(num_members)]
    if form.in_state:
        for k in range(num_members):
            paths = {name: column[k] for name, column in moving.items()}
            if ladder is not None:
                paths[RATE] = ladder
            start = {name: path[0] for name, path in paths.items()}
            states[k] = _settings.set_hyperparams(states[k], fixed[k] | start)
            writers[k] = [
                _steps.writer(states[k], watch.knobs[name], path)
                for name, path in paths.items()
            ]

    def elsewhere(k: int, rung: int, batch: Any) -> Any:
        """What the member's next step gives at another rate."""
        path = values[RATE][k] if ladder is None else ladder
        rate = watch.other(path[rung] if np.ndim(path) else path)
        state = _copies.copy_state(states[k])
        if form.in_state:
            state = _settings.set_hyperparams(state, {RATE: rate})
        there = fixed[k] | {RATE: jax.device_put(rate, places[k])}
        result = form.step(state, there, batch)
        _runs.settle(result)
        return result

    def advance(rung: int, batches: list[Any], alive: np.ndarray) -> list[list[Any]]:
        put = {place: [_put(batch, place) for batch in batches] for place in rates}
        losses = [[np.nan] * num_members for _ in batches]
        living = np.flatnonzero(alive)
        for k in living.tolist():
            climbed = {name: rungs[rung] for name, rungs in rates[places[k]].items()}
            given = fixed[k] | climbed
            for write in writers[k]:
                states[k] = write(states[k], rung)
            for j, batch in enumerate(put[places[k]]):
                probe = None
                if watch.looks and k == living[0]:
                    probe = elsewhere(k, rung, batch)
                result = form.step(states[k], given, batch)
                if rung == j == k == 0:
                    _runs.check_step(before, result)
                states[k], losses[j][k] = result
                _runs.settle(result)
                if probe is not None:
                    watch.look(result, probe)
            if rung == 0 and all(np.isfinite(float(row[k])) for row in losses):
                if k == 0:
                    watch.count(states[k])
                watch.compare(states[k], 0, k)
            if observe is not None:
                observe(states[k])
        return losses

    def check(rungs: int) -> None:
        watch.conclude()
        for k in range(num_members):
            watch.compare(states[k], rungs - 1, k)

    return Members(advance, check)


def together(
    form: Form,
    state: Any,
    values: Values,
    ladder: np.ndarray | None = None,
    devices: Sequence[Any] = (None,),
) -> Members:
    """The steps of all members at once, under ``vmap``; as :func:`one_by_one`."""
    _copies.check_arrays(state)
    watch = _Watch(form, state, values, ladder)
    num_members = len(next(iter(values.values())))
    padding = -num_members % len(devices)
    values = {name: np.pad(x, (0, padding), mode="edge") for name, x in values.items()}
    watch.values = values
    members = each = None
    if devices[0] is not None:
        mesh = jax.sharding.Mesh(np.array(devices), ("members",))
        spec = jax.sharding.PartitionSpec
        members = jax.sharding.NamedSharding(mesh, spec("members"))
        each = jax.sharding.NamedSharding(mesh, spec())
    hyperparams = {name: jax.device_put(x, members) for name, x in values.items()}
    climbing = {} if ladder is None else {RATE: list(ladder)}
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
            given = hyperparams | rate
            if form.in_state:
                state = _settings.set_hyperparams(state, given)
            result = form.step(state, given, batch)
            _runs.check_step(before, result)
            return jax.tree.map(_strong, result)

        return jax.vmap(member_fn)(states, hyperparams)

    states = jax.jit(start_fn, out_shardings=members)(_put(state, each))

    def elsewhere(rung: int, batch: Any) -> Any:
        """What the next step gives at other rates."""
        copies = jax.tree.map(jnp.copy, states)
        if ladder is not None:
            rate = {RATE: jax.device_put(watch.other(ladder[rung]), each)}
            return advance_fn(copies, hyperparams, rate, batch)
        others = jax.device_put(watch.other(values[RATE]), members)
        return advance_fn(copies, hyperparams | {RATE: others}, {}, batch)

    def advance(rung: int, batches: list[Any], alive: np.ndarray) -> list[Any]:
        nonlocal states
        del alive  # All take the step: what has diverged costs nothing.
        rate = {name: rungs[rung] for name, rungs in rates.items()}
        losses = []
        for batch in batches:
            put = _put(batch, each)
            probe = elsewhere(rung, put) if watch.looks else None
            _runs.settle(probe)
            states, loss = result = advance_fn(states, hyperparams, rate, put)
            losses.append(loss)
            _runs.settle(result)
            if probe is not None:
                watch.look(result, probe)
        if rung == 0 and np.isfinite(_runs.means(losses)).all():
            watch.count(states)
            watch.compare(states, 0)
        return losses

    def check(rungs: int) -> None:
        watch.conclude()
        watch.compare(states, rungs - 1)

    return Members(advance, check)


def train(
    title: str,
    num_steps: int,
    source: Iterator[Any],
    form: Form,
    num_members: int,
    members: Members,
    progress: bool,
) -> np.ndarray:
    """Losses of (members, steps), NaN after a member's first that is not finite."""
    losses = np.full((num_members, num_steps), np.nan)
    alive = np.full(num_members, True)

    def step_fn(rung: int, batches: list[Any]) -> Any:
        return members.advance(rung, batches, alive)

    accumulated = form.accumulation_steps
    seen = _runs.dispatch(title, num_steps, source, accumulated, step_fn, progress)
    for rung, values in enumerate(seen):
        values = _runs.means(values)[:num_members]
        losses[alive, rung] = values[alive]
        alive &= np.isfinite(values)
        if not alive.any():
            break
    if np.isfinite(losses[:, 0]).any():  # Otherwise nothing can be told of the rate.
        members.check(num_steps)
    return losses
