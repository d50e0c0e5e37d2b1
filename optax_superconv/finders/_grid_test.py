"""Which weight decay, which momentum? Every combination of a grid, side by side.

A grid test trains one member for each combination, all from the same state and on the
same batches, and compares their losses. With a learning rate that climbs, it is a range
test per combination: the weight decay whose curve reaches lowest is the one to take. At
a constant rate it is a short grid search.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast, get_args

import jax
import numpy as np
from numpy.typing import ArrayLike

from optax_superconv import _batches, _checks, _settings
from optax_superconv._trees import check_unshared
from optax_superconv.finders import _members, _runs, _steps
from optax_superconv.finders._grid_results import GridTestResult, compare

State = TypeVar("State")
Mode = Literal["range", "constant"]


def _axes(grid: Mapping[str, Iterable[float]]) -> dict[str, np.ndarray]:
    """The checked axes of the grid."""
    if not isinstance(grid, Mapping):
        kind = type(grid).__name__
        raise TypeError(f"`grid` must be a mapping from names to values, got a {kind}.")
    _checks.require(len(grid) > 0, "grid", "at least one axis", "none")
    axes = {}
    for key, values in grid.items():
        name = f"grid[{key!r}]"
        if not isinstance(key, str):
            raise TypeError(f"`grid` must have names for keys, got {key!r}.")
        # Strings and mappings have no axes.
        if np.ndim(cast(ArrayLike, values)) != 1:
            raise TypeError(f"`{name}` must be a sequence of numbers, got {values!r}.")
        axes[key] = axis = np.array(
            [_checks.scalar(f"{name}[{k}]", x) for k, x in enumerate(values)]
        )
        _checks.require(axis.size > 0, name, "at least one value", "none")
        distinct = len(np.unique(axis.astype(np.float32))) == len(axis)
        _checks.require(distinct, name, "distinct values in float32", axis.tolist())
    return axes


def _warn_of_idle(result: GridTestResult) -> None:
    """Warns of hyperparameters of which all values gave the same losses."""
    idle = [
        name
        for k, (name, axis) in enumerate(result.axes.items())
        if len(axis) > 1
        and np.array_equal(
            *np.broadcast_arrays(result.losses, result.losses.take([0], axis=k)),
            equal_nan=True,
        )
    ]
    if idle:
        warnings.warn(
            f"`grid` has values of {', '.join(map(repr, idle))} that all gave the same "
            "losses: it does not act, or too little to be seen.",
            stacklevel=3,
        )


def grid_test(
    step_fn: Callable[..., tuple[State, jax.Array]],
    state: State,
    batches: Any,
    grid: Mapping[str, Iterable[float]],
    *,
    num_steps: int = 100,
    mode: Mode = "range",
    min_learning_rate: float = 1e-6,
    max_learning_rate: float = 10.0,
    accumulation_steps: int = 1,
    stacked: bool = False,
    pass_hyperparams: bool = False,
    vectorize: bool = False,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]  # jaxlib has no stub
    progress: bool = False,
) -> GridTestResult:
    r"""Trains every combination of a grid of hyperparameters and compares them.

    All members start from ``state`` and see the same batch at each step. Their
    hyperparameters are set in the state, as the rate in :func:`range_test`. The score
    is

    * with ``mode="range"``, where the learning rate climbs as in :func:`range_test`,
      the lowest point of the curve, smoothed as in :func:`suggest_learning_rate`.
      Every curve diverges in the end, which does not count against it; one with fewer
      than 10 finite losses scores infinity;
    * with ``mode="constant"``, the mean of the last tenth of the losses (at least 1),
      or infinity if any loss is not finite.

    The standard error of the margin is, at climbing rates, that of the two smoothed
    points as if each had seen batches of its own, which is cautious; at constant
    values, that of the mean difference over the last tenth, from step to step, as if
    steps were independent; NaN for fewer than 100 steps, whose tenth tells too little.

    One compilation serves the whole grid. A member that diverges does not disturb the
    others.

    Args:
      step_fn: ``(state, batch) -> (state, loss)``, your own training step, as for
        :func:`range_test`. It may donate its state or change it in place, and must
        change nothing else.
      state: As for :func:`range_test`, with one dial of each name of the grid. There
        are as many copies of it as combinations; yours survives.
      batches: As for :func:`range_test`; one is drawn per step and seen by all.
      grid: The values of each hyperparameter by name, such as ``{"weight_decay":
        [1e-4, 1e-3], "b1": [0.8, 0.9]}``: at least one name, each with at least one
        value. They are the names of :func:`read_hyperparams`, unless hyperparameters
        are passed. Values are float32, and those of a name differ in it.
      num_steps: Steps of each member, at least 10 with ``mode="range"``, else at least
        1.
      mode: ``"range"``: the rate climbs from ``min_learning_rate`` to
        ``max_learning_rate``, for every combination, and is no axis of the grid.
        ``"constant"``: every combination keeps its values, and ``"learning_rate"`` may
        be an axis like any other.
      min_learning_rate: The lowest rate, above 0; for ``mode="range"``.
      max_learning_rate: The highest rate, above the lowest; for ``mode="range"``.
      accumulation_steps: Batches of each step; as for :func:`range_test`.
      stacked: Whether ``batches`` has a leading axis of steps; as for
        :func:`range_test`.
      pass_hyperparams: Whether ``step_fn`` is ``(state, hyperparams, batch)``, which
        sees a dict of float32 scalar arrays with a value of each axis, and
        ``"learning_rate"`` with ``mode="range"``.
      vectorize: Whether the members take a step together, under ``vmap``, instead of
        one after another without waiting for the device. Under ``vmap`` the step is
        traced, and its state must hold nothing but arrays and numbers. It pays for
        small networks; on a CPU, wide layers and convolutions are slower that way.
      devices: Over which the members are spread; None leaves them where ``state`` is.
      progress: Whether to show a progress bar (needs rich).

    Returns:
      A :class:`GridTestResult`; its ``curve(**result.best)`` is the range test of the
      best combination, for :func:`suggest_learning_rate`.

    Raises:
      ValueError: If a hyperparameter does not act, as for :func:`range_test`. If no
        combination has a finite first loss, so that the start or the first batch is
        bad. If no score is finite (the message names the remedy). If ``batches`` is a
        single one, or an iterator that ends too early.

    Warns:
      UserWarning: If all values of a name gave the same losses.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> tx = osc.sgd(0.1, weight_decay=0.1, mask=None)
      >>> @jax.jit
      ... def step_fn(state, x):
      ...     w, opt_state = state
      ...     loss, grad = jax.value_and_grad(lambda w: ((w - x) ** 2).mean())(w)
      ...     updates, opt_state = tx.update(grad, opt_state, w)
      ...     return (optax.apply_updates(w, updates), opt_state), loss
      >>> w = jnp.zeros(())
      >>> result = osc.grid_test(
      ...     step_fn, (w, tx.init(w)), [jnp.ones(8)],
      ...     {"momentum": [0.0, 0.5, 0.9], "weight_decay": [0.0, 0.1]})
      >>> print(result.losses.shape, result.best)
      (3, 2, 100) {'momentum': 0.0, 'weight_decay': 0.0}

    References:
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018 (sections 4.3 and 4.4).
    """
    form = _steps.form_of(step_fn, pass_hyperparams, accumulation_steps, "hyperparams")
    _checks.choice("mode", mode, get_args(Mode))
    _checks.flag("vectorize", vectorize)
    at_least = 10 if mode == "range" else 1  # A curve of fewer is not smoothed.
    num_steps = _checks.steps("num_steps", num_steps, at_least=at_least)
    places: list[Any] = [None]
    if devices is not None:
        rule = "a sequence of devices"
        places = _checks.items("devices", devices, rule)
        if not all(isinstance(place, jax.Device) for place in places):
            raise TypeError(f"`devices` must be {rule}, got {devices!r}.")
    _checks.require(len(places) > 0, "devices", "at least one device", "none")
    axes = _axes(grid)
    if form.in_state:
        for name, axis in axes.items():
            _checks.number(f"grid[{name!r}]", axis, _settings.rule_of(name))
    ladder = None
    if mode == "range":
        ladder = _runs.geometric_ladder(min_learning_rate, max_learning_rate, num_steps)
        _checks.require(
            "learning_rate" not in axes,
            "grid",
            "without 'learning_rate', which climbs from `min_learning_rate` to "
            "`max_learning_rate` (or take mode='constant')",
            f"{sorted(axes)}",
        )
    if vectorize:
        check_unshared("state", state, "under `vmap`", "take vectorize=False")
    source = _batches.draw(batches, stacked)
    columns = np.meshgrid(*axes.values(), indexing="ij")
    values = {
        name: column.ravel().astype(np.float32)
        for name, column in zip(axes, columns, strict=True)
    }
    build = _members.together if vectorize else _members.one_by_one
    members = build(form, state, values, ladder, places)
    losses = _members.train(
        "grid test", num_steps, source, form, columns[0].size, members, progress
    )
    _checks.require(
        np.isfinite(losses[:, 0]).any(),
        "step_fn",
        "given a state and a batch for which some combination has a finite first loss, "
        "which precedes any update",
        f"{losses[0, 0]} for all",
    )
    result = compare(losses, ladder, axes, _steps.optimizer_of(state))
    _warn_of_idle(result)
    return result
