"""From which step on does a group of parameters train?

Gradual unfreezing trains the head of a trained network first, and lets the others join
later, from the output to the input: ULMFiT thaws a group per epoch, fast.ai
all at once. A group that starts later needs memory of its own, so each has an inner
state, as in ``optax.partition``. It is left alone until then, and counts from there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from optax_superconv import _checks, _records, _trees
from optax_superconv._numerics import increment
from optax_superconv._trees import LabelFn, Labels
from optax_superconv.transforms import _skeletons
from optax_superconv.transforms._link import (
    check_state,
    check_transformation,
    is_transformation,
)


class GradualUnfreezingState(NamedTuple):
    """State of :func:`gradual_unfreezing`."""

    count: jax.Array  # (), int32
    facts: dict[str, jax.Array]  # frozen/<label>: (), bool; in the last update
    inner_state: optax.PartitionState  # one state of the inner optimizer per cell
    skeleton: Any  # the containers of the parameters, () for each leaf


def gradual_unfreezing(
    inner: optax.GradientTransformation | Callable[[int], optax.GradientTransformation],
    thaw_steps: Mapping[Any, int | None],
    param_labels: Labels | LabelFn,
) -> optax.GradientTransformationExtraArgs:
    """Freezes groups of parameters until a step of their own, or for good.

    A group with thaw step s gets updates of -0.0 at counts 0 to s - 1 and its first at
    count s. It then begins as on its first step: its moments are empty and schedules
    inside ``inner`` count from there, while what trains already goes on undisturbed.
    This is ``optax.partition`` with a state of ``inner`` per label, of constant
    structure: nothing is traced again at a thaw, and a checkpoint of any step loads.
    Each label costs time (a step with 12 labels takes 2 to 4 times as long as with
    one), so give one label to all that thaws at the same step.

    A frozen leaf keeps every bit, whatever stands before this or inside ``inner``, so
    put all that adds to the updates there, weight decay above all, and never after it
    (a rate after it may turn a parameter of -0.0 into 0.0).
    A rate that follows the run stands after: ``chain(gradual_unfreezing(chain(
    scale_by_scheduled_adam(...), add_decayed_weights(...)), ...),
    scale_by_learning_rate(schedule))``. Clipping by the global norm belongs before;
    inside ``inner`` each group has a norm of its own.

    Batch statistics are no parameters: to hold them too, run frozen layers in their
    evaluation mode.

    Args:
      inner: The optimizer of each group, or its part up to the learning rate. Or a
        function of the thaw step that makes it, where schedules are to follow the run:
        ``lambda step: scale_by_scheduled_adam(lambda count: b1(count + step))``.
      thaw_steps: A dict from label to the step of the first update, an int of at least
        0, or None for never. Labels are all strings or all integers. A group that never
        thaws has no memory of its own. A resumed run goes by the steps that are given
        here, and refuses a state of other labels.
      param_labels: A tree of labels, a prefix of one, a dict from path to label, or a
        function ``params -> labels``; see :func:`scale_by_group`.

    Returns:
      The transformation. :func:`read_hyperparams` reads ``frozen/<label>``, whether the
      last update left a group alone, and what ``inner`` records as ``name/<label>``:
      until the group's thaw the values at step 0. A group that never thaws has no
      other records. :func:`restart_schedules` freezes groups anew.

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
      ...     grads = {"body": jnp.ones(()), "head": jnp.ones(())}
      ...     updates, state = tx.update(grads, state, params)
      ...     frozen = osc.read_hyperparams(state)["frozen/body"]
      ...     print(frozen, updates["body"], updates["head"])
      True -0.0 -1.0
      True -0.0 -1.0
      False -1.0 -1.0
      False -1.0 -1.0

    References:
      Howard and Ruder, `Universal Language Model Fine-tuning for Text Classification
      <https://arxiv.org/abs/1801.06146>`_, 2018, section 3.3.
    """
    if not callable(inner):
        check_transformation("inner", inner, " or a function that makes one")
    steps = _checked_steps(thaw_steps)

    def make_inner(step: int | None) -> optax.GradientTransformation:
        if step is None:
            return optax.identity()
        if is_transformation(inner):
            return inner
        made = inner(step)
        check_transformation(f"inner({step})", made)
        return made

    cells = {
        label: functools.partial(frozen_until, step, make_inner(step))
        for label, step in steps.items()
    }
    return unfreezing(cells, steps, param_labels, lambda label, _: label)


def unfreezing(
    cells: Mapping[Any, Callable[[jax.Array], optax.GradientTransformation]],
    thaw_steps: Mapping[Any, int | None] | Callable[[list[Any]], Any],
    param_labels: Labels | LabelFn,
    cell_of: Callable[[Any, list[Any]], Any],
) -> optax.GradientTransformationExtraArgs:
    """:func:`gradual_unfreezing` of labels that may share a cell with one inner state.

    ``cells`` are optimizers as functions of the count, by name; ``cell_of(label,
    labels)`` names that of a label. ``thaw_steps`` may be a function of the distinct
    labels.
    """

    def look_at(tree: Any) -> tuple[Any, dict[Any, int | None]]:
        """The cell of each leaf, as a tree, and the thaw step of each label."""
        labels = _trees.labels_of(param_labels, tree)
        known = _trees.check_labels(labels)
        steps = thaw_steps
        if not isinstance(steps, Mapping):
            steps = steps(known) if labels else {}
        hint = " (0 trains from the start, None never)"
        _trees.check_entries("thaw_steps", steps, labels, tree, hint)
        treedef = jax.tree.structure(tree, is_leaf=_trees.is_box)
        names = [cell_of(label, known) for label in labels]
        return jax.tree.unflatten(treedef, names), {**steps}

    def inner_at(count: jax.Array, names: Any) -> optax.GradientTransformationExtraArgs:
        of_cell = {name: make(count) for name, make in cells.items()}
        return optax.partition(of_cell, lambda _: names)

    def facts_at(
        count: jax.Array, steps: Mapping[Any, int | None]
    ) -> dict[str, jax.Array]:
        return {
            f"frozen/{label}": jnp.array(True) if step is None else count < step
            for label, step in steps.items()
        }

    def init_fn(params: optax.Params) -> GradualUnfreezingState:
        names, steps = look_at(params)
        count = jnp.zeros([], jnp.int32)
        facts = facts_at(count, steps)
        if _trees.is_unknown(params):  # A single leaf matches whatever dict there is.
            facts = cast(dict[str, jax.Array], count < 0)
        return GradualUnfreezingState(
            count,
            facts,
            cast(optax.PartitionState, inner_at(count, names).init(params)),
            _skeletons.skeleton_of(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradualUnfreezingState]:
        check_state(state, GradualUnfreezingState)
        state = cast(GradualUnfreezingState, state)
        _skeletons.check_skeleton(updates, state.skeleton)
        names, steps = look_at(updates)
        facts = facts_at(state.count, steps)
        _checks.require(
            sorted(facts) == sorted(state.facts),
            "state",
            f"of groups with these labels ({', '.join(sorted(facts))})",
            f"one with {', '.join(sorted(state.facts))}",
        )
        if params is not None:
            params = _trees.given_updates(params, updates)
        new_updates, inner_state = inner_at(state.count, names).update(
            updates, state.inner_state, params, **extra_args
        )
        return new_updates, GradualUnfreezingState(
            increment(state.count),
            facts,
            cast(optax.PartitionState, inner_state),
            state.skeleton,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def frozen_until(
    step: int | None,
    inner: optax.GradientTransformation,
    count: jax.Array,
    *,
    before_rate: bool = False,
) -> optax.GradientTransformation:
    """The inner optimizer, which is left alone until ``count`` has come to a step.

    ``before_rate`` says that the updates are still to be multiplied by minus a rate.
    """
    if step == 0:
        return inner
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> optax.OptState:
        return optax.EmptyState() if step is None else inner.init(params)

    def still(updates: optax.Updates) -> optax.Updates:
        # To add -0.0 leaves every bit of a parameter as it is, and 0.0 does not.
        zeros = jax.tree.map(jnp.zeros_like, updates)
        return zeros if before_rate else jax.tree.map(jnp.negative, zeros)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if step is None:
            return still(updates), state
        new_updates, new_state = inner.update(updates, state, params, **extra_args)
        thawed = count >= step
        updates = _choose(thawed, new_updates, still(new_updates))
        return updates, _choose_state(thawed, new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _choose_state(condition: jax.Array, new: Any, old: Any) -> Any:
    """``new`` if ``condition`` else ``old``; of records always ``new``.

    What is frozen is at its step 0, and in ``new`` its records are of that step.
    """

    def choose(new: Any, old: Any) -> Any:
        if not _records.has_record(new):
            return _choose(condition, new, old)
        chosen = {
            name: value
            if name in _records.RECORDS
            else _choose_state(condition, value, getattr(old, name))
            for name, value in new._asdict().items()
        }
        # A cooldown waits for the thaw, and so what it lifts.
        if hasattr(old, "ending"):
            waits = ~condition & (old.ending.pending > 0)
            held = new.holds.held | (old.holds.held & waits)
            chosen["holds"] = new.holds._replace(held=held)
        return type(new)(**chosen)

    return jax.tree.map(choose, new, old, is_leaf=_records.has_record)


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
    """``new`` if ``condition`` else ``old``, in the dtypes of ``old``."""

    # Selecting runs on without the host, where a conditional on a GPU waits for it.
    def choose(new: Any, old: Any) -> jax.Array:
        old = jnp.asarray(old)
        return jax.lax.select(condition, jnp.asarray(new).astype(old.dtype), old)

    return jax.tree.map(choose, new, old)


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
