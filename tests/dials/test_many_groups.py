"""Dials by name where the names of a record do not sort like its groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_superconv as osc

NUMBERS = list(range(12))
KINDS = {
    "integers": NUMBERS,
    "digits": [str(k) for k in NUMBERS],
    "paths": [f"enc/{k}" for k in NUMBERS],
    "words": [f"{'ab' * (k % 3)}{k}" for k in NUMBERS],
}
PARAMS = [jnp.full(2, 1.0 + k) for k in NUMBERS]
LINKS = {
    "rate": lambda m, labels: osc.scale_by_learning_rate(
        1.0, multipliers=m, param_labels=labels, cooldown_shape="linear"
    ),
    "group": lambda m, labels: osc.scale_by_group(m, labels),
    "function": lambda m, labels: osc.scale_by_group(lambda _: m, labels),
}


def applied(tx, state):
    """What each group's update was multiplied by."""
    updates, state = tx.update(PARAMS, state, PARAMS)
    sizes = [abs(float((u / p)[0])) for u, p in zip(updates, PARAMS, strict=True)]
    return np.array(sizes), state


@pytest.mark.slow
@pytest.mark.parametrize("labels", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("link", LINKS)
def test_each_name_sets_its_own_group_and_no_other(link, labels):
    multipliers = {label: 1.0 + k for k, label in enumerate(labels)}
    tx = LINKS[link](multipliers, labels)
    kind = "learning_rate" if link == "rate" else "multiplier"
    expected = 1.0 + np.arange(12)
    for k, label in enumerate(labels):
        state = osc.set_hyperparams(tx.init(PARAMS), {f"{kind}/{label}": 50.0})
        sizes, state = applied(tx, state)
        np.testing.assert_allclose(sizes, np.where(np.arange(12) == k, 50, expected))
        read = osc.read_hyperparams(state)
        values = [read[f"{kind}/{label}"] for label in labels]
        np.testing.assert_allclose(values, sizes, rtol=1e-6)
        sizes, _ = applied(tx, osc.restart_schedules(state))
        np.testing.assert_allclose(sizes, expected, rtol=1e-6)


@pytest.mark.parametrize("labels", KINDS.values(), ids=KINDS)
def test_a_cooldown_keeps_the_proportions_of_all_groups(labels):
    multipliers = {label: 1.0 + k for k, label in enumerate(labels)}
    tx = LINKS["rate"](multipliers, labels)
    _, state = applied(tx, tx.init(PARAMS))
    held = osc.set_hyperparams(state, {f"learning_rate/{labels[7]}": 0.5})
    state = osc.start_cooldown(held, 4)
    start = np.where(np.arange(12) == 7, 0.5, 1.0 + np.arange(12))
    for part in (1.0, 0.75, 0.5, 0.25, 0.0):
        sizes, state = applied(tx, state)
        np.testing.assert_allclose(sizes, part * start, rtol=1e-6)


def test_a_parameter_may_have_the_name_of_a_record():
    params = {"facts": jnp.ones((2, 2)), "holds": jnp.ones(2), "count": jnp.ones(1)}
    state = osc.adamw(0.1).init({k: params[k] for k in ("facts", "holds")})
    assert osc.read_hyperparams(state)["learning_rate"] == np.float32(0.1)


def test_what_is_held_waits_with_the_cooldown_for_the_thaw():
    labels = {"body": "body", "head": "head"}
    params = jax.tree.map(lambda _: jnp.ones(2), labels)
    inner = osc.scale_by_learning_rate(0.1, cooldown_shape="linear")
    tx = osc.gradual_unfreezing(inner, {"body": 3, "head": 0}, labels)
    state = osc.set_hyperparams(tx.init(params), {"learning_rate/body": 0.5})
    state, rates = osc.start_cooldown(state, 2), []
    for _ in range(6):
        _, state = tx.update(params, state, params)
        rates.append(float(osc.read_hyperparams(state)["learning_rate/body"]))
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.5, 0.5, 0.25, 0.0], rtol=1e-6)


def test_python_numbers_in_a_state_are_numbers():
    state = optax.inject_hyperparams(optax.sgd)(0.1).init(PARAMS)
    state.hyperparams["learning_rate"] = 0.2
    state = osc.set_hyperparams(state, {"learning_rate": 0.3})
    assert state.hyperparams["learning_rate"] == np.float32(0.3)
    state = optax.tree.set(osc.sgd(0.1).init(PARAMS), count=7)
    assert int(osc.restart_schedules(state)[-1].count) == 0


def test_a_whole_number_is_not_cut_off():
    state = optax.inject_hyperparams(optax.sgd)(1).init(PARAMS)
    with pytest.raises(ValueError, match=r"must be a whole number.*got 0\.3"):
        osc.set_hyperparams(state, {"learning_rate": 0.3})


ARRAYS = {
    "learning_rate": lambda x: osc.sgd(x),
    "momentum": lambda x: osc.sgd(0.1, x),
    "b1": lambda x: osc.adamw(0.1, x),
    "eps": lambda x: osc.adamw(0.1, eps=x),
    "weight_decay": lambda x: osc.adamw(0.1, weight_decay=x),
    "cooldown_end": lambda x: osc.scale_by_learning_rate(0.1, cooldown_end=x),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("size", [1, 2])
def test_an_array_is_no_single_number(name, size):
    with pytest.raises(TypeError, match=f"`{name}` must be a single number"):
        ARRAYS[name](np.full(size, 0.1))


def test_a_schedule_gives_single_numbers():
    with pytest.raises(TypeError, match=r"single number at each step.*\(1,\)"):
        osc.sgd(lambda count: jnp.ones(1)).init(PARAMS)


def test_large_integers_are_numbers():
    state = osc.set_hyperparams(osc.sgd(0.1).init(PARAMS), {"learning_rate": 10**10})
    _, state = osc.sgd(0.1).update(PARAMS, state)
    assert osc.read_hyperparams(state)["learning_rate"] == np.float32(1e10)


@pytest.mark.parametrize("mask", [{"bodyy": True}, jax.tree_util.Partial(max, 1)])
def test_a_mask_of_another_structure_is_named(mask):
    params = {"body": jnp.ones(2)}
    tx = osc.add_decayed_weights(0.1, mask)
    with pytest.raises(ValueError, match="`mask` must be a tree of bools"):
        tx.update(params, tx.init(params), params)
