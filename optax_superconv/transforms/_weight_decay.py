"""Which weights decay, and how strongly?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._numerics import narrow, times, widen
from optax_superconv._trees import (
    array_of,
    given_updates,
    map_with_paths,
)
from optax_superconv.transforms._groups import Groups, grouped
from optax_superconv.transforms._link import given, scheduled_link


def _is_matrix(params: optax.Params, groups: Groups) -> Any:
    """True for leaves of two dimensions or more whose path does not end in `bias`.

    Axes along which multipliers lie are layers, and do not count.
    """
    axes = iter(groups.axes() or itertools.repeat(0))

    def decayed(path: str, leaf: Any) -> bool:
        is_bias = path.rpartition("/")[2] == "bias"
        return jnp.ndim(array_of(leaf)) - next(axes) > 1 and not is_bias

    return map_with_paths(decayed, params)


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: Any = "matrices"
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the weights times the weight decay to the updates, and records the decay.

    .. math:: u_i \leftarrow u_i + \lambda_t \theta_i

    It has the name and the place of Optax's function: after a rescaling such as Adam's
    and before the learning rate the decay is decoupled, as in AdamW; before a momentum
    it is coupled, as in SGD. Differs from ``optax.add_decayed_weights``:

    1. By default biases and vectors do not decay, and norm scales are vectors.
    2. The state is the same for a constant and for a schedule. The decay is float32 for
       every dtype of the updates, which keep theirs.

    Args:
      weight_decay: Strength :math:`\lambda` of at least 0, or a schedule ``count ->
        weight_decay``. AdamC's, in proportion to the rate, is
        ``lambda t: 0.01 * rate(t) / peak``.
      mask: What is decayed. ``"matrices"``: a leaf that has two dimensions or more and
        whose path does not end in ``bias`` (Flax's attention biases have two). Or as in
        ``optax.add_decayed_weights``: a tree of bools, a prefix of one, a function of
        the parameters, or None for everything. A norm scale that is stacked over layers
        has two dimensions too; it needs a mask, unless a recipe's ``multipliers`` show
        that its leading axis is one of layers.

    Returns:
      The transformation; :func:`read_hyperparams` reads ``weight_decay``. Its
      ``update`` needs the parameters; it leaves alone what has no update (None).

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> params = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
      >>> tx = osc.add_decayed_weights(0.5)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"], updates["bias"])
      [[1.5 1.5]] [1. 1.]

    References:
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    return decayed_weights(weight_decay, mask, grouped(None, None))


def decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: Any, groups_of: Callable[[Any], Groups]
) -> optax.GradientTransformationExtraArgs:
    """:func:`add_decayed_weights` where leaves may be stacked over layers."""
    _checks.number_or_schedule("weight_decay", weight_decay, _checks.NON_NEGATIVE)
    if isinstance(mask, str):
        _checks.choice("mask", mask, ("matrices",))

    def apply(
        decay: jax.Array, updates: optax.Updates, params: optax.Params | None
    ) -> optax.Updates:
        params = given_updates(given(params, "decay weights"), updates)

        def decayed(g: ArrayLike, p: ArrayLike) -> jax.Array:
            return narrow(widen(g) + times(decay, widen(p)), g)

        # The default has a name, and not a function, so that this is a link of plain
        # data: libraries turn functions in a chain into pytrees, or into schedules.
        chosen = True if mask is None else mask
        if isinstance(mask, str):
            chosen = _is_matrix(params, groups_of(params))
        elif _checks.is_function(mask):
            chosen = mask(params)
        try:
            where = jax.tree.map(
                lambda m, g: jax.tree.map(lambda _: m, g), chosen, updates
            )
        except ValueError as error:
            raise ValueError(
                "`mask` must be a tree of bools like the parameters, or a prefix of "
                f"one, or a function that makes one, got {mask!r}. (What can be called "
                "but is a pytree is read as one; trees of bools work.)"
            ) from error
        _checks.require(
            all(np.ndim(m) == 0 for m in jax.tree.leaves(where)),
            "mask",
            "a tree of bools like the parameters, or a prefix of one",
            "one with arrays for leaves",
        )
        return jax.tree.map(
            lambda m, g, p: decayed(g, p) if m else g, where, updates, params
        )

    return scheduled_link("weight_decay", weight_decay, apply)
