"""What do the links of a chain have in common?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import jax
import optax

from optax_superconv import _dials
from optax_superconv._numerics import increment

if TYPE_CHECKING:
    from typing_extensions import TypeIs  # Known to every type checker.

State = TypeVar("State", bound=tuple[Any, ...])


class ScheduledState(NamedTuple):
    """State of a transformation that has a single hyperparameter and no memory."""

    count: jax.Array  # (), int32
    dials: _dials.Record
    holds: _dials.Holds


def check_state(state: Any, kind: type) -> None:
    """Raises unless this is the state of such a transformation."""
    if not isinstance(state, kind):
        raise ValueError(
            f"`state` must be what `init` of this transformation makes, a "
            f"{kind.__name__}, got a {type(state).__name__}. A checkpoint is restored "
            "into the structure of `tx.init(params)`."
        )


def link(
    kind: type[State],
    init_fn: optax.TransformInitFn,
    update: Callable[
        [optax.Updates, State, optax.Params | None], tuple[optax.Updates, State]
    ],
) -> optax.GradientTransformationExtraArgs:
    """A transformation with such a state that has no use for extra arguments."""

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, State]:
        del extra_args
        check_state(state, kind)
        return update(updates, cast(State, state), params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def given(params: optax.Params | None, purpose: str) -> optax.Params:
    """The parameters, or an error that says what they are needed for."""
    if params is None:
        raise ValueError(f"`params` must be given to `update` to {purpose}, got None.")
    return params


def is_transformation(value: Any) -> TypeIs[optax.GradientTransformation]:
    """Whether this can stand in a chain."""
    return hasattr(value, "init") and hasattr(value, "update")


def check_transformation(name: str, value: Any, more: str = "") -> None:
    """Raises unless this can stand in a chain."""
    if not is_transformation(value):
        raise TypeError(
            f"`{name}` must be a gradient transformation{more}, got {value!r} of type "
            f"{type(value).__name__}."
        )


def scheduled_link(
    name: str,
    value: optax.ScalarOrSchedule,
    apply: Callable[[jax.Array, optax.Updates, optax.Params | None], optax.Updates],
) -> optax.GradientTransformationExtraArgs:
    """Applies a recorded constant or schedule: ``apply(value, updates, params)``."""

    def init_fn(params: optax.Params) -> ScheduledState:
        del params
        return ScheduledState(*_dials.first({name: value}))

    def update_fn(
        updates: optax.Updates, state: ScheduledState, params: optax.Params | None
    ) -> tuple[optax.Updates, ScheduledState]:
        (now,), dials, holds = _dials.applied(
            {name: value}, state.count, state.dials, state.holds
        )
        new_state = ScheduledState(increment(state.count), dials, holds)
        return apply(now, updates, params), new_state

    return link(ScheduledState, init_fn, update_fn)
