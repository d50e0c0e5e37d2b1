r"""Which factor for which group, from the input to the output?

Known special cases are choices of the factors:

* discriminative fine-tuning and layer-wise decay: :math:`m_l = d^{\,L-1-l}` of L groups
  from the input to the output, with :math:`d = 1/2.6` in ULMFiT and 0.65 to 0.9 for
  vision transformers;
* fast.ai's ``slice(lowest, highest)``: geometric between two ends.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.tree_util import all_leaves
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._trees import check_labels


def _in_order(labels: Any) -> list[Any]:
    """Distinct labels from the input to the output."""
    if _checks.is_function(labels):
        raise TypeError(
            f"`labels` must be a tree or a sequence of labels, got {labels!r}. Call it "
            "with the parameters first."
        )
    if isinstance(labels, set | frozenset | range):
        found = list(labels)
    else:
        found = jax.tree.leaves(labels)
    distinct = check_labels(found, "labels")
    _checks.require(bool(distinct), "labels", "at least one label", labels)
    if isinstance(distinct[0], str) and len(distinct) > 1:
        if not (isinstance(labels, list | tuple) and all_leaves(labels)):
            raise ValueError(
                "`labels` must be numbers, or names in a sequence from the input to "
                f"the output, got a tree of names {_checks.listed(distinct)}, which "
                "has no order."
            )
        return list(dict.fromkeys(found))
    return distinct


def layerwise_multipliers(
    labels: Any, decay: ArrayLike, *, min_multiplier: ArrayLike = 0.0
) -> dict[Any, Any]:
    r"""Multipliers that fall by a constant factor per group towards the input.

    .. math:: m_l = \max(d^{\,L - 1 - l}, m_{\min}), \qquad l = 0, \ldots, L - 1

    The last group keeps the whole rate. ULMFiT's discriminative rates are
    ``decay=1 / 2.6``; fine-tuned vision transformers use 0.65 to 0.9.

    Args:
      labels: A tree of integers, as the function of :func:`label_by_depth` makes from
        the parameters. Or a sequence of integers or names from the input to the output,
        with at least one label. Integers are sorted. Names keep the order of the
        sequence; a tree of names has no order, so it may have only one.
      decay: Factor :math:`d` per group, in (0, 1].
      min_multiplier: The smallest multiplier, in [0, 1].

    Returns:
      A dict from label to multiplier, for :func:`scale_by_group`.

    Examples:
      >>> import optax_superconv as osc
      >>> osc.layerwise_multipliers(["stem", "body", "head"], 0.5)
      {'stem': 0.25, 'body': 0.5, 'head': 1.0}

    References:
      Howard and Ruder, `Universal Language Model Fine-tuning for Text Classification
      <https://arxiv.org/abs/1801.06146>`_, 2018, section 3.2;
      Bao et al., `BEiT <https://arxiv.org/abs/2106.08254>`_, 2022.
    """
    d = _float("decay", decay, _checks.FRACTION)
    rule = _checks.Rule("at least 0 and at most 1", lambda m: (m >= 0) & (m <= 1))
    least = _float("min_multiplier", min_multiplier, rule)
    order = _in_order(labels)
    traced = isinstance(d + least, jax.Array)
    return {
        label: jnp.maximum(d**power, least) if traced else max(d**power, least)
        for power, label in zip(reversed(range(len(order))), order, strict=True)
    }


def _float(name: str, value: ArrayLike, rule: _checks.Rule) -> Any:
    """A concrete number as a float, checked; a traced one as it is."""
    if isinstance(value, jax.core.Tracer):
        return value
    return _checks.scalar(name, value, rule)


def geometric_multipliers(
    labels: Any, lowest: ArrayLike | None = None, highest: ArrayLike = 1.0
) -> dict[Any, Any]:
    r"""Multipliers spaced evenly in their logarithm, as fast.ai's ``slice`` of rates.

    .. math:: m_l = m_{\text{low}}\,
              (m_{\text{high}} / m_{\text{low}})^{\,l / (L - 1)}

    Args:
      labels: As in :func:`layerwise_multipliers`.
      lowest: Multiplier of the group nearest the input, above 0. None is fast.ai's
        ``slice(highest)``: a tenth of ``highest`` for every group but the last.
      highest: Multiplier of the last group, above 0 and at least ``lowest``.

    Returns:
      A dict from label to multiplier, for :func:`scale_by_group`.

    Examples:
      >>> import optax_superconv as osc
      >>> osc.geometric_multipliers(range(3), 0.25)
      {0: 0.25, 1: 0.5, 2: 1.0}
      >>> osc.geometric_multipliers(range(3))
      {0: 0.1, 1: 0.1, 2: 1.0}

    References:
      Howard and Gugger, `fastai: A Layered API for Deep Learning
      <https://arxiv.org/abs/2002.04688>`_, 2020, ``even_mults``.
    """
    high = _float("highest", highest, _checks.POSITIVE)
    order = _in_order(labels)
    if lowest is None:
        return {label: high if label == order[-1] else high / 10 for label in order}
    low = _float("lowest", lowest, _checks.POSITIVE)
    if not isinstance(low + high, jax.Array):
        _checks.require(low <= high, "lowest", f"at most `highest` ({high})", low)
    last = max(len(order) - 1, 1)
    # From the top, so that a single group has the highest.
    powers = [(last - len(order) + 1 + k) / last for k in range(len(order))]
    return {
        label: low * (high / low) ** power if power < 1 else high
        for label, power in zip(order, powers, strict=True)
    }
