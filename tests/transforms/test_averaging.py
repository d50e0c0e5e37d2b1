"""Is the average the one of the formula, and is it found and read back anywhere?"""

import functools
import pickle

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference
from common import assert_same_bits, at, scan
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import optax_superconv as osc

STEPS = 30
INT32_MAX = np.iinfo(np.int32).max
RNG = np.random.default_rng(0)
STEP = RNG.normal(size=(STEPS, 3)).astype(np.float32)
START = RNG.normal(size=3).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def program(tx, params, updates):

    def step(carry, u):
        params, state = carry
        u, state = tx.update(u, state, params)
        params = optax.apply_updates(params, u)
        return (params, state), (params, osc.eval_params(state, params))

    (_, state), histories = jax.lax.scan(step, (params, tx.init(params)), updates)
    return *histories, state


def run(tx, params=START, updates=STEP):
    """The parameters and the averages after each update, and the last state."""
    return jax.device_get(program(tx, params, updates))


# --- values --------------------------------------------------------------------------


def ema(decay):
    """Closed form, for a decay that depends on the number of the sample."""

    def mean(samples):
        return reference.average(samples, [1 - decay(n) for n in range(len(samples))])

    return mean


def literal(weight):
    def mean(samples):
        average = samples[0]
        for n, sample in enumerate(samples[1:], start=1):
            average = average + weight(n) * (sample - average)
        return average

    return mean


def polynomial(power):
    return lambda samples: reference.polynomial_decay_average(samples, power)


def last(window):
    return lambda samples: samples[-window:].mean(0)


AVERAGES = {
    # transformation, mean of the samples, first sample, every
    "ema": (osc.ema_params(0.9), ema(lambda n: 0.9), 0, 1),
    "ema-0": (osc.ema_params(0), lambda samples: samples[-1], 0, 1),
    "ema-long": (osc.ema_params(0.99999), ema(lambda n: 0.99999), 0, 1),
    "ema-late": (osc.ema_params(0.7, start_step=5, every=3), ema(lambda n: 0.7), 5, 3),
    "ema-moving": (
        osc.ema_params(lambda count: 0.5 + 0.4 * ((count % 3) / 3)),
        ema(lambda n: 0.5 + 0.4 * ((n % 3) / 3)),
        0,
        1,
    ),
    "ema-schedule-of-steps": (  # A schedule counts steps, not samples.
        osc.ema_params(lambda count: 1 - 1 / (count + 2), every=4),
        ema(lambda n: 1 - 1 / (4 * n + 2)),
        0,
        4,
    ),
    "ema-warmup": (
        osc.ema_params(0.9, warmup=2 / 3),
        ema(lambda n: min(0.9, 1 - (n + 1) ** (-2 / 3))),
        0,
        1,
    ),
    "ema-warmup-1": (osc.ema_params(0.99999, warmup=1), last(STEPS), 0, 1),
    "ema-frozen-at-first": (  # Nothing to average before the decay falls below 1.
        osc.ema_params(lambda count: jnp.where(count < 3, 1.0, 0.5)),
        lambda s: s[-1] if len(s) < 4 else ema(lambda n: 0.5)(s[3:]),
        0,
        1,
    ),
    "swa": (osc.swa_params(0), last(STEPS), 0, 1),
    "swa-late": (osc.swa_params(7, every=4), last(STEPS), 7, 4),
    "average-constant": (osc.average_params(0.3), literal(lambda n: 0.3), 0, 1),
    "average-moving": (
        osc.average_params(lambda n: 1 / (n + 5), start_step=2, every=2),
        literal(lambda n: 1 / (n + 5)),
        2,
        2,
    ),
    "polynomial-0": (osc.average_params(power=0), last(STEPS), 0, 1),
    **{
        f"polynomial-{p}": (
            osc.average_params(power=p, every=2),
            polynomial(p),
            0,
            2,
        )
        for p in (0.5, 3, 8.0)
    },
    "lawa": (osc.lawa_params(4), last(4), 0, 1),
    "lawa-1": (osc.lawa_params(1), last(1), 0, 1),
    "lawa-late": (osc.lawa_params(3, start_step=4, every=5), last(3), 4, 5),
    "lawa-never-full": (osc.lawa_params(100), last(100), 0, 1),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_the_average_is_that_of_the_formula_at_every_step(name):
    tx, mean, start, every = AVERAGES[name]
    params, averages, _ = run(tx)
    history = np.asarray(params, np.float64)
    for t in range(STEPS):
        samples = history[: t + 1][start::every]
        expected = mean(samples) if len(samples) else history[t]
        np.testing.assert_allclose(averages[t], expected, rtol=1e-5, atol=2e-6)


def test_swa_is_the_mean_to_float32_rounding():
    updates = RNG.normal(size=(1000, 3)).astype(np.float32)
    params, averages, _ = run(osc.swa_params(100, every=7), START, updates)
    expected = np.asarray(params, np.float64)[100::7].mean(0)
    np.testing.assert_allclose(averages[-1], expected, rtol=4e-6)


@pytest.mark.parametrize(
    "tx",
    [osc.ema_params(0.9, every=3), osc.lawa_params(2, every=3)],
    ids=["ema", "lawa"],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_sampled_leaves_every_bit(tx, bad):
    updates = np.where(np.arange(5)[:, None] < 4, STEP[:5], np.float32(bad))
    params, states = jax.device_get(scan(tx, START, updates))
    assert not np.isfinite(params[4]).any()
    before, after = at(states, 3), at(states, 4)
    assert_same_bits(after._replace(count=before.count), before)


def test_a_decay_near_one_keeps_its_digits():
    """1 - 0.9999 in float32 is 1.0002e-4."""
    state = run(osc.ema_params(0.9999), START, STEP[:1])[-1]
    np.testing.assert_allclose(state.total_weight, 1e-4, rtol=1e-6)


def test_updates_pass_through_with_every_bit():
    tx = osc.ema_params(0.9)
    updates, _ = jax.jit(tx.update)(STEP[0], tx.init(START), START)
    assert_same_bits(updates, STEP[0])


@pytest.mark.parametrize(
    "tx",
    [osc.ema_params(0.9, warmup=0.5), osc.swa_params(0), osc.lawa_params(3)],
    ids=["ema", "swa", "lawa"],
)
def test_averages_outlast_the_largest_count(tx):
    _, states = scan(tx, START, STEP, tx.init(START))
    last = np.int32(INT32_MAX)
    state = at(jax.device_get(states), -1)._replace(count=last, num_samples=last)
    _, states = jax.device_get(scan(tx, START, STEP, state))
    chex.assert_tree_all_finite(states)


# --- low precision -------------------------------------------------------------------


def towards_one(**options):
    """bfloat16 parameters at 1 from the first update, averaged from 0."""
    tx = osc.ema_params(0.999, **options)
    state = tx.init(jnp.zeros(64, jnp.bfloat16))
    # As far from the goal as a first sample that was 0.
    state = state._replace(num_samples=jnp.int32(1), total_weight=jnp.float32(1))
    ones, zeros = jnp.ones(64, jnp.bfloat16), jnp.zeros(64, jnp.bfloat16)

    @jax.jit
    def loop(state):
        return jax.lax.fori_loop(
            0, 20_000, lambda _, state: tx.update(zeros, state, ones)[1], state
        )

    state = loop(state)
    (average,) = state.averages.values()
    # In float32: eval_params gives bfloat16, which has 1 or 0.996 and nothing between.
    return np.asarray(average, np.float32).mean(), osc.eval_params(state, ones)


def test_an_average_of_bfloat16_parameters_reaches_its_goal():
    average, parameters = towards_one()
    np.testing.assert_allclose(average, 1, atol=1e-3)
    assert parameters.dtype == jnp.bfloat16
    assert (parameters == 1).all()


def test_a_bfloat16_average_stalls_at_a_quarter():
    average, _ = towards_one(accumulator_dtype=jnp.bfloat16)
    np.testing.assert_allclose(average, 0.25, atol=0.02)


@pytest.mark.parametrize(
    ("dtype", "accumulator"),
    [
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float64", "float64"),
        ("complex64", "complex64"),
        ("complex128", "complex128"),
    ],
)
def test_averages_are_wide_and_come_back_narrow(dtype, accumulator, x64):
    params = np.asarray([0.1, 0.2, 0.3]).astype(dtype)
    for tx in (osc.ema_params(0.9), osc.lawa_params(2)):
        history, averages, state = run(tx, params, STEP[:4].astype(dtype))
        assert averages.dtype == dtype
        if hasattr(state, "averages"):
            assert state.averages["ema"].dtype == accumulator
            mean = ema(lambda n: 0.9)(np.asarray(history, "complex128"))
        else:
            mean = np.asarray(history, "complex128")[-2:].mean(0)
        tolerance = {2: 4e-3, 4: 1e-6, 8: 1e-7, 16: 1e-7}[params.dtype.itemsize]
        np.testing.assert_allclose(
            np.asarray(averages[-1], "complex128"), mean, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_accumulators_may_have_any_dtype(dtype):
    params, averages, state = run(osc.swa_params(0, accumulator_dtype=dtype))
    assert state.averages["swa"].dtype == dtype
    assert averages.dtype == jnp.float32
    np.testing.assert_allclose(averages[-1], params.mean(0), atol=0.1)


# --- at any nesting ------------------------------------------------------------------

PARAMS = {"kernel": np.ones((8, 2), "f"), "bias": {"b": np.zeros(2, "f")}}
MEAN = {"kernel": np.full((8, 2), 3.0), "bias": {"b": np.full(2, 2.0)}}


@functools.partial(jax.jit, static_argnums=(0, 2))
def steps_of_one(tx, params, steps=3):
    """Parameters that grow by 1 a step, so that the mean of three is 2 more."""

    def step(_, carry):
        params, state = carry
        grads = jax.tree.map(lambda p: -jnp.ones_like(p), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))


SGD = optax.sgd(1.0)
NESTINGS = {
    "chain": lambda tx: optax.chain(SGD, tx),
    "named_chain": lambda tx: optax.named_chain(("sgd", SGD), ("average", tx)),
    "apply_if_finite": lambda tx: optax.apply_if_finite(optax.chain(SGD, tx), 3),
    "inject": lambda tx: optax.chain(
        optax.inject_hyperparams(optax.sgd)(learning_rate=1.0), tx
    ),
    "masked": lambda tx: optax.chain(
        SGD, optax.masked(tx, {"kernel": True, "bias": {"b": True}})
    ),
    "partition": lambda tx: optax.chain(
        optax.partition({0: SGD, 1: SGD}, {"kernel": 0, "bias": 1}), tx
    ),
}
AVERAGING = {"swa": osc.swa_params(0), "lawa": osc.lawa_params(5)}
either = pytest.mark.parametrize("tx", AVERAGING.values(), ids=AVERAGING)


@either
@pytest.mark.parametrize("nest", NESTINGS.values(), ids=NESTINGS)
def test_any_nesting_is_read(nest, tx):
    params, state = steps_of_one(nest(tx), PARAMS)
    chex.assert_trees_all_close(osc.eval_params(state, params), MEAN)
    chex.assert_trees_all_close(jax.jit(osc.eval_params)(state, params), MEAN)


@either
def test_under_multi_steps_the_samples_are_optimizer_steps(tx):
    multi = optax.MultiSteps(optax.chain(SGD, tx), 2)
    params, state = steps_of_one(multi, PARAMS, 6)
    chex.assert_trees_all_close(osc.eval_params(state, params), MEAN)


@either
@pytest.mark.parametrize(
    "mask",
    [
        lambda tx: optax.masked(tx, {"kernel": True, "bias": False}),
        lambda tx: optax.partition(
            {"on": tx, "off": optax.identity()}, {"kernel": "on", "bias": "off"}
        ),
    ],
    ids=["masked", "partition"],
)
def test_what_is_masked_out_is_the_current(mask, tx):
    params, state = steps_of_one(optax.chain(SGD, mask(tx)), PARAMS)
    read = osc.eval_params(state, params)
    chex.assert_trees_all_close(read, {**MEAN, "bias": params["bias"]})


def test_several_averages_are_told_apart_by_name():
    tx = optax.chain(
        SGD,
        osc.ema_params(0.5),
        osc.swa_params(0),
        osc.lawa_params(2, name="mine"),
        osc.average_params(0.1),
    )
    params, state = steps_of_one(tx, np.zeros(2, "f"))
    expected = {"ema": 17 / 7, "swa": 2.0, "mine": 2.5, "average": 1.29}
    for name, value in expected.items():
        read = osc.eval_params(state, params, name=name)
        np.testing.assert_allclose(read, value, rtol=1e-6)


class Point(eqx.Module):
    """Arrays beside what is none."""

    x: jax.Array
    activation: object
    missing: object = None
    size: int = eqx.field(static=True, default=3)


def test_equinox_modules_without_their_functions():
    module = Point(jnp.zeros(2), jax.nn.relu)
    arrays = eqx.filter(module, eqx.is_array)
    params, state = steps_of_one(optax.chain(SGD, osc.swa_params(0)), arrays)
    whole = eqx.combine(params, module)
    for given in (params, whole):
        read = osc.eval_params(state, given)
        assert jax.tree.structure(read) == jax.tree.structure(given)
        np.testing.assert_array_equal(read.x, 2)
    assert osc.eval_params(state, whole).activation is jax.nn.relu


TREES = {
    "array": lambda x: x,
    "tuple": lambda x: (x, [x]),
    "frozen": lambda x: FrozenDict({"a": {"b": x}}),
    "none": lambda x: {"a": x, "b": None},
    "boxed": lambda x: {"a": nn.Partitioned(x, names=(None,))},
    "empty-name": lambda x: {"": x, "a/b": x, "a": {"c": x}},
}


@either
@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_any_container_is_given_back(make, tx):
    params, state = steps_of_one(optax.chain(SGD, tx), make(np.zeros(2, "f")))
    read = osc.eval_params(state, params)
    chex.assert_trees_all_close(read, make(np.full(2, 2.0)))


@either
def test_integers_pass_through(tx):
    params = {"x": np.zeros(2, "f"), "n": np.arange(3, dtype="i")}
    updates = {"x": np.ones((3, 2), "f"), "n": np.ones((3, 3), "i")}
    params, state = at(jax.device_get(scan(tx, params, updates)), -1)
    read = osc.eval_params(state, params)
    np.testing.assert_array_equal(read["x"], 2)
    assert_same_bits(read["n"], np.arange(3, dtype="i") + 3)


def test_mixed_dtypes_come_back_each_in_its_own():
    params = {
        "a": jnp.zeros(2, jnp.bfloat16),
        "b": jnp.zeros(2, jnp.float16),
        "c": jnp.zeros((), jnp.complex64),
        "d": jnp.zeros(2),
    }
    tx = optax.chain(SGD, osc.ema_params(0.9))
    params, state = jax.eval_shape(lambda params: steps_of_one(tx, params), params)
    read = jax.eval_shape(osc.eval_params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(read, params)


class Net(nnx.Module):
    """A layer with a norm, so with parameters and other variables."""

    def __init__(self):
        self.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))


def pure(tree):
    return nnx.to_pure_dict(tree)


@functools.cache
def nnx_trained(tx, steps=3):
    net = Net()
    optimizer = nnx.Optimizer(net, optax.chain(SGD, tx), wrt=nnx.Param)
    step = nnx.jit(
        lambda net, optimizer: optimizer.update(
            net, jax.tree.map(lambda p: -jnp.ones_like(p), nnx.state(net, nnx.Param))
        )
    )
    for _ in range(steps):
        step(net, optimizer)
    return net, optimizer


@either
def test_nnx_optimizer(tx):
    net, optimizer = nnx_trained(tx)
    current = nnx.state(net, nnx.Param)
    expected = jax.tree.map(lambda p: p - 1, pure(current))
    for state in (optimizer.opt_state, optimizer):
        read = osc.eval_params(state, current)
        assert jax.tree.structure(read) == jax.tree.structure(current)
        chex.assert_trees_all_close(pure(read), expected, rtol=1e-5)
    read = osc.eval_params(optimizer.opt_state, pure(current))
    chex.assert_trees_all_close(read, expected, rtol=1e-5)


def test_nnx_inside_jit_evaluates_a_model_with_the_average():
    net, optimizer = nnx_trained(osc.swa_params(0))

    @nnx.jit
    def evaluated(net, optimizer):
        averaged = nnx.clone(net)
        nnx.update(
            averaged,
            osc.eval_params(optimizer.opt_state, nnx.state(net, nnx.Param)),
        )
        return averaged.layer(jnp.ones(2)), net.layer(jnp.ones(2))

    averaged, current = evaluated(net, optimizer)
    np.testing.assert_allclose(averaged, current - 3, rtol=1e-5)


@either
def test_linen_train_state(tx):
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=optax.chain(SGD, tx))
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for _ in range(3):
        state = step(state, jax.tree.map(lambda p: -np.ones_like(p), PARAMS))
    chex.assert_trees_all_close(osc.eval_params(state, state.params), MEAN)


@either
def test_vmapped_states_are_read_by_vmap(tx):
    scales = np.asarray([1.0, 2.0, 5.0, 7.0, 9.0], "f")

    @jax.jit
    @jax.vmap
    def final(scale):
        params, _, state = program(tx, START, scale * STEP)
        return params[-1], state

    params, states = final(scales)
    read = jax.jit(jax.vmap(osc.eval_params))(states, params)
    for k, scale in enumerate(scales):
        expected = run(tx, START, scale * STEP)[1][-1]
        np.testing.assert_allclose(read[k], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"^`opt_state` must be .*jax\.vmap"):
        osc.eval_params(states, params)


@either
def test_before_the_first_sample_the_parameters_are_current(tx):
    late = {"swa": osc.swa_params(10), "lawa": osc.lawa_params(5, start_step=10)}
    tx = late["swa"] if tx is AVERAGING["swa"] else late["lawa"]
    params, state = steps_of_one(optax.chain(SGD, tx), PARAMS)
    assert_same_bits(osc.eval_params(state, params), params)


# --- structure, shards and checkpoints -----------------------------------------------


@either
def test_parameters_and_state_may_be_donated_together(tx):
    tx = optax.chain(osc.scale_by_learning_rate(0.1), tx)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    results = []
    for options in ({}, {"donate_argnums": (0, 1)}):
        params = jax.tree.map(jnp.asarray, PARAMS)
        state = tx.init(params)
        for _ in range(4):
            params, state = jax.jit(step, **options)(params, state)
        results.append(osc.eval_params(state, params))
    chex.assert_trees_all_equal(*results)


@either
@pytest.mark.parametrize(
    "axis", ["Auto", pytest.param("Explicit", marks=pytest.mark.slow)]
)
def test_averages_are_sharded_like_the_parameters(tx, axis):
    mesh = jax.make_mesh(
        (8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, axis),)
    )
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(np.arange(16, dtype="f").reshape(8, 2), sharding)
    state = tx.init(params)
    for _ in range(3):
        large = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim >= 2]
        assert large
        for leaf in large:
            assert leaf.sharding.shard_shape(leaf.shape)[-2:] == (1, 2)
        _, state = jax.jit(tx.update)(params, state, params)
    for read in (osc.eval_params, jax.jit(osc.eval_params)):
        assert read(state, params).sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(read(state, params), 2 * np.asarray(params))


@either
def test_a_checkpoint_continues_bit_for_bit(tx, tmp_path):
    params, state = steps_of_one(optax.chain(SGD, tx), PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = optax.chain(SGD, tx).init(PARAMS)
        restored = checkpointer.restore(tmp_path / "state", like)
    assert_same_bits(restored, state)
    assert_same_bits(pickle.loads(pickle.dumps(state)), state)
    assert_same_bits(osc.eval_params(restored, params), osc.eval_params(state, params))


# --- bad input -----------------------------------------------------------------------

STATE = optax.chain(SGD, osc.ema_params(0.9)).init(PARAMS)
TWO = optax.chain(osc.ema_params(0.9), osc.swa_params(0)).init(PARAMS)
SAME = optax.chain(osc.ema_params(0.9), osc.ema_params(0.99)).init(PARAMS)
PARTS = {0: osc.ema_params(0.9), 1: osc.ema_params(0.9)}
PARTITION = optax.partition(PARTS, {"kernel": 0, "bias": 1}).init(PARAMS)
BAD = {
    "no-average": (
        SGD.init(PARAMS), PARAMS, {},
        "`opt_state` must be of an optimizer with an average, got EmptyState",
    ),
    "which": (TWO, PARAMS, {}, "`name` must be one of 'ema', 'swa', got None"),
    "unknown": (
        TWO, PARAMS, {"name": "lawa"},
        "`name` must be one of 'ema', 'swa', got 'lawa'",
    ),
    "same-name": (
        SAME, PARAMS, {},
        "`opt_state` must be one with a single average 'ema' (give each a name, put it "
        "last in the chain and outside of `optax.partition`, or pass a part of the "
        "state), got several, at '0', '1'",
    ),
    "partition": (
        PARTITION, PARAMS, {},
        "`opt_state` must be one with a single average 'ema' (give each a name, put it "
        "last in the chain and outside of `optax.partition`, or pass a part of the "
        "state), got several, at 'inner_states/0/inner_state', "
        "'inner_states/1/inner_state'",
    ),
    "missing": (
        STATE, {"kernel": PARAMS["kernel"]}, {},
        "`params` must be of the structure that the average has seen at `init`, got "
        "without 'bias/b'",
    ),
    "anew": (
        STATE, PARAMS | {"new": jnp.ones(1)}, {},
        "`params` must be of the structure that the average has seen at `init`, got "
        "with new 'new'",
    ),
    "both": (
        STATE, {"kernel": PARAMS["kernel"], "bias": jnp.ones(1)}, {},
        "`params` must be of the structure that the average has seen at `init`, got "
        "without 'bias/b' and with new 'bias'",
    ),
    "shape": (
        STATE, PARAMS | {"kernel": jnp.ones((2, 8))}, {},
        "`params` must be of the shapes that the average has seen at `init` ((8, 2) at "
        "'kernel'), got (2, 8)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("state", "params", "options", "message"), BAD.values(), ids=BAD
)
def test_what_cannot_be_read_is_refused(state, params, options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        osc.eval_params(state, params, **options)
    assert str(error.value) == message + "."


@either
def test_an_update_without_parameters_is_refused(tx):
    with pytest.raises(ValueError, match=r"^`params` must be given to `update`"):
        tx.update(START, tx.init(START))
