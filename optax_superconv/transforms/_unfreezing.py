"""From which step on does a group of parameters train?

Gradual unfreezing trains the head of a trained network first, and lets the others join
later, from the output to the input: ULMFiT thaws a group per epoch, fast.ai
all at once. A group that starts later needs memory of its own, so there is an inner
state per distinct thaw step. It is left alone until then, and counts from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from optax_superconv import _checks, _dials, _trees
from optax_superconv._numerics import increment
from optax_superconv._trees import LabelFn, Labels
from optax_superconv.transforms._link import check_transformation, is_transformation


class GradualUnfreezingState(NamedTuple):
    """State of :func:`gradual_unfreezing`."""

    count: jax.Array  # (), int32
    skeleton: Any  # the containers of the parameters, () for each leaf
    frozen: jax.Array  # (distinct thaw steps,), bool; in the next update
    groups: tuple[_dials.GroupState, ...]  # one per distinct thaw step


def gradual_unfreezing(
    inner: optax.GradientTransformation | Callable[[int], optax.GradientTransformation],
    thaw_steps: Mapping[Any, int | None],
    param_labels: Labels | LabelFn,
) -> optax.GradientTransformationExtraArgs:
    """Freezes groups of parameters until a step of their own, or for good.

    A group with thaw step s gets updates of zero at counts 0 to s - 1 and its first at
    count s. It then begins as on its first step: its moments are empty and schedules
    inside ``inner`` count from there, while what trains already goes on undisturbed.
    There is one state of ``inner`` per distinct thaw step, of constant structure:
    nothing is traced again at a thaw, and a checkpoint of any step loads.

    A frozen leaf keeps its bits (but for the sign of a zero) whatever stands before
    this or inside ``inner``, so put all that adds to the updates there, weight decay
    above all, and never after it.
    A rate that follows the run stands after: ``chain(gradual_unfreezing(chain(
    scale_by_scheduled_adam(...), add_decayed_weights(...)), ...),
    scale_by_learning_rate(schedule))``. Clipping by the global norm belongs before;
    inside ``inner`` each thaw step has a norm of its own.

    Batch statistics are no parameters: to hold them too, run frozen layers in their
    evaluation mode.

    Args:
      inner: The optimizer of each group, or its part up to the learning rate. Or a
        function of the thaw step that makes it, where schedules are to follow the run:
        ``lambda step: scale_by_scheduled_adam(lambda count: b1(count + step))``.
      thaw_steps: A dict from label to the step of the first update, an int of at least
        0, or None for never. Labels are all strings or all integers. A group that never
        thaws has no memory of its own.
      param_labels: A tree of labels, a prefix of one, a dict from path to label, or a
        function ``params -> labels``; see :func:`scale_by_group`.

    Returns:
      The transformation. :func:`frozen_labels` tells what is frozen;
      :func:`read_hyperparams` reads what ``inner`` records as ``name/<label>``: until a
      group's thaw a learning rate of 0, and of all else the value at step 0. A group
      that never thaws has no records.

    Raises:
      ValueError: At ``init`` and ``update``, if a label has no thaw step or a thaw step
        has no label. In ``update``, if the updates have another structure than the
        parameters at ``init``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> params = {"body": jnp.zeros(()), "head": jnp.zeros(())}
      >>> tx = osc.gradual_unfreezing(
      ...     optax.sgd(1.0), {"body": 2, "head": 0}, {"body": "body", "head": "head"})
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     print(osc.frozen_labels(state), end=" ")
      ...     grads = {"body": jnp.ones(()), "head": jnp.ones(())}
      ...     updates, state = tx.update(grads, state, params)
      ...     print(updates["body"], updates["head"])
      {'body'} 0.0 -1.0
      {'body'} 0.0 -1.0
      set() -1.0 -1.0
      set() -1.0 -1.0

    References:
      Howard and Ruder, `Universal Language Model Fine-tuning for Text Classification
      <https://arxiv.org/abs/1801.06146>`_, 2018, section 3.3.
    """
    if not callable(inner):
        check_transformation("inner", inner, " or a function that makes one")

    def make_inner(step: int) -> optax.GradientTransformation:
        if is_transformation(inner):
            return inner
        made = inner(step)
        check_transformation(f"inner({step})", made)
        return made

    return unfreezing(make_inner, _checked_steps(thaw_steps), param_labels)


def unfreezing(
    make_inner: Callable[[int], optax.GradientTransformation],
    thaw_steps: dict[Any, int | None] | Callable[[list[Any]], Any],
    param_labels: Labels | LabelFn,
    *,
    order: Sequence[int] = (),
    keeps_zeros: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """:func:`gradual_unfreezing` whose thaw steps may be a function of the labels.

    Its values are then those of ``order``, rising, which is all that is known without
    parameters. ``keeps_zeros`` says that the arrays of the inner state are 0 at first
    and stay so under gradients of 0, as Adam's moments do. Then frozen gradients are
    set to 0 and moments need not be held: if they were, the update could not use those
    that are stored, and the compiled program would compute every moment twice. Such an
    inner optimizer sees None for the leaves of others, which costs a step less than
    ``optax.MaskedNode``.
    """
    hole = None if keeps_zeros else optax.MaskedNode()

    def thaws_of(tree: Any) -> tuple[list[int | None], dict[Any, int | None]]:
        """The thaw step of each leaf and of each label."""
        labels = _trees.labels_of(param_labels, tree)
        if isinstance(thaw_steps, dict):
            steps = thaw_steps
        else:
            steps = thaw_steps(_trees.check_labels(labels)) if labels else {}
        hint = " (0 trains from the start, None never)"
        _trees.check_entries("thaw_steps", steps, labels, tree, hint)
        return [steps[label] for label in labels], steps

    def part(tree: Any, thaws: list[int | None], step: int) -> Any:
        """The tree with nothing but the leaves that thaw at ``step``."""
        leaves, treedef = jax.tree.flatten(tree, is_leaf=_trees.is_box)
        pairs = zip(leaves, thaws, strict=True)
        return jax.tree.unflatten(
            treedef, [x if thaw == step else hole for x, thaw in pairs]
        )

    def frozen_at(count: jax.Array, order: Sequence[int | None]) -> jax.Array:
        flags = [jnp.array(True) if s is None else count < s for s in order]
        return jnp.stack(flags) if flags else jnp.zeros(0, bool)

    def init_fn(params: optax.Params) -> GradualUnfreezingState:
        thaws, by_label = thaws_of(params)
        distinct = order or _distinct(by_label)
        count = jnp.zeros([], jnp.int32)
        groups = []
        for step in distinct:
            labels = sorted(k for k, s in by_label.items() if s == step)
            inner_state = (
                optax.EmptyState()
                if step is None
                # A tree without leaves is passed on whole: optax.tree.map_params looks
                # for parameters with a placeholder.
                else make_inner(step).init(
                    part(params, thaws, step) if thaws else params
                )
            )
            frozen = jnp.array(step is None or step > 0)
            names = dict.fromkeys(labels) if thaws else cast(dict[Any, None], params)
            groups.append(_dials.GroupState(names, frozen, inner_state))
        return GradualUnfreezingState(
            count, _trees.skeleton_of(params), frozen_at(count, distinct), tuple(groups)
        )

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradualUnfreezingState]:
        state = cast(GradualUnfreezingState, state)
        _trees.check_skeleton(updates, state.skeleton)
        thaws, by_label = thaws_of(updates)
        distinct = order or _distinct(by_label)
        leaves, treedef = jax.tree.flatten(updates, is_leaf=_trees.is_box)
        new_leaves = list(leaves)
        groups = []
        for step, group in zip(distinct, state.groups, strict=True):
            mine = [k for k, thaw in enumerate(thaws) if thaw == step]
            if step is None:
                for k in mine:
                    new_leaves[k] = jax.tree.map(jnp.zeros_like, leaves[k])
                groups.append(group)
                continue
            inner = optax.with_extra_args_support(make_inner(step))
            thawed = state.count >= step
            my_updates = part(updates, thaws, step)
            if step > 0 and keeps_zeros:
                my_updates = _or_zeros(thawed, my_updates)
            new_updates, inner_state = inner.update(
                my_updates,
                group.inner_state,
                None if params is None else part(params, thaws, step),
                **extra_args,
            )
            if step > 0:
                new_updates = _or_zeros(thawed, new_updates)
                inner_state = _choose_state(
                    thawed, inner_state, group.inner_state, keeps_zeros
                )
            new = jax.tree.leaves(new_updates, is_leaf=_trees.is_box)
            for k, leaf in zip(mine, new, strict=True):
                new_leaves[k] = leaf
            groups.append(_dials.GroupState(group.labels, ~thawed, inner_state))
        count = increment(state.count)
        return jax.tree.unflatten(treedef, new_leaves), GradualUnfreezingState(
            count, state.skeleton, frozen_at(count, distinct), tuple(groups)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _checked_steps(thaw_steps: Any) -> dict[Any, int | None]:
    if not isinstance(thaw_steps, Mapping):
        raise TypeError(
            "`thaw_steps` must be a dict from label to step, got "
            f"{thaw_steps!r} of type {type(thaw_steps).__name__}."
        )
    _checks.require(
        bool(thaw_steps), "thaw_steps", "a dict of at least one label", "{}"
    )
    _trees.check_labels(thaw_steps, "thaw_steps")
    return {
        label: None if step is None else _checks.steps(f"thaw_steps[{label!r}]", step)
        for label, step in thaw_steps.items()
    }


def _distinct(by_label: Mapping[Any, int | None]) -> list[int | None]:
    """Distinct thaw steps, rising, None last."""
    distinct = set(by_label.values())
    never: list[int | None] = [None] if None in distinct else []
    return sorted(s for s in distinct if s is not None) + never


def _choose(condition: jax.Array, new: Any, old: Any) -> jax.Array:
    # Selecting runs on without the host, where a conditional on a GPU waits for it.
    new, old = jnp.asarray(new), jnp.asarray(old)
    new = new if new.dtype == old.dtype else new.astype(old.dtype)
    return jax.lax.select(condition, new, old)


def _or_zeros(condition: jax.Array, updates: optax.Updates) -> optax.Updates:
    return jax.tree.map(lambda u: _choose(condition, u, jnp.zeros_like(u)), updates)


def _choose_state(condition: jax.Array, new: Any, old: Any, scalars_only: bool) -> Any:
    """``new`` if ``condition`` else ``old``; of records always ``new``.

    A frozen state is at its step 0, and so are its records in ``new``. As outputs of
    their own they are computed once, and not again for every leaf.
    """

    def is_record(node: Any) -> bool:
        return isinstance(node, _dials.AppliedHyperparams | _dials.AppliedMultipliers)

    def choose(new: Any, old: Any) -> Any:
        if is_record(new) or (scalars_only and jnp.ndim(new) > 0):
            return new
        return _choose(condition, new, old)

    return jax.tree.map(choose, new, old, is_leaf=is_record)


def frozen_labels(opt_state: Any) -> set[Any]:
    """The labels that :func:`gradual_unfreezing` holds frozen in the next update.

    Args:
      opt_state: An optimizer state, or any pytree that holds one, such as an
        ``nnx.Optimizer`` or a Linen ``TrainState``; at any nesting.

    Returns:
      The labels; empty if nothing is frozen. Labels whose thaw step is None always are.
      Of a batch of states, what is frozen in all of them.

    Raises:
      TypeError: Under ``jit``, where the step is not known.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> tx = osc.gradual_unfreezing(optax.adam(1e-3), {0: 10, 1: 0}, [0, 1])
      >>> osc.frozen_labels(tx.init([jnp.ones(2), jnp.ones(2)]))
      {0}
    """
    found: set[Any] = set()
    for state in _dials.find_states(opt_state, GradualUnfreezingState).values():
        (frozen,) = jax.tree.leaves(state.frozen)  # Out of its box, if it has one.
        if isinstance(frozen, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise TypeError(
                "`opt_state` must be concrete to tell what is frozen, got "
                f"{type(frozen).__name__}."
            )
        # The axes of a batch of states come first.
        flags = np.all(np.asarray(frozen).reshape(-1, len(state.groups)), axis=0)
        for flag, group in zip(flags, state.groups, strict=True):
            found.update(group.labels if flag else ())
    return found
