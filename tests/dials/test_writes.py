"""Does what is written into a record, as Optax's users write, take effect?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import at
from dialed import GRADS, LABELS, PARAMS, RECIPES, falling, follow, rates, setting

import optax_superconv as osc

pytestmark = pytest.mark.slow

GRAD = at(GRADS, 0)


def put(name, value):
    """``optax.tree.set``."""
    return lambda state: optax.tree.set(state, **{name: value})


def write(value, part=-1, key="learning_rate"):
    """Into the dict of a state."""

    def written(state):
        record = getattr(state[part], "hyperparams", None) or state[part].dials
        record[key] = value
        return state

    return written


WRITES = {
    "tree.set": lambda value: put("learning_rate", value),
    "dict": write,
}
VALUES = {
    "float": 0.03,
    "numpy": np.float64(0.03),
    "array": jnp.float32(0.03),
    "int": 1,
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("how", WRITES.values(), ids=WRITES)
def test_a_write_is_held(how, value, jit):
    tx = osc.sgd(falling)
    update = None if jit else tx.update
    applied = rates(tx, 4, {1: how(value)}, update=update)
    np.testing.assert_array_equal(applied, np.float32([0.1, value, value, value]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_written_into(recipe):
    tx = RECIPES[recipe]()
    one, _, _ = follow(tx, 2, {1: put("learning_rate", 0.03)})
    other, _, _ = follow(tx, 2, {1: setting("learning_rate", 0.03)})
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", ["b1", "b2", "eps", "weight_decay"])
def test_every_dial_can_be_written(name):
    tx = osc.adamw(falling, weight_decay=falling)
    applied = rates(tx, 3, {1: put(name, 0.25)}, name)
    np.testing.assert_array_equal(applied[1:], np.float32(0.25))


def test_a_momentum_can_be_written():
    tx = osc.sgd(0.1, lambda t: 0.5 + 0.1 * t)
    applied = rates(tx, 3, {1: write(0.25, 0, "momentum")}, "momentum")
    np.testing.assert_array_equal(applied, np.float32([0.5, 0.25, 0.25]))


def test_a_written_base_is_multiplied_and_a_written_group_is_not():
    tx = osc.sgd(falling, multipliers={0: 0.5, 1: 1.0}, param_labels=LABELS)
    actions = {1: put("learning_rate", 0.4), 2: write(0.3, key="learning_rate/0")}
    _, read, _ = follow(tx, 4, actions)
    expected = np.float32([0.05, 0.2, 0.3, 0.3])
    np.testing.assert_allclose(read["learning_rate/0"], expected, rtol=1e-6)
    expected = np.float32([0.1, 0.4, 0.4, 0.4])
    np.testing.assert_allclose(read["learning_rate/1"], expected, rtol=1e-6)


def test_a_multiplier_can_be_written():
    tx = osc.scale_by_group({0: falling, 1: 1.0}, LABELS)
    written = {1: lambda state: state.dials.update({"multiplier/0": 0.7}) or state}
    applied = rates(tx, 3, written, "multiplier/0")
    np.testing.assert_array_equal(applied, np.float32([0.1, 0.7, 0.7]))


def test_what_was_written_is_read_before_the_update():
    tx = osc.sgd(falling)
    state = put("learning_rate", 0.03)(tx.init(PARAMS))
    assert osc.read_hyperparams(state)["learning_rate"] == np.float32(0.03)


@pytest.mark.parametrize("how", WRITES.values(), ids=WRITES)
def test_none_releases_what_was_written(how):
    tx = osc.sgd(falling)
    actions = {1: how(0.03), 3: setting("learning_rate", None)}
    applied = rates(tx, 5, actions)
    expected = np.float32([0.1, 0.03, 0.03, falling(3), falling(4)])
    np.testing.assert_allclose(applied, expected, rtol=1e-6)


def test_none_before_the_update_takes_a_write_back():
    tx = osc.sgd(falling)

    def both(state):
        return setting("learning_rate", None)(put("learning_rate", 0.03)(state))

    np.testing.assert_allclose(
        rates(tx, 3, {1: both}), np.float32([falling(t) for t in range(3)]), rtol=1e-6
    )


@pytest.mark.parametrize("jit", [False, True])
def test_of_a_write_and_a_set_the_later_counts(jit):
    tx = osc.sgd(falling)
    update = jax.jit(tx.update) if jit else tx.update
    first, then = put("learning_rate", 0.03), setting("learning_rate", 0.07)
    for actions, expected in (((first, then), 0.07), ((then, first), 0.03)):
        both = functools.reduce(lambda f, g: lambda s: g(f(s)), actions)
        applied = rates(tx, 3, {1: both}, update=update)
        np.testing.assert_array_equal(applied[1:], np.float32(expected))


def test_the_value_just_applied_cannot_be_seen():
    tx = osc.sgd(falling)
    same = {2: lambda s: put("learning_rate", s[-1].hyperparams["learning_rate"])(s)}
    expected = np.float32([falling(t) for t in range(4)])
    np.testing.assert_allclose(rates(tx, 4, same), expected, rtol=1e-6)


def test_the_value_just_applied_can_be_set():
    tx = osc.sgd(falling)
    same = {2: lambda s: setting("learning_rate", falling(1))(s)}
    expected = np.float32([falling(t) for t in (0, 1, 1, 1)])
    np.testing.assert_allclose(rates(tx, 4, same), expected, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.0])
def test_a_schedule_does_not_hold_itself(bad, jit):
    """A NaN equals nothing, not even what was written."""
    tx = osc.scale_by_learning_rate(lambda t: jnp.where(t == 1, bad, falling(t)))
    update = jax.jit(tx.update) if jit else tx.update
    applied = rates(tx, 4, update=update)
    expected = np.float32([falling(0), bad, falling(2), falling(3)])
    np.testing.assert_allclose(applied, expected, rtol=1e-6)


def test_a_schedule_of_nan_does_not_hold_other_dials():
    tx = osc.adamw(0.1, b1=lambda t: jnp.where(t == 1, jnp.nan, 0.9 - 0.01 * t))
    applied = rates(tx, 3, name="b1")
    np.testing.assert_allclose(applied, [0.9, np.nan, 0.88], rtol=1e-6)


def test_nan_can_be_written_and_taken_back():
    tx = osc.scale_by_learning_rate(falling)
    actions = {1: put("learning_rate", np.nan), 2: put("learning_rate", 0.5)}
    np.testing.assert_array_equal(
        rates(tx, 4, actions), np.float32([0.1, np.nan, 0.5, 0.5])
    )


@pytest.mark.parametrize("jit", [False, True])
def test_a_constant_that_is_written_back_is_released(jit):
    """So that it cools down again."""
    tx = osc.scale_by_learning_rate(0.1, cooldown_shape="linear")
    update = jax.jit(tx.update) if jit else tx.update
    actions = {
        0: lambda state: osc.start_cooldown(state, 10),
        2: put("learning_rate", 0.7),
        4: put("learning_rate", 0.1),
    }
    expected = [0.1, 0.09, 0.7, 0.7, 0.06, 0.05]
    np.testing.assert_allclose(
        rates(tx, 6, actions, update=update), np.float32(expected), rtol=1e-6
    )


def test_a_number_that_is_set_to_itself_is_held():
    """Unlike a write: what is set explicitly outranks a cooldown."""
    tx = osc.scale_by_learning_rate(0.1, cooldown_shape="linear")
    actions = {
        0: lambda state: osc.start_cooldown(state, 10),
        2: setting("learning_rate", 0.1),
    }
    expected = np.float32([0.1, 0.09, 0.1, 0.1])
    np.testing.assert_allclose(rates(tx, 4, actions), expected, rtol=1e-6)


def test_a_write_inside_jit():
    tx = osc.sgd(falling)

    @jax.jit
    def step(state, rate):
        state = optax.tree.set(state, learning_rate=rate)
        return tx.update(GRAD, state, PARAMS)[1]

    state = tx.init(PARAMS)
    for rate in (0.3, 0.2):
        state = step(state, rate)
        assert osc.read_hyperparams(state)["learning_rate"] == np.float32(rate)


def test_a_write_survives_a_donating_loop():
    tx = osc.sgd(falling)
    update = jax.jit(tx.update, donate_argnums=1)
    applied = rates(tx, 4, {1: put("learning_rate", 0.03)}, update=update)
    np.testing.assert_array_equal(applied[1:], np.float32(0.03))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.masked(tx, {"body": True, "head": False}),
        lambda tx: optax.partition({"all": tx}, lambda _: "all"),
        lambda tx: optax.named_chain(("tx", tx)),
    ],
    ids=["MultiSteps", "apply_if_finite", "masked", "partition", "named_chain"],
)
def test_a_write_takes_effect_at_any_nesting(wrap):
    tx = wrap(osc.sgd(falling))
    _, read, _ = follow(tx, 3, {1: put("learning_rate", 0.03)})
    (applied,) = (v for k, v in read.items() if k.startswith("learning_rate"))
    np.testing.assert_array_equal(applied[1:], np.float32(0.03))


def test_in_a_frozen_group_a_write_acts_from_the_thaw_on():
    tx = osc.gradual_unfreezing(osc.sgd(falling), {0: 2, 1: 0}, LABELS)

    def written(state):
        inner = state.inner_state.inner_states[0].inner_state
        inner[-1].hyperparams["learning_rate"] = jnp.float32(0.03)
        return state

    applied = rates(tx, 4, {0: written}, "learning_rate/0")
    np.testing.assert_array_equal(applied[2:], np.float32(0.03))


def test_a_constant_becomes_a_schedule_at_the_next_checkpoint():
    """A state that nobody has set follows whatever optimizer it is loaded into."""
    constant, scheduled = osc.sgd(0.1), osc.sgd(falling)
    *_, state = follow(constant, 2)
    applied = rates(scheduled, 2, state=state)
    np.testing.assert_allclose(applied, [falling(2), falling(3)], rtol=1e-6)


def test_a_hold_survives_the_next_checkpoint():
    constant, scheduled = osc.sgd(0.1), osc.sgd(falling)
    *_, state = follow(constant, 2, {1: setting("learning_rate", 0.7)})
    np.testing.assert_array_equal(rates(scheduled, 2, state=state), np.float32(0.7))
