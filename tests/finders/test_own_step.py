"""The finders on a training step as it is: the rate is set in its state, and acts."""

import functools
import itertools
import re

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_superconv as osc
from optax_superconv.finders import _runs

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(7, 8, 4)))
Y = np.float32(np.tanh(X.sum(-1, keepdims=True)))
BATCHES = list(zip(X, Y, strict=True))
ENDS = {"min_learning_rate": 1e-4, "max_learning_rate": 1.0}
LADDER = np.geomspace(1e-4, 1.0, 20, dtype=np.float32)
SHORT = ENDS | {"num_steps": 20}


def leaves_of(tree):
    def data(leaf):
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.array(leaf)

    return [data(leaf) for leaf in jax.tree.leaves(tree)]


# --- plain pytrees --------------------------------------------------------------------


def make_params():
    rng = np.random.default_rng(1)
    shapes = {"in": (4, 6), "bias": (6,), "out": (6, 1)}
    return {k: jnp.asarray(0.5 * rng.normal(size=s), jnp.float32)
            for k, s in shapes.items()}  # fmt: skip


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["in"] + params["bias"])
    return jnp.mean((hidden @ params["out"] - y) ** 2)


def step_of(tx):
    """A step that has a whole optimizer in its state."""

    def step_fn(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step_fn


def passed_step_of(make_tx):
    """The same where hyperparameters are passed."""

    def step_fn(state, hyperparams, batch):
        if not isinstance(hyperparams, dict):
            hyperparams = {"learning_rate": hyperparams}
        return step_of(make_tx(**hyperparams))(state, batch)

    return step_fn


def start(tx, params=None):
    params = make_params() if params is None else params
    return params, tx.init(params)


def bare(tx, rates, state=None, batches=BATCHES):
    """The losses of a plain loop that sets each rate."""
    state, losses = state or start(tx), []
    step_fn = jax.jit(step_of(tx))
    for rate, batch in zip(rates, itertools.cycle(batches)):
        params, opt_state = state
        opt_state = osc.set_hyperparams(opt_state, {"learning_rate": rate})
        state, loss = step_fn((params, opt_state), batch)
        losses.append(float(loss))
    return losses


inject = functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
OWN = {
    "constant": osc.adamw(3e-3),
    "schedule": osc.onecycle_adamw(0.1, 30),
    "sgd of groups": osc.sgd(
        0.1, multipliers={0: 0.5, 1: 2.0}, param_labels={"in": 0, "bias": 0, "out": 1}
    ),
    "inject_hyperparams": inject(optax.adamw)(1e-3),
    "inject_hyperparams around ours": inject(osc.adamw)(1e-3),
    "inject_hyperparams around a cycle": inject(
        osc.onecycle_adamw, static_args=("total_steps",)
    )(0.1, total_steps=30),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), osc.adamw(1e-3)),
    "cooling down": osc.sgd(0.1),
    "unfreezing": osc.fine_tune_adamw(
        0.1, 30, {"in": 0, "bias": 0, "out": 1}, decay=0.5, freeze_steps=5
    ),
    "average": optax.chain(osc.sgd(0.1), osc.ema_params(0.9)),
    "if finite": optax.apply_if_finite(osc.adamw(1e-3), 5),
}


FAST = ("schedule", "sgd of groups", "inject_hyperparams", "cooling down", "unfreezing")


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in OWN
    ],
)
def test_the_rate_of_the_ladder_is_what_trains(name):
    tx = OWN[name]
    state = start(tx)
    if name == "cooling down":
        state = state[0], osc.start_cooldown(state[1], 5)
    before = leaves_of(state)
    result = osc.range_test(jax.jit(step_of(tx)), state, BATCHES, **SHORT)
    chex.assert_trees_all_equal(leaves_of(state), before)
    np.testing.assert_allclose(result.losses, bare(tx, LADDER, state), rtol=1e-6)
    np.testing.assert_array_equal(result.learning_rates, LADDER)


def test_a_schedule_inside_has_no_say():
    momentum = osc.onecycle_momentum_schedule(1000)
    ours, plain = (
        osc.range_test(jax.jit(step_of(tx)), start(tx), BATCHES, **SHORT).losses
        for tx in (osc.onecycle_adamw(0.1, 1000), osc.adamw(0.3, momentum))
    )
    np.testing.assert_allclose(ours, plain, rtol=1e-6)


def test_a_step_is_traced_once_and_may_donate():
    traces = itertools.count()
    tx = osc.onecycle_adamw(0.1, 30)

    @functools.partial(jax.jit, donate_argnums=0)
    def step_fn(state, batch):
        next(traces)
        return step_of(tx)(state, batch)

    state = start(tx)
    osc.range_test(step_fn, state, BATCHES, **SHORT)
    osc.grid_test(step_fn, state, BATCHES, {"weight_decay": [0.0, 0.1]}, **SHORT)
    osc.convergence_threshold(step_fn, state, BATCHES, num_steps=40)
    assert next(traces) == 1
    assert np.isfinite(leaves_of(state)[0]).all()


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize(
    "mode", ["range", pytest.param("constant", marks=pytest.mark.slow)]
)
def test_a_grid_sets_every_dial(vectorize, mode):
    grid = {"weight_decay": [0.0, 0.3], "b1": [0.5, 0.95]}
    options = dict(SHORT) if mode == "range" else {"num_steps": 20}
    if mode == "constant":
        grid |= {"learning_rate": [0.01, 0.1]}
    tx = osc.onecycle_adamw(0.1, 30)
    options |= {"mode": mode, "vectorize": vectorize}
    own = osc.grid_test(jax.jit(step_of(tx)), start(tx), BATCHES, grid, **options)
    make_tx = lambda learning_rate, weight_decay, b1: osc.adamw(  # noqa: E731
        learning_rate, b1, weight_decay=weight_decay
    )
    passed = osc.grid_test(
        jax.jit(passed_step_of(make_tx)),
        start(osc.adamw(0.1)),
        BATCHES,
        grid,
        pass_hyperparams=True,
        **options,
    )
    np.testing.assert_allclose(own.losses, passed.losses, rtol=2e-5)
    assert own.best == passed.best


def test_a_threshold_is_that_of_the_rate_alone():
    tx = osc.sgd(osc.onecycle_schedule(0.1, 1000), 0.5)
    own = osc.convergence_threshold(
        jax.jit(step_of(tx)), start(tx), BATCHES, num_steps=60
    )
    make_tx = lambda learning_rate: osc.sgd(learning_rate, 0.5)  # noqa: E731
    passed = osc.convergence_threshold(
        jax.jit(passed_step_of(make_tx)),
        start(osc.sgd(0.1)),
        BATCHES,
        num_steps=60,
        pass_hyperparams=True,
    )
    assert own.threshold == pytest.approx(passed.threshold, rel=1e-5)


# --- frameworks -----------------------------------------------------------------------


class _Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(6, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


@nnx.jit
def train_step(model, optimizer, batch):
    x, y = batch
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def nnx_state(tx):
    model = _Net(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def nnx_step(state, batch):
    return state, train_step(*state, batch)


def test_an_nnx_loop_with_batch_norm_and_dropout():
    state = nnx_state(osc.onecycle_adamw(0.1, 1000))
    before = leaves_of(nnx.state(state))
    result = osc.range_test(nnx_step, state, BATCHES, **SHORT)
    chex.assert_trees_all_equal(leaves_of(nnx.state(state)), before)
    plain = nnx_state(osc.adamw(0.1, osc.onecycle_momentum_schedule(1000)))
    losses = []
    for rate, batch in zip(LADDER, itertools.cycle(BATCHES)):
        osc.set_hyperparams(plain[1], {"learning_rate": rate})
        losses.append(float(train_step(*plain, batch)))
    np.testing.assert_allclose(result.losses, losses, rtol=1e-6)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("finder", ["range", "grid", "threshold"])
def test_the_state_survives_a_step_that_raises(finder, error):
    calls = itertools.count()

    def step_fn(state, batch):
        loss = train_step(*state, batch)
        if next(calls) == 9:
            raise error
        return state, loss

    state = nnx_state(osc.onecycle_adamw(0.1, 1000))
    before = leaves_of(nnx.state(state))
    find = {
        "range": lambda: osc.range_test(step_fn, state, BATCHES),
        "grid": lambda: osc.grid_test(step_fn, state, BATCHES, {"b1": [0.5, 0.9]}),
        "threshold": lambda: osc.convergence_threshold(
            step_fn, state, BATCHES, num_steps=20
        ),
    }
    with pytest.raises(error):
        find[finder]()
    chex.assert_trees_all_equal(leaves_of(nnx.state(state)), before)


class _Opaque(nnx.Module, pytree=False):
    def __init__(self, rngs):
        self.inner = _Net(rngs)

    def __call__(self, x):
        return self.inner(x)


def opaque_state(tx):
    model = _Opaque(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def test_nnx_objects_that_are_no_pytrees_are_copied_too():
    def state_of(kind):
        model = kind(nnx.Rngs(0))
        return model, nnx.Optimizer(model, osc.adamw(0.1), wrt=nnx.Param)

    grid = {"weight_decay": [0.0, 0.5]}
    state = state_of(_Opaque)
    before = leaves_of(nnx.state(state))
    opaque = osc.grid_test(nnx_step, state, BATCHES, grid, **SHORT)
    chex.assert_trees_all_equal(leaves_of(nnx.state(state)), before)
    plain = osc.grid_test(nnx_step, state_of(_Net), BATCHES, grid, **SHORT)
    np.testing.assert_allclose(opaque.losses, plain.losses, rtol=1e-6)


class _Holder(nnx.Module):
    """Keeps a whole state in one Variable."""

    def __init__(self, state):
        self.state = nnx.Variable(state)


def test_a_variable_may_hold_a_whole_state():
    tx = osc.onecycle_adamw(0.1, 30)
    step = jax.jit(step_of(tx))

    def step_fn(holder, batch):
        state, loss = step(holder.state.get_value(), batch)
        holder.state.set_value(state)
        return holder, loss

    result = osc.range_test(step_fn, _Holder(start(tx)), BATCHES, **SHORT)
    np.testing.assert_allclose(result.losses, bare(tx, LADDER), rtol=1e-6)


class _LinenNet(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6, param_dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.2, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(1, param_dtype=self.dtype)(x)


class _TrainState(train_state.TrainState):
    batch_stats: dict
    key: jax.Array


@jax.jit
def linen_step(state, batch):
    x, y = batch

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        rngs = {"dropout": jax.random.fold_in(state.key, state.step)}
        out, new = state.apply_fn(
            variables, x, train=True, rngs=rngs, mutable=["batch_stats"]
        )
        return jnp.mean((out - y) ** 2), new["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), loss


def linen_state(tx, dtype=jnp.float32):
    model = _LinenNet(dtype)
    variables = model.init(jax.random.key(0), X[0], train=False)
    return _TrainState.create(
        apply_fn=model.apply, tx=tx, key=jax.random.key(1), **variables
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)]
)
def test_a_linen_train_state_with_clipping_and_micro_steps(dtype):
    clipped = optax.chain(optax.clip_by_global_norm(1.0), osc.onecycle_adamw(0.1, 99))
    tx = optax.MultiSteps(clipped, 2).gradient_transformation()
    state = linen_state(tx, dtype)
    before = leaves_of(state)
    result = osc.range_test(linen_step, state, BATCHES, accumulation_steps=2, **SHORT)
    chex.assert_trees_all_equal(leaves_of(state), before)
    losses, batches = [], itertools.cycle(BATCHES)
    for rate in LADDER:
        opt_state = osc.set_hyperparams(state.opt_state, {"learning_rate": rate})
        state, two = state.replace(opt_state=opt_state), []
        for _ in range(2):
            state, loss = linen_step(state, next(batches))
            two.append(float(loss))
        losses.append(np.mean(two))
    np.testing.assert_allclose(result.losses, losses, rtol=1e-6)


def test_an_equinox_loop():
    tx = osc.adamw(0.1)

    @eqx.filter_jit
    def step_fn(state, batch):
        model, opt_state = state
        x, y = batch
        loss, grads = eqx.filter_value_and_grad(
            lambda model: jnp.mean((jax.vmap(model)(x) - y) ** 2)
        )(model)
        updates, opt_state = tx.update(
            grads, opt_state, eqx.filter(model, eqx.is_array)
        )
        return (eqx.apply_updates(model, updates), opt_state), loss

    model = eqx.nn.MLP(4, 1, 6, 1, key=jax.random.key(0))
    state = model, tx.init(eqx.filter(model, eqx.is_array))
    result = osc.range_test(step_fn, state, BATCHES, **SHORT)
    losses = []
    for rate, batch in zip(LADDER, itertools.cycle(BATCHES)):
        state = state[0], osc.set_hyperparams(state[1], {"learning_rate": rate})
        state, loss = step_fn(state, batch)
        losses.append(float(loss))
    np.testing.assert_allclose(result.losses, losses, rtol=1e-6)


def test_a_step_under_shard_map_on_eight_devices():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    tx = osc.onecycle_adamw(0.1, 30)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=(PartitionSpec(), PartitionSpec()),
    )
    def step_fn(state, batch):
        params, opt_state = state
        value = lambda p: jax.lax.pmean(loss_fn(p, batch), "data")  # noqa: E731
        loss, grads = jax.value_and_grad(value)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    state = jax.device_put(start(tx), NamedSharding(mesh, PartitionSpec()))
    step_fn(state, BATCHES[0])
    result = osc.range_test(step_fn, state, BATCHES, **SHORT)
    alone = osc.range_test(jax.jit(step_of(tx)), start(tx), BATCHES, **SHORT)
    np.testing.assert_allclose(result.losses, alone.losses, rtol=1e-4)
    assert step_fn._cache_size() == 1


def test_a_step_on_several_cpu_devices_is_waited_for():
    mesh = jax.make_mesh((8,), ("data",))
    slow = jax.jit(lambda x: jnp.linalg.matrix_power(x, 40).sum())
    where = NamedSharding(mesh, PartitionSpec())
    loss = slow(jax.device_put(jnp.eye(200), where))
    _runs.settle(loss)
    assert loss.is_ready()


# --- a rate that does not act ---------------------------------------------------------


def find(tx, **options):
    return osc.range_test(jax.jit(step_of(tx)), start(tx), BATCHES, **SHORT | options)


def find_passed(make_tx, **options):
    return osc.range_test(
        jax.jit(passed_step_of(make_tx)),
        start(make_tx(1.0)),
        BATCHES,
        pass_hyperparams=True,
        **SHORT | options,
    )


def other_optimizer(state, batch):
    """Updates with an optimizer that is not in its state."""
    params, opt_state = state
    (params, _), loss = step_of(optax.sgd(0.1))(
        (params, optax.sgd(0.1).init(params)), batch
    )
    return (params, opt_state), loss


def resetting(state, batch):
    params, opt_state = state
    opt_state = osc.set_hyperparams(opt_state, {"learning_rate": 0.01})
    return step_of(osc.sgd(0.1))((params, opt_state), batch)


class _Loop:
    """Has its model outside of the state that it is given."""

    def __init__(self):
        self.state = nnx_state(osc.adamw(0.1))

    def step(self, state, batch):
        return state, train_step(*self.state, batch)


def forgetful(state, batch):
    """Has a leaf that is no number, and never changes."""
    return state, loss_fn(state[0], batch)


MICRO = optax.MultiSteps(osc.sgd(0.1), 2).gradient_transformation()
LABELS = {"in": "a", "bias": "a", "out": "b"}
IDLE = {
    "no dial": (
        lambda: find(optax.adamw(1e-3)),
        "hold a dial 'learning_rate'.*osc.adamw",
    ),
    "a schedule of inject_hyperparams": (
        lambda: find(inject(optax.adamw)(optax.cosine_decay_schedule(1.0, 9))),
        "inject_hyperparams.*overwrites it",
    ),
    "two optimizers": (
        lambda: find(optax.chain(osc.sgd(0.1), osc.sgd(0.1))),
        "one dial 'learning_rate'.*pass_hyperparams",
    ),
    "an optimizer per label": (
        lambda: find(optax.partition({"a": osc.sgd(0.1), "b": osc.sgd(0.1)}, LABELS)),
        "learning_rate/a.*pass_hyperparams",
    ),
    "bfloat16": (
        lambda: find(
            optax.inject_hyperparams(optax.adamw, hyperparam_dtype=jnp.bfloat16)(1e-3)
        ),
        "in float32, got bfloat16.*hyperparam_dtype",
    ),
    "another optimizer": (
        lambda: osc.range_test(other_optimizer, start(osc.sgd(0.1)), BATCHES, **SHORT),
        "apply the learning_rate|react to the learning rate",
    ),
    "another optimizer, injected": (
        lambda: osc.range_test(
            other_optimizer, start(inject(optax.sgd)(0.1)), BATCHES, **SHORT
        ),
        "react to the learning rate in its state",
    ),
    "set by the step": (
        lambda: osc.range_test(resetting, start(osc.sgd(0.1)), BATCHES, **SHORT),
        "apply the learning_rate",
    ),
    "a model that is not in the state": (
        lambda: osc.range_test(_Loop().step, _Loop().state, BATCHES, **SHORT),
        "react to|apply the learning_rate",
    ),
    "micro-steps": (
        lambda: find(optax.MultiSteps(osc.sgd(0.1), 3).gradient_transformation()),
        "`accumulation_steps` must be the number of micro-steps",
    ),
    "fewer micro-steps": (
        lambda: find(
            optax.MultiSteps(osc.sgd(0.1), 3).gradient_transformation(),
            accumulation_steps=2,
        ),
        "`accumulation_steps` must be the number of micro-steps",
    ),
    "more micro-steps": (
        lambda: find(
            optax.MultiSteps(osc.sgd(0.1), 2).gradient_transformation(),
            accumulation_steps=4,
        ),
        "`accumulation_steps` must be the number of micro-steps",
    ),
    "micro-steps that begin the next update": (
        lambda: find(
            optax.MultiSteps(osc.sgd(0.1), 2).gradient_transformation(),
            accumulation_steps=3,
        ),
        "`accumulation_steps` must be the number of micro-steps",
    ),
    "micro-steps together": (
        lambda: osc.grid_test(
            step_of(MICRO), start(MICRO), BATCHES, {"momentum": [0.1]}, vectorize=True
        ),
        "`accumulation_steps` must be the number of micro-steps",
    ),
    "passed, in bfloat16": (
        lambda: find_passed(
            lambda learning_rate: optax.inject_hyperparams(
                optax.adamw, hyperparam_dtype=jnp.bfloat16
            )(learning_rate)
        ),
        "in float32, got bfloat16.*hyperparam_dtype",
    ),
    "passed, with a schedule": (
        lambda: find_passed(
            lambda learning_rate: osc.onecycle_adamw(learning_rate, 1000)
        ),
        "apply the learning_rate.*schedule",
    ),
    "passed, with a schedule that begins at the peak": (
        lambda: find_passed(
            lambda learning_rate: osc.sgd(
                optax.cosine_decay_schedule(learning_rate, 99)
            )
        ),
        "apply the learning_rate.*schedule",
    ),
    "passed, but constant": (
        lambda: find_passed(lambda learning_rate: optax.adamw(1e-3)),
        "react to the learning rate that it is given",
    ),
    "passed, but constant, and recorded": (
        lambda: find_passed(lambda learning_rate: osc.adamw(1e-3)),
        "apply the learning_rate",
    ),
    "passed, micro-steps": (
        lambda: find_passed(
            lambda learning_rate: optax.MultiSteps(
                optax.sgd(learning_rate), 3
            ).gradient_transformation()
        ),
        "`accumulation_steps` must be the number of micro-steps",
    ),
    "grid of what is not held": (
        lambda: osc.grid_test(
            step_of(osc.sgd(0.1)), start(osc.sgd(0.1)), BATCHES, {"b1": [0.1, 0.9]}
        ),
        "hold a dial 'b1' to be set, got one that holds momentum, learning_rate",
    ),
    "grid that the step overwrites": (
        lambda: osc.grid_test(
            resetting,
            start(osc.sgd(0.1)),
            BATCHES,
            {"learning_rate": [0.1, 0.2]},
            mode="constant",
        ),
        "apply the learning_rate",
    ),
    "grid of which one value is overwritten": (
        lambda: osc.grid_test(
            resetting,
            start(osc.sgd(0.1)),
            BATCHES,
            {"learning_rate": [0.01, 0.2]},
            mode="constant",
            vectorize=True,
        ),
        "apply the learning_rate that it is given, here 0.2, got 0.01",
    ),
    "a module that is no pytree, with another optimizer": (
        lambda: osc.range_test(
            lambda state, batch: (state, jnp.mean(state[0](batch[0]))),
            opaque_state(inject(optax.sgd)(0.1)),
            BATCHES,
            **SHORT,
        ),
        "react to the learning rate in its state",
    ),
    "nothing but a NaN": (
        lambda: osc.range_test(
            forgetful,
            (
                make_params() | {"x": jnp.float32(np.nan)},
                inject(optax.sgd)(0.1).init(0.0),
            ),
            BATCHES,
            **SHORT,
        ),
        "react to the learning rate in its state",
    ),
    "grid together": (
        lambda: osc.grid_test(
            other_optimizer,
            start(inject(optax.sgd)(0.1)),
            BATCHES,
            {"learning_rate": [0.1, 0.2]},
            mode="constant",
            vectorize=True,
        ),
        "react to the learning rate in its state",
    ),
    "threshold with a schedule": (
        lambda: osc.convergence_threshold(
            jax.jit(
                passed_step_of(
                    lambda learning_rate: osc.onecycle_sgd(learning_rate, 1000)
                )
            ),
            start(osc.onecycle_sgd(0.1, 1000)),
            BATCHES,
            num_steps=10,
            pass_hyperparams=True,
        ),
        "apply the learning_rate.*schedule",
    ),
}


@pytest.mark.parametrize("name", IDLE)
def test_a_rate_that_does_not_act_is_an_error(name):
    call, message = IDLE[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


def test_a_schedule_that_the_state_does_not_record_is_told_by_nothing_else():
    """The limit of what can be known: so the passed form is not the first one."""
    found = find_passed(
        lambda learning_rate: optax.adamw(
            optax.cosine_decay_schedule(learning_rate, 99)
        )
    )
    assert len(found.losses) == 20


def test_one_of_two_rates_may_be_passed():
    def make_tx(learning_rate):
        return optax.chain(osc.sgd(-1.0), osc.sgd(learning_rate))

    assert len(find_passed(make_tx).losses) == 20


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_range_grid_may_diverge_as_a_whole(vectorize):
    """The steps that are on their way are past those that are told of."""

    def step_fn(state, batch):
        state, loss = step_of(tx)(state, batch[:2])
        return state, jnp.where(batch[2] > 12, jnp.nan, loss)

    tx = osc.sgd(0.1)
    found = osc.grid_test(
        jax.jit(step_fn),
        start(tx),
        [(*BATCHES[0], np.float32(k)) for k in range(20)],
        {"momentum": [0.5, 0.9]},
        vectorize=vectorize,
        **SHORT,
    )
    assert found.diverged.all()


def test_a_step_that_reacts_late_is_looked_at_again():
    """As one that accumulates gradients by itself."""

    def step_fn(state, batch):
        (params, opt_state), total, count = state
        total = jax.tree.map(jnp.add, total, jax.grad(loss_fn)(params, batch))
        due = count % 3 == 2
        updates, new = tx.update(total, opt_state, params)
        stepped = optax.apply_updates(params, updates), new
        pick = lambda a, b: jnp.where(due, a, b)  # noqa: E731
        kept = jax.tree.map(pick, stepped, (params, opt_state))
        total = jax.tree.map(lambda x: jnp.where(due, 0, x), total)
        return (kept, total, count + 1), loss_fn(params, batch)

    tx = inject(optax.sgd)(0.1)
    state = start(tx), jax.tree.map(jnp.zeros_like, make_params()), jnp.int32(0)
    found = osc.range_test(
        jax.jit(step_fn), state, BATCHES, accumulation_steps=3, **SHORT
    )
    assert found.losses[0] > found.losses.min()


@pytest.mark.parametrize(
    "step_fn",
    [lambda state, rate, batch: None, lambda model, optimizer, x, y: None],
)
def test_a_step_of_other_arguments_is_told_what_to_write(step_fn):
    with pytest.raises(
        TypeError, match=r"take \(state, batch\).*pass_hyperparams=True"
    ):
        osc.range_test(step_fn, start(osc.sgd(0.1)), BATCHES)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize(
    ("name", "value"), [("b2", 1.5), ("b1", 1.0), ("weight_decay", -0.1)]
)
def test_a_dial_out_of_range_is_named(name, value, vectorize):
    tx = osc.adamw(0.1)
    message = rf"^`grid\['{name}'\]` must be .*at least 0"
    with pytest.raises(ValueError, match=message):
        osc.grid_test(
            step_of(tx), start(tx), BATCHES, {name: [0.5, value]}, vectorize=vectorize
        )


def test_values_of_a_grid_that_change_nothing_are_warned_of():
    tx = optax.chain(osc.sgd(0.1, momentum=0.0), osc.scheduled_trace(0.0))
    tx = osc.sgd(0.1, weight_decay=lambda step: 0.0, mask=False)
    grid = {"weight_decay": [0.0, 0.1], "momentum": [0.5, 0.9]}
    with pytest.warns(UserWarning, match="'weight_decay' that all gave the same"):
        osc.grid_test(jax.jit(step_of(tx)), start(tx), BATCHES, grid, **SHORT)


# --- what is in a state ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "path"),
    [
        (np.random.default_rng(0), "[2]['x']"),
        (bytearray(b"x"), "[2]['x']"),
        (_Loop.__new__(_Loop), "[2]['x']"),
        (functools.partial(print, np.random.default_rng(0)), "[2]['x']"),
    ],
)
def test_what_may_change_is_refused_by_its_path(leaf, path):
    state = (*start(osc.sgd(0.1)), {"x": leaf})
    with pytest.raises(TypeError, match=re.escape(f"at state{path}")):
        osc.range_test(lambda s, b: (s, 1.0), state, BATCHES)


@pytest.mark.parametrize("leaf", ["text", loss_fn, _Opaque(nnx.Rngs(0))])
def test_what_is_no_array_is_refused_under_vmap(leaf):
    tx = osc.sgd(0.1)
    grid = {"momentum": [0.5, 0.9]}
    with pytest.raises(TypeError, match=r"vectorize=True.* at state\[2\]\['x'\]"):
        osc.grid_test(
            step_of(tx), (*start(tx), {"x": leaf}), BATCHES, grid, vectorize=True
        )


def test_what_cannot_change_passes():
    tx = osc.sgd(0.1)
    more = {
        "function": loss_fn, "jitted": linen_step, "type": int, "text": "x", "n": 3,
        "partial": functools.partial(loss_fn, batch=None), "module": _LinenNet(),
        "activation": jax.nn.relu, "dtype": np.dtype("float32"), "tx": tx,
    }  # fmt: skip

    def step_fn(state, batch):
        inner, loss = step(state[0], batch)
        return (inner, state[1]), loss

    step = jax.jit(step_of(tx))
    found = osc.range_test(step_fn, (start(tx), more), BATCHES, **SHORT)
    assert len(found.losses) == 20


# --- what batches are -----------------------------------------------------------------


class _Pair:
    def __init__(self, x, y):
        self.x, self.y = x, y


jax.tree_util.register_dataclass(_Pair, ["x", "y"], [])


@pytest.mark.parametrize(
    "batch",
    [
        {"x": X[0], "y": Y[0]},
        (X[0], Y[0]),
        [X[0], np.arange(8)],
        [X[0], {"y": Y[0]}],
        (X[0], {"y": Y[0]}),
        X[0],
        jnp.asarray(X[0]),
        _Pair(X[0], Y[0]),
        "text",
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_a_single_batch_is_an_error(batch):
    tx = osc.sgd(0.1)
    with pytest.raises(ValueError, match=r"`batches` must be several .*`\[batch\]`"):
        osc.range_test(step_of(tx), start(tx), batch)


class _Loader:
    def __iter__(self):
        return iter(BATCHES)


@pytest.mark.parametrize(
    ("batches", "stacked"),
    [
        (tuple(BATCHES), False),
        (_Loader(), False),
        (itertools.cycle(BATCHES), False),
        ((X, Y), True),
        ([X, Y], True),
    ],
    ids=["tuple", "loader", "iterator", "stacked tuple", "stacked list"],
)
def test_batches_come_in_many_forms(batches, stacked):
    tx = osc.sgd(0.1)
    step = jax.jit(lambda state, batch: step_of(tx)(state, tuple(batch)))
    found = osc.range_test(step, start(tx), batches, stacked=stacked, **SHORT)
    expected = osc.range_test(step, start(tx), BATCHES, **SHORT)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)


# --- accumulation ---------------------------------------------------------------------


def test_a_ladder_waits_for_the_optimizer():
    """Micro-steps of equal batches are a step."""
    plain = osc.onecycle_adamw(0.1, 30)
    micro = optax.MultiSteps(plain, 3).gradient_transformation()
    found = find(micro, accumulation_steps=3)
    thrice = osc.range_test(
        jax.jit(step_of(micro)),
        start(micro),
        [batch for batch in BATCHES for _ in range(3)],
        accumulation_steps=3,
        **SHORT,
    )
    once = osc.range_test(jax.jit(step_of(plain)), start(plain), BATCHES, **SHORT)
    np.testing.assert_allclose(thrice.losses, once.losses, rtol=1e-5)
    assert len(found.losses) == 20


@pytest.mark.slow
@pytest.mark.parametrize("vectorize", [False, True])
def test_a_grid_and_a_threshold_accumulate_too(vectorize):
    plain = osc.adamw(0.1)
    micro = optax.MultiSteps(plain, 2).gradient_transformation()
    twice = [batch for batch in BATCHES for _ in range(2)]
    grid = {"weight_decay": [0.0, 0.5]}
    ours, expected = (
        osc.grid_test(
            jax.jit(step_of(tx)),
            start(tx),
            batches,
            grid,
            vectorize=vectorize,
            **SHORT,
            **more,
        )
        for tx, batches, more in (
            (micro, twice, {"accumulation_steps": 2}),
            (plain, BATCHES, {}),
        )
    )
    np.testing.assert_allclose(ours.losses, expected.losses, rtol=1e-5)
    if not vectorize:
        ours, expected = (
            osc.convergence_threshold(
                jax.jit(step_of(tx)), start(tx), batches, num_steps=80, **more
            )
            for tx, batches, more in (
                (micro, twice, {"accumulation_steps": 2}),
                (plain, BATCHES, {}),
            )
        )
        assert ours.threshold == pytest.approx(expected.threshold, rel=1e-3)


def test_an_iterator_is_drawn_on_by_the_rung():
    iterator = itertools.cycle(BATCHES)
    counted = (next(iterator) for _ in range(59))
    tx = osc.sgd(0.1)
    with pytest.raises(ValueError, match=r"20 steps of .* \(3 for each\).* 59"):
        osc.range_test(step_of(tx), start(tx), counted, accumulation_steps=3, **SHORT)


# --- noise ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["knee", "halfway", "steepest", "minimum", "middle"])
@pytest.mark.parametrize("period", range(2, 11))
def test_few_batches_that_take_turns_are_flat(period, method):
    rates = np.geomspace(1e-6, 10, 100)
    rng = np.random.default_rng(period)
    for values in (
        rng.normal(size=period),
        np.eye(period)[0],
        rng.permutation(period),
    ):
        losses = 2.3 + 0.1 * np.resize(values, 100)
        result = osc.RangeTestResult(rates, losses, losses, False, optimizer="adamw")
        with pytest.raises(ValueError, match="is flat"):
            osc.suggest_learning_rate(result, method=method)


@pytest.mark.parametrize("method", ["knee", "halfway", "minimum", "middle"])
@pytest.mark.parametrize("seed", range(5))
def test_few_losses_that_stand_alone_are_flat(seed, method):
    """As rounding leaves them, or a bad batch in twenty."""
    rates, rng = np.geomspace(1e-6, 10, 100), np.random.default_rng(seed)
    for size in (0.7, 1.0, 3.0):
        losses = 2.3 + 0.1 * np.round(size * rng.normal(size=100))
        result = osc.RangeTestResult(rates, losses, losses, False, optimizer="adamw")
        with pytest.raises(ValueError, match="is flat"):
            osc.suggest_learning_rate(result, method=method)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.95])
def test_a_fall_without_noise_that_swings_back_is_no_noise(momentum):
    w, trace, losses = 0.0, 0.0, []
    rates = np.geomspace(1e-6, 10, 100)
    for rate in rates:  # A parabola.
        losses.append((w - 1) ** 2)
        trace = momentum * trace + 2 * (w - 1)
        w -= rate * trace
    result = osc.RangeTestResult(
        rates, np.array(losses), np.array(losses), True, optimizer="adamw"
    )
    for method in ("knee", "halfway", "steepest", "minimum", "middle"):
        assert 1e-4 < osc.suggest_learning_rate(result, method=method) < 1


def test_a_plateau_at_the_start_has_one_remedy():
    rates = np.geomspace(1e-6, 10, 100)
    results = []
    for seed in range(3):
        losses = 2.3 + 0.01 * np.random.default_rng(seed).normal(size=100)
        losses[80 + seed :] = np.geomspace(3, 1e4, 20 - seed)
        results.append(
            osc.RangeTestResult(rates, losses, losses, True, optimizer="adamw")
        )
    with pytest.raises(ValueError, match=r"plateau.*more `num_steps`") as caught:
        osc.suggest_learning_rate(results)
    assert "lower" not in str(caught.value)
    assert "higher" not in str(caught.value)
