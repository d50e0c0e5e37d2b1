"""A bound holds for a number as it is applied, which is in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

import optax_superconv as osc

NEARLY_1 = 1 - 1e-8  # 1 in float32
BELOW_1 = float(np.nextafter(np.float32(1), np.float32(0)))
TINY = float(np.finfo(np.float32).tiny)
HUGE = 1e39  # inf in float32
MOST = float(np.finfo(np.float32).max)

PARAMS = jnp.ones(2)
STEPS = {"total_steps": 10}


def by_label(multiplier):
    return osc.scale_by_group({0: multiplier}, 0)


def exponential(low=0.1, high=0.2):
    return osc.phase_schedule(low, [osc.Phase(3, high, "exponential")])


def range_test(low, high):
    return osc.range_test(
        lambda w, rate, batch: (w - rate, jnp.sum(w)),
        PARAMS,
        [1.0],
        min_learning_rate=low,
        max_learning_rate=high,
        num_steps=2,
        pass_hyperparams=True,
    )


def set_to(name, value):
    return osc.set_hyperparams(osc.adamw(0.1).init(PARAMS), {name: value})


DECAYS = {
    "scheduled_trace.decay": osc.scheduled_trace,
    "scale_by_scheduled_adam.b1": osc.scale_by_scheduled_adam,
    "scale_by_scheduled_adam.b2": lambda x: osc.scale_by_scheduled_adam(0.9, x),
    "sgd.momentum": lambda x: osc.sgd(0.1, x),
    "adamw.b1": lambda x: osc.adamw(0.1, x),
    "adamw.b2": lambda x: osc.adamw(0.1, 0.9, x),
    "onecycle.max_momentum": lambda x: osc.onecycle(0.1, 10, max_momentum=x),
    "onecycle_sgd.max_momentum": lambda x: osc.onecycle_sgd(0.1, 10, max_momentum=x),
    "onecycle_adamw.max_momentum": lambda x: osc.onecycle_adamw(
        0.1, 10, max_momentum=x
    ),
    "fine_tune_adamw.max_momentum": lambda x: osc.fine_tune_adamw(
        0.1, 10, 0, max_momentum=x
    ),
    "onecycle_momentum_schedule.max_momentum": lambda x: osc.onecycle_momentum_schedule(
        10, max_momentum=x
    ),
    "ema_params.decay": osc.ema_params,
    "set_hyperparams.b1": lambda x: set_to("b1", x),
    "stability_limit.momentum": lambda x: osc.stability_limit(
        1.0, optimizer="adam", momentum=x
    ),
}
POSITIVES = {
    "phase_schedule.init_value": lambda x: exponential(low=x),
    "phase_schedule.end_value": lambda x: exponential(high=x),
    "with_cooldown.schedule": lambda x: osc.with_cooldown(
        x, 10, 5, end_value=0.1, shape="exponential"
    ),
    "with_cooldown.end_value": lambda x: osc.with_cooldown(
        0.1, 10, 5, end_value=x, shape="exponential"
    ),
    "warmup_stable_decay_schedule.end_value": (
        lambda x: osc.warmup_stable_decay_schedule(
            0.1, 10, end_value=x, shape="exponential"
        )
    ),
    "onecycle.end_learning_rate": lambda x: osc.onecycle(
        0.1, 10, end_learning_rate=x, shape="exponential"
    ),
    "scale_by_learning_rate.cooldown_end": lambda x: osc.scale_by_learning_rate(
        0.1, cooldown_end=x, cooldown_shape="exponential"
    ),
    "scale_by_learning_rate.learning_rate": lambda x: osc.scale_by_learning_rate(
        x, cooldown_end=0.1, cooldown_shape="exponential"
    ),
    "layerwise_multipliers.decay": lambda x: osc.layerwise_multipliers(range(2), x),
    "geometric_multipliers.lowest": lambda x: osc.geometric_multipliers(range(2), x),
    "fine_tune_adamw.decay": lambda x: osc.fine_tune_adamw(0.1, 10, 0, decay=x).init(
        PARAMS
    ),
    "cyclical_schedule.gamma": lambda x: osc.cyclical_schedule(
        0.1, 0.2, 3, mode="exp_range", gamma=x
    ),
    "average_params.weight": osc.average_params,
    "transfer_peak.peak": lambda x: osc.transfer_peak(x, 1.0, 1.0, 10),
    "transfer_peak.to_schedule": lambda x: osc.transfer_peak(1.0, 1.0, x, 10),
    "range_test.min_learning_rate": lambda x: range_test(x, 1.0),
}
FINITES = {
    "phase_schedule.init_value": lambda x: osc.phase_schedule(x, [(3, 0.1)]),
    "phase_schedule.end_value": lambda x: osc.phase_schedule(0.1, [(3, x)]),
    "with_cooldown.schedule": lambda x: osc.with_cooldown(x, 10, 5),
    "onecycle.peak_learning_rate": lambda x: osc.onecycle(x, 10),
    "onecycle_sgd.peak_learning_rate": lambda x: osc.onecycle_sgd(x, 10),
    "onecycle_adamw.peak_learning_rate": lambda x: osc.onecycle_adamw(x, 10),
    "onecycle_schedule.peak_value": lambda x: osc.onecycle_schedule(x, 10),
    "cyclical_schedule.peak_value": lambda x: osc.cyclical_schedule(0.1, x, 3),
    "warmup_stable_decay_schedule.peak_value": (
        lambda x: osc.warmup_stable_decay_schedule(x, 10)
    ),
    "refined_schedule.peak_value": lambda x: osc.refined_schedule(np.ones(6), x, 10),
    "scale_by_learning_rate.learning_rate": osc.scale_by_learning_rate,
    "scale_by_learning_rate.cooldown_end": lambda x: osc.scale_by_learning_rate(
        0.1, cooldown_end=x
    ),
    "sgd.learning_rate": osc.sgd,
    "sgd.weight_decay": lambda x: osc.sgd(0.1, weight_decay=x),
    "adamw.learning_rate": osc.adamw,
    "adamw.eps": lambda x: osc.adamw(0.1, eps=x),
    "fine_tune_adamw.peak_learning_rate": lambda x: osc.fine_tune_adamw(x, 10, 0),
    "add_decayed_weights.weight_decay": osc.add_decayed_weights,
    "scale_by_group.multipliers": by_label,
    "scale_by_group.multipliers, stacked": lambda x: by_label(np.array([1.0, x])),
    "geometric_multipliers.highest": lambda x: osc.geometric_multipliers(
        range(2), 0.1, x
    ),
    "average_params.power": lambda x: osc.average_params(power=x),
    "set_hyperparams.learning_rate": lambda x: set_to("learning_rate", x),
    "grid_test.grid": lambda x: osc.grid_test(
        lambda w, h, batch: (w - h["learning_rate"], jnp.sum(w)),
        PARAMS,
        [1.0],
        {"weight_decay": [0.1, x]},
        num_steps=10,
        pass_hyperparams=True,
    ),
    "range_test.max_learning_rate": lambda x: range_test(0.1, x),
}


def cases(table, *values):
    return [
        pytest.param(make, name.split(".")[1].split(",")[0], x, id=f"{name}={x!r}")
        for name, make in table.items()
        for x in values
    ]


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        *cases(DECAYS, NEARLY_1, -1e-60),
        *cases(POSITIVES, 1e-46, 1e-60, TINY / 2),
        *cases(FINITES, HUGE, 2 * MOST),
    ],
)
def test_what_breaks_a_rule_in_float32_is_refused(make, name, value):
    with pytest.raises(ValueError, match=rf"{name}.*must be .*, got") as error:
        make(value)
    assert "float32" in str(error.value) or value < 0


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [*cases(DECAYS, BELOW_1, 0.96), *cases(POSITIVES, TINY), *cases(FINITES, 1e38)],
)
def test_what_keeps_it_is_taken(make, name, value):
    make(value)


def test_what_is_refused_would_not_have_worked():
    assert np.float32(NEARLY_1) == 1
    assert np.float32(1e-46) == 0
    assert jnp.float32(TINY / 2) * 1 == 0  # A compiled program has no such number.
