r"""How does a momentum that changes act on the updates?

Momentum is a running sum of gradients (``trace``) or a running mean (Adam's first
moment). A sum works with a schedule as it is. A mean has a bias that must be removed.
Division by :math:`1 - \beta_t^t` removes it only if :math:`\beta` is constant. With
one cycle between 0.95 and 0.85 and a constant gradient, this division makes the first
moment wrong by up to 35 % in a run of 20 steps, and by up to 11 % in one of 200. So
each of Adam's means comes with the mean of a constant 1,

.. math:: w_t = \beta_t w_{t-1} + (1 - \beta_t), \qquad w_0 = 0,

and is divided by it. This is exact for any schedule. For a constant, :math:`w_t` equals
:math:`1 - \beta^t`.

Accumulators of bfloat16 or float16 parameters are float32 unless a dtype is given. In
bfloat16 a mean with :math:`\beta = 0.999` stops at a quarter of its final value.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks, _dials
from optax_superconv._numerics import (
    accumulator,
    increment,
    narrow,
    once,
    times,
    weight_after,
    wide_dtype,
    widen,
)
from optax_superconv._trees import map_updates
from optax_superconv.transforms._link import link


class ScheduledTraceState(NamedTuple):
    """State of :func:`scheduled_trace`."""

    count: jax.Array  # (), int32
    trace: optax.Updates  # like the parameters
    dials: _dials.Record  # momentum
    holds: _dials.Holds


class ScaleByScheduledAdamState(NamedTuple):
    """State of :func:`scale_by_scheduled_adam`."""

    count: jax.Array  # (), int32
    mu: optax.Updates  # like the parameters
    nu: optax.Updates  # like the parameters
    mu_weight: jax.Array  # (), float32; the mean of a constant 1
    nu_weight: jax.Array  # (), float32
    dials: _dials.Record  # b1, b2, eps
    holds: _dials.Holds


def _zeros_like(params: optax.Params, dtype: Any = None) -> optax.Updates:
    return jax.tree.map(partial(accumulator, dtype=dtype), params)


def _real_zeros_like(leaf: ArrayLike) -> jax.Array:
    return jnp.zeros_like(leaf, dtype=jnp.finfo(wide_dtype(leaf)).dtype)


def _kept(moment: Any) -> Any:
    return moment


def scheduled_trace(
    decay: optax.ScalarOrSchedule,
    *,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum as a running sum of updates, with a decay that may be a schedule.

    .. math:: m_t = g_t + \mu_t m_{t-1}, \qquad
              u_t = m_t \;\text{ or, with Nesterov, }\; g_t + \mu_t m_t

    This is ``optax.trace`` with a schedule. Place it before the learning rate. Place a
    coupled weight decay before it. With a constant decay and a constant gradient, the
    step grows to :math:`1 / (1 - \mu)` times the step of plain SGD.

    Args:
      decay: Momentum in [0, 1), or a schedule ``count -> momentum``.
      nesterov: Whether to use Nesterov momentum, in the form of Optax and PyTorch.
      accumulator_dtype: Dtype of the sum, a floating-point type; of complex parameters
        the complex type of this width, at least complex64. None is the dtype of the
        parameters, but at least float32.

    Returns:
      The transformation; :func:`read_hyperparams` reads ``momentum``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.scheduled_trace(lambda t: jnp.where(t < 2, 0.5, 0.0))
      >>> state = tx.init(jnp.zeros(()))
      >>> for _ in range(3):
      ...     update, state = tx.update(jnp.ones(()), state)
      ...     print(update)
      1.0
      1.5
      1.0

    References:
      Sutskever et al., `On the importance of initialization and momentum in deep
      learning <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013.
    """
    _checks.number_or_schedule("decay", decay, _checks.DECAY)
    _checks.flag("nesterov", nesterov)
    accumulator_dtype = _checks.float_dtype("accumulator_dtype", accumulator_dtype)
    given = {"momentum": decay}

    def init_fn(params: optax.Params) -> ScheduledTraceState:
        count, dials, holds = _dials.first(given)
        trace = _zeros_like(params, accumulator_dtype)
        return ScheduledTraceState(count, trace, dials, holds)

    def update_fn(
        updates: optax.Updates, state: ScheduledTraceState, params: optax.Params | None
    ) -> tuple[optax.Updates, ScheduledTraceState]:
        del params
        (momentum,), dials, holds = _dials.applied(
            given, state.count, state.dials, state.holds
        )

        def accumulate(g: ArrayLike, m: jax.Array) -> jax.Array:
            wide = widen(g)
            return wide + times(momentum, m.astype(wide.dtype))

        trace = map_updates(accumulate, updates, state.trace, otherwise=_kept)
        looked = map_updates(accumulate, updates, trace) if nesterov else trace
        looked = map_updates(lambda g, u: narrow(u, g), updates, looked)
        return looked, ScheduledTraceState(
            increment(state.count),
            jax.tree.map(narrow, trace, state.trace),
            dials,
            holds,
        )

    return link(ScheduledTraceState, init_fn, update_fn)


def scale_by_scheduled_adam(
    b1: optax.ScalarOrSchedule,
    b2: optax.ScalarOrSchedule = 0.999,
    *,
    eps: optax.ScalarOrSchedule = 1e-8,
    mu_dtype: Any = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's rescaling with betas that may be schedules and an exact debiasing.

    .. math::
      m_t &= \beta_{1,t} m_{t-1} + (1 - \beta_{1,t}) g_t, \quad
      v_t = \beta_{2,t} v_{t-1} + (1 - \beta_{2,t}) g_t^2 \\
      u_t &= \frac{m_t / w_t}{\sqrt{v_t / w'_t} + \epsilon}, \quad
      w_t = \beta_{1,t} w_{t-1} + (1 - \beta_{1,t})

    The weight :math:`w'_t` is the same with :math:`\beta_2`. With Nesterov, the
    numerator is
    :math:`\beta_{1,t+1} m_t / w_{t+1} + (1 - \beta_{1,t}) g_t / w_t`.

    Place it first, then a decoupled weight decay, then the learning rate. Differs from
    ``optax.scale_by_adam``:

    1. The betas may be schedules, and the debiasing is exact while they move.
    2. The betas are float32 for every dtype of the parameters. The moments of bfloat16
       or float16 parameters are float32 too, but the first has the ``mu_dtype`` if one
       is given.

    Args:
      b1: Decay of the first moment in [0, 1), or a schedule ``count -> b1``.
      b2: Decay of the second moment in [0, 1), or a schedule ``count -> b2``.
      eps: Number that is added to the root of the second moment, at least 0, or a
        schedule ``count -> eps``.
      mu_dtype: Dtype of the first moment, a floating-point type; of complex parameters
        the complex type of this width, at least complex64. None is the dtype of the
        parameters, but at least float32. In bfloat16 the moment itself is rounded, by
        up to a few per cent.
      nesterov: Whether to use Nesterov momentum, with the b1 of the next step.

    Returns:
      The transformation; :func:`read_hyperparams` reads ``b1``, ``b2`` and ``eps``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.scale_by_scheduled_adam(osc.onecycle_momentum_schedule(20))
      >>> state = tx.init(jnp.zeros(()))
      >>> for _ in range(20):
      ...     update, state = tx.update(jnp.ones(()), state)
      >>> print(update)  # The mean of a constant 1 is 1, whatever b1 does.
      1.0

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015 (algorithm 1);
      Dozat, `Incorporating Nesterov Momentum into Adam
      <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016 (algorithm 2).
    """
    return adam_from(0, b1, b2, eps=eps, mu_dtype=mu_dtype, nesterov=nesterov)


def adam_from(
    thaw_step: int,
    b1: optax.ScalarOrSchedule,
    b2: optax.ScalarOrSchedule,
    *,
    eps: optax.ScalarOrSchedule = 1e-8,
    mu_dtype: Any = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_scheduled_adam` whose moments stay as they are until a step.

    What it does with the updates before that step is no use. To hold the moments from
    outside costs more: the compiled program then computes each of them twice.
    """
    _checks.number_or_schedule("b1", b1, _checks.DECAY)
    _checks.number_or_schedule("b2", b2, _checks.DECAY)
    _checks.number_or_schedule("eps", eps, _checks.NON_NEGATIVE)
    _checks.flag("nesterov", nesterov)
    mu_dtype = _checks.float_dtype("mu_dtype", mu_dtype)
    given = {"b1": b1, "b2": b2, "eps": eps}

    def init_fn(params: optax.Params) -> ScaleByScheduledAdamState:
        count, dials, holds = _dials.first(given)
        return ScaleByScheduledAdamState(
            count,
            mu=_zeros_like(params, mu_dtype),
            nu=jax.tree.map(_real_zeros_like, params),
            mu_weight=jnp.zeros([], jnp.float32),
            nu_weight=jnp.zeros([], jnp.float32),
            dials=dials,
            holds=holds,
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByScheduledAdamState,
        params: optax.Params | None,
    ) -> tuple[optax.Updates, ScaleByScheduledAdamState]:
        del params
        count = increment(state.count)
        (beta1, beta2, epsilon), dials, holds = _dials.applied(
            given, state.count, state.dials, state.holds
        )
        gain1, gain2 = 1 - beta1, 1 - beta2
        if thaw_step:
            thawed = state.count >= thaw_step
            gain1, gain2 = (jnp.where(thawed, gain, 0) for gain in (gain1, gain2))
            zeros = jax.tree.map(jnp.zeros_like, updates)
            updates = jax.tree.map(partial(jax.lax.select, thawed), updates, zeros)
        mu_weight = weight_after(state.mu_weight, gain1)
        nu_weight = weight_after(state.nu_weight, gain2)
        weights = mu_weight, nu_weight
        if thaw_step:  # Nothing is divided by 0 before it.
            mu_weight, nu_weight = (
                jnp.where(weight > 0, weight, 1) for weight in (mu_weight, nu_weight)
            )
        # These are scalars, so that each leaf needs one division and not two.
        of_mu, of_g = 1 / mu_weight, jnp.zeros_like(mu_weight)
        if nesterov:
            next_beta1 = jnp.where(holds.held[0], beta1, _dials.value_at(b1, count))
            of_mu = next_beta1 / (next_beta1 * mu_weight + (1 - next_beta1))
            of_g = gain1 / mu_weight
        numbers = jnp.stack([gain1, gain2, of_mu, of_g, 1 / nu_weight, epsilon])
        gain1, gain2, of_mu, of_g, of_nu, epsilon = once(numbers, state.count)

        def first_moment(g: ArrayLike, m: jax.Array) -> jax.Array:
            wide = widen(g)
            m = m.astype(wide.dtype)
            return m + times(gain1, wide - m)

        def second_moment(g: ArrayLike, v: jax.Array) -> jax.Array:
            wide = widen(g)
            square = jnp.real(wide * jnp.conj(wide))
            v = v.astype(square.dtype)
            return v + times(gain2, square - v)

        mu = map_updates(first_moment, updates, state.mu, otherwise=_kept)
        nu = map_updates(second_moment, updates, state.nu, otherwise=_kept)

        def rescale(g: ArrayLike, m: jax.Array, v: jax.Array) -> jax.Array:
            numerator = times(of_mu, m)
            if nesterov:
                numerator = numerator + times(of_g, widen(g))
            root = jnp.sqrt(times(of_nu, v)) + epsilon.astype(v.dtype)
            return narrow(numerator / root.astype(numerator.dtype), g)

        return map_updates(rescale, updates, mu, nu), ScaleByScheduledAdamState(
            count,
            jax.tree.map(narrow, mu, state.mu),
            jax.tree.map(narrow, nu, state.nu),
            *weights,
            dials,
            holds,
        )

    return link(ScaleByScheduledAdamState, init_fn, update_fn)
