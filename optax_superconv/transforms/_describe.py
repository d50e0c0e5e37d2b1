"""Which parameters are in which group, for a person to check?"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_superconv import _checks, _dials, _trees
from optax_superconv._trees import LabelFn, Labels
from optax_superconv.transforms._groups import Multipliers, grouped


def describe_groups(
    params: optax.Params,
    param_labels: Labels | LabelFn,
    multipliers: Multipliers | None = None,
    *,
    leaves: bool = False,
) -> str:
    """A table of the groups, for a person to check.

    Args:
      params: The parameters; shapes and dtypes will do, as ``jax.eval_shape`` gives.
      param_labels: A tree of labels, a prefix of one, a dict from path to label, or a
        function ``params -> labels``; see :func:`scale_by_group`.
      multipliers: As in :func:`scale_by_group`. A schedule shows its value at step 0,
        an array its ends and its length. None leaves that column out.
      leaves: Whether to have a line per leaf, in the order of the leaves, with its
        path, group and shape. False has a line per group, in the order of the labels:
        how many leaves and numbers it has, and the paths of the first leaves.

    Returns:
      The lines, under a line of headings.

    Raises:
      ValueError: If a label has no multiplier or a multiplier has no label.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> layer = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> params = {"embed": jnp.ones((5, 2)), "layers": [layer, layer]}
      >>> label = osc.label_by_depth()
      >>> multipliers = osc.layerwise_multipliers(label(params), 0.75)
      >>> print(osc.describe_groups(params, label, multipliers))
      group  leaves  parameters  multiplier  paths
      0           1          10      0.5625  embed
      1           2           6        0.75  layers/0/bias, layers/0/kernel
      2           2           6           1  layers/1/bias, layers/1/kernel
      >>> print(osc.describe_groups(params, label, leaves=True))
      group  parameters  path
      0          (5, 2)  embed
      1            (2,)  layers/0/bias
      1          (2, 2)  layers/0/kernel
      2            (2,)  layers/1/bias
      2          (2, 2)  layers/1/kernel
    """
    _checks.flag("leaves", leaves)
    labels, paths = _trees.labels_of(param_labels, params), _trees.paths_of(params)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    shown: dict[str, str] = {}
    if multipliers is not None:
        groups = grouped(multipliers, param_labels)(params)
        shown = dict(zip(groups.shapes, map(_shown, groups.multipliers), strict=True))
    members = zip(labels, shapes, paths, strict=True)
    if leaves:
        headings = ["group", "parameters", "multiplier", "path"]
        rows = [
            [str(label), str(shape), shown.get(str(label), ""), path]
            for label, shape, path in members
        ]
    else:
        headings = ["group", "leaves", "parameters", "multiplier", "paths"]
        rows = []
        members = list(members)
        for group in _trees.check_labels(labels):
            mine = [(shape, path) for label, shape, path in members if label == group]
            size = sum(math.prod(shape) for shape, _ in mine)
            first = ", ".join(
                [path for _, path in mine[:2]] + ["..."] * (len(mine) > 2)
            )
            of_group = str(group), str(len(mine)), f"{size:,}"
            rows.append([*of_group, shown.get(str(group), ""), first])
    if multipliers is None:
        column = headings.index("multiplier")
        headings, *rows = ([*r[:column], *r[column + 1 :]] for r in [headings, *rows])
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for first, *numbers, last in [headings, *rows]:
        middle = (x.rjust(width) for x, width in zip(numbers, widths[1:], strict=False))
        lines.append("  ".join([first.ljust(widths[0]), *middle, last]))
    return "\n".join(lines)


def _shown(multiplier: Any) -> str:
    value = _dials.value_at(multiplier, jnp.int32(0), 1)
    if value.ndim:
        return f"{value[0]:.4g} ... {value[-1]:.4g} ({len(value)})"
    return f"{value:.4g}"
