r"""Which rate for which parameter?

One optimizer for all parameters, then a factor per group: :math:`u_i = m_{l(i)} u_i`.
Known special cases are choices of the factors:

* discriminative fine-tuning and layer-wise decay: :math:`m_l = d^{\,L-1-l}` of L groups
  from the input to the output, with :math:`d = 1/2.6` in ULMFiT and 0.65 to 0.9 for
  vision transformers;
* fast.ai's ``slice(lowest, highest)``: geometric between two ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import all_leaves
from jax.typing import ArrayLike

from optax_superconv import _checks
from optax_superconv._dials import (
    AppliedMultipliers,
    increment,
    narrow,
    times,
    value_at,
    widen,
)
from optax_superconv.transforms._labels import (
    LabelFn,
    Labels,
    check_labels,
    check_skeleton,
    is_box,
    is_function,
    is_masked,
    labels_of,
    listed,
    names_of,
    paths_of,
    skeleton_of,
)


class ScaleByGroupState(NamedTuple):
    """State of :func:`scale_by_group`."""

    count: jax.Array  # (), int32
    skeleton: Any  # the containers of the parameters, () for each leaf
    applied: AppliedMultipliers


def _in_order(labels: Any) -> list[Any]:
    """Distinct labels from the input to the output."""
    if is_function(labels):
        raise TypeError(
            f"`labels` must be a tree or a sequence of labels, got {labels!r}. Call it "
            "with the parameters first."
        )
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        labels = [labels]
    elif all_leaves([labels]):  # A range, an array, the keys of a dict.
        ordered = not isinstance(labels, set | frozenset)
        labels = list(labels) if ordered else {"": list(labels)}
    is_sequence = isinstance(labels, list | tuple) and all_leaves(labels)
    leaves = jax.tree.leaves(labels, is_leaf=is_box)
    leaves = [jax.tree.leaves(x)[0] if is_box(x) else x for x in leaves]
    arrays = (np.generic, np.ndarray, jax.Array)
    leaves = [
        label
        for x in leaves
        for label in (np.ravel(x).tolist() if isinstance(x, arrays) else [x])
    ]
    distinct = check_labels(leaves, "labels")
    _checks.require(bool(distinct), "labels", "at least one label", labels)
    if isinstance(distinct[0], str) and len(distinct) > 1:
        if not is_sequence:
            raise ValueError(
                "`labels` must be numbers, or names in a sequence from the input to "
                f"the output, got a tree of names {listed(distinct)}, which has no "
                "order."
            )
        return list(dict.fromkeys(leaves))
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
    d = _float("decay", decay, "above 0 and at most 1", lambda d: (d > 0) & (d <= 1))
    rule = "at least 0 and at most 1"
    least = _float(
        "min_multiplier", min_multiplier, rule, lambda m: (m >= 0) & (m <= 1)
    )
    order = _in_order(labels)
    traced = isinstance(d + least, jax.Array)
    return {
        label: jnp.maximum(d**power, least) if traced else max(d**power, least)
        for power, label in zip(reversed(range(len(order))), order, strict=True)
    }


def _float(name: str, value: ArrayLike, rule: str, holds: Any) -> Any:
    """A concrete number as a float, checked; a traced one as it is."""
    if isinstance(value, jax.core.Tracer):
        return value
    return _checks.scalar(name, value, rule, holds)


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
    high = _float("highest", highest, "above 0", lambda m: m > 0)
    order = _in_order(labels)
    if lowest is None:
        return {label: high if label == order[-1] else high / 10 for label in order}
    low = _float("lowest", lowest, "above 0", lambda m: m > 0)
    if not isinstance(low + high, jax.Array):
        _checks.require(low <= high, "lowest", f"at most `highest` ({high})", low)
    last = max(len(order) - 1, 1)
    # From the top, so that a single group has the highest.
    powers = [(last - len(order) + 1 + k) / last for k in range(len(order))]
    return {
        label: low * (high / low) ** power if power < 1 else high
        for label, power in zip(order, powers, strict=True)
    }


def scale_by_group(
    multipliers: Mapping[Any, optax.ScalarOrSchedule] | Callable[[list[Any]], Any],
    param_labels: Labels | LabelFn,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the updates of each group of parameters by a factor of its own.

    .. math:: u_i \leftarrow m_{l(i)}(t)\, u_i

    One optimizer for all and then this: the step costs what the optimizer alone costs,
    however many groups there are. Where it stands decides what it scales:

    * after a rescaling such as Adam's it scales the rate (before, Adam undoes it);
    * after ``add_decayed_weights`` it scales the decay too, as a rate per group does in
      timm, PyTorch's and Optax's AdamW; between the two, the decay is the same for all;
    * after the momentum of SGD or before it is the same for constants.

    So: ``chain(scale_by_scheduled_adam(...), add_decayed_weights(...),
    scale_by_group(...), scale_by_learning_rate(...))``. A finished optimizer will do:
    ``chain(onecycle_adamw(...), scale_by_group(...))``.

    Args:
      multipliers: A dict from label to multiplier, a finite number of at least 0 or a
        schedule ``count -> number``. :func:`layerwise_multipliers` makes one. Or a
        function of the labels (a sorted list of integers, or a set of names) that makes
        the dict, such as ``functools.partial(layerwise_multipliers, decay=0.75)``.
        (If ``optax.masked`` hides parameters, the function gets the labels of the
        others.)
      param_labels: A tree of labels, a prefix of one, or a function
        ``params -> labels`` such as :func:`label_by_depth` makes.

    Returns:
      The transformation. :func:`read_hyperparams` reads ``learning_rate/<label>``, the
      rate that each group got, where a rate is recorded in the same chain, as by
      :func:`scale_by_learning_rate`; else ``multiplier/<label>``.

    Raises:
      ValueError: At ``init`` and ``update``, if a label has no multiplier or a
        multiplier has no label. In ``update``, if the updates have another structure
        than the parameters at ``init``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
      >>> label = osc.label_by_path([("body", 0), ("head", 1)])
      >>> tx = optax.chain(
      ...     optax.scale_by_adam(),
      ...     osc.scale_by_group({0: 0.1, 1: 1.0}, label),
      ...     osc.scale_by_learning_rate(0.5))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> print(updates["body"].round(3), updates["head"].round(3))
      [-0.05 -0.05] [-0.5 -0.5]
      >>> rates = osc.read_hyperparams(state)
      >>> print({name: round(float(rate), 3) for name, rate in rates.items()})
      {'learning_rate': 0.5, 'learning_rate/0': 0.05, 'learning_rate/1': 0.5}

    References:
      Howard and Ruder, `Universal Language Model Fine-tuning for Text Classification
      <https://arxiv.org/abs/1801.06146>`_, 2018, section 3.2.
    """
    if not is_function(multipliers):
        multipliers = _checked_multipliers(multipliers)

    def values_at(by_label: Mapping[Any, Any], count: jax.Array) -> dict[Any, Any]:
        return {k: value_at(by_label[k], count) for k in sorted(by_label)}

    def record(values: dict[Any, Any], params: Any) -> AppliedMultipliers:
        if not values:  # optax.tree.map_params knows its placeholder by what it holds.
            return AppliedMultipliers(params, jnp.zeros(0))
        return AppliedMultipliers(names_of(values), jnp.stack(list(values.values())))

    def init_fn(params: optax.Params) -> ScaleByGroupState:
        labels = labels_of(param_labels, params)
        by_label = _multipliers_of(multipliers, labels, params)
        count = jnp.zeros([], jnp.int32)
        return ScaleByGroupState(
            count, skeleton_of(params), record(values_at(by_label, count), params)
        )

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByGroupState]:
        state = cast(ScaleByGroupState, state)
        del params, extra_args
        check_skeleton(updates, state.skeleton)
        labels = labels_of(param_labels, updates)
        by_label = _multipliers_of(multipliers, labels, updates)
        values = values_at(by_label, state.count)
        factors = {
            k: value if callable(by_label[k]) else _as_data(value, state.count)
            for k, value in values.items()
        }
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_box)

        def scaled(label: Any, leaf: Any) -> Any:
            return jax.tree.map(
                lambda g: narrow(times(factors[label], widen(g)), g), leaf
            )

        scaled_leaves = map(scaled, labels, leaves)
        return jax.tree.unflatten(treedef, scaled_leaves), ScaleByGroupState(
            increment(state.count), state.skeleton, record(values, updates)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _as_data(value: jax.Array, count: jax.Array) -> jax.Array:
    """A constant that XLA does not build into its kernels.

    So the leaves of all groups share kernels, and to compile many groups takes no
    longer than to compile one. XLA builds in scalars, and what it can compute
    beforehand; it cannot know that a count is not negative.
    """
    zero = count.astype(jnp.uint32) >> 31
    return jax.lax.dynamic_slice(jnp.stack([value, value + 1]), (zero,), (1,)).reshape(
        ()
    )


def _checked_multipliers(multipliers: Any) -> dict[Any, optax.ScalarOrSchedule]:
    """A copy; raises unless this is a dict of constants and schedules by label."""
    if not isinstance(multipliers, Mapping):
        raise TypeError(
            "`multipliers` must be a dict from label to multiplier, or a function that "
            f"makes one, got {multipliers!r} of type {type(multipliers).__name__}."
        )
    _checks.require(
        len(multipliers) > 0, "multipliers", "a dict of at least one label", "{}"
    )
    check_labels(multipliers, "multipliers")
    for label, multiplier in multipliers.items():
        name = f"multipliers[{label!r}]"
        rule = "finite and at least 0"
        _checks.number_or_schedule(name, multiplier, rule, _checks.non_negative)
        if not callable(multiplier) and np.ndim(multiplier):
            raise TypeError(f"`{name}` must be a single number, got {multiplier}.")
    return dict(multipliers)


def _multipliers_of(multipliers: Any, labels: list[Any], params: Any) -> dict[Any, Any]:
    """The dict of multipliers, checked against the labels of ``params``."""
    if is_function(multipliers):
        if not labels:
            return {}
        known = check_labels(labels)
        # Names have no order: a set of them is refused by what would need one.
        multipliers = multipliers(set(known) if isinstance(known[0], str) else known)
        _checked_multipliers(multipliers)
    by_label: dict[Any, str] = {}
    for path, label in zip(paths_of(params), labels, strict=True):
        by_label.setdefault(label, path)
    missing = [label for label in by_label if label not in multipliers]
    if missing:
        where = {label: by_label[label] for label in missing}
        raise ValueError(
            "`multipliers` must have every label, got none for "
            + listed(f"{label} ({path} ...)" for label, path in where.items())
            + "."
        )
    idle = [label for label in multipliers if label not in by_label]
    if idle and labels and not is_masked(params):
        raise ValueError(
            f"`multipliers` must each have a parameter, got {listed(idle)}, where the "
            f"labels are {listed(by_label)}."
        )
    return multipliers


def describe_groups(
    params: optax.Params,
    param_labels: Labels | LabelFn,
    multipliers: Any = None,
) -> str:
    """A table of path, group and multiplier, for a person to check.

    Args:
      params: The parameters.
      param_labels: A tree of labels, a prefix of one, or a function
        ``params -> labels``.
      multipliers: As in :func:`scale_by_group`. A schedule shows its value at step 0.
        None leaves that column out.

    Returns:
      A line per leaf, in the order of the leaves, under a line of headings.

    Raises:
      ValueError: If a label has no multiplier or a multiplier has no label.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> params = {"embed": jnp.ones(2), "layers": [jnp.ones(2), jnp.ones(2)]}
      >>> label = osc.label_by_depth()
      >>> multipliers = osc.layerwise_multipliers(label(params), 0.75)
      >>> print(osc.describe_groups(params, label, multipliers))
      path      group  multiplier
      embed     0      0.5625
      layers/0  1      0.75
      layers/1  2      1
    """
    labels = labels_of(param_labels, params)
    rows = [["path", "group"], *zip(paths_of(params), map(str, labels), strict=True)]
    if multipliers is not None:
        if not is_function(multipliers):
            _checked_multipliers(multipliers)
        values = _multipliers_of(multipliers, labels, params)
        shown = [f"{_at_start(values[label]):.4g}" for label in labels]
        column = ["multiplier", *shown]
        rows = [[*row, cell] for row, cell in zip(rows, column, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _at_start(multiplier: float | jax.Array | Callable[[jax.Array], Any]) -> float:
    return float(multiplier(jnp.int32(0)) if callable(multiplier) else multiplier)
