"""Which rate scales the updates, and how is it recorded?"""

from __future__ import annotations

import jax
import optax

from optax_superconv import _checks
from optax_superconv._numerics import scale
from optax_superconv.transforms._link import scheduled_link


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule, *, flip_sign: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Scales updates by the (negated) learning rate, and records the rate it applied.

    It has the name and the contract of Optax's function, for the end of any chain. Put
    it in the place of that one, and :func:`read_hyperparams` reads the rate. Differs
    from ``optax.scale_by_learning_rate``:

    1. The state is the same for a constant and for a schedule, so that a checkpoint of
       one loads into the other.
    2. The rate is float32 for every dtype of the updates, which keep theirs.

    Args:
      learning_rate: A finite number, or a schedule ``count -> rate``.
      flip_sign: Whether to multiply by minus the rate, as descent needs.

    Returns:
      The transformation. Its record is the rate itself, never negated.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> schedule = lambda count: 0.1 / (count + 1)
      >>> tx = optax.chain(
      ...     optax.scale_by_lion(), osc.scale_by_learning_rate(schedule))
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state, params)
      >>> print(float(osc.read_hyperparams(state)["learning_rate"]))
      0.05000000074505806
    """
    _checks.number_or_schedule("learning_rate", learning_rate)

    def apply(
        rate: jax.Array, updates: optax.Updates, params: optax.Params | None
    ) -> optax.Updates:
        del params
        return scale(-rate if flip_sign else rate, updates)

    return scheduled_link("learning_rate", learning_rate, apply)
