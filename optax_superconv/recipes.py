"""Which optimizer, ready to use? The links, chained."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._trees import LabelFn, Labels
from optax_superconv.schedules._cycles import onecycle_pair
from optax_superconv.schedules._phases import Shape
from optax_superconv.transforms._groups import scale_by_group
from optax_superconv.transforms._learning_rate import scale_by_learning_rate
from optax_superconv.transforms._momentum import (
    scale_by_scheduled_adam,
    scheduled_trace,
)
from optax_superconv.transforms._multipliers import layerwise_multipliers
from optax_superconv.transforms._unfreezing import unfreezing
from optax_superconv.transforms._weight_decay import add_decayed_weights


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
      peak_learning_rate: The highest rate, at least 0. :func:`range_test` helps to find
        it.
      total_steps: Optimizer steps of the whole run, at least 1; see
        :func:`onecycle_adamw`, also for the durations and rates that follow.
      warmup_steps: Steps up to the peak. None is ``round(0.3 * total_steps)``.
      init_learning_rate: Rate at step 0. None is ``peak_learning_rate / 25``.
      end_learning_rate: Rate from step ``total_steps`` on.
      annihilation_steps: Steps of the final fall from the initial rate. None is 0.
      shape: Shape of every phase; see :func:`onecycle_schedule`.
      max_momentum: Momentum at the start and the end, in [0, 1).
      base_momentum: Momentum at the peak of the rate, in [0, 1) and at most
        ``max_momentum``.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: Strength :math:`\lambda` of at least 0, or a schedule.
      weight_decay_mask: What is decayed; see :func:`onecycle_adamw`.
      accumulator_dtype: Dtype of the momentum; see :func:`scheduled_trace`.

    Returns:
      The optimizer. :func:`read_hyperparams` reads ``learning_rate``, ``momentum`` and
      ``weight_decay``.

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
    learning_rate, momentum = onecycle_pair(
        peak_learning_rate,
        init_learning_rate,
        end_learning_rate,
        {"max_momentum": max_momentum, "base_momentum": base_momentum},
        total_steps,
        warmup_steps,
        annihilation_steps,
        shape,
    )
    return optax.chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
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
      peak_learning_rate: The highest rate, at least 0. :func:`range_test` helps to find
        it.
      total_steps: Optimizer steps of the whole run, at least 1. Under
        ``optax.MultiSteps`` an optimizer step is one that is emitted.
      warmup_steps: Steps up to the peak, at least 0 and less than ``total_steps``. None
        is ``round(0.3 * total_steps)``.
      init_learning_rate: Rate at step 0, at least 0 and at most the peak. None is
        ``peak_learning_rate / 25``.
      end_learning_rate: Rate from step ``total_steps`` on, at least 0 and at most the
        peak, or at most the initial rate with ``annihilation_steps``.
      annihilation_steps: Steps of the final fall from the initial rate, at least 0.
        Warm-up and annihilation together are at most ``total_steps``. None is 0.
      shape: Shape of every phase; see :func:`onecycle_schedule`.
      max_b1: b1 at the start and the end, in [0, 1).
      base_b1: b1 at the peak of the rate, in [0, 1) and at most ``max_b1``.
      b2: Decay of the second moment in [0, 1), or a schedule. It does not cycle with
        b1.
      eps: Number that is added to the root of the second moment, at least 0.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: Strength :math:`\lambda` of at least 0, or a schedule. AdamC's, in
        proportion to the rate, is ``lambda t: 0.01 * rate(t) / peak``.
      weight_decay_mask: What is decayed. ``"matrices"``: a leaf that has two dimensions
        or more and whose path does not end in ``bias`` (Flax's attention biases have
        two). Or as in ``optax.add_decayed_weights``: a tree of bools, a function of the
        parameters, or None for everything. Norm scales that are stacked over layers
        have two dimensions too, so they need a mask.
      mu_dtype: Dtype of the first moment; see :func:`scale_by_scheduled_adam`.

    Returns:
      The optimizer. :func:`read_hyperparams` reads ``learning_rate``, ``b1`` and
      ``weight_decay``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.onecycle_adamw(0.5, total_steps=100)
      >>> applied = osc.read_hyperparams(tx.init(jnp.zeros((2, 2))))
      >>> print({name: round(float(value), 3) for name, value in applied.items()})
      {'b1': 0.95, 'weight_decay': 0.01, 'learning_rate': 0.02}

    References:
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018;
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    learning_rate, b1 = onecycle_pair(
        peak_learning_rate,
        init_learning_rate,
        end_learning_rate,
        {"max_b1": max_b1, "base_b1": base_b1},
        total_steps,
        warmup_steps,
        annihilation_steps,
        shape,
    )
    return optax.chain(
        scale_by_scheduled_adam(b1, b2, eps=eps, mu_dtype=mu_dtype, nesterov=nesterov),
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_learning_rate(learning_rate),
    )


def fine_tune_adamw(
    peak_learning_rate: ArrayLike,
    total_steps: int,
    param_labels: Labels | LabelFn,
    *,
    decay: ArrayLike = 1 / 2.6,
    min_multiplier: ArrayLike = 0.0,
    freeze_steps: int = 0,
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
    r"""Fine-tunes a trained network: the head first, then all, each at its own rate.

    .. math:: \eta_{l,t} = \eta_t\, \max(d^{\,L-1-l}, m_{\min})

    For ``freeze_steps`` the last group trains alone, its rate rising towards the peak.
    Then all groups train through one cycle of :func:`onecycle_adamw` over the steps
    that are left, at rates that fall by the factor ``decay`` from each group to the one
    before. Without ``freeze_steps`` and with ``decay=1`` this is
    :func:`onecycle_adamw`. It differs from fast.ai's ``fine_tune`` in three points:
    rates are a constant factor apart (fast.ai spreads a factor of 100 over its groups),
    both phases peak at the same rate (fast.ai halves the second), the head keeps its
    moments when the others thaw. To thaw group after group as ULMFiT does, build the
    chain that stands at :func:`gradual_unfreezing`.

    Args:
      peak_learning_rate: The highest rate of the last group, at least 0.
      total_steps: Optimizer steps of the whole run, ``freeze_steps`` included, at least
        1. Under ``optax.MultiSteps`` an optimizer step is one that is emitted.
      param_labels: Integers that rise from the input to the output, as a tree of
        labels, a prefix of one, or a function ``params -> labels``:
        :func:`label_by_depth`, or ``label_by_path([("head/.*", 1), (".*", 0)])``. The
        last group is that of the labels in sight, where ``optax.masked`` hides some.
        Under ``optax.inject_hyperparams`` name it in ``static_args``.
      decay: Factor :math:`d` per group, in (0, 1]; ULMFiT's is 1 / 2.6, vision
        transformers use 0.65 to 0.9.
      min_multiplier: The smallest multiplier :math:`m_{\min}`, in [0, 1].
      freeze_steps: Steps for which the last group trains alone, at least 0 and below
        ``total_steps``. 0 trains every group from the start.
      warmup_steps: Steps from the thaw to the peak, at least 0 and less than the steps
        after the thaw. None is ``round(0.3 * (total_steps - freeze_steps))``.
      init_learning_rate: Rate at step 0 and at the thaw; see :func:`onecycle_adamw`.
        None is ``peak_learning_rate / 25``.
      end_learning_rate: Rate from step ``total_steps`` on; see :func:`onecycle_adamw`.
      annihilation_steps: Steps of the final fall, of those after the thaw; see
        :func:`onecycle_adamw`. None is 0.
      shape: Shape of every phase; see :func:`onecycle_schedule`.
      max_b1: b1 at the start, the thaw and the end, in [0, 1).
      base_b1: b1 at the peaks of the rate, in [0, 1) and at most ``max_b1``.
      b2: Decay of the second moment, in [0, 1), or a schedule.
      eps: Number that is added to the root of the second moment, at least 0.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: Strength of at least 0, or a schedule. It is multiplied by the rate
        of each group, so that frozen groups keep every bit.
      weight_decay_mask: What is decayed; see :func:`onecycle_adamw`.
      mu_dtype: Dtype of the first moment; see :func:`scale_by_scheduled_adam`.

    Returns:
      The optimizer. :func:`read_hyperparams` reads ``learning_rate/<label>`` (0 while
      frozen), and ``b1`` and ``weight_decay``, as ``b1/<label>`` if ``freeze_steps`` is
      not 0. :func:`frozen_labels` tells what is frozen.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> params = {"layers": [jnp.ones(2), jnp.ones(2)], "head": jnp.ones(2)}
      >>> tx = osc.fine_tune_adamw(
      ...     0.01, 100, osc.label_by_depth(), decay=0.5, freeze_steps=20)
      >>> state = tx.init(params)
      >>> for _ in range(45):  # 20 frozen, 24 to the peak.
      ...     updates, state = tx.update(params, state, params)
      >>> applied = osc.read_hyperparams(state)
      >>> print([round(float(applied[f"learning_rate/{k}"]), 4) for k in range(3)])
      [0.0025, 0.005, 0.01]

    References:
      Howard and Ruder, `Universal Language Model Fine-tuning for Text Classification
      <https://arxiv.org/abs/1801.06146>`_, 2018, section 3;
      Howard and Gugger, `fastai: A Layered API for Deep Learning
      <https://arxiv.org/abs/2002.04688>`_, 2020, ``fine_tune``.
    """
    total = "total_steps", _checks.steps("total_steps", total_steps, at_least=1)
    freeze_steps = _checks.steps("freeze_steps", freeze_steps, below=total)
    # Checks decay and min_multiplier where the optimizer is built.
    layerwise_multipliers(range(2), decay, min_multiplier=min_multiplier)
    learning_rate, b1 = onecycle_pair(
        peak_learning_rate,
        init_learning_rate,
        end_learning_rate,
        {"max_b1": max_b1, "base_b1": base_b1},
        total_steps,
        warmup_steps,
        annihilation_steps,
        shape,
        rise_steps=freeze_steps,
    )

    def adamw_from(step: int) -> optax.GradientTransformation:
        def of_run(value: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
            """A group counts from its thaw; its schedules follow the run."""
            if step == 0 or not callable(value):
                return value
            last = _checks.MAX_STEPS - step  # The sum is int32 too.
            return lambda count: value(jnp.minimum(count, last) + step)

        return optax.chain(
            scale_by_scheduled_adam(
                of_run(b1), of_run(b2), eps=eps, mu_dtype=mu_dtype, nesterov=nesterov
            ),
            add_decayed_weights(of_run(weight_decay), weight_decay_mask),
        )

    def thaw_steps(labels: list[Any]) -> dict[Any, int]:
        return {k: 0 if k == labels[-1] else freeze_steps for k in labels}

    def multipliers(labels: list[Any]) -> dict[Any, Any]:
        rule = "integers that rise from the input to the output"
        ordered = isinstance(labels, list)  # Names come as a set.
        names = _checks.listed(sorted(labels))
        _checks.require(ordered, "param_labels", rule, f"names without order, {names}")
        return layerwise_multipliers(labels, decay, min_multiplier=min_multiplier)

    adamw = adamw_from(0)
    if freeze_steps:
        order = 0, freeze_steps
        adamw = unfreezing(
            adamw_from, thaw_steps, param_labels, order=order, keeps_zeros=True
        )
    return optax.chain(
        adamw,
        scale_by_group(multipliers, param_labels),
        scale_by_learning_rate(learning_rate),
    )
