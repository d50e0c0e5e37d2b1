"""Do updates have the structure that the parameters had at ``init``?"""

from __future__ import annotations

from typing import Any

import jax
import optax

from optax_superconv import _trees


def skeleton_of(params: optax.Params) -> Any:
    """The containers of the parameters, with an empty tuple for each leaf."""

    def bare(node: Any) -> Any:
        return optax.MaskedNode() if _trees.is_hole(node) else ()

    return jax.tree.map(
        bare, params, is_leaf=lambda n: _trees.is_hole(n) or _trees.is_box(n)
    )


def check_skeleton(updates: optax.Updates, skeleton: Any) -> None:
    """Raises unless ``updates`` have the structure that ``init`` has seen."""
    if skeleton is None:
        return
    now = skeleton_of(updates)
    same: Any = jax.tree.structure(skeleton)
    if jax.tree.structure(now) == same:
        return

    def names_in(tree: Any) -> dict[_trees.Names, Any]:
        return dict(
            _trees.named_leaves(tree, lambda node: type(node) is tuple and not node)
        )

    before, after = names_in(skeleton), names_in(now)
    changed = _trees.difference(before.keys() - after, after.keys() - before)
    kind = f"containers of another kind ({type(now).__name__} at the root)"
    rule = "the structure of the parameters at `init`"
    raise ValueError(f"`updates` must have {rule}, got updates {changed or kind}.")
