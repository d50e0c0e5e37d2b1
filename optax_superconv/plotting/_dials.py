"""Which values do schedules, or the dials of an optimizer, take over a run?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_superconv import _checks, _records
from optax_superconv.plotting._axes import new_axes
from optax_superconv.transforms._link import is_transformation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_POINTS = 2001

# By kind, as `learning_rate`, and by label, "" if there are no groups: (points,) each.
Curves = dict[str, dict[str, np.ndarray]]


def plot_schedule(
    dials: optax.Schedule
    | Mapping[str, optax.Schedule]
    | optax.GradientTransformation
    | optax.MultiSteps,
    total_steps: int,
    ax: Axes | None = None,
    *,
    params: Any = None,
) -> Axes:
    """Draws schedules, or the dials of an optimizer, over the steps of a run.

    Of schedules it draws the values from 0 to ``total_steps``. Each has a y-axis of its
    own, in its own colour, since rates and momenta differ by orders of magnitude.

    Of an optimizer it draws what it applies, as :func:`read_hyperparams` reads it after
    each of ``total_steps`` updates, in a dry run on gradients of 0. The groups of a
    dial share a y-axis, from light to dark, in the logarithm if their highest values
    are far apart. A dial that never moves stands in the title, but for the learning
    rate. Where ``frozen/<label>`` is set, the dials of that label are not drawn, since
    they do not act.

    Args:
      dials: A schedule, a mapping from names to at least one schedule, or an optimizer
        with a dial that :func:`read_hyperparams` reads.
      total_steps: Steps of the run, at least 1, of which at most 2,001 are drawn. With
        ``optax.MultiSteps`` they are micro-steps.
      ax: Where to draw; None is new axes.
      params: The parameters of the optimizer, arrays or ``jax.ShapeDtypeStruct``, where
        their labels depend on them. They are replaced by zeros, of size 1 along all but
        the leading axis. None is a single matrix.

    Returns:
      The axes of the first schedule, or of the learning rate.

    Examples:
      >>> import optax_superconv as osc
      >>> ax = osc.plotting.plot_schedule({
      ...     "learning rate": osc.onecycle_schedule(1.0, 100),
      ...     "momentum": osc.onecycle_momentum_schedule(100)}, total_steps=100)
      >>> print(ax.get_ylabel(), len(ax.figure.axes))
      learning rate 2
      >>> ax = osc.plotting.plot_schedule(osc.onecycle_adamw(1e-3, 100), 100)
      >>> print([axes.get_ylabel() for axes in ax.figure.axes])
      ['learning_rate', 'b1']
      >>> print(ax.get_title())
      b2 = 0.99, eps = 1e-08, weight_decay = 0.01
    """
    total_steps = _checks.steps("total_steps", total_steps, at_least=1)
    if not isinstance(dials, Mapping) and is_transformation(dials):
        steps, curves = _dry_run(dials, total_steps, params)
        first = new_axes(ax)
        curves, constants = _told_apart(curves)
        first.set_title(", ".join(constants), fontsize="medium")
    else:
        schedules: Any = dials if isinstance(dials, Mapping) else {"value": dials}
        _checks.require(len(schedules) > 0, "dials", "at least one schedule", "none")
        for name, schedule in schedules.items():
            _checks.function(f"dials[{name!r}]", schedule)
        first = new_axes(ax)
        steps = _thinned(total_steps)
        # Optax's own schedules do not all broadcast.
        curves = {
            name: {"": np.asarray(jax.vmap(schedule)(steps))}
            for name, schedule in schedules.items()
        }
    first.set_xlabel("step")
    _draw(first, steps, curves)
    return first


def _thinned(last: int) -> np.ndarray:
    """Steps from 0 to the last, no more than can be seen."""
    return np.unique(np.linspace(0, last, _MAX_POINTS).astype(np.int32))


def _dry_run(tx: Any, total_steps: int, params: Any) -> tuple[np.ndarray, Curves]:
    """What the dials of an optimizer apply, at some of its steps."""
    given = {"w": np.zeros((2, 2))} if params is None else params

    def stand_in(leaf: Any) -> jax.Array:
        # Masks go by the number of axes, and arrays of multipliers by the first one.
        shape = np.shape(leaf)
        return jnp.zeros(shape[:1] + (1,) * len(shape[1:]), jnp.float32)

    zeros = jax.tree.map(stand_in, given)
    try:
        state = tx.init(zeros)
    except Exception as error:
        if params is None:
            error.add_note("Labels depend on the parameters: give `params`.")
        raise
    entries = list(_records.entries_in(_records.places_in(state)))
    if not any(entry.is_dial for entry in entries):
        raise ValueError(
            "`dials` must be an optimizer with dials that `read_hyperparams` reads, "
            "such as `osc.adamw(...)` or a chain that ends with "
            "`osc.scale_by_learning_rate`, got one without: "
            f"{_records.states_in(state)}."
        )
    steps = _thinned(total_steps - 1)

    @jax.jit
    def run(zeros: Any, state: Any) -> Any:
        def advance(state: Any, num_steps: jax.Array) -> tuple[Any, Any]:
            def update(_: Any, state: Any) -> Any:
                return tx.update(zeros, state, zeros)[1]

            state = jax.lax.fori_loop(0, num_steps, update, state)
            return state, _records.read_hyperparams(state)

        gaps = jnp.asarray(np.diff(steps, prepend=-1), jnp.int32)
        return jax.lax.scan(advance, state, gaps)[1]

    applied = run(zeros, state)
    curves: Curves = {}
    for name in (entry.name for entry in entries if entry.is_dial):
        kind, _, label = name.partition("/")
        values = np.asarray(applied[name], np.float64).reshape(len(steps), -1)
        if f"frozen/{label}" in applied:
            values[np.asarray(applied[f"frozen/{label}"])] = np.nan
        columns = values.T
        for k, column in enumerate(columns):
            layer = f"[{k}]" if len(columns) > 1 else ""
            if not np.isnan(column).all():
                curves.setdefault(kind, {})[label + layer] = column
    for groups in curves.values():  # What all groups share is often that of one.
        base = groups.pop("", None)
        if base is not None and not any(
            np.array_equal(base, x) for x in [*groups.values()]
        ):
            groups[""] = base
    return steps, curves


def _told_apart(curves: Curves) -> tuple[Curves, list[str]]:
    """What is drawn, the learning rate first, and the dials that never move."""
    moving: Curves = {}
    constants: list[str] = []
    for kind in sorted(curves, key=lambda kind: not kind.startswith("learning_rate")):
        values = np.concatenate([*curves[kind].values()])
        values = np.unique(values[~np.isnan(values)])
        if len(values) > 1 or not moving:
            moving[kind] = curves[kind]
        else:
            constants.append(f"{kind} = {values[0]:.4g}")
    return moving, constants


def _draw(first: Axes, steps: np.ndarray, curves: Curves) -> None:
    """Each kind on a y-axis of its own, in its own colour."""
    handles: list[Any] = []
    axes = first
    for k, (kind, groups) in enumerate(curves.items()):
        axes = first if k == 0 else first.twinx()
        if k > 1:
            axes.spines["right"].set_position(("axes", 1 + 0.15 * (k - 1)))
        axes.set_ylabel(kind, color=f"C{k}")
        lines = []
        shades = iter(_shades(f"C{k}", len(groups.keys() - {""})))
        for label, values in groups.items():
            color, style = (next(shades), "-") if label else (f"C{k}", "--")
            style = style if len(groups) > 1 else "-"
            (line,) = axes.plot(steps, values, color=color, linestyle=style)
            line.set_label(f"{kind}/{label}" if label else kind)
            lines.append(line)
        highest = np.array([np.nanmax(values) for values in groups.values()])
        highest = highest[highest > 0]
        if highest.size and highest.max() > 30 * highest.min():
            axes.set_yscale("log")
            axes.set_ylim(highest.min() / 30, 1.5 * highest.max())
        if len(lines) > 4:  # Shades lead from the first to the last.
            grouped = [line for line in lines if "/" in str(line.get_label())]
            lines = [*(x for x in lines if x not in grouped), grouped[0], grouped[-1]]
        handles += lines if len(lines) > 1 else []
    if handles:  # On the axes that are drawn last, or lines run over it.
        axes.legend(handles=handles, fontsize="small")


def _shades(color: str, number: int) -> np.ndarray:
    """A colour from light to dark."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    base = np.array(to_rgb(color))
    if number < 2:
        return base[None]
    ends = [1 - 0.45 * (1 - base), base, 0.45 * base]
    return LinearSegmentedColormap.from_list("", ends)(np.linspace(0, 1, number))
