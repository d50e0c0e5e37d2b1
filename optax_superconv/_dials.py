"""Which value of a hyperparameter does a link apply, and who decides it?

A schedule knows what should be applied at a step; a log wants what was. So whatever
applies a hyperparameter records it in its own state, in float32 whatever the dtype of
the parameters. A record is a dial too: what is set there, or written into it, is held
in place of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from optax_superconv._numerics import joined, once, split

Record = dict[str, jax.Array]  # (), float32 each; what the last update applied
Shapes = dict[str, tuple[int, ...]]  # of a record, in its order: (), or (layers,)


class Cooldown(NamedTuple):
    """The cooldown of a rate, and of the rates of its groups."""

    pending: jax.Array  # (), int32; the length of one that starts at the next update
    lifts: jax.Array  # (numbers,), bool; what was held when that was decided
    start_step: jax.Array  # (), int32
    cooldown_steps: jax.Array  # (), int32; 0 before the first
    origin: jax.Array  # (numbers,), float32; the rates at the start
    end: jax.Array  # (numbers,), float32


class Holds(NamedTuple):
    """Who decides the values of a record: their schedules, or whoever set them."""

    written: jax.Array  # (numbers,), uint32; the bits that the last update wrote
    held: jax.Array  # (numbers,), bool
    values: jax.Array  # (numbers,), float32; what is applied while held


def value_at(
    value: optax.ScalarOrSchedule, count: jax.Array, most_axes: int = 0
) -> jax.Array:
    """The value of a constant or a schedule at ``count``, in float32."""
    number = jnp.asarray(value(count) if callable(value) else value, jnp.float32)
    if number.ndim > most_axes:
        raise TypeError(
            "A hyperparameter must be a single number at each step, got one of shape "
            f"{number.shape} from {value!r}."
        )
    return number


def bits(values: jax.Array) -> jax.Array:
    """What is compared, since no value equals a NaN."""
    return jax.lax.bitcast_convert_type(values, jnp.uint32)


def in_order(names: Iterable[str]) -> list[str]:
    """Names as a vector has them: a dict forgets how it was made, and 10 is after 2."""

    def key(name: str) -> tuple[str, int, str]:
        kind, _, label = name.partition("/")
        return kind, len(label) if label.isdigit() else 0, label

    return sorted(names, key=key)


def written(
    shapes: Shapes, values: Sequence[jax.Array], holds: Holds
) -> tuple[Record, Holds]:
    """A new record, and what it is compared with later."""
    # As bits, so that it is no second name for the same buffer: donation needs that.
    record = dict(zip(shapes, values, strict=True))
    return record, holds._replace(written=bits(joined(values)))


def opened(shapes: Shapes, values: jax.Array) -> tuple[Record, Holds]:
    """The record before the first update, and nothing held."""
    idle = jnp.zeros(len(values), bool)
    holds = Holds(idle, idle, jnp.zeros_like(values))
    return written(shapes, split(values, [*shapes.values()]), holds)


def of_dials(
    decide: Callable[..., jax.Array], flags: jax.Array, shapes: Shapes
) -> jax.Array:
    """For all numbers of a dial, whether any or all of them have a flag."""
    if not any(shapes.values()):
        return flags
    parts = split(flags, [*shapes.values()])
    decided = [
        jnp.broadcast_to(decide(part, -1, keepdims=True), part.shape) if shape else part
        for part, shape in zip(parts, shapes.values(), strict=True)
    ]
    return joined(decided, flags.ndim - 1) > 0


def noticed(
    shapes: Shapes,
    record: Mapping[str, Any],
    holds: Holds,
    base: jax.Array,
    given: Sequence[Any],
) -> Holds:
    """Holds what is found in the record if the last update did not write it.

    ``given`` are the constants or schedules that would otherwise decide, or None, and
    ``base`` their values now. A traced constant is the dial of whoever traces it, as
    ``optax.inject_hyperparams`` does, so nothing is looked for.
    """
    if sorted(record) != sorted(shapes):
        raise ValueError(
            "`state` must be of this optimizer, whose hyperparameters are "
            f"{', '.join(shapes)}, got one with {', '.join(sorted(record))}."
        )
    if base.shape != holds.held.shape:
        raise ValueError(
            "`state` must be of this optimizer, whose hyperparameters have "
            f"{len(base)} numbers, got one with {len(holds.held)}."
        )
    sizes = [math.prod(shape) for shape in shapes.values()]
    watched = [not isinstance(value, jax.core.Tracer) for value in given]
    constant = [not (value is None or callable(value)) for value in given]
    found = joined(
        jnp.broadcast_to(jnp.asarray(record[name]), shape)
        for name, shape in shapes.items()
    )
    changed = of_dials(jnp.any, bits(found) != holds.written, shapes)
    changed = changed & np.repeat(watched, sizes)
    # A constant that is written back is released, not held.
    own = of_dials(jnp.all, bits(found) == bits(base), shapes)
    own = own & np.repeat(constant, sizes)
    return holds._replace(
        held=jnp.where(changed, ~own, holds.held),
        values=jnp.where(changed, found, holds.values),
    )


def applied(
    given: Mapping[str, optax.ScalarOrSchedule],
    count: jax.Array,
    record: Mapping[str, Any],
    holds: Holds,
) -> tuple[list[jax.Array], Record, Holds]:
    """The values to apply at ``count``, in order of their names, and their record."""
    shapes: Shapes = dict.fromkeys(in_order(given), ())
    base = joined(value_at(given[name], count) for name in shapes)
    holds = noticed(shapes, record, holds, base, [given[name] for name in shapes])
    values = [*once(jnp.where(holds.held, holds.values, base), count)]
    return values, *written(shapes, values, holds)


def first(
    given: Mapping[str, optax.ScalarOrSchedule],
) -> tuple[jax.Array, Record, Holds]:
    """A count of 0, and the record and holds before the first update."""
    count, names = jnp.zeros([], jnp.int32), in_order(given)
    values = joined(value_at(given[name], count) for name in names)
    return count, *opened(dict.fromkeys(names, ()), values)
