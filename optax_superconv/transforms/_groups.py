r"""Which rate for which parameter?

One optimizer for all parameters, then a factor per group: :math:`u_i = m_{l(i)} u_i`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks, _dials, _trees
from optax_superconv._numerics import elements, increment, joined, scale
from optax_superconv._trees import LabelFn, Labels
from optax_superconv.transforms import _skeletons
from optax_superconv.transforms._link import link

# A number, an array along the leading axis of stacked layers, or a schedule of these.
Multiplier = ArrayLike | optax.Schedule
Multipliers = Mapping[Any, Multiplier] | Callable[[list[Any]], Mapping[Any, Multiplier]]


class ScaleByGroupState(NamedTuple):
    """State of :func:`scale_by_group`."""

    count: jax.Array  # (), int32
    dials: _dials.Record  # multiplier/<label>, (layers,) for one that is an array
    holds: _dials.Holds
    skeleton: Any  # the containers of the parameters, () for each leaf


class Groups(NamedTuple):
    """The groups of a tree, in the order of their names."""

    shapes: _dials.Shapes  # of their multipliers, by name
    multipliers: list[Any]
    members: list[int]  # per leaf of the tree, a box being one; empty without groups
    skeleton: Any
    are_unknown: bool  # optax.tree.map_params asks, and has no parameters

    def factors_at(self, count: jax.Array) -> jax.Array:
        """The factors of all groups, float32."""
        return joined(_dials.value_at(x, count, 1) for x in self.multipliers)

    def axes(self) -> list[int]:
        """Per leaf, how many leading axes are layers."""
        axes = [len(shape) for shape in self.shapes.values()]
        return [axes[member] for member in self.members]

    def named(self, kind: str) -> _dials.Shapes:
        """The shapes by the names of dials, ``kind/<label>``."""
        return {f"{kind}/{name}": shape for name, shape in self.shapes.items()}


def scale_by_group(
    multipliers: Multipliers,
    param_labels: Labels | LabelFn,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the updates of each group of parameters by a factor of its own.

    .. math:: u_i \leftarrow m_{l(i)}(t)\, u_i

    For a chain whose rate is not this package's; its :func:`scale_by_learning_rate`
    takes multipliers itself. One optimizer for all and then this: the step costs what
    the optimizer alone costs, however many groups there are. Where it stands decides
    what it scales:

    * after a rescaling such as Adam's it scales the rate (before, Adam undoes it);
    * after ``add_decayed_weights`` it scales the decay too, as a rate per group does in
      timm, PyTorch's and Optax's AdamW; between the two, the decay is the same for all;
    * after the momentum of SGD or before it is the same for constants.

    A finished optimizer will do: ``chain(optax.adamw(1e-3), scale_by_group(...))``.

    Layers that are stacked for ``jax.lax.scan`` or ``jax.vmap`` are one leaf with a
    leading axis. Their multiplier is an array of shape (layers,), a factor per index.

    Args:
      multipliers: A dict from label to multiplier: a finite number of at least 0, an
        array of them along the leading axis of all leaves of the group, or a schedule
        ``count -> number or array``. :func:`layerwise_multipliers` makes one. Or a
        function of the labels (a sorted list of integers, or a set of names) that makes
        the dict, such as ``functools.partial(layerwise_multipliers, decay=0.75)``.
        (If ``optax.masked`` hides parameters, the function gets the labels of the
        others.)
      param_labels: A tree of labels, a prefix of one, a dict from path to label such as
        ``{"blocks/0": 0, "head": 1}``, or a function ``params -> labels`` such as
        :func:`label_by_depth` makes.

    Returns:
      The transformation. :func:`read_hyperparams` reads ``multiplier/<label>``, which
      :func:`set_hyperparams` sets; it has the shape of the multiplier.

    Raises:
      ValueError: At ``init`` and ``update``, if a label has no multiplier or a
        multiplier has no label, or if an array is not as long as the leading axis of a
        leaf. In ``update``, if the updates have another structure
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
      ...     optax.scale_by_learning_rate(0.5))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> print(updates["body"].round(3), updates["head"].round(3))
      [-0.05 -0.05] [-0.5 -0.5]
      >>> applied = osc.read_hyperparams(state)
      >>> print({name: round(float(value), 3) for name, value in applied.items()})
      {'multiplier/0': 0.1, 'multiplier/1': 1.0}

    References:
      Howard and Ruder, `Universal Language Model Fine-tuning for Text Classification
      <https://arxiv.org/abs/1801.06146>`_, 2018, section 3.2.
    """
    given = multipliers is not None and param_labels is not None
    _checks.require(given, "multipliers", "given, with `param_labels`", None)
    groups_of = grouped(multipliers, param_labels)

    def init_fn(params: optax.Params) -> ScaleByGroupState:
        groups, count = groups_of(params), jnp.zeros([], jnp.int32)
        factors = groups.factors_at(count)
        dials, holds = _dials.opened(groups.named("multiplier"), factors)
        # A single leaf matches whatever dict there is.
        dials = cast(_dials.Record, factors) if groups.are_unknown else dials
        return ScaleByGroupState(count, dials, holds, groups.skeleton)

    def update_fn(
        updates: optax.Updates, state: ScaleByGroupState, params: optax.Params | None
    ) -> tuple[optax.Updates, ScaleByGroupState]:
        del params
        _skeletons.check_skeleton(updates, state.skeleton)
        groups, count = groups_of(updates), state.count
        base, shapes = groups.factors_at(count), groups.named("multiplier")
        holds = _dials.noticed(
            shapes, state.dials, state.holds, base, groups.multipliers
        )
        factors = jnp.where(holds.held, holds.values, base)
        of_group = elements(factors, count, [*shapes.values()])
        dials, holds = _dials.written(shapes, of_group, holds)
        return scale_groups(of_group, groups, updates), ScaleByGroupState(
            increment(count), dials, holds, state.skeleton
        )

    return link(ScaleByGroupState, init_fn, update_fn)


def grouped(
    multipliers: Any, param_labels: Labels | LabelFn | None
) -> Callable[[Any], Groups]:
    """The groups of a tree, with multipliers and labels that are checked here."""
    if multipliers is None and param_labels is None:
        return lambda tree: Groups({}, [], [], None, False)
    for name, value, other in (
        ("multipliers", multipliers, "param_labels"),
        ("param_labels", param_labels, "multipliers"),
    ):
        _checks.require(value is not None, name, f"given with `{other}`", None)
    if not callable(multipliers):
        multipliers = _checked_multipliers(multipliers)

    def groups_of(tree: Any) -> Groups:
        labels = _trees.labels_of(cast(Labels, param_labels), tree)
        by_label = _multipliers_of(multipliers, labels, tree)
        # In the order of the full names, `kind/<label>`.
        full = _dials.in_order(f"/{label}" for label in by_label)
        names = [name.removeprefix("/") for name in full]
        by_name = {str(label): value for label, value in by_label.items()}
        at = {name: k for k, name in enumerate(names)}
        shapes = {name: _shape_of(by_name[name]) for name in names}
        members = [at[str(label)] for label in labels]
        _check_layers([shapes[names[k]] for k in members], tree, labels)
        return Groups(
            shapes,
            [by_name[name] for name in names],
            members,
            _skeletons.skeleton_of(tree),
            not names and _trees.is_unknown(tree),
        )

    return groups_of


def _shape_of(multiplier: Any) -> tuple[int, ...]:
    value = jax.eval_shape(lambda: _dials.value_at(multiplier, jnp.int32(0), 1))
    return value.shape


def _check_layers(shapes: list[tuple[int, ...]], tree: Any, labels: list[Any]) -> None:
    """Raises unless each leaf has an index per element of an array of multipliers."""
    if not any(shapes):
        return
    leaves = jax.tree.leaves(tree, is_leaf=_trees.is_box)
    rows = zip(shapes, leaves, labels, _trees.paths_of(tree), strict=True)
    for shape, leaf, label, path in rows:
        (array,) = jax.tree.leaves(leaf)
        _checks.require(
            jnp.shape(array)[:1] == shape or not shape,
            f"multipliers[{label!r}]",
            f"a number, or one per index of the leading axis of each leaf, as {path} "
            f"of shape {jnp.shape(array)}",
            f"an array of shape {shape}",
        )


def scale_groups(
    factors: Sequence[jax.Array], groups: Groups, updates: optax.Updates
) -> optax.Updates:
    """Each update times the factor of its group."""
    leaves, treedef = jax.tree.flatten(updates, is_leaf=_trees.is_box)
    scaled = [
        scale(factors[member], leaf)
        for member, leaf in zip(groups.members, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, scaled)


def _checked_multipliers(multipliers: Any) -> dict[Any, Multiplier]:
    """A copy; raises unless this is a dict of constants and schedules by label."""
    if not isinstance(multipliers, Mapping):
        raise TypeError(
            "`multipliers` must be a dict from label to multiplier, or a function that "
            f"makes one, got {multipliers!r} of type {type(multipliers).__name__}."
        )
    _checks.require(
        len(multipliers) > 0, "multipliers", "a dict of at least one label", "{}"
    )
    _trees.check_labels(multipliers, "multipliers")
    for label, multiplier in multipliers.items():
        name = f"multipliers[{label!r}]"
        if not callable(multiplier):
            _checks.number(name, multiplier, _checks.NON_NEGATIVE)
            rule, shape = "a number, or an array of one axis", np.shape(multiplier)
            fits = len(shape) <= 1 and 0 not in shape
            _checks.require(fits, name, rule, f"an array of shape {shape}")
    return dict(multipliers)


def _multipliers_of(multipliers: Any, labels: list[Any], params: Any) -> dict[Any, Any]:
    """The dict of multipliers, checked against the labels of ``params``."""
    if callable(multipliers):
        if not labels:
            return {}
        known = _trees.check_labels(labels)
        # Names have no order: a set of them is refused by what would need one.
        multipliers = multipliers(set(known) if isinstance(known[0], str) else known)
        _checked_multipliers(multipliers)
    _trees.check_entries("multipliers", multipliers, labels, params, "")
    return multipliers
