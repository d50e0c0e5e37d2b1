"""Which weight decay, which momentum? Every combination of a grid, side by side.

A grid test trains one member for each combination, all from the same state and on the
same batches, and compares their losses. With a learning rate that climbs, it is a range
test per combination: the weight decay whose curve reaches lowest is the one to take. At
a constant rate it is a short grid search.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from optax_superconv import _batches, _checks
from optax_superconv._trees import shares_variables
from optax_superconv.finders import _runs
from optax_superconv.finders._range_test import RangeTestResult, range_test
from optax_superconv.finders._suggestions import smooth_curve

State = TypeVar("State")
Batch = TypeVar("Batch")
Mode = Literal["range", "constant"]

# One product of more multiply-adds than this pays for its own dispatch on a CPU. Time
# of 12 members one by one over their time under vmap (three-layer MLP, width x batch,
# two shared cores, jax 0.10.2): 16 x 64: 3.5, 64 x 64: 1.3, 128 x 64: 1.1, 256 x 64:
# 1.1, 512 x 64: 0.6, 1024 x 64: 0.7, 128 x 512: 0.9, 256 x 512: 0.3; convolutions of 8
# and 32 channels: 0.7 and 0.3. 128 x 128 x 512 is 2**23. Accelerators: not measured.
_LARGE_PRODUCT = 2**23


class GridTestResult(NamedTuple):
    """The curves of a grid test; array axes come in the order of ``axes``.

    Attributes:
      axes: The values of each hyperparameter by name, float64 as given.
      learning_rates: (num_steps,) float32, the ladder; None in mode ``"constant"``.
      losses: (*grid, num_steps) float64, the loss at each step before its update; NaN
        after divergence.
      diverged: (*grid) bool, whether a curve ended early, by :func:`range_test`'s rule
        in mode ``"range"``, at a loss that is not finite in mode ``"constant"``.
      scores: (*grid) float64, lower is better; see :func:`grid_test`.
      best: The combination with the lowest score.
      margin: By how much the runner-up's score is higher, in the unit of the loss; NaN
        for a single combination, infinite if all others diverged.
      margin_in_errors: The margin in its standard errors. Below 2 or 3 the grid has
        not told the two apart. Another initialisation is not in these errors.
    """

    axes: dict[str, np.ndarray]
    learning_rates: np.ndarray | None
    losses: np.ndarray
    diverged: np.ndarray
    scores: np.ndarray
    best: dict[str, float]
    margin: float
    margin_in_errors: float

    def curve(self, **combination: float) -> RangeTestResult:
        """The range test of one combination, for :func:`suggest_learning_rate`.

        Only a grid test with ``mode="range"`` has such curves.

        Args:
          **combination: A value of each axis, one of those in ``axes``, as in
            ``result.curve(**result.best)``.

        Returns:
          What :func:`range_test` returns for that combination.
        """
        _checks.require(
            self.learning_rates is not None,
            "curve",
            "called on a grid test with mode='range'",
            "one with mode='constant'",
        )
        _checks.require(
            set(combination) == set(self.axes),
            "combination",
            f"a value for each of {', '.join(map(repr, self.axes))}",
            f"{combination}",
        )
        index = []
        for name, axis in self.axes.items():
            # As the step sees them: a JAX array's values are float32 already.
            wanted = np.float32(combination[name])
            at = np.flatnonzero(axis.astype(np.float32) == wanted)
            rule = f"one of {axis.tolist()}"
            _checks.require(at.size > 0, name, rule, combination[name])
            index.append(int(at[0]))
        assert self.learning_rates is not None
        return _curve(self.losses[tuple(index)], self.learning_rates)


def _curve(losses: np.ndarray, ladder: np.ndarray) -> RangeTestResult:
    """A range test that sees these losses."""
    result = range_test(
        lambda step, rate, batch: (step + 1, losses[step]),
        0,
        [None],
        min_value=float(ladder[0]),
        max_value=float(ladder[-1]),
        num_steps=len(ladder),
    )
    return result._replace(learning_rates=ladder[: len(result.losses)])


def _axes(grid: Mapping[str, Iterable[float]], mode: str) -> dict[str, np.ndarray]:
    """The checked axes of the grid."""
    if not isinstance(grid, Mapping):
        raise TypeError(
            "`grid` must be a mapping from names to values, got a "
            f"{type(grid).__name__}."
        )
    _checks.require(len(grid) > 0, "grid", "at least one axis", "none")
    axes = {}
    for key, values in grid.items():
        if not isinstance(key, str):
            raise TypeError(f"`grid` must have names for keys, got {key!r}.")
        name = f"grid[{key!r}]"
        if isinstance(values, str | bytes | Mapping) or not (
            isinstance(values, Iterable)
            and np.ndim(cast(ArrayLike, values)) == 1  # Takes anything.
        ):
            raise TypeError(f"`{name}` must be a sequence of numbers, got {values!r}.")
        values = list(values)
        _checks.require(len(values) > 0, name, "at least one value", "none")
        axis = np.array(
            [
                _checks.scalar(
                    f"{name}[{k}]",
                    value,
                    "finite in float32",
                    lambda x: np.abs(x) <= np.finfo(np.float32).max,
                )
                for k, value in enumerate(values)
            ]
        )
        distinct = len(np.unique(axis.astype(np.float32))) == len(axis)
        _checks.require(distinct, name, "distinct values in float32", axis.tolist())
        axes[key] = axis
    if mode == "range":
        _checks.require(
            "learning_rate" not in axes,
            "grid",
            "without 'learning_rate', which climbs from `min_value` to `max_value` "
            "(or take mode='constant')",
            f"{sorted(axes)}",
        )
    return axes


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, also those of the jaxprs inside."""
    for equation in jaxpr.eqns:
        yield equation
        for param in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")
        ):
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _vectorized(
    step_fn: Callable[..., Any],
    state: Any,
    values: dict[str, np.ndarray],
    ladder: np.ndarray | None,
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]  # jaxlib has no stub
) -> Callable[[int, Any, Sequence[int]], jax.Array]:
    """One step of all members at once; ``advance`` for ``_runs.lockstep``."""
    num_members = len(next(iter(values.values())))
    padding = -num_members % len(devices) if devices else 0
    members = each = None
    if devices:
        mesh = jax.sharding.Mesh(np.array(devices), ("members",))
        spec = jax.sharding.PartitionSpec
        members = jax.sharding.NamedSharding(mesh, spec("members"))
        each = jax.sharding.NamedSharding(mesh, spec())
    hyperparams = {
        name: jax.device_put(np.pad(column, (0, padding), mode="edge"), members)
        for name, column in values.items()
    }
    rates = None if ladder is None else jax.device_put(list(ladder), each)

    def start_fn(state: Any) -> Any:
        state = jax.tree.map(_runs.strong, state)
        shape = (num_members + padding,)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, shape + x.shape), state)

    step_fn = jax.jit(step_fn)  # Traced once, for the choice and for the run.

    def member_fn(state: Any, hyperparams: Any, batch: Any) -> Any:
        result = step_fn(state, hyperparams, batch)
        _runs.check_step(result)
        _runs.check_layout(_runs.layout(state), result[0])
        return jax.tree.map(_runs.strong, result)

    def advance_fn(states: Any, hyperparams: Any, rate: Any, batch: Any) -> Any:
        batch = jax.tree.map(_runs.strong, batch)
        climbing = {} if rate is None else {"learning_rate": rate}
        return jax.vmap(lambda s, h: member_fn(s, h | climbing, batch))(
            states, hyperparams
        )

    if devices:
        state = jax.device_put(state, each)
    states = jax.jit(start_fn, out_shardings=members)(state)
    jitted = jax.jit(advance_fn, donate_argnums=0)

    def advance(step: int, batch: Any, _: Sequence[int]) -> jax.Array:
        nonlocal states
        if devices:
            batch = jax.device_put(batch, each)
        rate = None if rates is None else rates[step]
        states, losses = jitted(states, hyperparams, rate, batch)
        return losses

    return advance


def _one_by_one(
    step_fn: Callable[..., Any],
    state: Any,
    values: dict[str, np.ndarray],
    ladder: np.ndarray | None,
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]  # jaxlib has no stub
) -> Callable[[int, Any, Sequence[int]], list[Any]]:
    """One step of one member after another; ``advance`` for ``_runs.lockstep``."""
    num_members = len(next(iter(values.values())))
    places = [
        devices[k % len(devices)] if devices else None for k in range(num_members)
    ]
    fixed = [
        {name: jax.device_put(column[k], place) for name, column in values.items()}
        for k, place in enumerate(places)
    ]
    rates = {
        place: [] if ladder is None else jax.device_put(list(ladder), place)
        for place in places
    }

    def hyperparams(step: int, member: int) -> dict[str, jax.Array]:
        if ladder is None:
            return dict(fixed[member])
        return fixed[member] | {"learning_rate": rates[places[member]][step]}

    states = [_runs.copy_state(state, place) for place in places]
    return _runs.sequential(step_fn, states, hyperparams, devices)


def _vmap_pays(jaxpr: Any, platform: str) -> bool:
    """Whether members are faster side by side."""
    if platform != "cpu":
        return True
    for equation in _equations(jaxpr):
        if equation.primitive.name == "conv_general_dilated":
            return False
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            size = math.prod(equation.outvars[0].aval.shape)
            if size * math.prod(shape[k] for k in contracted) > _LARGE_PRODUCT:
                return False
    return True


def _compare(
    losses: np.ndarray, ladder: np.ndarray | None, axes: dict[str, np.ndarray]
) -> GridTestResult:
    """Scores the members' losses, (members, num_steps)."""
    num_steps = losses.shape[1]
    tail = losses[:, -_runs.tenth(losses) :]
    diverged = ~np.all(np.isfinite(losses), axis=1)
    scores, errors = np.full((2, len(losses)), np.inf)
    if ladder is None:
        scores = np.where(diverged, np.inf, tail.mean(axis=1))
    else:
        for k in np.flatnonzero(np.isfinite(losses[:, 0])):
            curve = _curve(losses[k], ladder)
            losses[k, len(curve.losses) :] = np.nan
            diverged[k] = curve.diverged
            try:
                smooth = smooth_curve(curve)
            except ValueError:  # Too short to be smoothed.
                continue
            lowest = smooth.values.argmin()
            scores[k], errors[k] = smooth.values[lowest], smooth.errors[lowest]

    order = np.argsort(scores, kind="stable")
    best, second = order[0], order[min(1, len(order) - 1)]
    _checks.require(
        bool(np.isfinite(scores[best])),
        "grid",
        "a grid with a combination that does not diverge "
        + ("in its first 10 steps (lower `min_value`, or raise `num_steps`)"
           if ladder is not None else "(try lower learning rates)"),
        f"losses that cease to be finite after {np.isfinite(losses).sum(axis=1).min()}"
        f" to {np.isfinite(losses).sum(axis=1).max()} steps",
    )  # fmt: skip
    margin = margin_in_errors = np.nan
    if second != best:
        margin = scores[second] - scores[best]
        if ladder is not None:
            error = np.hypot(errors[best], errors[second])
        elif tail.shape[1] >= 10 and np.isfinite(margin):
            apart = tail[second] - tail[best]
            error = apart.std(ddof=1) / np.sqrt(len(apart))
        else:
            error = np.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            margin_in_errors = np.float64(margin) / error
    shape = tuple(map(len, axes.values()))
    index = np.unravel_index(best, shape)
    return GridTestResult(
        axes,
        ladder,
        losses.reshape(*shape, num_steps),
        diverged.reshape(shape),
        scores.reshape(shape),
        {
            name: float(axis[k])
            for (name, axis), k in zip(axes.items(), index, strict=True)
        },
        float(margin),
        float(margin_in_errors),
    )


def grid_test(
    step_fn: Callable[[State, dict[str, jax.Array], Batch], tuple[State, jax.Array]],
    state: State,
    batches: Any,
    grid: Mapping[str, Iterable[float]],
    *,
    num_steps: int = 100,
    mode: Mode = "range",
    min_value: float = 1e-6,
    max_value: float = 10.0,
    vectorize: bool | Literal["auto"] = "auto",
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]  # jaxlib has no stub
    progress: bool = False,
) -> GridTestResult:
    r"""Trains every combination of a grid of hyperparameters and compares them.

    All members start from ``state`` and see the same batch at each step. The score is

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
      step_fn: ``(state, hyperparams, batch) -> (state, loss)``, the caller's own
        training step, best jitted (``"auto"`` does it where it can). ``hyperparams`` is
        a dict of float32 scalar arrays with a value of each axis, and
        ``"learning_rate"`` with ``mode="range"``. The loss is a scalar. It may donate
        its state, and must change nothing else.
      state: A pytree of any structure. The step must keep its structure, shapes and
        dtypes. There are as many copies of it as combinations; the caller's survives.
      batches: As for :func:`range_test`; one is drawn per step and seen by all.
      grid: The values of each hyperparameter by name, such as ``{"weight_decay":
        [1e-4, 1e-3], "momentum": [0.8, 0.9]}``: at least one name, each with at least
        one value. The step sees the values in float32, where those of a name differ.
      num_steps: Steps of each member, at least 10 with ``mode="range"``, else at least
        1.
      mode: ``"range"``: the rate climbs from ``min_value`` to ``max_value``, for every
        combination, and is no axis of the grid. ``"constant"``: every combination keeps
        its values, and ``"learning_rate"`` may be an axis like any other.
      min_value: The lowest rate, above 0; for ``mode="range"``.
      max_value: The highest rate, above ``min_value``; for ``mode="range"``.
      vectorize: Whether the members take a step together, under ``vmap``, or one after
        another without waiting for the device. Under ``vmap`` the step is traced, and
        its state must hold nothing but arrays and numbers. ``"auto"`` is ``vmap``,
        unless the step cannot be traced or, on a CPU, holds a convolution or a large
        matrix product, which run slower that way.
      devices: Over which the members are spread; None leaves them where ``state`` is.
      progress: Whether to show a progress bar (needs rich).

    Returns:
      A :class:`GridTestResult`; its ``curve(**result.best)`` is the range test of the
      best combination, for :func:`suggest_learning_rate`.

    Raises:
      ValueError: If no combination has a finite first loss, so that the start or the
        first batch is bad. If no score is finite (the message names the remedy). If an
        iterator ends too early.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> @jax.jit
      ... def step_fn(state, hyperparams, x):
      ...     w, trace = state
      ...     loss, grad = jax.value_and_grad(lambda w: ((w - x) ** 2).mean())(w)
      ...     trace = hyperparams["momentum"] * trace + grad
      ...     return (w - hyperparams["learning_rate"] * trace, trace), loss
      >>> result = osc.grid_test(
      ...     step_fn, (jnp.zeros(()), jnp.zeros(())), [jnp.ones(8)],
      ...     {"momentum": [0.0, 0.5, 0.9]}, max_value=1.0)
      >>> print(result.losses.shape, result.best)
      (3, 100) {'momentum': 0.0}

    References:
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018 (sections 4.3 and 4.4).
    """
    _checks.function("step_fn", step_fn)
    _checks.choice("mode", mode, get_args(Mode))
    if not isinstance(vectorize, bool) and vectorize != "auto":
        raise ValueError(
            f"`vectorize` must be True, False or 'auto', got {vectorize!r}."
        )
    at_least = 10 if mode == "range" else 1  # A curve of fewer is not smoothed.
    num_steps = _checks.steps("num_steps", num_steps, at_least=at_least)
    if devices is None:
        devices = []
    elif isinstance(devices, str) or not all(
        isinstance(device, jax.Device) for device in devices
    ):
        raise TypeError(f"`devices` must be a sequence of devices, got {devices!r}.")
    else:
        devices = list(devices)
        _checks.require(len(devices) > 0, "devices", "at least one device", "none")
    axes = _axes(grid, mode)
    ladder = None
    if mode == "range":
        ladder = _runs.geometric_ladder(min_value, max_value, num_steps)
    source = _batches.draw(batches)

    shape = tuple(map(len, axes.values()))
    columns = np.meshgrid(*axes.values(), indexing="ij")
    values = {
        name: column.ravel().astype(np.float32)
        for name, column in zip(axes, columns, strict=True)
    }

    first: Any = next(source, source)
    if first is source:
        raise _runs.ran_dry(num_steps, 0)
    if vectorize == "auto":
        names = values if ladder is None else {**values, "learning_rate": ladder}
        example = (state, dict.fromkeys(names, np.float32(0.0)), first)
        platform = devices[0].platform if devices else jax.default_backend()
        jaxpr = None
        if not shares_variables(state):
            jaxpr = _runs.jaxpr_of(step_fn, example)
        vectorize = jaxpr is not None and _vmap_pays(jaxpr, platform)
        if jaxpr is not None and not hasattr(step_fn, "lower"):
            step_fn = jax.jit(step_fn)
    _checks.require(
        not (vectorize and shares_variables(state)),
        "state",
        "without Variables that Flax NNX objects share, under `vmap` (split it with "
        "`nnx.split`, or take vectorize=False)",
        "a shared one",
    )
    build = _vectorized if vectorize else _one_by_one
    advance = build(step_fn, state, values, ladder, devices)
    with _runs.progress_bar("grid test", progress, num_steps) as tick:
        losses = _runs.lockstep(
            advance,
            (math.prod(shape), num_steps),
            itertools.chain([first], source),
            drop=not vectorize,
            tick=tick,
        )
    _checks.require(
        np.isfinite(losses[:, 0]).any(),
        "step_fn",
        "given a state and a batch for which some combination has a finite first loss, "
        "which precedes any update",
        f"{losses[0, 0]} for all",
    )
    return _compare(losses, ladder, axes)
