r"""Which parameters are evaluated?

At a large rate the last parameters bounce around a valley, and their average lies near
its floor. An average is the last link of a chain: it sees the parameters after each
update, passes the updates on, and keeps

.. math:: a_{n+1} = a_n + w_n (\theta - a_n).

With :math:`w_n = 1 / (n + 1)` that is the plain mean, and with a mean's own weights any
other; nothing remains to be debiased when it is read.

Accumulators are float32 or wider whatever the parameters: in bfloat16 an average with
decay 0.999 stops moving at a quarter of its goal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._dials import (
    array_of,
    find_states,
    increment,
    states_in,
    value_at,
    wide_dtype,
)
from optax_superconv.transforms._labels import is_box, is_hole, listed, map_with_paths


class AverageState(NamedTuple):
    """State of :func:`average_params` and of the averages that are made of it."""

    count: jax.Array  # (), int32
    num_samples: jax.Array  # (), int32
    total_weight: jax.Array  # (), float32; the average of a constant 1
    averages: dict[str, optax.Params]  # name to a tree like the parameters


class SnapshotState(NamedTuple):
    """State of :func:`lawa_params`."""

    count: jax.Array  # (), int32
    num_samples: jax.Array  # (), int32
    snapshots: dict[str, optax.Params]  # name to a tree of (window, ...)


def _is_averaged(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)


def _round_at_random(key: jax.Array, wide: jax.Array) -> jax.Array:
    """A float32 as one of its two neighbours in bfloat16; the mean is the float32."""
    if jnp.iscomplexobj(wide):
        return wide
    wide = wide.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(wide, jnp.uint32)
    noise = jax.random.bits(key, wide.shape, jnp.uint32) >> 16
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    result = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.isfinite(wide), result, wide).astype(jnp.bfloat16)


def _sampler(
    start_step: int, every: int, name: str
) -> Callable[[jax.Array], jax.Array]:
    """Checks when samples are taken, and says whether the update at a count is one."""
    start_step = _checks.steps("start_step", start_step)
    every = _checks.steps("every", every, at_least=1)
    if not isinstance(name, str):
        raise TypeError(
            f"`name` must be a string, got {name!r} of type {type(name).__name__}."
        )
    return lambda count: (count >= start_step) & ((count - start_step) % every == 0)


def _params_after(updates: optax.Updates, params: optax.Params | None) -> optax.Params:
    if params is None:
        raise ValueError(
            "`params` must be given to `update` to average them, got None."
        )
    return optax.apply_updates(params, updates)


def _average(
    gain: Callable[[jax.Array, jax.Array], jax.Array],
    start_step: int,
    every: int,
    accumulator_dtype: Any,
    rounding_seed: int | None,
    name: str,
) -> optax.GradientTransformationExtraArgs:
    """Averages with ``gain(count, num_samples)``, over the gains' own average of 1."""
    is_sample = _sampler(start_step, every, name)
    if accumulator_dtype is not None:
        accumulator_dtype = jnp.dtype(accumulator_dtype)
        _checks.require(
            jnp.issubdtype(accumulator_dtype, jnp.floating),
            "accumulator_dtype",
            "a floating-point type",
            accumulator_dtype,
        )
    if rounding_seed is not None:
        _checks.steps("rounding_seed", rounding_seed)
        _checks.require(
            accumulator_dtype == jnp.bfloat16,
            "accumulator_dtype",
            "bfloat16 with `rounding_seed`",
            accumulator_dtype,
        )

    def init_fn(params: optax.Params) -> AverageState:
        def zeros(leaf: ArrayLike) -> Any:
            if not _is_averaged(leaf):
                return optax.MaskedNode()
            real = not jnp.iscomplexobj(leaf)
            dtype = accumulator_dtype if real else None
            return jnp.zeros_like(leaf, dtype=dtype or wide_dtype(leaf))

        zero = jnp.zeros([], jnp.int32)
        return AverageState(
            zero,
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.float32),
            {name: jax.tree.map(zeros, params)},
        )

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AverageState]:
        state = cast(AverageState, state)
        del extra_args
        after = _params_after(updates, params)
        sampled = is_sample(state.count)
        added = gain(state.count, state.num_samples)
        total = state.total_weight + added * (1 - state.total_weight)
        # Where every decay so far was 1, the last sample has all the weight.
        weight = jnp.where(total > 0, added / total, 1.0)
        averages = state.averages[name]

        def blend(mean: Any, leaf: Any) -> Any:
            if is_hole(mean):
                return mean
            dtype = np.promote_types(wide_dtype(leaf), wide_dtype(mean))
            wide = mean.astype(dtype)
            return wide + weight.astype(dtype) * (leaf.astype(dtype) - wide)

        wide = jax.tree.map(blend, averages, after, is_leaf=is_hole)
        if rounding_seed is not None:
            key = jax.random.fold_in(jax.random.key(rounding_seed), state.count)
            keys = optax.tree.split_key_like(key, wide)
            wide = jax.tree.map(_round_at_random, keys, wide)
        averages = jax.tree.map(
            lambda new, old: jnp.where(sampled, new.astype(old.dtype), old),
            wide,
            averages,
        )
        return updates, AverageState(
            increment(state.count),
            jnp.where(sampled, increment(state.num_samples), state.num_samples),
            jnp.where(sampled, total, state.total_weight),
            {name: averages},
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def average_params(
    weight: optax.ScalarOrSchedule,
    *,
    start_step: int = 0,
    every: int = 1,
    accumulator_dtype: Any = None,
    rounding_seed: int | None = None,
    name: str = "average",
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the parameters with weights of your own; updates pass through.

    .. math:: a_{n+1} = a_n + w(n)\,(\theta - a_n), \qquad a_1 = \theta

    for the n-th sample, counted from 0. The first is taken whole, whatever ``w(0)`` is.
    Put it last in the chain: it adds the updates that reach it to the parameters, as
    ``optax.apply_updates`` will (anywhere else, what it averages are no parameters).
    :func:`eval_params` reads the average.

    The update of step ``count`` = 0, 1, ... gives a sample if ``count`` is
    ``start_step`` or a multiple of ``every`` steps later. (To sample the ends of epochs
    of E steps from epoch k = 0, 1, ... on: ``start_step=(k + 1) * E - 1, every=E``.)

    Args:
      weight: :math:`w(n)` in (0, 1], a number or a function of the number of samples
        before. ``lambda n: 1 / (n + 1)`` is the mean, :func:`polynomial_weights` a mean
        of the tail.
      start_step: The first step that is sampled, at least 0.
      every: Steps from sample to sample, at least 1. Each update costs the same.
      accumulator_dtype: Dtype of the average, a floating-point type. None is the dtype
        of the parameters, but at least float32. Complex parameters keep theirs.
      rounding_seed: An int of at least 0 that rounds at random, for runs whose memory
        has no room for float32. It needs ``accumulator_dtype=jnp.bfloat16``. The mean
        of the rounded steps is right, also for small steps. Every run with this seed
        rounds in the same way. It draws a number per parameter and step. None rounds to
        the nearest number.
      name: Name of this average, a string. It tells several averages in one state
        apart.

    Returns:
      The transformation. Its accumulators are sharded like the parameters. Leaves that
      are not floating point, or that ``optax.masked`` takes out, are not averaged.

    Raises:
      ValueError: In ``update``, if it gets no ``params``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> tx = optax.chain(
      ...     optax.sgd(1.0), osc.average_params(lambda n: 1 / (n + 1)))
      >>> params = jnp.zeros(())
      >>> state = tx.init(params)
      >>> for _ in range(3):  # Parameters 1, 2, 3.
      ...     updates, state = tx.update(-jnp.ones(()), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(osc.eval_params(state, params))
      2.0

    References:
      Polyak and Juditsky, `Acceleration of Stochastic Approximation by Averaging
      <https://doi.org/10.1137/0330046>`_, 1992.
    """
    rule = "above 0 and at most 1"
    _checks.number_or_schedule("weight", weight, rule, lambda w: (w > 0) & (w <= 1))

    def gain(count: jax.Array, num_samples: jax.Array) -> jax.Array:
        del count
        return jnp.where(num_samples == 0, 1.0, value_at(weight, num_samples))

    return _average(gain, start_step, every, accumulator_dtype, rounding_seed, name)


def polynomial_weights(power: ArrayLike) -> Callable[[ArrayLike], jax.Array]:
    r"""Weights for :func:`average_params` of which the last samples have the most.

    .. math:: w(n) = \frac{p + 1}{n + 1 + p}

    gives the k-th of n samples a share in proportion to about :math:`k^p`: 0 is the
    plain mean, larger powers are means of the tail whose length grows with the run.

    Args:
      power: :math:`p`, at least 0.

    Returns:
      The function of the number of samples before.

    Examples:
      >>> import optax_superconv as osc
      >>> weight = osc.polynomial_weights(3)
      >>> print([round(float(weight(n)), 3) for n in (0, 1, 9)])
      [1.0, 0.8, 0.308]

    References:
      Shamir and Zhang, `Stochastic Gradient Descent for Non-smooth Optimization
      <https://arxiv.org/abs/1212.1824>`_, 2013, section 4 (polynomial-decay averaging).
    """
    _checks.number("power", power, "finite and at least 0", _checks.non_negative)

    def weight(num_samples: ArrayLike) -> jax.Array:
        exponent = jnp.asarray(power, jnp.float32)
        before = jnp.asarray(num_samples).astype(jnp.float32)
        return (exponent + 1) / (before + 1 + exponent)

    return weight


def ema_params(
    decay: optax.ScalarOrSchedule,
    *,
    warmup: ArrayLike | None = None,
    start_step: int = 0,
    every: int = 1,
    accumulator_dtype: Any = None,
    rounding_seed: int | None = None,
    name: str = "ema",
) -> optax.GradientTransformationExtraArgs:
    r"""Exponential moving average of the parameters, debiased; updates pass through.

    .. math:: a_t = \frac{\sum_{s \le t} (1 - \beta)\, \beta^{t - s}\, \theta_s}
                         {\sum_{s \le t} (1 - \beta)\, \beta^{t - s}},

    a mean over the last :math:`1 / (1 - \beta)` samples or so, without the initial
    parameters. A decay that moves is debiased exactly. With ``warmup`` the decay of the
    n-th sample (from 0) is at most :math:`1 - (n + 1)^{-p}`, which forgets the start
    faster. (``optax.ema`` averages updates, not parameters.)

    Args:
      decay: :math:`\beta` per sample, in [0, 1), or a schedule ``count -> decay``.
      warmup: :math:`p` in (0, 1]. 2/3 is timm's. 1 is a plain mean until its length is
        :math:`1 / (1 - \beta)`. None is no warm-up; the debiased average needs none.
      start_step: The first step that is sampled, at least 0.
      every: Steps from sample to sample, at least 1. ``decay`` is per sample.
      accumulator_dtype: Dtype of the average; see :func:`average_params`.
      rounding_seed: For bfloat16 accumulators; see :func:`average_params`.
      name: Name of this average, a string; see :func:`average_params`.

    Returns:
      The transformation, to be put last in the chain; :func:`eval_params` reads it.

    Raises:
      ValueError: In ``update``, if it gets no ``params``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> tx = optax.chain(optax.sgd(1.0), osc.ema_params(0.5))
      >>> params = jnp.zeros(())
      >>> state = tx.init(params)
      >>> for _ in range(2):  # Parameters 1 and 2, with weights 1/3 and 2/3.
      ...     updates, state = tx.update(-jnp.ones(()), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(osc.eval_params(state, params).round(4))
      1.6667

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015, sections 3 (the
      debiasing) and 7.2 (of parameters).
    """
    _checks.number_or_schedule("decay", decay, _checks.DECAY_RULE, _checks.decay_rate)
    if warmup is not None:
        rule = "above 0 and at most 1"
        _checks.number("warmup", warmup, rule, lambda p: (p > 0) & (p <= 1))
    constant = None if callable(decay) else _checks.number("decay", decay)

    def gain(count: jax.Array, num_samples: jax.Array) -> jax.Array:
        # 1 - 0.9999 in float32 has but four digits.
        added = (
            1 - value_at(decay, count)
            if constant is None
            else jnp.asarray(1 - constant, jnp.float32)
        )
        if warmup is None:
            return added
        power = jnp.asarray(warmup, jnp.float32)
        return jnp.maximum(added, (num_samples.astype(jnp.float32) + 1) ** -power)

    return _average(gain, start_step, every, accumulator_dtype, rounding_seed, name)


def swa_params(
    start_step: int,
    every: int = 1,
    *,
    accumulator_dtype: Any = None,
    rounding_seed: int | None = None,
    name: str = "swa",
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic weight averaging: the mean from a step on; updates pass through.

    .. math:: a_{n+1} = a_n + \frac{\theta - a_n}{n + 1}

    Args:
      start_step: The first step that is sampled, at least 0; see
        :func:`average_params`.
      every: Steps from sample to sample, at least 1. In the paper it is an epoch, or a
        cycle of the rate, sampled where the rate is lowest.
      accumulator_dtype: Dtype of the average; see :func:`average_params`.
      rounding_seed: For bfloat16 accumulators; see :func:`average_params`.
      name: Name of this average, a string; see :func:`average_params`.

    Returns:
      The transformation, to be put last in the chain; :func:`eval_params` reads it. A
      network with batch norms then needs :func:`recalibrate_batch_stats`.

    Raises:
      ValueError: In ``update``, if it gets no ``params``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> tx = optax.chain(optax.sgd(1.0), osc.swa_params(1, every=2))
      >>> params = jnp.zeros(())
      >>> state = tx.init(params)
      >>> for _ in range(5):  # Parameters 1 to 5; samples 2 and 4.
      ...     updates, state = tx.update(-jnp.ones(()), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(osc.eval_params(state, params))
      3.0

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
      Generalization <https://arxiv.org/abs/1803.05407>`_, 2018, algorithm 1.
    """
    return average_params(
        polynomial_weights(0),
        start_step=start_step,
        every=every,
        accumulator_dtype=accumulator_dtype,
        rounding_seed=rounding_seed,
        name=name,
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
    is_sample = _sampler(start_step, every, name)

    def init_fn(params: optax.Params) -> SnapshotState:
        def ring(leaf: ArrayLike) -> Any:
            if not _is_averaged(leaf):
                return optax.MaskedNode()
            return jnp.stack([jnp.zeros_like(leaf)] * window)

        return SnapshotState(
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.int32),
            {name: jax.tree.map(ring, params)},
        )

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SnapshotState]:
        state = cast(SnapshotState, state)
        del extra_args
        after = _params_after(updates, params)
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

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _means(state: AverageState | SnapshotState) -> dict[str, optax.Params]:
    """The average of each name, like the parameters; masked leaves stay masked."""
    number = array_of(state.num_samples)
    _checks.require(
        number.ndim == 0,
        "opt_state",
        "of a single run (of several: `jax.vmap(eval_params)(opt_state, params)`)",
        f"one whose count of samples has the shape {number.shape}",
    )
    if isinstance(state, AverageState):
        return state.averages

    def mean(ring: Any) -> Any:
        if is_hole(ring):
            return ring
        snapshots = array_of(ring)
        wide = snapshots.astype(wide_dtype(snapshots))
        kept = jnp.minimum(number, len(wide))
        total = wide.sum(0)  # Snapshots not yet taken are 0.
        return total / jnp.maximum(kept, 1).astype(total.dtype)

    return {
        name: jax.tree.map(mean, tree, is_leaf=lambda n: is_hole(n) or is_box(n))
        for name, tree in state.snapshots.items()
    }


def _by_path(tree: Any) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    map_with_paths(leaves.__setitem__, tree, holes=True)
    return leaves


def _is_below(path: str, parents: set[str]) -> bool:
    names = path.split("/")
    return any("/".join(names[:k]) in parents for k in range(len(names) + 1))


def _check_same_paths(average: dict[str, Any], params: dict[str, Any]) -> None:
    """Raises unless both have the same leaves; a masked node stands for a subtree."""
    holes = {path for path, leaf in average.items() if is_hole(leaf)}
    missing = [path for path in average if path not in params and path not in holes]
    anew = [p for p in params if p not in average and not _is_below(p, holes)]
    reasons = [
        *([f"no {listed(missing)}"] if missing else []),
        *([f"{listed(anew)} anew"] if anew else []),
    ]
    _checks.require(
        not reasons,
        "params",
        "of the structure that the average has seen at `init`",
        " and ".join(reasons),
    )


def eval_params(
    opt_state: Any, params: optax.Params, *, name: str | None = None
) -> Any:
    """The averaged parameters, ready to evaluate.

    Finds the average at any nesting of the state; inside ``optax.partition``, the
    averages of the groups are put together. Works inside and outside ``jit``.

    Args:
      opt_state: An optimizer state with an average, such as that of
        :func:`ema_params`, or any pytree that holds one, such as the ``opt_state`` of
        an ``nnx.Optimizer`` or a Linen ``TrainState``. A state with a leading axis, as
        of ``jax.vmap``, needs ``jax.vmap(eval_params)(opt_state, params)``.
      params: The current parameters, with the paths and the shapes that the optimizer
        was initialised with. The containers may differ, an ``nnx.State`` for example.
      name: The ``name`` that the average was made with. None is the only average; a
        state with several needs a name.

    Returns:
      The average in the containers, dtypes and Flax Variables of ``params``. Leaves
      that are not averaged, and all before the first sample, are those of ``params``.
      Batch statistics belong to parameters: see :func:`recalibrate_batch_stats`.

    Raises:
      ValueError: If there is no average in the state, or if two averages with the same
        name hold the same leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> tx = optax.chain(optax.sgd(1.0), osc.ema_params(0.5), osc.swa_params(0))
      >>> params = {"w": jnp.zeros(())}
      >>> state = tx.init(params)
      >>> for _ in range(2):  # Parameters 1 and 2.
      ...     updates, state = tx.update({"w": -jnp.ones(())}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(osc.eval_params(state, params, name="swa")["w"])
      1.5
    """
    found = [
        (at, state, key, tree)
        for at, state in find_states(opt_state, AverageState, SnapshotState).items()
        for key, tree in _means(state).items()
    ]
    _checks.require(
        bool(found),
        "opt_state",
        "of an optimizer with an average",
        states_in(opt_state),
    )
    names = list(dict.fromkeys(key for _, _, key, _ in found))
    known = ", ".join(map(repr, names))
    if name is None:
        _checks.require(len(names) == 1, "name", f"one of {known}", name)
    else:
        _checks.require(name in names, "name", f"one of {known}", repr(name))
    current = _by_path(params)
    chosen: dict[str, tuple[str, Any, Any]] = {}
    for at, state, key, tree in found:
        if name is not None and key != name:
            continue
        average = _by_path(tree)
        _check_same_paths(average, current)
        for path, leaf in average.items():
            if leaf is None or is_hole(leaf):
                continue
            _checks.require(
                path not in chosen,
                "opt_state",
                f"one with a single average {key!r} of {path!r} (give them names, or "
                "pass a part of the state)",
                f"several, at {chosen.get(path, [''])[0]!r} and {at!r}",
            )
            chosen[path] = at, state, array_of(leaf)

    def averaged(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return jax.tree.map(lambda array: array, leaf)  # No Variable is shared.
        _, state, average = chosen[path]
        now = array_of(leaf)
        _checks.require(
            now.shape == average.shape,
            "params",
            f"of the shapes that the average has seen at `init` ({average.shape} at "
            f"{path!r})",
            now.shape,
        )
        value = jnp.where(
            array_of(state.num_samples) > 0, average.astype(now.dtype), now
        )
        return jax.tree.map(lambda _: value, leaf)

    return map_with_paths(averaged, params)
