"""SGD and AdamW of any rate: what the contract of every transformation leaves open."""

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
both = pytest.mark.parametrize("recipe", [osc.sgd, osc.adamw])


@functools.partial(jax.jit, static_argnums=0)
def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(tx, carry, begin, end, *, start=None):
    """Parameters and state after the steps; a cooldown's ``start`` is (k, n)."""
    for t in range(begin, end):
        if start and t == start[0]:
            carry = carry[0], osc.start_cooldown(carry[1], start[1])
        carry = step(tx, *carry, at(GRADS, t))
    return carry


def whole(tx, **options):
    return train(tx, (START, tx.init(START)), 0, STEPS, **options)


def assert_close_to(params, final):
    """``final(parameters, gradients)`` of float64 gives the last parameters."""
    for name in params:
        expected = final(START[name].astype(float), GRADS[name].astype(float))[-1]
        np.testing.assert_allclose(params[name], expected, rtol=1e-4, atol=1e-5)


def planned(shape="1-sqrt"):
    return osc.warmup_stable_decay_schedule(
        0.1,
        TOTAL,
        warmup_steps=4,
        decay_steps=7,
        init_value=0.02,
        end_value=0.001,
        shape=shape,
    )


OPEN = osc.phase_schedule(0.02, [(4, 0.1)])


def planned_at(count, shape="1-sqrt"):
    return reference.warmup_stable_decay(count, 0.1, TOTAL, 4, 7, 0.02, 0.001, shape)


def open_at(count):
    return min(0.02 + 0.02 * count, 0.1)


def cooled_at(count):
    return reference.cooled(count, open_at, 13, 6, 0.0, "1-sqrt")


PLANS = {
    # schedule, start of a cooldown, rate
    "constant": (0.1, None, lambda t: 0.1),
    "planned": (planned(), None, planned_at),
    "planned-exponential": (
        planned("exponential"),
        None,
        functools.partial(planned_at, shape="exponential"),
    ),
    "open": (OPEN, None, open_at),
    "cooled": (OPEN, (7, 6), cooled_at),
    "cooled-early": (planned(), (7, 6), cooled_at),
}
plans = pytest.mark.parametrize(
    ("schedule", "start", "expected"), PLANS.values(), ids=PLANS
)


@plans
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_its_formula(schedule, start, expected, nesterov):
    tx = osc.sgd(schedule, 0.8, weight_decay=0.1, mask=None, nesterov=nesterov)
    params, state = whole(tx, start=start)
    assert_close_to(
        params,
        lambda p, g: reference.sgd(
            p, g, expected, lambda t: 0.8, decay=lambda t: 0.1, nesterov=nesterov
        ),
    )
    applied = osc.read_hyperparams(state)
    np.testing.assert_allclose(applied["learning_rate"], expected(STEPS - 1), rtol=1e-5)
    assert applied["cooldown"] == (start is not None)


@plans
@pytest.mark.parametrize("nesterov", [False, True])
def test_adamw_is_its_formula(schedule, start, expected, nesterov):
    tx = osc.adamw(
        schedule, 0.8, 0.95, eps=1e-3, weight_decay=0.1, mask=None, nesterov=nesterov
    )
    params, _ = whole(tx, start=start)
    assert_close_to(
        params,
        lambda p, g: reference.adamw(
            p, g, expected, lambda t: 0.8, lambda t: 0.95, 1e-3,
            decay=lambda t: 0.1, nesterov=nesterov,
        ),
    )  # fmt: skip


def test_the_defaults_of_sgd():
    """Nesterov momentum of 0.9, and no decay."""
    params, _ = whole(osc.sgd(0.1))
    assert_close_to(
        params,
        lambda p, g: reference.sgd(p, g, lambda t: 0.1, lambda t: 0.9, nesterov=True),
    )


def test_the_defaults_of_adamw():
    """Betas of 0.9 and 0.99, and a decay of 0.01 of matrices."""
    params, _ = whole(osc.adamw(0.1))
    assert_close_to(
        params,
        lambda p, g: reference.adamw(
            p, g, lambda t: 0.1, lambda t: 0.9, lambda t: 0.99,
            decay=lambda t: 0.01 if p.ndim > 1 else 0.0,
        ),
    )  # fmt: skip


def test_eps_may_be_a_schedule():
    """Its value changes once, and each part of the run is that of a constant."""

    def adamw(eps):
        return osc.adamw(0.1, eps=eps, weight_decay=0.0)

    scheduled = adamw(lambda t: jnp.where(t < 3, 1.0, 1e-3))
    carry = scheduled.init(START)
    params, state = train(scheduled, (START, carry), 0, 3)
    expected, _ = train(adamw(1.0), (START, carry), 0, 3)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)
    ours, _ = train(scheduled, (params, state), 3, 6)
    theirs, _ = train(adamw(1e-3), (params, state), 3, 6)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


@both
def test_the_default_decay_is_of_matrices_alone(recipe):
    everything = whole(recipe(0.1, weight_decay=0.5, mask=None))
    matrices = whole(recipe(0.1, weight_decay=0.5))
    nothing = whole(recipe(0.1, weight_decay=0.0))
    chex.assert_trees_all_close(matrices[0]["kernel"], everything[0]["kernel"])
    chex.assert_trees_all_close(matrices[0]["bias"], nothing[0]["bias"])


@both
def test_a_constant_decay_of_zero_is_no_link(recipe):
    for zero in (0, 0.0, np.float32(0)):
        tx = recipe(0.1, weight_decay=zero)
        state = tx.init(START)
        assert "weight_decay" not in osc.read_hyperparams(state)
        tx.update(START, state)  # Without parameters.


@both
def test_a_scheduled_decay_of_zero_is_a_link(recipe):
    state = recipe(0.1, weight_decay=lambda t: 0.0).init(START)
    assert osc.read_hyperparams(state)["weight_decay"] == 0.0


def test_the_accumulators_have_the_dtypes_that_are_asked_for():
    for tx in (
        osc.sgd(0.1, accumulator_dtype=jnp.bfloat16),
        osc.adamw(0.1, mu_dtype=jnp.bfloat16),
    ):
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, START))
        assert {x.shape for x in leaves if x.dtype == jnp.bfloat16} == {(8, 4), (4,)}


CYCLES = {
    "sgd": (osc.onecycle_sgd, osc.sgd),
    "adamw": (osc.onecycle_adamw, osc.adamw),
}


@pytest.mark.parametrize(("recipe", "plain"), CYCLES.values(), ids=CYCLES)
def test_a_cycle_is_the_pair_of_its_schedules(recipe, plain):
    phases = {"warmup_steps": 5, "annihilation_steps": 4, "base_momentum": 0.7}
    ours, _ = whole(recipe(0.1, TOTAL, **phases))
    theirs, _ = whole(plain(*osc.onecycle(0.1, TOTAL, **phases)))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


AVERAGES = {
    "none": optax.identity(),
    "ema": osc.ema_params(0.9),
    "lawa": osc.lawa_params(3),
    "two": optax.chain(osc.swa_params(2), osc.ema_params(0.9)),
}


@both
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_planned_and_open_runs_have_one_state(recipe, average):
    state, other = (
        jax.eval_shape(optax.chain(recipe(schedule), average).init, START)
        for schedule in (planned(), 0.1)
    )
    assert types(state) == types(other)


@both
def test_a_checkpoint_of_an_open_run_continues_in_a_planned_one(recipe, tmp_path):
    """And the other way round; before the decay the two are the same."""
    late = osc.warmup_stable_decay_schedule(0.1, TOTAL, warmup_steps=3)
    opened, closed = (
        optax.chain(recipe(schedule), osc.ema_params(0.9))
        for schedule in (osc.phase_schedule(0.0, [(3, 0.1)]), late)
    )
    expected, expected_state = whole(closed)
    for first, then, start in ((opened, closed, None), (closed, opened, (16, 4))):
        saved = train(first, (START, first.init(START)), 0, 8)
        path = tmp_path / str(start)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, saved)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(path, (START, then.init(START)))
        restored = jax.device_get(restored)
        continued, state = train(then, restored, 8, STEPS, start=start)
        chex.assert_trees_all_close(continued, expected, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(
            osc.eval_params(state, continued),
            osc.eval_params(expected_state, expected),
            rtol=1e-5,
            atol=1e-6,
        )


@both
def test_an_average_behind_changes_no_update_and_is_of_the_parameters(recipe):
    with_average = optax.chain(recipe(planned()), osc.swa_params(0))
    params, state = whole(with_average)
    expected, _ = whole(recipe(planned()))
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
def test_the_rate_may_be_batched_or_traced(recipe):
    def final(peak, decay):
        tx = recipe(osc.phase_schedule(peak / 2, [(3, peak)]), weight_decay=decay)
        state = osc.start_cooldown(tx.init(START), 5)
        _, state = tx.update(START, state, START)
        return tx.update(START, state, START)[0]["kernel"]

    batched = jax.jit(jax.vmap(final))(jnp.array([0.1, 0.2]), jnp.array([0.0, 0.01]))
    single = jax.jit(lambda: final(0.2, 0.01))()
    np.testing.assert_allclose(batched[1], single, rtol=1e-5, atol=1e-8)
