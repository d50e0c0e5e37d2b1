"""The late-decay recipes: what the contract of every transformation leaves open."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference
from common import at, make_grads, make_params, types

import optax_superconv as osc

TOTAL = 20
STEPS = TOTAL + 5
START = jax.tree.map(np.asarray, make_params())
GRADS = jax.tree.map(np.asarray, make_grads(STEPS))
RECIPES = (osc.late_decay_sgd, osc.late_decay_adamw)
both = pytest.mark.parametrize("recipe", RECIPES)


@functools.partial(jax.jit, static_argnums=0)
def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(tx, carry, begin, end, *, trigger=None):
    """Parameters and state after the steps; ``trigger`` is the pair (k, n)."""
    for t in range(begin, end):
        if trigger and t == trigger[0]:
            carry = carry[0], osc.start_cooldown(carry[1], trigger[1])
        carry = step(tx, *carry, at(GRADS, t))
    return carry


def whole(tx, **options):
    return train(tx, (START, tx.init(START)), 0, STEPS, **options)


def assert_close_to(params, final):
    """``final(parameters, gradients)`` of float64 gives the last parameters."""
    for name in params:
        expected = final(START[name].astype(float), GRADS[name].astype(float))[-1]
        np.testing.assert_allclose(params[name], expected, rtol=1e-4, atol=1e-5)


def rate(count, shape="1-sqrt", end=0.001):
    return reference.warmup_stable_decay(count, 0.1, TOTAL, 4, 7, 0.02, end, shape)


def triggered_rate(count):
    return reference.cooled(
        count, lambda t: min(0.02 + 0.02 * t, 0.1), 13, 6, 0.001, "1-sqrt"
    )


DIALS = {"warmup_steps": 4, "init_learning_rate": 0.02, "end_learning_rate": 0.001}
PLANS = {
    # total_steps, options, trigger, rate
    "planned": (TOTAL, {"decay_steps": 7}, None, rate),
    "planned-exponential": (
        TOTAL,
        {"decay_steps": 7, "shape": "exponential"},
        None,
        functools.partial(rate, shape="exponential"),
    ),
    "open": (None, {}, None, lambda t: min(0.02 + 0.02 * t, 0.1)),
    "triggered": (None, {}, (7, 6), triggered_rate),
    "triggered-early": (TOTAL, {"decay_steps": 7}, (7, 6), triggered_rate),
}
plans = pytest.mark.parametrize(
    ("total", "options", "trigger", "expected"), PLANS.values(), ids=PLANS
)


@functools.cache
def built(recipe, total, **options):
    return recipe(
        0.1, total, weight_decay=0.1, weight_decay_mask=None, **DIALS, **options
    )


@plans
@pytest.mark.parametrize("nesterov", [False, True])
def test_late_decay_sgd_is_its_formula(total, options, trigger, expected, nesterov):
    tx = built(osc.late_decay_sgd, total, momentum=0.8, nesterov=nesterov, **options)
    params, state = whole(tx, trigger=trigger)
    assert_close_to(
        params,
        lambda p, g: reference.sgd(
            p, g, expected, lambda t: 0.8, decay=lambda t: 0.1, nesterov=nesterov
        ),
    )
    applied = osc.read_hyperparams(state)
    np.testing.assert_allclose(applied["learning_rate"], expected(STEPS - 1), rtol=1e-5)
    assert applied["cooldown"] == (trigger is not None)


@plans
@pytest.mark.parametrize("nesterov", [False, True])
def test_late_decay_adamw_is_its_formula(total, options, trigger, expected, nesterov):
    options = options | {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "nesterov": nesterov}
    tx = built(osc.late_decay_adamw, total, **options)
    params, _ = whole(tx, trigger=trigger)
    assert_close_to(
        params,
        lambda p, g: reference.adamw(
            p, g, expected, lambda t: 0.8, lambda t: 0.95, 1e-3,
            decay=lambda t: 0.1, nesterov=nesterov,
        ),
    )  # fmt: skip


@both
def test_the_default_decay_is_of_matrices_alone(recipe):
    everything = whole(recipe(0.1, TOTAL, weight_decay=0.5, weight_decay_mask=None))
    matrices = whole(recipe(0.1, TOTAL, weight_decay=0.5))
    nothing = whole(recipe(0.1, TOTAL, weight_decay=0.0))
    chex.assert_trees_all_close(matrices[0]["kernel"], everything[0]["kernel"])
    chex.assert_trees_all_close(matrices[0]["bias"], nothing[0]["bias"])


def test_the_default_decay_steps_are_a_fifth():
    default, given = (
        whole(osc.late_decay_sgd(0.1, TOTAL, **options))[0]
        for options in ({}, {"decay_steps": TOTAL // 5})
    )
    chex.assert_trees_all_equal(default, given)


def test_the_accumulators_have_the_dtypes_that_are_asked_for():
    for tx in (
        osc.late_decay_sgd(0.1, TOTAL, accumulator_dtype=jnp.bfloat16),
        osc.late_decay_adamw(0.1, None, mu_dtype=jnp.bfloat16),
    ):
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, START))
        assert {x.shape for x in leaves if x.dtype == jnp.bfloat16} == {(8, 4), (4,)}


AVERAGES = {
    "none": None,
    "ema": osc.ema_params(0.9),
    "lawa": osc.lawa_params(3),
    "two": optax.chain(osc.swa_params(2), osc.ema_params(0.9)),
}


@both
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_planned_and_open_runs_have_one_state(recipe, average):
    planned = recipe(0.1, TOTAL, warmup_steps=2, average=average)
    opened = recipe(0.1, None, average=average)
    state, other = (jax.eval_shape(tx.init, START) for tx in (planned, opened))
    assert types(state) == types(other)


@both
def test_a_checkpoint_of_an_open_run_continues_in_a_planned_one(recipe, tmp_path):
    """And the other way round; before the decay the two are the same."""
    opened, planned = (
        recipe(0.1, total, warmup_steps=3, average=osc.ema_params(0.9))
        for total in (None, TOTAL)
    )
    expected, expected_state = whole(planned)
    for first, then, trigger in ((opened, planned, None), (planned, opened, (16, 4))):
        saved = train(first, (START, first.init(START)), 0, 8)
        path = tmp_path / str(trigger)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, saved)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(path, (START, then.init(START)))
        restored = jax.device_get(restored)
        continued, state = train(then, restored, 8, STEPS, trigger=trigger)
        chex.assert_trees_all_close(continued, expected, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(
            osc.eval_params(state, continued),
            osc.eval_params(expected_state, expected),
            rtol=1e-5,
            atol=1e-6,
        )


@both
def test_an_average_changes_no_update_and_is_of_the_parameters(recipe):
    with_average = recipe(0.1, TOTAL, average=osc.swa_params(0))
    params, state = whole(with_average)
    expected, _ = whole(recipe(0.1, TOTAL))
    chex.assert_trees_all_close(params, expected, rtol=1e-6)
    carry, total = (START, with_average.init(START)), jax.tree.map(np.zeros_like, START)
    for t in range(STEPS):
        carry = train(with_average, carry, t, t + 1)
        total = jax.tree.map(np.add, total, carry[0])
    mean = jax.tree.map(lambda x: x / STEPS, total)
    chex.assert_trees_all_close(
        osc.eval_params(state, params), mean, rtol=1e-5, atol=1e-6
    )


@both
def test_the_peak_may_be_batched_or_traced(recipe):
    def final(peak, end):
        tx = recipe(peak, None, warmup_steps=3, end_learning_rate=end)
        state = osc.start_cooldown(tx.init(START), 5)
        _, state = tx.update(START, state, START)
        return tx.update(START, state, START)[0]["kernel"]

    batched = jax.jit(jax.vmap(final))(jnp.array([0.1, 0.2]), jnp.array([0.0, 0.01]))
    single = jax.jit(lambda: final(0.2, 0.01))()
    np.testing.assert_allclose(batched[1], single, rtol=1e-5, atol=1e-8)
