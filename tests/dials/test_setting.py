"""Is what was set applied, from the next update on, in place of what else decides?"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_same_bits, at
from dialed import GRADS, LABELS, PARAMS, Link, falling, follow, rates, setting

import optax_superconv as osc

STEPS, K = 7, 3


def grouped(value, multipliers=None):
    return osc.scale_by_learning_rate(
        value, multipliers=multipliers or {0: 0.5, 1: 1.0}, param_labels=LABELS
    )


# --- held is scheduled ----------------------------------------------------------------

MOVING = {
    "rate": falling,
    "decay": lambda t: 0.5 + 0.05 * t,
}
# Name of the dial, how an optimizer is made of its number, what it is at first, then.
DIALS = {
    "rate-sgd": ("learning_rate", osc.sgd, "rate", 0.03),
    "rate-adamw": ("learning_rate", osc.adamw, "rate", 0.03),
    "rate-groups": ("learning_rate", grouped, "rate", 0.03),
    # Times a power of 2 nothing is rounded.
    "rate/0": ("learning_rate/0", lambda m: grouped(0.25, {0: m, 1: 1.0}), "rate", 0.3),
    "momentum": ("momentum", lambda m: osc.sgd(0.1, m), "decay", 0.8),
    "momentum-plain": (
        "momentum",
        lambda m: osc.sgd(0.1, m, nesterov=False),
        "decay",
        0.8,
    ),
    "b1": ("b1", lambda b: osc.adamw(0.1, b), "decay", 0.8),
    "b2": ("b2", lambda b: osc.adamw(0.1, b2=b), "decay", 0.8),
    "eps": ("eps", lambda e: osc.adamw(0.1, eps=e), "rate", 0.3),
    "decay-adamw": (
        "weight_decay",
        lambda d: osc.adamw(0.1, weight_decay=d),
        "rate",
        0.3,
    ),
    "decay-sgd": ("weight_decay", lambda d: osc.sgd(0.1, weight_decay=d), "rate", 0.3),
    "multiplier": (
        "multiplier/0",
        lambda m: optax.chain(
            osc.scale_by_group({0: m, 1: 1.0}, LABELS), optax.scale(-0.1)
        ),
        "rate",
        0.3,
    ),
}


def switched(before, after):
    return lambda t: jnp.where(t < K, before(t), after)


@pytest.mark.slow
@pytest.mark.parametrize("dial", DIALS)
def test_held_from_a_step_on_is_a_schedule_of_that_value(dial):
    name, make, kind, value = DIALS[dial]
    # A group's rate is its multiplier times a base of 1 / 4.
    held_at = value / 4 if name == "learning_rate/0" else value
    held, read, _ = follow(make(MOVING[kind]), STEPS, {K: setting(name, held_at)})
    planned, expected, _ = follow(make(switched(MOVING[kind], value)), STEPS)
    assert_same_bits(held, planned)
    assert_same_bits(read, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dial", DIALS)
def test_the_dial_of_a_constant_can_be_set(dial):
    name, make, kind, value = DIALS[dial]
    before = float(MOVING[kind](1))
    scale = 4 if name == "learning_rate/0" else 1
    read = rates(make(before), 4, {2: setting(name, value / scale)}, name)
    expected = [before / scale] * 2 + [value / scale] * 2
    np.testing.assert_array_equal(read, np.float32(expected))


@pytest.mark.parametrize("dial", DIALS)
def test_released_it_follows_its_schedule(dial):
    name, make, kind, value = DIALS[dial]
    tx = make(MOVING[kind])
    update = jax.jit(tx.update)
    actions = {1: setting(name, value), K: setting(name, None)}
    released = rates(tx, STEPS, actions, name, update=update)
    scheduled = rates(tx, STEPS, None, name, update=update)
    np.testing.assert_array_equal(released[K:], scheduled[K:])
    assert (released[1:K] == np.float32(value)).all()


def test_nesterov_looks_ahead_with_what_is_held():
    held, *_ = follow(
        osc.adamw(0.1, MOVING["decay"], nesterov=True), 4, {0: setting("b1", 0.8)}
    )
    constant, *_ = follow(osc.adamw(0.1, lambda t: 0.8 + 0 * t, nesterov=True), 4)
    assert_same_bits(held, constant)


def test_several_at_once():
    values = {"learning_rate": 0.03, "b1": 0.5, "weight_decay": 0.2, "eps": 0.1}
    tx = osc.onecycle_adamw(0.1, 10)
    _, read, _ = follow(tx, 3, {0: lambda s: osc.set_hyperparams(s, values)})
    for name, value in values.items():
        np.testing.assert_array_equal(read[name], np.float32(value))


def test_the_count_of_the_schedule_goes_on():
    link = Link(falling).set(learning_rate=0.5)
    link.step(), link.step()
    np.testing.assert_allclose(link.set(learning_rate=None).step(), falling(2))


# --- precedence -----------------------------------------------------------------------

GROUPS = {"multipliers": {0: 0.5, 1: 2.0}, "param_labels": LABELS}
LINEAR = GROUPS | {"cooldown_shape": "linear"}


def read_after(link):
    link.step()
    read = osc.read_hyperparams(link.state)
    return [float(read[f"learning_rate{end}"]) for end in ("", "/0", "/1")]


def expect(link, *values):
    np.testing.assert_allclose(read_after(link), values, rtol=1e-6)


def test_a_held_base_is_multiplied():
    expect(Link(0.1, **GROUPS).set(learning_rate=0.4), 0.4, 0.2, 0.8)


def test_a_held_group_outranks_the_base():
    link = Link(0.1, **GROUPS).set(learning_rate=0.4, learning_rate__0=0.03)
    expect(link, 0.4, 0.03, 0.8)


def test_a_held_group_stays_when_the_base_is_released():
    link = Link(0.1, **GROUPS).set(learning_rate=0.4, learning_rate__0=0.03)
    link.step()
    expect(link.set(learning_rate=None), 0.1, 0.03, 0.2)


def test_a_released_group_follows_the_held_base():
    link = Link(0.1, **GROUPS).set(learning_rate=0.4, learning_rate__0=0.03)
    link.step()
    expect(link.set(learning_rate__0=None), 0.4, 0.2, 0.8)


def test_a_base_set_during_a_cooldown_outranks_it_for_all_groups():
    link = Link(0.1, **LINEAR).cool(4)
    link.step(), link.step()
    expect(link.set(learning_rate=0.4), 0.4, 0.2, 0.8)


def test_a_group_set_during_a_cooldown_outranks_it_alone():
    link = Link(0.1, **LINEAR).cool(4)
    link.step(), link.step()
    expect(link.set(learning_rate__1=0.7), 0.05, 0.025, 0.7)


def test_released_it_returns_to_the_cooldown():
    link = Link(0.1, **LINEAR).cool(4)
    link.step(), link.set(learning_rate=0.4, learning_rate__1=0.7).step()
    link.set(learning_rate=None, learning_rate__1=None)
    expect(link, 0.05, 0.025, 0.1)


def test_what_is_held_at_the_start_of_a_cooldown_falls_and_is_held_no_more():
    link = Link(0.1, **LINEAR).set(learning_rate=0.4, learning_rate__1=0.6).cool(4)
    expect(link, 0.4, 0.2, 0.6)
    expect(link, 0.3, 0.15, 0.45)
    expect(link.set(learning_rate=None, learning_rate__1=None), 0.2, 0.1, 0.3)


def test_groups_keep_their_own_end_in_proportion():
    link = Link(0.1, **LINEAR, cooldown_end=0.02).set(learning_rate__1=0.4).cool(2)
    for expected in ((0.1, 0.05, 0.4), (0.06, 0.03, 0.24), (0.02, 0.01, 0.08)):
        expect(link, *expected)


def test_reading_between_a_set_and_the_update_gives_what_was_applied():
    link = Link(falling)
    link.step()
    before = osc.read_hyperparams(link.state)
    assert_same_bits(osc.read_hyperparams(link.set(learning_rate=0.5).state), before)
    assert_same_bits(osc.read_hyperparams(link.set(learning_rate=None).state), before)


def test_the_last_of_several_sets_counts():
    link = Link(0.1).set(learning_rate=0.4).set(learning_rate=0.3)
    np.testing.assert_allclose(link.step(), 0.3, rtol=1e-6)
    link.set(learning_rate=0.4).set(learning_rate=None)
    np.testing.assert_allclose(link.step(), 0.1, rtol=1e-6)


@pytest.mark.parametrize("value", [0, 1, np.float64(0.3), jnp.bfloat16(0.5), "array"])
def test_numbers_of_any_kind(value):
    value = np.ones((), np.int32) if isinstance(value, str) else value
    assert Link(0.1).set(learning_rate=value).step() == np.float32(value)


def test_numbered_names_set_their_own():
    tx = optax.chain(*(osc.scale_by_learning_rate(x) for x in (0.1, 0.2, 0.3)))
    _, read, _ = follow(tx, 1, {0: setting("learning_rate_1", 0.7)})
    values = [read[f"learning_rate{end}"][0] for end in ("", "_1", "_2")]
    np.testing.assert_allclose(values, [0.1, 0.7, 0.3], rtol=1e-6)


def test_a_label_of_a_partition_sets_its_own():
    tx = optax.partition({0: osc.sgd(0.1), 1: osc.sgd(0.2)}, LABELS)
    _, read, _ = follow(tx, 1, {0: setting("learning_rate/1", 0.7)})
    values = [read[f"learning_rate/{k}"][0] for k in LABELS.values()]
    np.testing.assert_allclose(values, [0.1, 0.7], rtol=1e-6)


def test_a_frozen_group_reports_a_rate_and_does_not_act():
    tx = osc.fine_tune_adamw(0.1, 12, LABELS, freeze_steps=3)
    history, read, _ = follow(tx, 2, {1: setting("learning_rate/0", 0.7)})
    assert read["frozen/0"].all()
    assert read["learning_rate/0"][1] == np.float32(0.7)
    assert_same_bits(at(history, 1)["body"], PARAMS["body"])


# --- many at once ---------------------------------------------------------------------

EIGHT = np.float32(np.geomspace(1e-3, 1.0, 8))


@pytest.mark.slow
@pytest.mark.parametrize("make", [osc.onecycle_sgd, osc.onecycle_adamw])
def test_vmapped_over_rates_it_is_as_many_runs(make):
    tx = make(0.1, 10)

    @jax.jit
    def run(rate):
        state = osc.set_hyperparams(tx.init(PARAMS), {"learning_rate": rate})

        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (PARAMS, state), at(GRADS, slice(5)))[0][0]

    each = [run(rate) for rate in EIGHT]
    chex.assert_trees_all_close(
        jax.jit(jax.vmap(run))(EIGHT),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *each),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.slow
def test_a_forked_state_is_set_at_once_or_one_by_one():
    tx = osc.sgd(0.1)
    fork = jax.vmap(lambda r: osc.set_hyperparams(tx.init(PARAMS), {"momentum": r}))
    forked = fork(jnp.linspace(0, 0.7, 8))
    for rates_ in (0.5, EIGHT, EIGHT[:1]):
        again = osc.set_hyperparams(forked, {"learning_rate": rates_})
        update = functools.partial(tx.update, at(GRADS, 0))
        _, state = jax.vmap(update, (0, None))(again, PARAMS)
        read = osc.read_hyperparams(state)
        np.testing.assert_array_equal(
            read["learning_rate"], np.broadcast_to(np.float32(rates_), 8)
        )
        np.testing.assert_allclose(read["momentum"], np.linspace(0, 0.7, 8), 1e-6)


def test_a_schedule_of_rates_inside_scan():
    tx = osc.adamw(0.1)

    def step(state, rate):
        state = osc.set_hyperparams(state, {"learning_rate": rate})
        _, state = tx.update(PARAMS, state, PARAMS)
        return state, osc.read_hyperparams(state)["learning_rate"]

    applied = jax.lax.scan(step, tx.init(PARAMS), EIGHT)[1]
    np.testing.assert_array_equal(applied, EIGHT)


def test_settings_in_jit_are_those_outside():
    tx = osc.onecycle_adamw(0.1, 10)
    state = tx.init(PARAMS)
    values = {"learning_rate": jnp.float32(0.3), "b1": jnp.float32(0.5), "eps": None}
    inside = jax.jit(osc.set_hyperparams)(state, values)
    assert_same_bits(inside, osc.set_hyperparams(state, values))


def test_the_gradient_of_a_held_rate():
    """A hyperparameter's gradient: d/dr of p - r g is -g."""
    tx = osc.scale_by_learning_rate(falling)

    def moved(rate):
        state = osc.set_hyperparams(tx.init(1.0), {"learning_rate": rate})
        return tx.update(jnp.float32(3.0), state)[0]

    assert float(jax.grad(moved)(0.2)) == -3.0
