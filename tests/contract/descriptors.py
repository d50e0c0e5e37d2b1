"""One row per schedule and per transformation; the tests hold one property each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax
import reference

import optax_superconv as osc

TOTAL = 20


class Schedule(NamedTuple):
    """``make(value)`` builds it around one value, which may be traced or an array."""

    name: str
    make: Callable[[Any], optax.Schedule]
    value: float
    reference: Callable[[int], float]
    knots: tuple[int, ...]  # where phases meet
    total: int | None = TOTAL  # None: never ends


def quadratic(remaining):
    return remaining**2


def _onecycle(shape, *, end=0.001, annihilation=0, warmup=6):
    named = quadratic if shape == "quadratic" else shape

    def make(value):
        return osc.onecycle_schedule(
            value,
            TOTAL,
            warmup_steps=warmup,
            init_value=value / 10,
            end_value=end,
            annihilation_steps=annihilation,
            shape=named,
        )

    def at(count):
        return reference.onecycle(
            count, 0.3, TOTAL, warmup, 0.03, end, annihilation, shape
        )

    knots = (0, warmup, TOTAL - annihilation, TOTAL)
    name = f"onecycle-{shape}-{warmup}-{annihilation}"
    return Schedule(name, make, 0.3, at, knots)


def _momentum(annihilation):
    def make(value):
        return osc.onecycle_momentum_schedule(
            TOTAL,
            warmup_steps=6,
            max_momentum=value,
            base_momentum=0.8,
            annihilation_steps=annihilation,
        )

    def at(count):
        return reference.onecycle(
            count, 0.8, TOTAL, 6, 0.95, 0.95, annihilation, "cosine"
        )

    knots = (0, 6, TOTAL - annihilation, TOTAL)
    return Schedule(f"momentum-{annihilation}", make, 0.95, at, knots)


def _phases():
    def make(value):
        return osc.phase_schedule(
            0.0,
            [
                osc.Phase(0, value),
                (5, 0.5, "cosine"),
                osc.Phase(5, 0.5),
                osc.Phase(0, value),
                osc.Phase(10, 0.1, "exponential"),
            ],
        )

    walk = [
        (0, 2.0, "linear"),
        (5, 0.5, "cosine"),
        (5, 0.5, "linear"),
        (0, 2.0, "linear"),
        (10, 0.1, "exponential"),
    ]
    return Schedule(
        "phases", make, 2.0, lambda t: reference.phases(t, 0.0, walk), (0, 5, 10, 20)
    )


def _cyclical(mode):
    def make(value):
        return osc.cyclical_schedule(0.1, value, 4, 6, mode=mode, gamma=0.99)

    def at(count):
        return reference.cyclical(count, 0.1, 0.6, 4, 6, mode, 0.99)

    return Schedule(f"cyclical-{mode}", make, 0.6, at, (0, 4, 10, 14, 20), total=None)


def _warmup_stable_decay(shape):
    named = quadratic if shape == "quadratic" else shape

    def make(value):
        return osc.warmup_stable_decay_schedule(
            value,
            TOTAL,
            warmup_steps=4,
            decay_steps=7,
            init_value=0.01,
            end_value=0.001,
            shape=named,
        )

    def at(count):
        return reference.warmup_stable_decay(
            count, 0.3, TOTAL, 4, 7, 0.01, 0.001, shape
        )

    return Schedule(f"warmup_stable_decay-{shape}", make, 0.3, at, (0, 4, 13, TOTAL))


def _cooled_onecycle(shape, end):
    def make(value):
        cycle = osc.onecycle_schedule(value, 2 * TOTAL, warmup_steps=6, end_value=0.01)
        return osc.with_cooldown(cycle, TOTAL, 8, end_value=end, shape=shape)

    def cycle(count):
        return reference.onecycle(count, 0.3, 2 * TOTAL, 6, 0.3 / 25, 0.01, 0, "cosine")

    def at(count):
        return reference.cooled(count, cycle, TOTAL, 8, end, shape)

    return Schedule(f"with_cooldown-{shape}-{end}", make, 0.3, at, (0, 6, 12, TOTAL))


def _cooled_constant():
    def make(value):
        return osc.with_cooldown(value, TOTAL, TOTAL)

    def at(count):
        return reference.cooled(count, lambda t: 0.3, TOTAL, TOTAL, 0.0, "1-sqrt")

    return Schedule("with_cooldown-constant", make, 0.3, at, (0, TOTAL))


def _refined(optimizer, power):
    norms = [4.0, 1.0, 2.0, 0.5, 1.0, 3.0]

    def make(value):
        return osc.refined_schedule(
            norms, value, TOTAL, optimizer=optimizer, smoothing=0.0
        )

    def at(count):
        return reference.refined_schedule(count, norms, power, 0.3, TOTAL)

    return Schedule(f"refined-{optimizer}", make, 0.3, at, (0, 4, 8, 12, 16, TOTAL))


def _pair(which):
    """One of the two schedules of a cycle, around the peak or the highest momentum."""

    def make(value):
        values = {"peak_learning_rate": value, "init_learning_rate": value / 10}
        if which:
            values = {"peak_learning_rate": 1.0, "max_momentum": value}
        return osc.onecycle(
            total_steps=TOTAL,
            warmup_steps=6,
            annihilation_steps=4,
            shape="linear",
            base_momentum=0.8,
            **values,
        )[which]

    def at(count):
        values = (0.8, 0.95, 0.95) if which else (0.3, 0.03, 0.0)
        peak, init, end = values
        return reference.onecycle(count, peak, TOTAL, 6, init, end, 4, "linear")

    name = ("learning_rate", "momentum")[which]
    return Schedule(f"pair-{name}", make, (0.3, 0.95)[which], at, (0, 6, 16, TOTAL))


SCHEDULES = [
    *(_onecycle(s) for s in reference.SHAPES),
    _onecycle("cosine", annihilation=4),
    _onecycle("linear", annihilation=TOTAL - 6),
    _onecycle("linear", warmup=0),
    _momentum(0),
    _momentum(4),
    _pair(0),
    _pair(1),
    _phases(),
    *(_cyclical(mode) for mode in ("triangular", "triangular2", "exp_range")),
    _warmup_stable_decay("1-sqrt"),
    _warmup_stable_decay("exponential"),
    _cooled_onecycle("1-sqrt", 0.0),
    _cooled_onecycle("exponential", 0.9),
    _cooled_constant(),
    _refined("sgd", 2),
]


class Transform(NamedTuple):
    """``make(value)`` builds it around one value, which may be traced."""

    name: str
    make: Callable[[Any], optax.GradientTransformationExtraArgs]
    value: float
    keys: tuple[str, ...]
    # From parameters and a sequence of gradients to parameters after each step.
    reference: Callable[[np.ndarray, np.ndarray], np.ndarray]
    # For optax.inject_hyperparams: factory, arguments, which of them are static.
    inject: tuple[Callable, dict[str, Any], tuple[str, ...]]


def _constant(value):
    return lambda count: value


def rate(count, peak=0.1):
    return reference.onecycle(count, peak, TOTAL, 6, peak / 25, 0.0, 0, "cosine")


def beta(count, high=0.95, low=0.85):
    return reference.onecycle(count, low, TOTAL, 6, high, high, 0, "cosine")


def moving(count):
    """A momentum that moves, as a schedule of ours and of NumPy alike."""
    return 0.5 + 0.4 * ((count % 3) / 3)


def linear_rate(count):
    return 0.1 * (1 - count / TOTAL)


def growing_decay(count):
    return 0.01 * (1 + count / 2)


def cooling(count):
    return reference.cooled(count, _constant(0.11), 12, 12, 0.01, "1-sqrt")


def _started(tx, cooldown_steps):
    """A transformation that cools down from its first update on."""

    def init_fn(params):
        return osc.start_cooldown(tx.init(params), cooldown_steps)

    return optax.GradientTransformationExtraArgs(init_fn, tx.update)


THAW = 4
by_name = osc.label_by_path([("kernel", 0), ("bias", 1)])
# Of what it is given, the recipe takes the last group for the head, so under
# optax.masked the kernel must be that.
head_is_kernel = osc.label_by_path([("kernel", 1), ("bias", 0)])

TRANSFORMS = [
    Transform(
        "scale_by_learning_rate",
        lambda value: osc.scale_by_learning_rate(lambda t: value * linear_rate(t)),
        1.0,
        ("learning_rate", "cooldown"),
        lambda p, g: reference.sgd(p, g, linear_rate, _constant(0.0)),
        (osc.scale_by_learning_rate, {"learning_rate": 0.1}, ()),
    ),
    Transform(
        "scale_by_learning_rate-groups",
        lambda value: osc.scale_by_learning_rate(
            linear_rate,
            multipliers={0: lambda t: value * moving(t), 1: 2.0},
            param_labels=by_name,
        ),
        1.0,
        ("learning_rate", "learning_rate/0", "learning_rate/1", "cooldown"),
        lambda p, g: reference.sgd(
            p,
            g,
            lambda t: linear_rate(t) * (moving(t) if p.ndim > 1 else 2.0),
            _constant(0.0),
        ),
        (
            osc.scale_by_learning_rate,
            {"learning_rate": 0.1, "multipliers": {0: 0.1, 1: 1.0}}
            | {"param_labels": by_name},
            ("param_labels",),
        ),
    ),
    Transform(
        "scale_by_learning_rate-cooling",
        lambda value: _started(
            osc.scale_by_learning_rate(
                lambda t: value * (1 + linear_rate(t)), cooldown_end=0.01
            ),
            12,
        ),
        0.1,
        ("learning_rate", "cooldown"),
        lambda p, g: reference.sgd(p, g, cooling, _constant(0.0)),
        (
            lambda learning_rate: _started(
                osc.scale_by_learning_rate(learning_rate), 12
            ),
            {"learning_rate": 0.1},
            (),
        ),
    ),
    Transform(
        "scale_by_learning_rate-groups-cooling",
        lambda value: _started(
            osc.scale_by_learning_rate(
                lambda t: value * (1 + linear_rate(t)),
                multipliers={0: moving, 1: 2.0},
                param_labels=by_name,
                cooldown_end=0.01,
            ),
            12,
        ),
        0.1,
        ("learning_rate", "learning_rate/0", "learning_rate/1", "cooldown"),
        # The multipliers are those of the step where the cooldown started.
        lambda p, g: reference.sgd(
            p,
            g,
            lambda t: cooling(t) * (moving(0) if p.ndim > 1 else 2.0),
            _constant(0.0),
        ),
        (
            lambda learning_rate: _started(
                osc.scale_by_learning_rate(
                    learning_rate, multipliers={0: 0.1, 1: 1.0}, param_labels=by_name
                ),
                12,
            ),
            {"learning_rate": 0.1},
            (),
        ),
    ),
    Transform(
        "add_decayed_weights",
        lambda value: optax.chain(
            osc.add_decayed_weights(lambda t: value * growing_decay(t), mask=None),
            optax.scale(-0.1),
        ),
        1.0,
        ("weight_decay",),
        lambda p, g: reference.sgd(
            p, g, _constant(0.1), _constant(0.0), decay=growing_decay
        ),
        (osc.add_decayed_weights, {"weight_decay": 0.1}, ()),
    ),
    *(
        Transform(
            f"scheduled_trace-{nesterov}",
            lambda value, nesterov=nesterov: optax.chain(
                osc.scheduled_trace(lambda t: value * moving(t), nesterov=nesterov),
                optax.scale(-0.1),
            ),
            1.0,
            ("momentum",),
            lambda p, g, nesterov=nesterov: reference.sgd(
                p, g, _constant(0.1), moving, nesterov=nesterov
            ),
            (osc.scheduled_trace, {"decay": 0.9}, ()),
        )
        for nesterov in (False, True)
    ),
    *(
        Transform(
            f"scale_by_scheduled_adam-{nesterov}",
            lambda value, nesterov=nesterov: optax.chain(
                osc.scale_by_scheduled_adam(
                    lambda t: value * moving(t),
                    lambda t: 1 - 0.1 * moving(t),
                    eps=1e-3,
                    nesterov=nesterov,
                ),
                optax.scale(-0.1),
            ),
            1.0,
            ("b1", "b2", "eps"),
            lambda p, g, nesterov=nesterov: reference.adamw(
                p,
                g,
                _constant(0.1),
                moving,
                lambda t: 1 - 0.1 * moving(t),
                1e-3,
                nesterov=nesterov,
            ),
            (osc.scale_by_scheduled_adam, {"b1": 0.9}, ()),
        )
        for nesterov in (False, True)
    ),
    Transform(
        "onecycle_sgd",
        lambda value: osc.onecycle_sgd(
            value,
            TOTAL,
            weight_decay=growing_decay,
            mask=None,
        ),
        0.1,
        ("weight_decay", "momentum", "learning_rate", "cooldown"),
        lambda p, g: reference.sgd(
            p, g, rate, beta, decay=growing_decay, nesterov=True
        ),
        (
            osc.onecycle_sgd,
            {"peak_learning_rate": 0.1, "total_steps": TOTAL},
            ("total_steps",),
        ),
    ),
    Transform(
        "onecycle_adamw",
        lambda value: osc.onecycle_adamw(value, TOTAL, weight_decay=0.1, mask=None),
        0.1,
        ("b1", "b2", "eps", "weight_decay", "learning_rate", "cooldown"),
        lambda p, g: reference.adamw(
            p, g, rate, beta, _constant(0.99), decay=_constant(0.1)
        ),
        (
            osc.onecycle_adamw,
            {"peak_learning_rate": 0.1, "total_steps": TOTAL},
            ("total_steps",),
        ),
    ),
    Transform(
        "record_gradient_norms",
        lambda value: optax.chain(
            osc.record_gradient_norms(TOTAL, ord=2, num_samples=6),
            osc.scale_by_learning_rate(value),
        ),
        0.1,
        ("learning_rate", "cooldown"),
        lambda p, g: reference.sgd(p, g, _constant(0.1), _constant(0.0)),
        (
            osc.record_gradient_norms,
            {"total_steps": TOTAL, "ord": 2},
            ("total_steps", "ord", "num_samples"),
        ),
    ),
    Transform(
        "scale_by_group",
        lambda value: optax.chain(
            osc.scale_by_group({0: lambda t: value * moving(t), 1: 2.0}, by_name),
            osc.scale_by_learning_rate(0.1),
        ),
        1.0,
        ("multiplier/0", "multiplier/1", "learning_rate", "cooldown"),
        lambda p, g: reference.sgd(
            p,
            g,
            (lambda t: 0.1 * moving(t)) if p.ndim > 1 else _constant(0.2),
            _constant(0.0),
        ),
        (
            osc.scale_by_group,
            {"multipliers": {0: 0.1, 1: 1.0}, "param_labels": by_name},
            ("param_labels",),
        ),
    ),
    Transform(
        "gradual_unfreezing",
        lambda value: osc.gradual_unfreezing(
            optax.chain(
                osc.scheduled_trace(moving),
                osc.scale_by_learning_rate(lambda t: value * linear_rate(t)),
            ),
            {0: THAW, 1: 0},
            by_name,
        ),
        1.0,
        (
            *("frozen/0", "frozen/1"),
            *("momentum/0", "learning_rate/0", "cooldown/0"),
            *("momentum/1", "learning_rate/1", "cooldown/1"),
        ),
        lambda p, g: reference.thawing(
            p,
            g,
            THAW if p.ndim > 1 else 0,
            lambda p, g, _: reference.sgd(p, g, linear_rate, moving),
        ),
        (
            osc.gradual_unfreezing,
            {"inner": optax.sgd(0.1), "thaw_steps": {0: 2, 1: 0}}
            | {"param_labels": by_name},
            ("inner", "thaw_steps", "param_labels"),
        ),
    ),
    Transform(
        "fine_tune_adamw",
        lambda value: osc.fine_tune_adamw(
            value,
            TOTAL,
            head_is_kernel,
            decay=0.5,
            freeze_steps=THAW,
            warmup_steps=6,
            weight_decay=0.1,
            mask=None,
        ),
        0.1,
        (
            *("frozen/0", "frozen/1"),
            *("b1/body", "b2/body", "eps/body", "weight_decay/body"),
            *("b1/head", "b2/head", "eps/head", "weight_decay/head"),
            *("learning_rate", "learning_rate/0", "learning_rate/1", "cooldown"),
        ),
        lambda p, g: reference.fine_tune(
            p,
            g,
            0.1,
            TOTAL,
            THAW,
            6,
            multiplier=1.0 if p.ndim > 1 else 0.5,
            thaw=0 if p.ndim > 1 else THAW,
            decay=0.1,
        ),
        (
            osc.fine_tune_adamw,
            {"peak_learning_rate": 0.1, "total_steps": TOTAL, "freeze_steps": 2}
            | {"param_labels": head_is_kernel},
            ("total_steps", "freeze_steps", "param_labels"),
        ),
    ),
    *(
        Transform(
            factory.__name__,
            # Updates pass through, so that the average changes nothing.
            lambda value, factory=factory, arguments=arguments: optax.chain(
                osc.scale_by_learning_rate(lambda t: value * linear_rate(t)),
                factory(**arguments),
            ),
            1.0,
            ("learning_rate", "cooldown"),
            lambda p, g: reference.sgd(p, g, linear_rate, _constant(0.0)),
            (factory, arguments, ("start_step", "every", static)),
        )
        for factory, arguments, static in (
            (
                osc.average_params,
                {"weight": 0.5, "accumulator_dtype": "bfloat16"},
                "accumulator_dtype",
            ),
            (osc.ema_params, {"decay": 0.9, "start_step": 3}, "name"),
            (osc.lawa_params, {"window": 3, "every": 2}, "window"),
        )
    ),
    Transform(
        "sgd",
        lambda value: osc.sgd(
            osc.warmup_stable_decay_schedule(
                value, TOTAL, warmup_steps=4, decay_steps=7, end_value=0.001
            ),
            moving,
            weight_decay=growing_decay,
            mask=None,
        ),
        0.1,
        ("weight_decay", "momentum", "learning_rate", "cooldown"),
        lambda p, g: reference.sgd(
            p,
            g,
            lambda t: reference.warmup_stable_decay(
                t, 0.1, TOTAL, 4, 7, 0.0, 0.001, "1-sqrt"
            ),
            moving,
            decay=growing_decay,
            nesterov=True,
        ),
        (osc.sgd, {"learning_rate": 0.1, "weight_decay": 0.1}, ("nesterov",)),
    ),
    Transform(
        "adamw",
        lambda value: optax.chain(
            osc.adamw(
                osc.phase_schedule(0.01, [(4, value)]),
                moving,
                lambda t: 1 - 0.1 * moving(t),
                eps=1e-3,
                weight_decay=growing_decay,
                mask=None,
                multipliers={0: 0.5, 1: 2.0},
                param_labels=by_name,
                nesterov=True,
            ),
            osc.ema_params(0.9),
        ),
        0.1,
        (
            *("b1", "b2", "eps", "weight_decay"),
            *("learning_rate", "learning_rate/0", "learning_rate/1", "cooldown"),
        ),
        lambda p, g: reference.adamw(
            p,
            g,
            lambda t: (0.5 if p.ndim > 1 else 2.0) * min(0.01 + 0.09 * t / 4, 0.1),
            moving,
            lambda t: 1 - 0.1 * moving(t),
            1e-3,
            decay=growing_decay,
            nesterov=True,
        ),
        (
            osc.adamw,
            {"learning_rate": 0.1, "b1": 0.8, "weight_decay": 0.1},
            ("nesterov",),
        ),
    ),
]
