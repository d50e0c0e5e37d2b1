"""Which optimizer, ready to use?

The other modules, chained: rate and momentum cycle together, in one call and in one
state that can be read back.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._dials import (
    add_decayed_weights,
    scale_by_learning_rate,
    value_at,
)
from optax_superconv.schedules._late_decay import warmup_stable_decay_schedule
from optax_superconv.schedules._phases import (
    Phase,
    Shape,
    check_cycle,
    check_positive,
    onecycle_momentum_schedule,
    onecycle_schedule,
    phase_schedule,
)
from optax_superconv.transforms._cooldown import triggered_cooldown
from optax_superconv.transforms._groups import layerwise_multipliers, scale_by_group
from optax_superconv.transforms._labels import (
    LabelFn,
    Labels,
    map_with_paths,
)
from optax_superconv.transforms._momentum import (
    scale_by_scheduled_adam,
    scheduled_trace,
)
from optax_superconv.transforms._unfreezing import unfreezing


def _is_matrix(params: optax.Params) -> Any:
    """True for leaves of two dimensions or more whose path does not end in `bias`."""

    def decayed(path: str, leaf: Any) -> bool:
        (array,) = jax.tree.leaves(leaf)
        return jnp.ndim(array) > 1 and path.rsplit("/", 1)[-1] != "bias"

    return map_with_paths(decayed, params)


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
      max_momentum: Momentum at the start and the end, in [0, 1).
      base_momentum: Momentum at the peak of the rate, in [0, 1) and at most
        ``max_momentum``.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: Strength :math:`\lambda` of at least 0, or a schedule.
      weight_decay_mask: What is decayed. ``"matrices"``: a leaf that has two dimensions
        or more and whose path does not end in ``bias`` (Flax's attention biases have
        two). Or as in ``optax.add_decayed_weights``: a tree of bools, a function of the
        parameters, or None for everything. Norm scales that are stacked over layers
        have two dimensions too, so they need a mask.
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
    :func:`onecycle_adamw`. Differs from fast.ai's ``fine_tune``:

    1. Groups are as many as there are labels, their rates a constant factor apart
       (ULMFiT's; fast.ai spreads a factor of 100 over its groups).
    2. Both phases peak at the same rate (fast.ai halves the second), and the second
       starts at ``init_learning_rate``, as here all cycles do.
    3. The head keeps its moments when the others thaw.

    To thaw group after group as ULMFiT does, build the chain that stands there from
    :func:`gradual_unfreezing`.

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
      init_learning_rate: Rate at step 0 and at the thaw, at least 0 and at most the
        peak. None is ``peak_learning_rate / 25``.
      end_learning_rate: Rate from step ``total_steps`` on, at least 0 and at most the
        peak, or at most the initial rate with ``annihilation_steps``.
      annihilation_steps: Steps of the final fall from the initial rate, at least 0.
        Warm-up and annihilation together are at most the steps after the thaw. None is
        0.
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
      The optimizer. :func:`read_hyperparams` reads ``learning_rate``,
      ``learning_rate/<label>`` (0 while frozen), ``b1`` and ``weight_decay``, the last
      two as ``b1/<label>`` if ``freeze_steps`` is not 0. :func:`frozen_labels` tells
      what is frozen.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> params = {"layers": [jnp.ones(2), jnp.ones(2)], "head": jnp.ones(2)}
      >>> tx = osc.fine_tune_adamw(
      ...     0.01, 100, osc.label_by_depth(), decay=0.5, freeze_steps=20)
      >>> state = tx.init(params)
      >>> print(sorted(osc.frozen_labels(state)))
      [0, 1]
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
    total_steps = _checks.steps("total_steps", total_steps, at_least=1)
    freeze_steps = _checks.steps("freeze_steps", freeze_steps)
    rule = f"below `total_steps` ({total_steps})"
    _checks.require(freeze_steps < total_steps, "freeze_steps", rule, freeze_steps)
    # Checks decay and min_multiplier where the optimizer is built.
    layerwise_multipliers(range(2), decay, min_multiplier=min_multiplier)
    init = init_learning_rate
    learning_rate, b1 = _onecycle_pair(
        total_steps - freeze_steps,
        {
            "peak_learning_rate": peak_learning_rate,
            "init_learning_rate": init,
            "end_learning_rate": end_learning_rate,
        },
        {"max_b1": max_b1, "base_b1": base_b1},
        shape,
        warmup_steps=warmup_steps,
        annihilation_steps=annihilation_steps or 0,
    )

    def rising(start: Any, end: Any, then: optax.Schedule) -> optax.Schedule:
        """Moves over the frozen steps, which ``then`` follows."""
        if freeze_steps == 0:
            return then
        first = phase_schedule(start, [Phase(freeze_steps, end, shape)])

        def value(count: ArrayLike) -> jax.Array:
            step = cast(jax.Array, count)  # Or an int, which does the same.
            return jnp.where(
                step < freeze_steps,
                value_at(first, step),
                value_at(then, step - freeze_steps),
            )

        return value

    peak = jnp.asarray(peak_learning_rate, jnp.float32)
    learning_rate = rising(peak / 25 if init is None else init, peak, learning_rate)
    b1 = rising(max_b1, base_b1, b1)

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
            _decay(of_run(weight_decay), weight_decay_mask),
        )

    adamw_from(0)  # Checks its arguments where the optimizer is built.

    def thaw_steps(labels: list[Any]) -> dict[Any, int]:
        return {k: 0 if k == labels[-1] else freeze_steps for k in labels}

    def multipliers(labels: list[Any]) -> dict[Any, Any]:
        if any(isinstance(label, str) for label in labels):
            raise ValueError(
                "`param_labels` must give integers that rise from the input to the "
                f"output, got {sorted(labels)}, which have no such order."
            )
        return layerwise_multipliers(labels, decay, min_multiplier=min_multiplier)

    return optax.chain(
        unfreezing(
            adamw_from,
            thaw_steps,
            param_labels,
            order=(0, freeze_steps),
            keeps_zeros=True,
        )
        if freeze_steps
        else adamw_from(0),
        scale_by_group(multipliers, param_labels),
        scale_by_learning_rate(learning_rate),
    )


def _late_decay_rate(
    rates: dict[str, Any],
    total_steps: int | None,
    warmup_steps: int,
    decay_steps: int | None,
    shape: Shape,
) -> optax.GradientTransformationExtraArgs:
    """Warm-up, stable, decay: at a step that is known, or when it is triggered."""
    check_cycle(rates, "linear")
    peak, init, end = rates.values()
    if shape == "exponential":
        check_positive("peak_learning_rate", peak)
        check_positive("end_learning_rate", end)
    if total_steps is None:
        _checks.require(
            decay_steps is None,
            "decay_steps",
            "None without `total_steps` (give the length to `start_cooldown`)",
            decay_steps,
        )
        warmup_steps = _checks.steps("warmup_steps", warmup_steps)
        schedule = phase_schedule(init, [Phase(warmup_steps, peak)])
    else:
        schedule = warmup_stable_decay_schedule(
            peak,
            total_steps,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            init_value=init,
            end_value=end,
            shape=shape,
        )
    return triggered_cooldown(schedule, end_value=end, shape=shape)


def _last(
    average: optax.GradientTransformation | None,
) -> list[optax.GradientTransformation]:
    if average is None:
        return []
    if not (hasattr(average, "init") and hasattr(average, "update")):
        raise TypeError(
            "`average` must be a gradient transformation such as `ema_params(0.999)`, "
            f"got {average!r} of type {type(average).__name__}."
        )
    return [average]


def late_decay_sgd(
    peak_learning_rate: ArrayLike,
    total_steps: int | None,
    *,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    init_learning_rate: ArrayLike = 0.0,
    end_learning_rate: ArrayLike = 0.0,
    shape: Shape = "1-sqrt",
    momentum: optax.ScalarOrSchedule = 0.9,
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = "matrices",
    accumulator_dtype: Any = None,
    average: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD that stays at a large rate and decays it late, or when you say so.

    .. math:: m_t = \mu_t m_{t-1} + (g_t + \lambda_t \theta_t), \qquad
              \theta_{t+1} = \theta_t - \eta_t (g_t + \lambda_t \theta_t + \mu_t m_t)

    (without Nesterov, :math:`\theta_t - \eta_t m_t`), with the rate of
    :func:`warmup_stable_decay_schedule`. Without ``total_steps`` the rate stays at the
    peak until :func:`start_cooldown` is called on the state. The state is the same with
    and without ``total_steps``, so a checkpoint of an open-ended run continues in a run
    of known length, and the trigger works there too: it decays earlier.

    Args:
      peak_learning_rate: The rate between warm-up and decay, at least 0.
        :func:`convergence_threshold` finds the largest that converges.
      total_steps: Optimizer steps of the whole run, at least 1, or None for a run
        without a planned end. Under ``optax.MultiSteps`` an optimizer step is one that
        is emitted.
      warmup_steps: Steps of the linear warm-up, at least 0 and below ``total_steps``.
      decay_steps: Steps of the decay at the end, at least 1. Warm-up and decay together
        are at most ``total_steps``. None is ``round(0.2 * total_steps)``, but at least
        1, and at most the number of steps that the warm-up leaves. Without
        ``total_steps`` it must be None.
      init_learning_rate: Rate at step 0, at least 0 and at most the peak. Without
        warm-up steps the run starts at the peak.
      end_learning_rate: Rate at the end of the decay, at least 0 and at most the peak.
      shape: Shape of the decay; see :class:`Phase`. ``"exponential"`` needs the peak
        and the end above 0. The default ``end_learning_rate`` is 0.
      momentum: :math:`\mu` in [0, 1), or a schedule.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: Strength :math:`\lambda` of at least 0, or a schedule; coupled.
      weight_decay_mask: What is decayed; see :func:`onecycle_sgd`.
      accumulator_dtype: Dtype of the momentum; see :func:`scheduled_trace`.
      average: An average of the parameters, the last in the chain: :func:`ema_params`,
        :func:`swa_params`, :func:`lawa_params` or another. Several are an
        ``optax.chain`` of them. :func:`eval_params` reads it. Under
        ``optax.inject_hyperparams`` name it in ``static_args``. None is no average.

    Returns:
      The optimizer. :func:`read_hyperparams` reads ``learning_rate``, ``momentum``,
      ``weight_decay`` and ``cooldown`` (of a triggered decay, not of the planned one).

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> loss_fn = lambda w: jnp.sum((w - 3.0) ** 2)
      >>> tx = osc.late_decay_sgd(0.1, None, average=osc.ema_params(0.9))
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for step in range(100):
      ...     if step == 80:  # Enough: decay over the next 20 steps.
      ...         state = osc.start_cooldown(state, 20)
      ...     updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(2), osc.eval_params(state, params).round(2))
      [3. 3.] [3. 3.]

    References:
      Ren, Ma and Ying, `Understanding the Generalization Benefits of Late Learning Rate
      Decay <https://arxiv.org/abs/2401.11600>`_, 2024;
      Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations <https://arxiv.org/abs/2405.18392>`_, 2024.
    """
    rule = _checks.DECAY_RULE
    _checks.number_or_schedule("momentum", momentum, rule, _checks.decay_rate)
    rates = {
        "peak_learning_rate": peak_learning_rate,
        "init_learning_rate": init_learning_rate,
        "end_learning_rate": end_learning_rate,
    }
    return optax.chain(
        _decay(weight_decay, weight_decay_mask),
        scheduled_trace(
            momentum, nesterov=nesterov, accumulator_dtype=accumulator_dtype
        ),
        _late_decay_rate(rates, total_steps, warmup_steps, decay_steps, shape),
        *_last(average),
    )


def late_decay_adamw(
    peak_learning_rate: ArrayLike,
    total_steps: int | None,
    *,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    init_learning_rate: ArrayLike = 0.0,
    end_learning_rate: ArrayLike = 0.0,
    shape: Shape = "1-sqrt",
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.99,
    eps: ArrayLike = 1e-8,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    weight_decay_mask: Any = "matrices",
    mu_dtype: Any = None,
    average: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW that stays at a large rate and decays it late, or when you say so.

    .. math:: \theta_{t+1} = \theta_t - \eta_t
              \Big(\frac{m_t / w_t}{\sqrt{v_t / w'_t} + \epsilon}
              + \lambda_t \theta_t\Big)

    with the moments of :func:`scale_by_scheduled_adam` and the rate of
    :func:`warmup_stable_decay_schedule`. Without ``total_steps`` the rate stays at the
    peak until :func:`start_cooldown` is called on the state. The state is the same with
    and without ``total_steps``, so a checkpoint of an open-ended run continues in a run
    of known length, and the trigger works there too: it decays earlier.

    Args:
      peak_learning_rate: The rate between warm-up and decay, at least 0. With language
        models it is about half of the best peak of a cosine (Hägele et al.).
      total_steps: Optimizer steps of the whole run, at least 1, or None for a run
        without a planned end. Under ``optax.MultiSteps`` an optimizer step is one that
        is emitted.
      warmup_steps: Steps of the linear warm-up, at least 0 and below ``total_steps``.
      decay_steps: Steps of the decay at the end, at least 1. Warm-up and decay together
        are at most ``total_steps``. None is ``round(0.2 * total_steps)``, but at least
        1, and at most the number of steps that the warm-up leaves. Without
        ``total_steps`` it must be None.
      init_learning_rate: Rate at step 0, at least 0 and at most the peak. Without
        warm-up steps the run starts at the peak.
      end_learning_rate: Rate at the end of the decay, at least 0 and at most the peak.
      shape: Shape of the decay; see :class:`Phase`. ``"exponential"`` needs the peak
        and the end above 0. The default ``end_learning_rate`` is 0.
      b1: Decay of the first moment in [0, 1), or a schedule.
      b2: Decay of the second moment in [0, 1), or a schedule.
      eps: Number that is added to the root of the second moment, at least 0.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: Strength :math:`\lambda` of at least 0, or a schedule. It is
        decoupled, times the learning rate.
      weight_decay_mask: What is decayed; see :func:`onecycle_adamw`.
      mu_dtype: Dtype of the first moment; see :func:`scale_by_scheduled_adam`.
      average: An average of the parameters, the last in the chain: :func:`ema_params`,
        :func:`swa_params`, :func:`lawa_params` or another. Several are an
        ``optax.chain`` of them. :func:`eval_params` reads it. Under
        ``optax.inject_hyperparams`` name it in ``static_args``. None is no average.

    Returns:
      The optimizer. :func:`read_hyperparams` reads ``learning_rate``, ``b1``,
      ``weight_decay`` and ``cooldown`` (of a triggered decay, not of the planned one).

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> tx = osc.late_decay_adamw(1e-3, 1000, warmup_steps=100)
      >>> state = tx.init(jnp.zeros((2, 2)))
      >>> print(list(osc.read_hyperparams(state)))
      ['b1', 'weight_decay', 'cooldown', 'learning_rate']

    References:
      Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations <https://arxiv.org/abs/2405.18392>`_, 2024;
      Hu et al., `MiniCPM: Unveiling the Potential of Small Language Models
      <https://arxiv.org/abs/2404.06395>`_, 2024, section 4 (warm-up, stable, decay).
    """
    rates = {
        "peak_learning_rate": peak_learning_rate,
        "init_learning_rate": init_learning_rate,
        "end_learning_rate": end_learning_rate,
    }
    return optax.chain(
        scale_by_scheduled_adam(b1, b2, eps=eps, mu_dtype=mu_dtype, nesterov=nesterov),
        _decay(weight_decay, weight_decay_mask),
        _late_decay_rate(rates, total_steps, warmup_steps, decay_steps, shape),
        *_last(average),
    )
