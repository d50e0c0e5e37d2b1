"""Which weights decay, and how strongly?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._numerics import narrow, times, widen
from optax_superconv._trees import array_of, map_with_paths
from optax_superconv.transforms._link import given, scheduled_link


def _is_matrix(params: optax.Params) -> Any:
    """True for leaves of two dimensions or more whose path does not end in `bias`."""

    def decayed(path: str, leaf: Any) -> bool:
        return jnp.ndim(array_of(leaf)) > 1 and path.rpartition("/")[2] != "bias"

    return map_with_paths(decayed, params)


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule, weight_decay_mask: Any = "matrices"
) -> optax.GradientTransformationExtraArgs:
    """``optax.add_decayed_weights`` that records the decay and keeps one structure."""
    _checks.number_or_schedule("weight_decay", weight_decay, _checks.NON_NEGATIVE)
    # The default has a name because optax.inject_hyperparams takes a callable for a
    # schedule.
    if isinstance(weight_decay_mask, str):
        _checks.choice("weight_decay_mask", weight_decay_mask, ("matrices",))
        weight_decay_mask = _is_matrix

    def apply(
        decay: jax.Array, updates: optax.Updates, params: optax.Params | None
    ) -> optax.Updates:
        if not callable(weight_decay) and _checks.is_zero(weight_decay):
            return updates  # Reads no parameters, so none need to be given.

        def decayed(g: ArrayLike, p: ArrayLike) -> jax.Array:
            return narrow(widen(g) + times(decay, widen(p)), g)

        return jax.tree.map(decayed, updates, given(params, "decay weights"))

    transform = scheduled_link("weight_decay", weight_decay, apply)
    if weight_decay_mask is None:
        return transform
    return optax.masked(transform, weight_decay_mask)
