"""Is a step that was compiled once compiled for good, whatever is set?"""

import functools
import logging

import jax
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
    Compiled,
    falling,
    kinds,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_superconv as osc

pytestmark = pytest.mark.slow

GRAD = at(GRADS, 0)
GROUPED = functools.partial(
    osc.onecycle_sgd, 0.1, TOTAL, multipliers=MULTIPLIERS, param_labels=LABELS
)
WRAPPED = {
    "bare": lambda tx: tx,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(
        tx, lambda tree: jax.tree.map(lambda _: True, tree)
    ),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(9.0)), ("tx", tx)),
    "partition": lambda tx: optax.partition({"all": tx}, lambda _: "all"),
    "unfreezing": lambda tx: osc.gradual_unfreezing(tx, {"all": 0}, lambda _: "all"),
    "deep": lambda tx: optax.MultiSteps(
        optax.apply_if_finite(
            optax.chain(optax.masked(tx, {"body": True, "head": True})), 3
        ),
        1,
    ),
}


def all_set(state, value=0.01):
    """Every dial of the state set to the same number."""
    read = osc.read_hyperparams(state)
    names = [k for k in read if not k.startswith(("cooldown", "frozen"))]
    return osc.set_hyperparams(state, dict.fromkeys(names, value))


def released(state):
    return all_set(state, None)


ACTIONS = {
    "set": all_set,
    "release": released,
    "array": lambda state: all_set(state, jnp.float32(0.25)),
    "numpy": lambda state: all_set(state, np.float64(0.25)),
    "cooldown": lambda state: osc.start_cooldown(state, 3),
    "again": lambda state: osc.start_cooldown(state, np.int64(7)),
    "restart": osc.restart_schedules,
}


def stepped(tx, **options):
    def step(params, state):
        updates, state = tx.update(GRAD, state, params)
        return optax.apply_updates(params, updates), state

    return Compiled(step, **options)


def fresh():
    return jax.tree.map(jnp.copy, PARAMS)


def check_one_trace(tx, params, state, actions=ACTIONS, warm=1, **options):
    """All actions, each followed by a step that is the program of the first."""
    step = stepped(tx, **options)
    for _ in range(warm):
        params, state = step(params, state)
    counts, like = step.counts, kinds(state)
    for act in actions.values():
        state = act(state)
        assert kinds(state) == like
        params, state = step(params, state)
        assert step.counts == counts
        assert kinds(state) == like
    return counts


@pytest.mark.parametrize("recipe", RECIPES | UNFREEZING)
def test_a_donating_step_is_traced_once(recipe):
    tx, params = (RECIPES | UNFREEZING)[recipe](), fresh()
    counts = check_one_trace(tx, params, tx.init(params), donate_argnums=(0, 1))
    assert counts == (1, 1)


@pytest.mark.parametrize("wrap", WRAPPED)
def test_wrapped_it_is_traced_once(wrap):
    tx = WRAPPED[wrap](GROUPED())
    # Optax's own wrappers make states of another weak type than they take.
    check_one_trace(tx, PARAMS, tx.init(PARAMS), warm=2)


@pytest.mark.parametrize("wrap", WRAPPED)
def test_wrapped_it_is_set(wrap):
    tx = WRAPPED[wrap](GROUPED())
    state = all_set(tx.init(PARAMS), 0.25)
    _, state = jax.jit(tx.update)(GRAD, state, PARAMS)
    read = osc.read_hyperparams(state)
    assert {float(v) for k, v in read.items() if "e" in k and k[0] in "lm"} == {0.25}


@pytest.mark.parametrize("name", ["set", "cooldown", "restart"])
def test_a_step_is_compiled_once(name, caplog):
    """As JAX itself logs it."""
    tx = GROUPED()
    step = jax.jit(lambda grads, state: tx.update(grads, state)[1])
    state = step(GRAD, tx.init(PARAMS))
    state = ACTIONS[name](state)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        step(GRAD, state)
    assert "ompil" not in caplog.text


def test_settings_inside_the_step_are_traced_once():
    tx = GROUPED()

    def step(state, rate, length):
        state = osc.set_hyperparams(state, {"learning_rate": rate, "momentum": rate})
        state = osc.start_cooldown(state, length)
        return tx.update(GRAD, state, PARAMS)[1]

    compiled, state = Compiled(step, donate_argnums=0), tx.init(PARAMS)
    for k in range(4):
        state = compiled(state, jnp.float32(0.1 * k), jnp.int32(k))
    assert compiled.counts == (1, 1)


@pytest.mark.parametrize("act", [*ACTIONS.values()], ids=[*ACTIONS])
def test_a_state_is_a_stable_carry(act):
    tx = GROUPED()

    def step(state, _):
        return act(tx.update(GRAD, state, PARAMS)[1]), None

    carry, _ = jax.lax.scan(step, tx.init(PARAMS), None, 3)
    assert jax.tree.structure(carry) == jax.tree.structure(tx.init(PARAMS))


# --- where arrays are -----------------------------------------------------------------


def on_mesh(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    kernels = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda p: jax.device_put(p, kernels if p.ndim > 1 else everywhere), PARAMS
    )


MESHED = {
    "groups": GROUPED,
    "fine_tune": RECIPES["fine_tune-freeze"],
    "MultiSteps": lambda: optax.MultiSteps(GROUPED(), 2),
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("make", MESHED.values(), ids=MESHED)
def test_on_a_mesh_it_is_traced_once(make, axis_type):
    params, tx = on_mesh(axis_type), make()

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step, state = Compiled(step), tx.init(params)
    for _ in range(3):  # From the first step on scalars are on all devices.
        params, state = step(params, state, params)
    counts, like = step.counts, kinds(state)
    for act in ACTIONS.values():
        state = act(state)
        assert kinds(state) == like
        params, state = step(params, state, params)
    assert step.counts == counts


def test_on_a_mesh_the_rate_is_that_of_one_device():
    params, tx = on_mesh(AxisType.Auto), GROUPED()
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params)
    updates, _ = update(params, all_set(state, 0.25), params)
    _, state = update(PARAMS, tx.init(PARAMS), PARAMS)
    expected, _ = update(PARAMS, all_set(state, 0.25), PARAMS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected
    )


@pytest.mark.parametrize("act", [*ACTIONS.values()], ids=[*ACTIONS])
def test_a_committed_state_stays_on_its_device(act):
    tx, device = GROUPED(), jax.devices()[3]
    state = jax.device_put(tx.init(PARAMS), device)
    assert kinds(act(state)) == kinds(state)


@pytest.mark.parametrize("act", [*ACTIONS.values()], ids=[*ACTIONS])
def test_a_state_in_host_memory_stays_there(act):
    tx, device = GROUPED(), jax.devices()[0]
    there = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    state = jax.device_put(tx.init(PARAMS), there)
    for new in (act(state), act(act(state))):
        assert {x.sharding.memory_kind for x in jax.tree.leaves(new)} == {"pinned_host"}
        osc.read_hyperparams(new)


def test_an_abstract_state_is_set_too():
    tx = GROUPED()
    state = jax.eval_shape(tx.init, PARAMS)
    for act in ACTIONS.values():
        new = jax.eval_shape(act, state)
        assert jax.tree.structure(new) == jax.tree.structure(state)


# --- dtypes ---------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_in_64_bits_it_is_traced_once():
    tx = optax.chain(GROUPED(), osc.scale_by_learning_rate(falling))
    params = jax.tree.map(lambda p: p.astype("float64"), PARAMS)
    check_one_trace(tx, params, tx.init(params), warm=2)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("recipe", RECIPES)
def test_with_strict_promotion(recipe):
    tx = RECIPES[recipe]()
    state = tx.init(PARAMS)
    for act in ACTIONS.values():
        state = jax.eval_shape(act, act(state))
        state = jax.eval_shape(tx.update, GRAD, state, PARAMS)[1]
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)


@pytest.mark.parametrize("recipe", RECIPES)
def test_records_of_bfloat16_parameters_are_float32(recipe):
    tx = RECIPES[recipe]()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = all_set(tx.init(half), 0.3)
    updates, state = tx.update(half, state, half)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert osc.read_hyperparams(state)["learning_rate"] == np.float32(0.3)
