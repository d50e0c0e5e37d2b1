"""Which of the last parameters are kept, to be averaged when they are read?"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, tree_map_with_path
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._numerics import increment
from optax_superconv._trees import is_hole
from optax_superconv.transforms._link import given, link
from optax_superconv.transforms._samples import (
    SnapshotState,
    check_shape,
    is_averaged,
    is_finite,
    kept,
    sampler,
)


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
    float32 or wider when :func:`eval_params` reads it. Each update, sampled or not,
    reads and writes all of them. :func:`ema_params` with a decay of
    1 - 2 / (window + 1) costs one copy, and forgets more gently.

    Each snapshot is a tree like the parameters, and sharded like them. Snapshots that
    are not finite everywhere are left out. A state with another window is refused.

    Args:
      window: Number of snapshots that are kept, at least 1. While there are fewer, the
        mean is of these.
      every: Steps from snapshot to snapshot, at least 1; an epoch in the paper.
      start_step: The first step that is sampled, at least 0; see
        :func:`average_params`.
      name: Name of this average, a string; see :func:`average_params`.

    Returns:
      The transformation, to be put last in the chain; see :func:`average_params`, also
      for ``optax.MultiSteps``. :func:`eval_params` reads it.

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
        def zeros(leaf: ArrayLike) -> Any:
            return jnp.zeros_like(leaf) if is_averaged(leaf) else optax.MaskedNode()

        # A tree per slot: an axis of slots would need a sharding of its own, and those
        # who shard a state like its parameters have none for it.
        slots = tuple(jax.tree.map(zeros, params) for _ in range(window))
        count, num_samples = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return SnapshotState(count, num_samples, {name: slots})

    def update_fn(
        updates: optax.Updates, state: SnapshotState, params: optax.Params | None
    ) -> tuple[optax.Updates, SnapshotState]:
        slots = kept(state, name)
        rule = f"of {window} snapshots, the `window`"
        _checks.require(len(slots) == window, "state", rule, f"one of {len(slots)}")
        after = optax.apply_updates(given(params, "average them"), updates)
        sampled = is_sample(state.count) & is_finite(after)

        def put(here: jax.Array, keys: KeyPath, old: Any, leaf: Any) -> Any:
            if is_hole(old):
                return old
            check_shape(keys, old, leaf)
            return jnp.where(here, leaf.astype(old.dtype), old)

        snapshots = []
        for k, slot in enumerate(slots):
            here = sampled & (state.num_samples % window == k)
            new = tree_map_with_path(partial(put, here), slot, after, is_leaf=is_hole)
            snapshots.append(new)
        return updates, SnapshotState(
            increment(state.count),
            jnp.where(sampled, increment(state.num_samples), state.num_samples),
            {name: tuple(snapshots)},
        )

    return link(SnapshotState, init_fn, update_fn)
