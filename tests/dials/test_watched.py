"""Is a step exported for every platform, and all that it keeps finite?"""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import at
from dialed import (
    GRADS,
    LABELS,
    MULTIPLIERS,
    PARAMS,
    RECIPES,
    TOTAL,
    UNFREEZING,
    falling,
)

import optax_superconv as osc

pytestmark = pytest.mark.slow

GRAD = at(GRADS, 0)
ALL = RECIPES | UNFREEZING


@pytest.mark.parametrize("recipe", ALL)
def test_a_step_with_settings_is_exported(recipe):
    tx = ALL[recipe]()

    def step(grads, state, params, length):
        state = osc.start_cooldown(osc.restart_schedules(state), length)
        _, state = tx.update(grads, state, params)
        return osc.read_hyperparams(state)

    args = jax.eval_shape(lambda: (GRAD, tx.init(PARAMS), PARAMS, jnp.int32(3)))
    exported = jax.export.export(jax.jit(step), platforms=("cpu", "cuda", "tpu"))(*args)
    assert exported.platforms == ("cpu", "cuda", "tpu")


WATCHED = ALL | {
    "averages": lambda: optax.chain(
        osc.sgd(falling), osc.ema_params(0.9), osc.average_params(power=1.0)
    ),
    "swa": lambda: optax.chain(osc.sgd(0.1), osc.swa_params(2, 2)),
    "lawa": lambda: optax.chain(osc.sgd(0.1), osc.lawa_params(2)),
    "norms": lambda: optax.chain(osc.record_gradient_norms(TOTAL, ord=2), osc.sgd(0.1)),
    "group": lambda: osc.scale_by_group({0: falling, 1: 0.0}, LABELS),
    "exponential": lambda: osc.scale_by_learning_rate(
        falling,
        cooldown_shape="exponential",
        cooldown_end=1e-3,
        multipliers=MULTIPLIERS,
        param_labels=LABELS,
    ),
    "zero": lambda: osc.adamw(
        0.0, 0.0, 0.0, eps=1e-8, multipliers=MULTIPLIERS, param_labels=LABELS
    ),
    "rising": lambda: osc.scale_by_learning_rate(
        optax.linear_schedule(0.0, 0.1, 3),
        cooldown_shape="exponential",
        cooldown_end=1e-3,
        multipliers={0: 0.0, 1: 1.0},
        param_labels=LABELS,
    ),
    "inject": lambda: optax.inject_hyperparams(osc.adamw)(falling),
}


@pytest.mark.parametrize("make", WATCHED.values(), ids=WATCHED)
def test_no_state_holds_what_is_not_finite(make):
    tx = make()

    def check(state):
        for leaf in jax.tree.leaves(state):
            assert np.isfinite(np.asarray(leaf)).all()

    with jax.debug_nans(True), jax.debug_infs(True):
        state = tx.init(PARAMS)
        check(state)
        update = jax.jit(tx.update)
        for t in range(8):
            names = [k for k in osc.read_hyperparams(state) if "learning_rate/" in k]
            if t in (2, 4):
                state = osc.set_hyperparams(
                    state, dict.fromkeys(names, 0.0 if t == 2 else None)
                )
            if t in (0, 4, 5) and "cooldown" in osc.read_hyperparams(state):
                state = osc.start_cooldown(state, 2)
            if t == 6:
                state = osc.restart_schedules(state)
            check(state)
            _, state = update(GRAD, state, PARAMS)
            check(state)
