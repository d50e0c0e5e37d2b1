"""How long were the gradients of this run?"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_superconv import _checks
from optax_superconv._numerics import increment, wide_dtype, widen
from optax_superconv.transforms._link import link


class RecordGradientNormsState(NamedTuple):
    """State of :func:`record_gradient_norms`."""

    count: jax.Array  # (), int32
    gradient_norms: jax.Array  # (samples,), float32; -1 where nothing is recorded
    num_in_sample: jax.Array  # (), int32; norms in the mean of the current sample


def record_gradient_norms(
    total_steps: int,
    *,
    ord: Literal[1, 2],
    num_samples: int = 1000,
) -> optax.GradientTransformationExtraArgs:
    r"""Records the norms of a run's gradients, for :func:`refined_schedule`.

    .. math:: G_t = \sum_i |g_{t,i}| \;\text{ or }\; \sqrt{\sum_i |g_{t,i}|^2}

    over the whole tree, in float32 whatever the dtype of the gradient. Place it first
    in the chain, before any clipping, and with the chain inside ``optax.MultiSteps``,
    so that it counts optimizer steps; updates pass through untouched. After the run,
    ``optax.tree.get(opt_state, "gradient_norms")`` is the record.

    Args:
      total_steps: Steps of the whole run, at least 1. Nothing is recorded after them.
      ord: 1 for the l1 norm, which refines a schedule of Adam, 2 for the l2 norm,
        which refines one of SGD.
      num_samples: Length of the record, at least 1; it is no longer than
        ``total_steps``. The run is cut into so many parts, as equal as whole steps
        allow, and each sample is the mean of the finite norms of its part. A run that
        is resumed needs the same ``total_steps``, and a state with a record of another
        length is refused.

    Returns:
      The transformation. A sample is -1 until it is reached, or if no norm of its part
      was finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> tx = optax.chain(osc.record_gradient_norms(2, ord=2), optax.sgd(0.1))
      >>> state = tx.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([3.0, 4.0]), jnp.array([0.0, 1.0])):
      ...     _, state = tx.update(gradient, state)
      >>> print(optax.tree.get(state, "gradient_norms"))
      [5. 1.]

    References:
      Defazio, Cutkosky, Mehta and Mishchenko, `Optimal Linear Decay Learning Rate
      Schedules and Further Refinements <https://arxiv.org/abs/2310.07831>`_, 2023.
    """
    total = _checks.steps("total_steps", total_steps, at_least=1)
    rule = _checks.Rule("1 (for Adam) or 2 (for SGD)", lambda o: (o == 1) | (o == 2))
    _checks.scalar("ord", ord, rule)
    samples = min(_checks.steps("num_samples", num_samples, at_least=1), total)
    # The first `num_long` samples are a step longer than the others.
    short, num_long = divmod(total, samples)
    long = short + (num_long > 0)
    end_of_long = num_long * long

    def norm(updates: optax.Updates) -> jax.Array:
        # A record is not part of what is differentiated, and a norm of 0 has no slope.
        fixed = jax.lax.stop_gradient(jax.tree.leaves(updates))
        sizes = [jnp.abs(widen(g)) for g in fixed]
        dtype = wide_dtype(jnp.float32(0), *sizes)
        value = optax.tree.norm([size.astype(dtype) for size in sizes], ord=ord)
        return jnp.asarray(value, jnp.float32)

    def init_fn(params: optax.Params) -> RecordGradientNormsState:
        del params
        return RecordGradientNormsState(
            count=jnp.zeros([], jnp.int32),
            gradient_norms=jnp.full([samples], -1, jnp.float32),
            num_in_sample=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: RecordGradientNormsState,
        params: optax.Params | None,
    ) -> tuple[optax.Updates, RecordGradientNormsState]:
        del params
        length = len(state.gradient_norms)
        rule = f"of a record of {samples} samples"
        _checks.require(length == samples, "state", rule, f"one of {length}")
        step = jnp.minimum(state.count, total - 1)
        after = step - end_of_long
        index = jnp.where(after < 0, step // long, num_long + after // short)
        in_part = jnp.where(after < 0, step % long, after % short)
        num = jnp.where(in_part == 0, 0, state.num_in_sample)
        value, mean = norm(updates), state.gradient_norms[index]
        longer = mean + (value - mean) / (num + 1).astype(jnp.float32)
        longer = jnp.where(num == 0, value, longer)
        running = state.count < total
        counts = running & jnp.isfinite(value)
        return updates, RecordGradientNormsState(
            count=increment(state.count),
            gradient_norms=state.gradient_norms.at[index].set(
                jnp.where(counts, longer, mean)
            ),
            num_in_sample=jnp.where(
                running, jnp.where(counts, num + 1, num), state.num_in_sample
            ),
        )

    return link(RecordGradientNormsState, init_fn, update_fn)
