"""Who decides where ``optax.inject_hyperparams`` is around our links?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import at
from dialed import GRADS, LABELS, PARAMS, TOTAL, falling, follow, setting

import optax_superconv as osc

MADE = {
    "sgd": lambda rate: optax.inject_hyperparams(osc.sgd)(learning_rate=rate),
    "adamw": lambda rate: optax.inject_hyperparams(osc.adamw)(learning_rate=rate),
    "link": lambda rate: optax.inject_hyperparams(osc.scale_by_learning_rate)(
        learning_rate=rate
    ),
}
made = pytest.mark.parametrize("make", MADE.values(), ids=MADE)
jitted = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


def outer(value, name="learning_rate"):
    def written(state):
        state.hyperparams[name] = jnp.asarray(value, state.hyperparams[name].dtype)
        return state

    return written


def applied(tx, steps, actions, jit, params=PARAMS):
    """The inner link's rate, which is the one applied."""
    update = jax.jit(tx.update) if jit else tx.update
    _, read, _ = follow(tx, steps, actions, params=params, update=update)
    return read["learning_rate_1"]


@jitted
@made
def test_the_outer_dict_rules(make, jit):
    actions = {1: outer(0.3), 3: outer(0.1)}
    values = applied(make(0.1), 5, actions, jit)
    np.testing.assert_array_equal(values, np.float32([0.1, 0.3, 0.3, 0.1, 0.1]))


@jitted
@made
def test_the_outer_dial_can_be_set(make, jit):
    actions = {1: setting("learning_rate", 0.3), 3: setting("learning_rate", 0.2)}
    values = applied(make(0.1), 5, actions, jit)
    np.testing.assert_array_equal(values, np.float32([0.1, 0.3, 0.3, 0.2, 0.2]))


@jitted
@made
def test_optax_sets_both_and_the_outer_dict_rules_on(make, jit):
    actions = {
        1: lambda state: optax.tree.set(state, learning_rate=0.3),
        3: outer(0.2),
    }
    values = applied(make(0.1), 5, actions, jit)
    np.testing.assert_array_equal(values, np.float32([0.1, 0.3, 0.3, 0.2, 0.2]))


@jitted
@made
def test_an_outer_schedule_overwrites_what_is_written(make, jit):
    values = applied(make(falling), 4, {1: outer(0.7)}, jit)
    np.testing.assert_allclose(values, [falling(t) for t in range(4)], rtol=1e-6)


@pytest.mark.parametrize("rate", [0.1, falling], ids=["constant", "schedule"])
def test_what_is_written_inside_is_not_looked_at_under_jit(rate):
    def written(state):
        state.inner_state.hyperparams["learning_rate"] = jnp.float32(0.7)
        return state

    values = applied(MADE["link"](rate), 3, {1: written}, jit=True)
    expected = [float(rate(t)) if callable(rate) else rate for t in range(3)]
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_the_outer_dict_rules_in_bfloat16_under_jit():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    actions = {
        1: lambda state: optax.tree.set(state, learning_rate=0.3),
        3: outer(0.2),
    }
    tx = optax.inject_hyperparams(osc.scale_by_learning_rate)(learning_rate=0.1)
    values = applied(tx, 5, actions, True, half)
    expected = jnp.bfloat16(jnp.array([0.1, 0.3, 0.3, 0.2, 0.2]))
    np.testing.assert_array_equal(values, expected.astype(jnp.float32))


@jitted
def test_another_number_is_not_held_by_the_change_of_one(jit):
    tx = optax.inject_hyperparams(osc.adamw)(learning_rate=0.1, b1=falling)
    update = jax.jit(tx.update) if jit else tx.update
    _, read, _ = follow(tx, 4, {1: outer(0.3), 2: outer(0.2, "b2")}, update=update)
    np.testing.assert_allclose(read["b1_1"], [falling(t) for t in range(4)], rtol=1e-6)
    np.testing.assert_array_equal(read["b2_1"], np.float32([0.99, 0.99, 0.2, 0.2]))


def test_names_are_numbered():
    state = MADE["adamw"](0.1).init(PARAMS)
    names = ["b1", "b2", "eps", "weight_decay", "learning_rate"]
    expected = [*names, *(f"{name}_1" for name in names), "cooldown"]
    assert set(osc.read_hyperparams(state)) == set(expected)


@jitted
def test_the_inner_dial_can_be_set_and_released(jit):
    actions = {1: setting("learning_rate_1", 0.3), 3: setting("learning_rate_1", None)}
    values = applied(MADE["sgd"](0.1), 5, actions, jit)
    np.testing.assert_array_equal(values, np.float32([0.1, 0.3, 0.3, 0.1, 0.1]))


@jitted
def test_it_can_cool_down(jit):
    tx = optax.inject_hyperparams(osc.scale_by_learning_rate, static_args="flip_sign")(
        learning_rate=0.1, cooldown_shape="linear"
    )
    values = applied(tx, 4, {1: lambda s: osc.start_cooldown(s, 2)}, jit)
    np.testing.assert_allclose(values, [0.1, 0.1, 0.05, 0.0], rtol=1e-6)


def test_a_constant_cannot_be_released():
    state = MADE["sgd"](0.1).init(PARAMS)
    with pytest.raises(ValueError, match=r"learning_rate.*None"):
        osc.set_hyperparams(state, {"learning_rate": None})


@pytest.mark.parametrize("value", [0.1, None])
def test_a_scheduled_one_cannot_be_set(value):
    state = MADE["sgd"](falling).init(PARAMS)
    with pytest.raises(ValueError, match=r"inject_hyperparams.*schedule"):
        osc.set_hyperparams(state, {"learning_rate": value})


@pytest.mark.parametrize(("name", "value"), [("b1", 1.0), ("weight_decay", -1.0)])
def test_ranges_are_checked(name, value):
    state = MADE["adamw"](0.1).init(PARAMS)
    with pytest.raises(ValueError, match=name):
        osc.set_hyperparams(state, {name: value})


def test_of_optax_alone_it_is_set():
    tx = optax.inject_hyperparams(optax.adamw)(0.1)
    _, read, _ = follow(tx, 3, {1: setting("learning_rate", 0.3)})
    np.testing.assert_array_equal(read["learning_rate"], np.float32([0.1, 0.3, 0.3]))


def test_the_older_state_is_set_too():
    old = optax.InjectHyperparamsState(
        jnp.zeros([], jnp.int32),
        {"learning_rate": jnp.float32(0.1)},
        optax.sgd(0.1).init(PARAMS),
    )
    new = osc.set_hyperparams(old, {"learning_rate": 0.3})
    assert isinstance(new, optax.InjectHyperparamsState)
    assert osc.read_hyperparams(new)["learning_rate"] == np.float32(0.3)


@pytest.mark.parametrize("static", [("total_steps",), "total_steps"])
def test_a_recipe_of_a_peak_is_set_by_its_peak(static):
    tx = optax.inject_hyperparams(osc.onecycle_sgd, static_args=static)(
        peak_learning_rate=1.0, total_steps=TOTAL
    )
    state = osc.set_hyperparams(tx.init(PARAMS), {"peak_learning_rate": 0.5})
    _, state = jax.jit(tx.update)(at(GRADS, 0), state, PARAMS)
    read = osc.read_hyperparams(state)["learning_rate"]
    np.testing.assert_allclose(read, 0.5 / 25, rtol=1e-6)


@jitted
def test_groups_follow_the_outer_dict(jit):
    tx = optax.inject_hyperparams(
        lambda learning_rate: osc.sgd(
            learning_rate, multipliers={0: 0.5, 1: 1.0}, param_labels=LABELS
        )
    )(learning_rate=0.1)
    update = jax.jit(tx.update) if jit else tx.update
    _, read, _ = follow(tx, 3, {1: outer(0.4)}, update=update)
    np.testing.assert_allclose(read["learning_rate/0"], [0.05, 0.2, 0.2], rtol=1e-6)


def test_inside_a_partition():
    tx = optax.partition({"all": MADE["sgd"](0.1)}, lambda _: "all")
    _, read, _ = follow(tx, 2, {1: setting("learning_rate/all", 0.3)})
    np.testing.assert_array_equal(read["learning_rate/all_1"], np.float32([0.1, 0.3]))
