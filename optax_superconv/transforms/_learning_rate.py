"""Which rate scales the updates, of which group, and until when?

One link has all that a rate can depend on: its schedule, a multiplier per group, what
is held in its place, and a cooldown whose start is decided while the run goes on. A
later rise of the rate undoes the gain of a decay, so it is best to decide late when to
decay: when the loss no longer falls, the data run out, or a result is due.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_superconv import _checks, _dials
from optax_superconv._numerics import elements, increment, scale
from optax_superconv._trees import LabelFn, Labels
from optax_superconv.schedules._phases import Shape, check_positive, check_shape, move
from optax_superconv.transforms import _skeletons
from optax_superconv.transforms._groups import (
    Groups,
    Multipliers,
    grouped,
    scale_groups,
)
from optax_superconv.transforms._link import link


class ScaleByLearningRateState(NamedTuple):
    """State of :func:`scale_by_learning_rate`."""

    count: jax.Array  # (), int32
    hyperparams: _dials.Record  # learning_rate, learning_rate/<label> ((layers,))
    holds: _dials.Holds
    ending: _dials.Cooldown
    facts: dict[str, jax.Array]  # cooldown: (), float32
    skeleton: Any  # with groups, the containers of the parameters; () for each leaf


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
    *,
    multipliers: Multipliers | None = None,
    param_labels: Labels | LabelFn | None = None,
    cooldown_shape: Shape = "1-sqrt",
    cooldown_end: ArrayLike = 0.0,
    flip_sign: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by the (negated) learning rate, and records the rate it applied.

    .. math:: u_i \leftarrow -\eta_t\, m_{l(i)}(t)\, u_i

    It has the name and the contract of Optax's function, for the end of any chain. Put
    it in the place of that one, and :func:`read_hyperparams` reads the rate,
    :func:`set_hyperparams` sets it, and :func:`start_cooldown` lets it fall to its end:
    the next update, step k, applies the rate that it would have had, and then, over the
    n steps that the call asked for,

    .. math:: \eta_t = E + (\eta_k - E)\, g\Big(\frac{k + n - t}{n}\Big),

    with end :math:`E` and shape :math:`g`. The rates of groups keep their proportion to
    it. Differs from ``optax.scale_by_learning_rate``:

    1. The state is the same for a constant and for a schedule, so that a checkpoint of
       one loads into the other.
    2. The rate is float32 for every dtype of the updates, which keep theirs.

    Args:
      learning_rate: A finite number, or a schedule ``count -> rate``.
      multipliers: Factors by which the rates of groups differ, or None; see
        :func:`scale_by_group`. One optimizer for all groups costs what the optimizer
        alone costs, however many groups there are.
      param_labels: Which parameter is in which group; see :func:`scale_by_group`. Given
        with ``multipliers`` and not without.
      cooldown_shape: Shape of a cooldown; see :class:`Phase`. ``"exponential"`` needs a
        ``cooldown_end`` above 0, and a constant rate above 0. If a schedule is at 0
        when the cooldown starts, the rate goes to ``cooldown_end`` at once.
      cooldown_end: Rate at the end of a cooldown, finite. That of a group is this times
        its multiplier.
      flip_sign: Whether to multiply by minus the rate, as descent needs.

    Returns:
      The transformation. :func:`read_hyperparams` reads ``learning_rate``, never
      negated, ``learning_rate/<label>`` of each group, in the shape of its multiplier,
      and ``cooldown``, the fraction of a cooldown that is over: 0 before it, 1 after
      it. Its state has the rates in the dict ``hyperparams``, where trainers look for
      them.

    Raises:
      ValueError: At ``init`` and ``update``, if a label has no multiplier or a
        multiplier has no label, or if an array is not as long as the leading axis of a
        leaf. In ``update``, if the updates have another structure
        than the parameters at ``init``, or the state other groups.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_superconv as osc
      >>> tx = optax.chain(
      ...     optax.scale_by_lion(),
      ...     osc.scale_by_learning_rate(0.1, cooldown_shape="linear"))
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> for step in range(6):
      ...     if step == 2:
      ...         state = osc.start_cooldown(state, 4)
      ...     updates, state = tx.update(params, state, params)
      ...     applied = osc.read_hyperparams(state)
      ...     print(*(round(float(value), 3) for value in applied.values()))
      0.1 0.0
      0.1 0.0
      0.1 0.0
      0.075 0.25
      0.05 0.5
      0.025 0.75

    References:
      Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations <https://arxiv.org/abs/2405.18392>`_, 2024, section 3;
      Ren, Ma and Ying, `Understanding the Generalization Benefits of Late Learning Rate
      Decay <https://arxiv.org/abs/2401.11600>`_, 2024;
      Howard and Ruder, `Universal Language Model Fine-tuning for Text Classification
      <https://arxiv.org/abs/1801.06146>`_, 2018, section 3.2 (rates of groups).
    """
    _checks.number_or_schedule("learning_rate", learning_rate)
    _checks.single_number("cooldown_end", cooldown_end)
    _checks.flag("flip_sign", flip_sign)
    check_shape("cooldown_shape", cooldown_shape)
    if cooldown_shape == "exponential":
        check_positive("cooldown_end", cooldown_end)
        if not callable(learning_rate):
            check_positive("learning_rate", learning_rate)
    groups_of = grouped(multipliers, param_labels)

    def init_fn(params: optax.Params) -> ScaleByLearningRateState:
        groups = groups_of(params)
        count = jnp.zeros([], jnp.int32)
        rate = _dials.value_at(learning_rate, count)
        rates = jnp.concatenate([rate[None], rate * groups.factors_at(count)])
        hyperparams, holds = _dials.opened(_shapes(groups), rates)
        if groups.are_unknown:  # A single leaf matches whatever dict there is.
            hyperparams = cast(_dials.Record, rates)
        return ScaleByLearningRateState(
            count,
            hyperparams,
            holds,
            _dials.Cooldown(
                pending=jnp.zeros([], jnp.int32),
                lifts=jnp.zeros(len(rates), bool),
                start_step=jnp.zeros([], jnp.int32),
                cooldown_steps=jnp.zeros([], jnp.int32),
                origin=jnp.zeros_like(rates),
                end=jnp.zeros_like(rates),
            ),
            {"cooldown": jnp.zeros([], jnp.float32)},
            groups.skeleton,
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByLearningRateState,
        params: optax.Params | None,
    ) -> tuple[optax.Updates, ScaleByLearningRateState]:
        del params
        _skeletons.check_skeleton(updates, state.skeleton)
        groups = groups_of(updates)
        shapes, count, cooldown = _shapes(groups), state.count, state.ending
        elapsed = jnp.clip(count - cooldown.start_step, 0, cooldown.cooldown_steps)
        cools = elapsed > 0
        factors = groups.factors_at(
            jnp.where(cools, jnp.minimum(count, cooldown.start_step), count)
        )
        plain = _dials.value_at(learning_rate, count)
        base = jnp.concatenate([plain[None], plain * factors])
        given = [learning_rate, *(len(shapes) - 1) * [None]]
        holds = _dials.noticed(shapes, state.hyperparams, state.holds, base, given)
        cooled = _cooled(cooldown, cooldown_shape, elapsed)

        def rates_with(held: jax.Array) -> jax.Array:
            """The rates if these are held, and the others follow."""
            rate = jnp.where(cools, cooled[0], plain)
            rate = jnp.where(held[0], holds.values[0], rate)
            others = jnp.where(cools & ~held[0], cooled[1:], rate * factors)
            others = jnp.where(held[1:], holds.values[1:], others)
            return jnp.concatenate([rate[None], others])

        rates = rates_with(holds.held)
        starts = cooldown.pending > 0
        lifted = holds.held & cooldown.lifts
        ending = _dials.Cooldown(
            jnp.zeros_like(cooldown.pending),
            cooldown.lifts,
            jnp.where(starts, count, cooldown.start_step),
            jnp.where(starts, cooldown.pending, cooldown.cooldown_steps),
            # Without what has been set since it was decided, which outranks it.
            jnp.where(starts, rates_with(lifted), cooldown.origin),
            cooldown.end,
        )
        end = jnp.asarray(cooldown_end, jnp.float32)
        ends = _ends(ending.origin, factors, end, lifted)
        keeps = (cools & ~lifted & ~lifted[0]) | ~starts
        ending = ending._replace(end=jnp.where(keeps, cooldown.end, ends))
        steps = jnp.maximum(cooldown.cooldown_steps, 1).astype(jnp.float32)
        over = jnp.where(starts, 0, elapsed.astype(jnp.float32) / steps)
        holds = holds._replace(held=holds.held & ~(starts & cooldown.lifts))
        of_group = elements(rates, count, [*shapes.values()])
        hyperparams, holds = _dials.written(shapes, of_group, holds)
        signed = [-rate for rate in of_group] if flip_sign else of_group
        if groups.shapes:
            scaled = scale_groups(signed[1:], groups, updates)
        else:
            scaled = scale(signed[0], updates)
        return scaled, ScaleByLearningRateState(
            increment(count),
            hyperparams,
            holds,
            ending,
            {"cooldown": over},
            state.skeleton,
        )

    return link(ScaleByLearningRateState, init_fn, update_fn)


def _shapes(groups: Groups) -> _dials.Shapes:
    return {"learning_rate": (), **groups.named("learning_rate")}


def _ends(
    origin: jax.Array, factors: jax.Array, end: jax.Array, held: jax.Array
) -> jax.Array:
    """The ends of a cooldown: a group that was set apart keeps its own proportion."""
    rate = origin[0]
    own = origin[1:] / jnp.where(rate == 0, 1, rate)
    own = jnp.where(held[1:] & (rate != 0), own, factors)
    return end * jnp.concatenate([jnp.ones(1, jnp.float32), own])


def _cooled(cooldown: _dials.Cooldown, shape: Shape, elapsed: jax.Array) -> jax.Array:
    """The rates after so many steps of a cooldown."""
    origin, end = cooldown.origin, cooldown.end
    if shape == "exponential":  # Nothing falls geometrically from 0, or to it.
        moves = end > 0
        start = jnp.where(moves, jnp.where(origin > 0, origin, end), 1)
        target = jnp.where(moves, end, 1)
        moved = move(start, target, shape, elapsed, cooldown.cooldown_steps)
        return jnp.where(moves, moved, end)
    return move(origin, end, shape, elapsed, cooldown.cooldown_steps)
