"""Which optimizer, ready to use?

The other modules, chained: rate and momentum cycle together, in one call and in one
state that can be read back.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, KeyPath, keystr
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._hyperparams import add_decayed_weights, scale_by_learning_rate
from optax_superconv._momentum import scale_by_scheduled_adam, scheduled_trace
from optax_superconv._schedules import (
    Shape,
    check_cycle,
    onecycle_momentum_schedule,
    onecycle_schedule,
)


def _is_matrix(params: optax.Params) -> Any:
    """True for leaves of two dimensions or more whose path does not end in `bias`."""

    def decayed(path: KeyPath, leaf: Any) -> bool:
        # An nnx.State shows an array as the `value` of its Variable.
        if path and path[-1] == GetAttrKey("value"):
            path = path[:-1]
        return jnp.ndim(leaf) > 1 and keystr(path[-1:], simple=True) != "bias"

    return jax.tree_util.tree_map_with_path(decayed, params)


def _decay(
    weight_decay: optax.ScalarOrSchedule, mask: Any
) -> optax.GradientTransformationExtraArgs:
    # The default has a name because optax.inject_hyperparams takes a callable for a
    # schedule (and would trace a default of 0 annihilation steps: hence its None).
    if isinstance(mask, str):
        _checks.choice("weight_decay_mask", mask, ("matrices",))
        mask = _is_matrix
    return add_decayed_weights(weight_decay, mask)


def _onecycle_pair(
    total_steps: int,
    rates: dict[str, Any],
    momenta: dict[str, Any],
    shape: Shape,
    **durations: Any,
) -> tuple[optax.Schedule, optax.Schedule]:
    """Rate and momentum schedules, their values checked under the caller's names."""
    check_cycle({k: v for k, v in rates.items() if v is not None}, shape)
    check_cycle(momenta, shape, _checks.DECAY_RULE, _checks.decay_rate)
    peak, init, end = rates.values()
    high, low = momenta.values()
    if durations["annihilation_steps"] and init is not None:
        check_cycle({k: v for k, v in rates.items() if k[:4] != "peak"}, shape)
    durations["shape"] = shape
    return (
        onecycle_schedule(
            peak, total_steps, init_value=init, end_value=end, **durations
        ),
        onecycle_momentum_schedule(
            total_steps, max_momentum=high, base_momentum=low, **durations
        ),
    )


def onecycle_sgd(
    peak_learning_rate: ArrayLike,
    total_steps: int,
    *,
    warmup_steps: int | None = None,
    init_learning_rate: ArrayLike | None = None,
    end_learning_rate: ArrayLike = 0.0,
    annihilation_steps: int | None = None,
    shape: Shape = "cosine",
    max_momentum: ArrayLike = 0.95,
    base_momentum: ArrayLike = 0.85,
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = "matrices",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD whose learning rate cycles up and down while its momentum does the reverse.

    .. math:: m_t = \mu_t m_{t-1} + (g_t + \lambda_t \theta_t), \qquad
              \theta_{t+1} = \theta_t - \eta_t (g_t + \lambda_t \theta_t + \mu_t m_t)

    (without Nesterov, :math:`\theta_t - \eta_t m_t`). The weight decay is coupled: it
    is added to the gradient before the momentum, as in the paper and in PyTorch.

    Args:
      peak_learning_rate: The highest rate; see :func:`range_test` for how to find it.
      total_steps: Optimizer steps of the whole run, at least 1. Under
        ``optax.MultiSteps`` an optimizer step is one that is emitted.
      warmup_steps: Steps up to the peak; None is ``round(0.3 * total_steps)``.
      init_learning_rate: Rate at step 0; None is ``peak_learning_rate / 25``.
      end_learning_rate: Rate from step ``total_steps`` on.
      annihilation_steps: Steps of the final fall from the initial rate; None is 0.
      shape: Of every phase; see :class:`Phase`.
      max_momentum: Momentum at the start and the end, in [0, 1).
      base_momentum: Momentum at the peak of the rate, in [0, 1).
      nesterov: Whether to use Nesterov momentum.
      weight_decay: Strength :math:`\lambda` at least 0, or a schedule.
      weight_decay_mask: What is decayed. ``"matrices"``: a leaf that has two dimensions
        or more and whose path does not end in ``bias`` (Flax's attention biases have
        two). Or as in ``optax.add_decayed_weights``: a tree of bools, a function of the
        parameters, or None for everything. Norm scales that are stacked over layers
        have two dimensions as well: they need a mask.
      accumulator_dtype: Of the momentum; see :func:`scheduled_trace`.

    Returns:
      The optimizer. :func:`read_hyperparams` reads ``learning_rate``, ``momentum`` and
      ``weight_decay``.

    Raises:
      ValueError: Naming argument, rule and value, as in :func:`onecycle_schedule` and
        :func:`onecycle_momentum_schedule`, or for a negative constant weight decay.
      TypeError: For an argument of the wrong kind.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> loss_fn = lambda w: jnp.sum((w - 3.0) ** 2)
      >>> tx = osc.onecycle_sgd(0.1, total_steps=100)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(2))
      [3. 3.]

    References:
      Smith and Topin, `Super-Convergence: Very Fast Training of Neural Networks Using
      Large Learning Rates <https://arxiv.org/abs/1708.07120>`_, 2018;
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018.
    """
    learning_rate, momentum = _onecycle_pair(
        total_steps,
        {
            "peak_learning_rate": peak_learning_rate,
            "init_learning_rate": init_learning_rate,
            "end_learning_rate": end_learning_rate,
        },
        {"max_momentum": max_momentum, "base_momentum": base_momentum},
        shape,
        warmup_steps=warmup_steps,
        annihilation_steps=annihilation_steps or 0,
    )
    return optax.chain(
        _decay(weight_decay, weight_decay_mask),
        scheduled_trace(
            momentum, nesterov=nesterov, accumulator_dtype=accumulator_dtype
        ),
        scale_by_learning_rate(learning_rate),
    )


def onecycle_adamw(
    peak_learning_rate: ArrayLike,
    total_steps: int,
    *,
    warmup_steps: int | None = None,
    init_learning_rate: ArrayLike | None = None,
    end_learning_rate: ArrayLike = 0.0,
    annihilation_steps: int | None = None,
    shape: Shape = "cosine",
    max_b1: ArrayLike = 0.95,
    base_b1: ArrayLike = 0.85,
    b2: optax.ScalarOrSchedule = 0.99,
    eps: ArrayLike = 1e-8,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    weight_decay_mask: Any = "matrices",
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW whose learning rate cycles up and down while its b1 does the reverse.

    .. math:: \theta_{t+1} = \theta_t - \eta_t
              \Big(\frac{m_t / w_t}{\sqrt{v_t / w'_t} + \epsilon}
              + \lambda_t \theta_t\Big)

    with the moments of :func:`scale_by_scheduled_adam`. The weight decay is decoupled,
    times the learning rate.

    Args:
      peak_learning_rate: The highest rate; see :func:`range_test` for how to find it.
      total_steps: Optimizer steps of the whole run, at least 1. Under
        ``optax.MultiSteps`` an optimizer step is one that is emitted.
      warmup_steps: Steps up to the peak; None is ``round(0.3 * total_steps)``.
      init_learning_rate: Rate at step 0; None is ``peak_learning_rate / 25``.
      end_learning_rate: Rate from step ``total_steps`` on.
      annihilation_steps: Steps of the final fall from the initial rate; None is 0.
      shape: Of every phase; see :class:`Phase`.
      max_b1: b1 at the start and the end, in [0, 1).
      base_b1: b1 at the peak of the rate, in [0, 1).
      b2: Decay of the second moment, in [0, 1), or a schedule; never cycled with b1.
      eps: Added to the root of the second moment, at least 0.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: Strength :math:`\lambda` at least 0, or a schedule. AdamC's, in
        proportion to the rate, is ``lambda t: 0.01 * rate(t) / peak``.
      weight_decay_mask: What is decayed. ``"matrices"``: a leaf that has two dimensions
        or more and whose path does not end in ``bias`` (Flax's attention biases have
        two). Or as in ``optax.add_decayed_weights``: a tree of bools, a function of the
        parameters, or None for everything. Norm scales that are stacked over layers
        have two dimensions as well: they need a mask.
      mu_dtype: Of the first moment; see :func:`scale_by_scheduled_adam`.

    Returns:
      The optimizer. :func:`read_hyperparams` reads ``learning_rate``, ``b1`` and
      ``weight_decay``.

    Raises:
      ValueError: Naming argument, rule and value, as in :func:`onecycle_schedule` and
        :func:`scale_by_scheduled_adam`, or for a negative constant weight decay.
      TypeError: For an argument of the wrong kind.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> loss_fn = lambda w: jnp.sum((w - 3.0) ** 2)
      >>> tx = osc.onecycle_adamw(0.5, total_steps=100)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(1))
      [3. 3.]

    References:
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018;
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    learning_rate, b1 = _onecycle_pair(
        total_steps,
        {
            "peak_learning_rate": peak_learning_rate,
            "init_learning_rate": init_learning_rate,
            "end_learning_rate": end_learning_rate,
        },
        {"max_b1": max_b1, "base_b1": base_b1},
        shape,
        warmup_steps=warmup_steps,
        annihilation_steps=annihilation_steps or 0,
    )
    return optax.chain(
        scale_by_scheduled_adam(b1, b2, eps=eps, mu_dtype=mu_dtype, nesterov=nesterov),
        _decay(weight_decay, weight_decay_mask),
        scale_by_learning_rate(learning_rate),
    )
