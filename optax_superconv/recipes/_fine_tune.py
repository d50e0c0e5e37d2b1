"""Which optimizer for a trained network? The links, chained."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._dials import value_at
from optax_superconv._trees import LabelFn, Labels
from optax_superconv.recipes._optimizers import adamw, decay_link
from optax_superconv.schedules._onecycle import onecycle
from optax_superconv.schedules._phases import Phase, Shape, phase_schedule
from optax_superconv.transforms._learning_rate import scale_by_learning_rate
from optax_superconv.transforms._momentum import adam_from, scale_by_scheduled_adam
from optax_superconv.transforms._multipliers import layerwise_multipliers
from optax_superconv.transforms._unfreezing import frozen_until, unfreezing


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
    max_momentum: ArrayLike = 0.95,
    base_momentum: ArrayLike = 0.85,
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    mask: Any = "matrices",
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
      init_learning_rate: Rate at step 0 and at the thaw; see :func:`onecycle`. None is
        ``peak_learning_rate / 25``.
      end_learning_rate: Rate from step ``total_steps`` on; see :func:`onecycle`.
      annihilation_steps: Steps of the final fall, of those after the thaw; see
        :func:`onecycle`. None is 0.
      shape: Shape of every phase; see :func:`onecycle_schedule`.
      max_momentum: b1 at the start, the thaw and the end, in [0, 1).
      base_momentum: b1 at the peaks of the rate, in [0, 1) and at most
        ``max_momentum``.
      weight_decay: Strength of at least 0, or a schedule. It is multiplied by the rate
        of each group, so that frozen groups keep every bit.
      mask: What is decayed; see :func:`add_decayed_weights`.

    Returns:
      The optimizer. :func:`read_hyperparams` reads what it reads of :func:`adamw`, with
      ``learning_rate/<label>`` of every group. If ``freeze_steps`` is not 0 it reads
      ``frozen/<label>`` too, and what belongs to the moments once for the last group
      and once for all others, as ``b1/head`` and ``b1/body``, also while those are
      frozen.

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
    left = "total_steps - freeze_steps", total_steps - freeze_steps
    if warmup_steps is not None:
        _checks.steps("warmup_steps", warmup_steps, below=left)
    # Checks decay and min_multiplier where the optimizer is built.
    layerwise_multipliers(range(2), decay, min_multiplier=min_multiplier)
    learning_rate, b1 = onecycle(
        peak_learning_rate,
        total_steps - freeze_steps,
        warmup_steps=warmup_steps,
        init_learning_rate=init_learning_rate,
        end_learning_rate=end_learning_rate,
        annihilation_steps=annihilation_steps,
        shape=shape,
        max_momentum=max_momentum,
        base_momentum=base_momentum,
    )

    def multipliers(labels: list[Any]) -> dict[Any, Any]:
        rule = "integers that rise from the input to the output"
        ordered = isinstance(labels, list)  # Names come as a set.
        names = _checks.listed(sorted(labels))
        _checks.require(ordered, "param_labels", rule, f"names without order, {names}")
        return layerwise_multipliers(labels, decay, min_multiplier=min_multiplier)

    if not freeze_steps:
        return adamw(
            learning_rate,
            b1,
            weight_decay=weight_decay,
            mask=mask,
            multipliers=multipliers,
            param_labels=param_labels,
        )

    def after_rise(then: optax.Schedule, low: Any, high: Any) -> optax.Schedule:
        """The cycle, and before it one more way to its peak."""
        rise = phase_schedule(low, [Phase(freeze_steps, high, shape)])
        # In one dtype: strict promotion joins no others.
        parts = [lambda count, s=s: value_at(s, count) for s in (rise, then)]
        return optax.join_schedules(cast(Any, parts), [freeze_steps])

    peak, init = cast(jax.Array, peak_learning_rate), init_learning_rate
    learning_rate = after_rise(learning_rate, peak / 25 if init is None else init, peak)
    b1 = after_rise(b1, max_momentum, base_momentum)

    head = optax.chain(
        scale_by_scheduled_adam(b1, 0.99), *decay_link(weight_decay, mask)
    )
    moments = adam_from(freeze_steps, b1, 0.99)
    later = decay_link(_after(freeze_steps, weight_decay), mask)
    decays = optax.chain(optax.identity(), *later)

    def body(count: jax.Array) -> optax.GradientTransformation:
        frozen = frozen_until(freeze_steps, decays, count, before_rate=True)
        return optax.chain(moments, frozen)

    # One state for all that thaws together: a step costs more with each.
    return optax.chain(
        unfreezing(
            {"body": body, "head": lambda _: head},
            lambda labels: {k: 0 if k == labels[-1] else freeze_steps for k in labels},
            param_labels,
            lambda label, labels: "head" if label == labels[-1] else "body",
        ),
        scale_by_learning_rate(
            learning_rate, multipliers=multipliers, param_labels=param_labels
        ),
    )


def _after(step: int, value: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
    """A schedule from a step on; what is left alone counts from its thaw."""
    if not callable(value):
        return value
    last = _checks.MAX_STEPS - step  # The sum is int32 too.
    return lambda count: value(jnp.minimum(count, last) + step)
