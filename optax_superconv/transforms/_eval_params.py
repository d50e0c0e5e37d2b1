"""What do averaged parameters look like to a model?"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks, _trees
from optax_superconv._checks import listed
from optax_superconv._numerics import is_abstract, wide_dtype
from optax_superconv._records import check_structured, states_in
from optax_superconv._trees import Names
from optax_superconv.transforms._samples import AverageState, SnapshotState


def _positions(averages: optax.Params, params: optax.Params) -> dict[Names, Any]:
    """What was averaged, by its names; raises unless ``params`` has the same leaves."""
    found = dict(_trees.named_leaves(averages, _trees.is_position))
    current = dict(_trees.named_leaves(params, _trees.is_position))
    # What is masked may be a whole subtree.
    holes = {names for names, leaf in found.items() if _trees.is_hole(leaf)}
    lost = _trees.outside(found.keys() - current, holes)
    new = _trees.outside(current.keys() - found, holes)
    changed = _trees.difference(lost, new)
    rule = "of the structure that the average has seen at `init`"
    _checks.require(not changed, "params", rule, changed)
    return {n: leaf for n, leaf in found.items() if leaf is not None and n not in holes}


def _mean(snapshots: list[Any], num_samples: jax.Array) -> jax.Array:
    """The average of the snapshots of a leaf, or the one average itself."""
    first, *others = [_trees.array_of(leaf) for leaf in snapshots]
    if not others:
        return first
    dtype = wide_dtype(first)
    wide = sum((leaf.astype(dtype) for leaf in others), first.astype(dtype))
    # Snapshots not yet taken are 0.
    return wide / jnp.clip(num_samples, 1, len(snapshots)).astype(dtype)


def eval_params(
    opt_state: Any,
    params: optax.Params,
    *,
    name: str | None = None,
    blend: ArrayLike = 1.0,
) -> Any:
    """The averaged parameters, ready to evaluate.

    Finds the average at any nesting of the state. Works inside and outside ``jit``, and
    gives shapes and dtypes for those of ``jax.eval_shape``.

    Args:
      opt_state: An optimizer state with an average, such as that of
        :func:`ema_params`, or any pytree that holds one, such as the ``opt_state`` of
        an ``nnx.Optimizer`` or a Linen ``TrainState``. A state with a leading axis, as
        of ``jax.vmap``, needs ``jax.vmap(eval_params)(opt_state, params)``.
      params: The current parameters, with the paths and the shapes that the optimizer
        was initialised with. The containers may differ, an ``nnx.State`` for example.
      name: The ``name`` that the average was made with. None is the only average; a
        state with several needs a name.
      blend: A finite number b; (1 - b) params + b average is returned, computed in
        float32 or wider. Between 0 and 1 it interpolates, beyond it extrapolates.

    Returns:
      The average in the containers, dtypes and Flax Variables of ``params``. Leaves
      that are not averaged, and all before the first sample, are those of ``params``.
      State that belongs to weights has to be made anew for these: batch statistics by
      :func:`recalibrate_batch_stats`, the vectors of spectral norms by some forward
      passes in training mode; see :func:`average_params`.

    Raises:
      ValueError: If there is no average in the state, or more than one of the same
        name, as inside of ``optax.partition`` (put the average last in the chain), or
        if the containers of the state have become dicts, as in a checkpoint that was
        restored without them.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> tx = optax.chain(optax.sgd(1.0), osc.ema_params(0.5), osc.swa_params(0))
      >>> params = {"w": jnp.zeros(())}
      >>> state = tx.init(params)
      >>> for _ in range(2):  # Parameters 1 and 2.
      ...     updates, state = tx.update({"w": -jnp.ones(())}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(osc.eval_params(state, params, name="swa")["w"])
      1.5
    """
    _checks.single_number("blend", blend)
    if any(map(is_abstract, jax.tree.leaves((opt_state, params)))):
        read = partial(eval_params, name=name, blend=blend)
        return jax.eval_shape(read, opt_state, params)
    check_structured(opt_state)
    found = [
        (name_there, at, state, tree)
        for at, state in _find_states(opt_state, AverageState, SnapshotState).items()
        for name_there, tree in state[-1].items()
    ]
    rule = "of an optimizer with an average"
    _checks.require(bool(found), "opt_state", rule, states_in(opt_state))
    known = list(dict.fromkeys(name_there for name_there, *_ in found))
    if name is None and len(known) == 1:
        (name,) = known
    rule = f"one of {', '.join(map(repr, known))}"
    is_known = isinstance(name, str) and name in known
    _checks.require(is_known, "name", rule, repr(name))
    chosen = [item for item in found if item[0] == name]
    _checks.require(
        len(chosen) == 1,
        "opt_state",
        f"one with a single average {name!r} (give each a name, put it last in the "
        "chain and outside of `optax.partition`, or pass a part of the state)",
        f"several, at {listed(at for _, at, *_ in chosen)}",
    )
    ((_, _, state, tree),) = chosen
    number = _trees.array_of(state.num_samples)
    _checks.require(
        number.ndim == 0,
        "opt_state",
        "of a single run (of several: `jax.vmap(eval_params)(opt_state, params)`)",
        f"one whose count of samples has the shape {number.shape}",
    )
    slots = tree if isinstance(state, SnapshotState) else (tree,)
    averages = [_positions(slot, params) for slot in slots]

    def averaged(names: Names, leaf: Any) -> Any:
        if names not in averages[0]:
            return _trees.in_new_boxes(leaf)
        average = _mean([slot[names] for slot in averages], number)
        now = _trees.array_of(leaf)
        _checks.require(
            now.shape == average.shape,
            "params",
            f"of the shapes that the average has seen at `init` ({average.shape} at "
            f"{'/'.join(names)!r})",
            now.shape,
        )
        dtype = wide_dtype(average, now)
        part = jnp.asarray(blend).astype(dtype)
        mixed = (1 - part) * now.astype(dtype) + part * average.astype(dtype)
        # Whatever the parameters are, even if they are not finite.
        mixed = jnp.where(part == 1, average.astype(dtype), mixed)
        value = jnp.where(number > 0, mixed.astype(now.dtype), now)
        return _trees.boxed_as(leaf, value)

    return jax.tree.unflatten(
        jax.tree.structure(params, is_leaf=_trees.is_box),
        [averaged(*item) for item in _trees.named_leaves(params)],
    )


def _find_states(opt_state: Any, *kinds: type) -> dict[str, Any]:
    """The states of these kinds at any nesting, by their path."""
    found = jax.tree_util.tree_leaves_with_path(
        opt_state, is_leaf=lambda node: isinstance(node, kinds)
    )
    return {_trees.path_of(path): x for path, x in found if isinstance(x, kinds)}
