"""Does a rate act in the caller's step?

What is applied must be what was asked for: a schedule inside an optimizer multiplies
the rate that the optimizer is made with, and a step may leave the rate aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_superconv import _checks, _records, _trees
from optax_superconv.finders._runs import is_numeric
from optax_superconv.finders._steps import Knob, recorded, walk


def check_applied(
    state: Any,
    knobs: Mapping[str, Knob],
    wanted: Mapping[str, np.ndarray],
    in_state: bool,
) -> None:
    """Raises unless the state says that it applied one of the wanted values of each.

    ``wanted`` are (tries,) or (members, tries), the last one being due. An update that
    was left out, as by ``optax.apply_if_finite``, has an earlier one.
    """
    for name, values in wanted.items():
        if name not in knobs or f"{name}_1" in knobs:
            continue
        found = _trees.array_of(recorded(state, knobs[name]))
        found = np.asarray(found, np.float64)[..., None]
        close = np.isclose(found, values, rtol=1e-3, atol=0).any(axis=-1)
        if close.all():
            continue
        due = np.broadcast_to(values[..., -1], close.shape)[~close].ravel()[0]
        got = found[~close].ravel()[0]
        cause = (
            "its optimizer state was not updated, or something else was set there. "
            "Return what `update` returned."
            if in_state
            else "a schedule inside its optimizer changes it, or another value is set "
            "there. Leave the dials to the finder: a step (state, batch), without "
            "`pass_hyperparams`, trains at the values that are set, whatever the "
            "schedules."
        )
        raise ValueError(
            f"`step_fn` must apply the {name} that it is given, here {due:.3g}, got "
            f"{got:.3g} in the state that it returned: {cause}"
        )


def micro_steps(state: Any) -> list[np.ndarray]:
    """Of each ``optax.MultiSteps``: its micro-step and its update."""
    return [
        np.array([_trees.array_of(node.mini_step), _trees.array_of(node.gradient_step)])
        for _, node in walk(state, lambda x: isinstance(x, optax.MultiStepsState))
    ]


def check_accumulation(
    before: list[np.ndarray], after: list[np.ndarray], accumulation_steps: int
) -> None:
    """Raises unless the first rate was held for one update of ``optax.MultiSteps``."""
    for old, new in zip(before, after, strict=True):
        micro, update = new.reshape(2, -1) - old.reshape(2, -1)
        good = np.all(micro == 0) and np.all(update == 1)
        rule = "the number of micro-steps of which `optax.MultiSteps` makes an update"
        got = f"{accumulation_steps}, after which it has made {update.max()} updates"
        got += f" and {new[0].max()} micro-steps"
        _checks.require(bool(good), "accumulation_steps", rule, got)


def _trained(state: Any) -> list[Any]:
    """The numbers of a state, but for those beside a record of dials."""
    nodes = jax.tree.leaves(state, is_leaf=_records.has_record)
    return [
        leaf
        for node in nodes
        if not _records.has_record(node)
        for leaf in _trees.all_leaves(node)
        if is_numeric(leaf)
        and not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended)
    ]


@jax.jit
def _differ(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.any((a != b) & ~((a != a) & (b != b)))


def react(one: Any, other: Any) -> bool:
    """Whether the new states and losses of a step at two rates are not the same."""
    pairs = list(zip(_trained(one), _trained(other), strict=True))
    pairs.sort(key=lambda pair: np.size(pair[0]))
    for k in range(0, len(pairs), 32):  # The first ones are small, and will do.
        differ = [_differ(*pair) for pair in pairs[k : k + 32]]
        if any(map(bool, differ)):
            return True
    return False


def check_reacted(in_state: bool, low: float, high: float) -> None:
    """Raises: every step came out the same at two rates."""
    where = "in its state" if in_state else "that it is given"
    remedy = (
        "Update the parameters with the optimizer of that state, and return both"
        if in_state
        else "Make the optimizer of it, or leave the dials to the finder: a step "
        "(state, batch), without `pass_hyperparams`"
    )
    raise ValueError(
        f"`step_fn` must react to the learning rate {where}, got the same new state at "
        f"{low:.3g} and at {high:.3g}, at every step: the rate does not reach the "
        f"update, or all gradients are 0. {remedy}."
    )
