"""Which of the last parameters are kept, to be averaged when they are read?"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._numerics import increment
from optax_superconv._trees import is_hole
from optax_superconv.transforms._averages import is_averaged, sampler
from optax_superconv.transforms._link import given, link


class SnapshotState(NamedTuple):
    """State of :func:`lawa_params`."""

    count: jax.Array  # (), int32
    num_samples: jax.Array  # (), int32
    snapshots: dict[str, optax.Params]  # name to a tree of (window, ...)


def lawa_params(
    window: int,
    *,
    every: int = 1,
    start_step: int = 0,
    name: str = "lawa",
) -> optax.GradientTransformationExtraArgs:
    """Latest weight averaging: the mean of the last snapshots; updates pass through.

    Keeps the last ``window`` snapshots in a ring, in the parameters' own dtypes, which
    takes the memory of ``window`` copies of the parameters; their mean is computed in
    float32 or wider when :func:`eval_params` reads it. :func:`ema_params` with a decay
    of 1 - 2 / (window + 1) costs one copy, and forgets more gently.

    Args:
      window: Number of snapshots that are kept, at least 1. While there are fewer, the
        mean is of these.
      every: Steps from snapshot to snapshot, at least 1; an epoch in the paper.
      start_step: The first step that is sampled, at least 0; see
        :func:`average_params`.
      name: Name of this average, a string; see :func:`average_params`.

    Returns:
      The transformation, to be put last in the chain; :func:`eval_params` reads it.

    Raises:
      ValueError: In ``update``, if it gets no ``params``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> tx = optax.chain(optax.sgd(1.0), osc.lawa_params(2))
      >>> params = jnp.zeros(())
      >>> state = tx.init(params)
      >>> for _ in range(5):  # Parameters 1 to 5.
      ...     updates, state = tx.update(-jnp.ones(()), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(osc.eval_params(state, params))
      4.5

    References:
      Kaddour, `Stop Wasting My Time! Saving Days of ImageNet and BERT Training with
      Latest Weight Averaging <https://arxiv.org/abs/2209.14981>`_, 2022.
    """
    window = _checks.steps("window", window, at_least=1)
    is_sample = sampler(start_step, every, name)

    def init_fn(params: optax.Params) -> SnapshotState:
        def ring(leaf: ArrayLike) -> Any:
            if not is_averaged(leaf):
                return optax.MaskedNode()
            return jnp.stack([jnp.zeros_like(leaf)] * window)

        return SnapshotState(
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.int32),
            {name: jax.tree.map(ring, params)},
        )

    def update_fn(
        updates: optax.Updates, state: SnapshotState, params: optax.Params | None
    ) -> tuple[optax.Updates, SnapshotState]:
        after = optax.apply_updates(given(params, "average them"), updates)
        sampled = is_sample(state.count)
        slot = state.num_samples % window

        def put(ring: Any, leaf: Any) -> Any:
            if is_hole(ring):
                return ring
            return ring.at[slot].set(jnp.where(sampled, leaf, ring[slot]))

        snapshots = jax.tree.map(put, state.snapshots[name], after, is_leaf=is_hole)
        return updates, SnapshotState(
            increment(state.count),
            jnp.where(sampled, increment(state.num_samples), state.num_samples),
            {name: snapshots},
        )

    return link(SnapshotState, init_fn, update_fn)
