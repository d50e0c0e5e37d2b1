"""Are dials set where Flax keeps optimizers, in place where it writes in place?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dialed import PARAMS, TOTAL, falling
from flax import nnx
from flax.training.train_state import TrainState

import optax_superconv as osc


def make_optimizer(tx=None):
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx or osc.adamw(falling), wrt=nnx.Param)


def grads_of(model):
    return jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))


def applied(model, optimizer, name="learning_rate"):
    optimizer.update(model, grads_of(model))
    return float(osc.read_hyperparams(optimizer)[name])


ROOTS = {
    "optimizer": lambda model, optimizer: optimizer,
    "opt_state": lambda model, optimizer: optimizer.opt_state,
    "pair": lambda model, optimizer: (model, optimizer),
    "dict": lambda model, optimizer: {"a": model, "b": [optimizer]},
}


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_set_in_place_with_the_result_dropped(root):
    model, optimizer = make_optimizer()
    osc.set_hyperparams(root(model, optimizer), {"learning_rate": 0.3, "b1": 0.5})
    assert applied(model, optimizer) == np.float32(0.3)
    assert applied(model, optimizer, "b1") == 0.5
    osc.set_hyperparams(root(model, optimizer), {"learning_rate": None})
    np.testing.assert_allclose(applied(model, optimizer), falling(2), rtol=1e-6)


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_cooled_down_in_place_with_the_result_dropped(root):
    tx = osc.scale_by_learning_rate(0.1, cooldown_shape="linear")
    model, optimizer = make_optimizer(tx)
    osc.start_cooldown(root(model, optimizer), 2)
    rates = [applied(model, optimizer) for _ in range(3)]
    np.testing.assert_allclose(rates, [0.1, 0.05, 0.0], rtol=1e-6)


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_restarted_in_place_with_the_result_dropped(root):
    model, optimizer = make_optimizer()
    first = [applied(model, optimizer) for _ in range(3)]
    osc.restart_schedules(root(model, optimizer))
    assert [applied(model, optimizer) for _ in range(3)] == first


def test_the_result_is_the_optimizer():
    _, optimizer = make_optimizer()
    assert osc.set_hyperparams(optimizer, {"learning_rate": 0.3}) is optimizer
    assert osc.start_cooldown(optimizer, 3) is optimizer
    assert osc.restart_schedules(optimizer) is optimizer


def test_optaxs_own_state_of_an_nnx_optimizer_is_set_too():
    tx = optax.inject_hyperparams(optax.adamw)(0.1)
    model, optimizer = make_optimizer(tx)
    osc.set_hyperparams(optimizer, {"learning_rate": 0.3})
    assert applied(model, optimizer) == np.float32(0.3)


def test_schedules_of_optax_restart_in_place():
    model, optimizer = make_optimizer(optax.sgd(falling))
    bias = model.bias[...]
    optimizer.update(model, grads_of(model))
    first = model.bias[...] - bias
    osc.restart_schedules(optimizer)
    bias = model.bias[...]
    optimizer.update(model, grads_of(model))
    np.testing.assert_allclose(model.bias[...] - bias, first, rtol=1e-6)


@pytest.mark.parametrize("name", ["optimizer", "pair", "dict"])
def test_inside_nnx_jit_it_is_set_in_place_in_one_trace(name):
    model, optimizer = make_optimizer()
    traces = []

    @nnx.jit
    def step(model, optimizer, rate, length):
        traces.append(None)
        root = ROOTS[name](model, optimizer)
        osc.set_hyperparams(root, {"learning_rate": rate})
        osc.start_cooldown(root, length)
        optimizer.update(model, grads_of(model))

    for rate in (0.3, 0.2, 0.1):
        step(model, optimizer, jnp.float32(rate), jnp.int32(0))
        read = osc.read_hyperparams(optimizer)["learning_rate"]
        assert read == np.float32(rate)
    assert len(traces) == 1


def test_between_steps_of_nnx_jit_nothing_is_traced_again():
    model, optimizer = make_optimizer()
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(None)
        optimizer.update(model, grads_of(model))

    step(model, optimizer)
    for act in (
        lambda: osc.set_hyperparams(optimizer, {"learning_rate": 0.3}),
        lambda: osc.set_hyperparams(optimizer, {"learning_rate": None}),
        lambda: osc.start_cooldown(optimizer, 3),
        lambda: osc.restart_schedules(optimizer),
    ):
        act()
        step(model, optimizer)
    assert len(traces) == 1


def test_a_write_into_the_dict_of_an_nnx_optimizer_takes_effect():
    model, optimizer = make_optimizer()
    optimizer.update(model, grads_of(model))
    optimizer.opt_state[-1].hyperparams["learning_rate"][...] = jnp.float32(0.3)
    assert applied(model, optimizer) == np.float32(0.3)


def test_a_bad_value_leaves_an_nnx_optimizer_alone():
    model, optimizer = make_optimizer()
    with pytest.raises(ValueError, match="b1"):
        osc.set_hyperparams(optimizer, {"learning_rate": 0.3, "b1": 1.0})
    np.testing.assert_allclose(applied(model, optimizer), falling(0), rtol=1e-6)


def test_a_scheduled_name_leaves_an_nnx_optimizer_alone():
    tx = optax.inject_hyperparams(osc.adamw)(falling, weight_decay=0.02)
    optimizer = make_optimizer(tx)
    optimizer = optimizer[1] if isinstance(optimizer, tuple) else optimizer
    with pytest.raises(ValueError, match="does not overwrite"):
        osc.set_hyperparams(optimizer, {"weight_decay": 0.5, "learning_rate": 0.1})
    read = osc.read_hyperparams(optimizer)
    assert read["weight_decay"] == np.float32(0.02)


def test_a_variable_that_holds_a_whole_state():
    """As where a loop keeps it in a module of its own."""
    tx = osc.sgd(falling)
    holder = nnx.Variable(tx.init(PARAMS))
    assert osc.read_hyperparams(holder)["learning_rate"] == np.float32(0.1)
    osc.set_hyperparams(holder, {"learning_rate": 0.3})
    _, state = tx.update(PARAMS, holder.get_value(), PARAMS)
    assert osc.read_hyperparams(state)["learning_rate"] == np.float32(0.3)


def test_a_variable_that_holds_a_whole_state_cools_down_and_restarts():
    tx = osc.scale_by_learning_rate(0.1, cooldown_shape="linear")
    holder = nnx.Variable(tx.init(PARAMS))

    def rate():
        _, state = tx.update(PARAMS, holder.get_value(), PARAMS)
        holder.set_value(state)
        return float(osc.read_hyperparams(holder)["learning_rate"])

    osc.start_cooldown(holder, 2)
    np.testing.assert_allclose([rate() for _ in range(3)], [0.1, 0.05, 0], rtol=1e-6)
    osc.restart_schedules(holder)
    np.testing.assert_allclose([rate() for _ in range(3)], [0.1] * 3, rtol=1e-6)


# --- Linen ----------------------------------------------------------------------------


def train_state(tx=None):
    tx = tx or osc.onecycle_adamw(0.1, TOTAL)
    return TrainState.create(apply_fn=None, params=PARAMS, tx=tx)


@jax.jit
def trained(state):
    return state.apply_gradients(grads=state.params)


def test_a_train_state_is_set():
    old = train_state()
    state = osc.set_hyperparams(old, {"learning_rate": 0.3})
    assert isinstance(state, TrainState)
    assert osc.read_hyperparams(trained(state))["learning_rate"] == np.float32(0.3)
    untouched = osc.read_hyperparams(trained(old))["learning_rate"]
    np.testing.assert_allclose(untouched, 0.1 / 25, rtol=1e-6)


def test_a_train_state_cools_down():
    state = train_state(osc.sgd(0.1))
    state = osc.start_cooldown(state, 1)
    state = trained(trained(state))
    assert float(osc.read_hyperparams(state)["learning_rate"]) == 0.0


def test_a_train_state_restarts_and_keeps_its_step():
    state = trained(trained(train_state()))
    again = osc.restart_schedules(state)
    assert int(again.step) == 2
    read = osc.read_hyperparams(trained(again))["learning_rate"]
    np.testing.assert_allclose(read, 0.1 / 25, rtol=1e-6)


def test_a_pair_of_parameters_and_state_is_set():
    tx = osc.sgd(0.1)
    params, state = osc.set_hyperparams((PARAMS, tx.init(PARAMS)), {"momentum": 0.5})
    _, state = tx.update(params, state, params)
    assert float(osc.read_hyperparams(state)["momentum"]) == 0.5
