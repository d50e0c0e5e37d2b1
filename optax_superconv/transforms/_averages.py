r"""Which parameters are evaluated?

At a large rate the last parameters bounce around a valley, and their average lies near
its floor. An average is the last link of a chain: it sees the parameters after each
update, passes the updates on, and keeps

.. math:: a_{n+1} = a_n + w_n (\theta - a_n).

With :math:`w_n = 1 / (n + 1)` that is the plain mean, and with a mean's own weights any
other; nothing remains to be debiased when it is read.

A sample that is not finite anywhere is left out, as if its step had not been one to
sample: a single one would stay in the average for ever.

Accumulators are float32 or wider whatever the parameters: in bfloat16 an average with
decay 0.999 stops moving at a quarter of its goal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, tree_map_with_path
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._dials import value_at
from optax_superconv._numerics import (
    accumulator,
    increment,
    weight_after,
    wide_dtype,
)
from optax_superconv._trees import is_hole
from optax_superconv.transforms._link import given, link
from optax_superconv.transforms._samples import (
    AverageState,
    check_shape,
    is_averaged,
    is_finite,
    kept,
    sampler,
)


def _average(
    gain: Callable[[jax.Array, jax.Array], jax.Array],
    start_step: int,
    every: int,
    accumulator_dtype: Any,
    name: str,
) -> optax.GradientTransformationExtraArgs:
    """Averages with ``gain(count, num_samples)``, over the gains' own average of 1."""
    is_sample = sampler(start_step, every, name)
    accumulator_dtype = _checks.float_dtype("accumulator_dtype", accumulator_dtype)

    def init_fn(params: optax.Params) -> AverageState:
        def zeros(leaf: ArrayLike) -> Any:
            if not is_averaged(leaf):
                return optax.MaskedNode()
            return accumulator(leaf, accumulator_dtype)

        count, num_samples = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        averages = {name: jax.tree.map(zeros, params)}
        return AverageState(count, num_samples, jnp.zeros([], jnp.float32), averages)

    def update_fn(
        updates: optax.Updates, state: AverageState, params: optax.Params | None
    ) -> tuple[optax.Updates, AverageState]:
        means = kept(state, name)
        after = optax.apply_updates(given(params, "average them"), updates)
        sampled = is_sample(state.count) & is_finite(after)
        added = gain(state.count, state.num_samples)
        total = weight_after(state.total_weight, added)
        # Where every decay so far was 1, the last sample has all the weight.
        weight = jnp.where(total > 0, added / total, 1.0)

        def blend(keys: KeyPath, mean: Any, leaf: Any) -> Any:
            if is_hole(mean):
                return mean
            check_shape(keys, mean, leaf)
            dtype = wide_dtype(leaf, mean)
            wide = mean.astype(dtype)
            wide = wide + weight.astype(dtype) * (leaf.astype(dtype) - wide)
            return jnp.where(sampled, wide.astype(mean.dtype), mean)

        averages = tree_map_with_path(blend, means, after, is_leaf=is_hole)
        return updates, AverageState(
            increment(state.count),
            jnp.where(sampled, increment(state.num_samples), state.num_samples),
            jnp.where(sampled, total, state.total_weight),
            {name: averages},
        )

    return link(AverageState, init_fn, update_fn)


def average_params(
    weight: optax.ScalarOrSchedule | None = None,
    *,
    power: ArrayLike | None = None,
    start_step: int = 0,
    every: int = 1,
    accumulator_dtype: Any = None,
    name: str = "average",
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the parameters with weights of your own; updates pass through.

    .. math:: a_{n+1} = a_n + w(n)\,(\theta - a_n), \qquad a_1 = \theta

    for the n-th sample, counted from 0. The first is taken whole, whatever ``w(0)`` is.
    The weight is given, or it is that of a power,

    .. math:: w(n) = \frac{p + 1}{n + 1 + p},

    which gives the k-th of n samples a share in proportion to about :math:`k^p`: 0 is
    the plain mean, larger powers are means of the tail whose length grows with the run.

    Put it last in the chain: it adds the updates that reach it to the parameters, as
    ``optax.apply_updates`` will (anywhere else, what it averages are no parameters).
    Under ``optax.MultiSteps`` that chain is the inner optimizer, or micro-steps would
    be sampled.
    :func:`eval_params` reads the average.

    The update of step ``count`` = 0, 1, ... gives a sample if ``count`` is
    ``start_step`` or a multiple of ``every`` steps later. (To sample the ends of epochs
    of E steps from epoch k = 0, 1, ... on: ``start_step=(k + 1) * E - 1, every=E``.)
    A sample with a parameter that is not finite is left out and not counted.

    An average may go on with other numbers than before, such as another weight or
    decay; they hold for the samples to come. Its name and its shapes must stay.

    Batch statistics and whatever else was made for the weights of a step do not suit
    an average of them. Running statistics of batch norms:
    :func:`recalibrate_batch_stats`. The vectors of spectral norms, and scales of
    quantised weights, are to be computed anew from the averaged weights, as by some
    forward passes in training mode.

    Args:
      weight: :math:`w(n)` in (0, 1], a number or a function of the number of samples
        before. None is the weight of ``power``.
      power: :math:`p`, finite and at least 0. Give this or ``weight``. None is no
        power.
      start_step: The first step that is sampled, at least 0.
      every: Steps from sample to sample, at least 1. Each update costs the same.
      accumulator_dtype: Dtype of the average, a floating-point type. None is the dtype
        of the parameters, but at least float32. Of complex parameters it is the complex
        type of this width, at least complex64.
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
      >>> tx = optax.chain(optax.sgd(1.0), osc.average_params(power=1))
      >>> params = jnp.zeros(())
      >>> state = tx.init(params)
      >>> for _ in range(3):  # Parameters 1, 2, 3.
      ...     updates, state = tx.update(-jnp.ones(()), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{osc.eval_params(state, params):.4f}")  # (1 + 2 * 2 + 3 * 3) / 6
      2.3333

    References:
      Polyak and Juditsky, `Acceleration of Stochastic Approximation by Averaging
      <https://doi.org/10.1137/0330046>`_, 1992;
      Shamir and Zhang, `Stochastic Gradient Descent for Non-smooth Optimization
      <https://arxiv.org/abs/1212.1824>`_, 2013, section 4 (powers).
    """
    one = (weight is None) != (power is None)
    rule = "given, or `power` in its place"
    _checks.require(one, "weight", rule, f"weight={weight} and power={power}")
    if power is not None:
        _checks.single_number("power", power, _checks.NON_NEGATIVE)
    if weight is not None:
        _checks.number_or_schedule("weight", weight, _checks.FRACTION)

    def weight_of(num_samples: jax.Array) -> jax.Array:
        if weight is not None:
            return value_at(weight, num_samples)
        p = jnp.asarray(power, jnp.float32)
        return (p + 1) / (num_samples.astype(jnp.float32) + 1 + p)

    def gain(count: jax.Array, num_samples: jax.Array) -> jax.Array:
        del count
        return jnp.where(num_samples == 0, 1.0, weight_of(num_samples))

    return _average(gain, start_step, every, accumulator_dtype, name)


def ema_params(
    decay: optax.ScalarOrSchedule,
    *,
    warmup: ArrayLike | None = None,
    start_step: int = 0,
    every: int = 1,
    accumulator_dtype: Any = None,
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
    _checks.number_or_schedule("decay", decay, _checks.DECAY)
    if warmup is not None:
        _checks.single_number("warmup", warmup, _checks.FRACTION)
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

    return _average(gain, start_step, every, accumulator_dtype, name)


def swa_params(
    start_step: int,
    every: int = 1,
    *,
    accumulator_dtype: Any = None,
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
        power=0,
        start_step=start_step,
        every=every,
        accumulator_dtype=accumulator_dtype,
        name=name,
    )
