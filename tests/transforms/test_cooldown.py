"""Does a cooldown start when it is told to, wherever its state is?"""

import functools
import pickle
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference
from common import assert_same_bits, types
from descriptors import quadratic
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import optax_superconv as osc

STEPS = 40
INT32_MAX = np.iinfo(np.int32).max
GRAD = np.ones((), np.float32)


@functools.partial(jax.jit, static_argnums=0)
def run(tx, k, n, state=None):
    """What each of STEPS updates applied, with ``start_cooldown`` before update k."""

    def step(state, t):
        started = osc.start_cooldown(state, n)
        state = jax.tree.map(lambda a, b: jnp.where(t == k, a, b), started, state)
        updates, state = tx.update(GRAD, state)
        return state, osc.read_hyperparams(state) | {"updates": updates}

    state = tx.init(GRAD) if state is None else state
    return jax.lax.scan(step, state, jnp.arange(STEPS))[1]


MANUAL = osc.scale_by_learning_rate(0.1, cooldown_shape="linear")

# --- a trigger before update k is a plan from the start ------------------------------

SCHEDULES = {
    "number": 0.1,
    "warmup": optax.linear_schedule(0.02, 0.1, 10),
    "onecycle": osc.onecycle_schedule(0.1, 30, end_value=1e-3),
}
ENDS = [("linear", 0.0), ("cosine", 0.01), ("1-sqrt", 0.0), ("1-sqrt", 0.3)]
ENDS += [(quadratic, 1e-3), ("exponential", 1e-4)]
PAIRS = [(0, 1), (0, 9), (3, 20), (10, 2), (17, 5), (39, 3)]
PAIRS += [(5, 10**6), (7, INT32_MAX - 7)]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "end"), ENDS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_trigger_equals_a_plan(schedule, shape, end):
    tx = osc.scale_by_learning_rate(schedule, cooldown_end=end, cooldown_shape=shape)

    @jax.jit
    def plans():
        options = {"end_value": end, "shape": shape}
        made = [osc.with_cooldown(schedule, k + n, n, **options) for k, n in PAIRS]
        return jax.lax.map(lambda t: [plan(t) for plan in made], jnp.arange(STEPS))

    for (k, n), expected in zip(PAIRS, plans(), strict=True):
        applied = run(tx, k, n)
        np.testing.assert_array_max_ulp(applied["learning_rate"], expected, 2)
        np.testing.assert_array_equal(applied["updates"], -applied["learning_rate"])


def test_rates_by_the_formula():
    """The same against float64, so that the two cannot be wrong together."""
    tx = osc.scale_by_learning_rate(SCHEDULES["onecycle"], cooldown_end=0.01)

    def cycle(t):
        return reference.onecycle(t, 0.1, 30, 9, 0.004, 1e-3, 0, "cosine")

    for k, n in [(0, 9), (3, 20), (17, 5)]:
        expected = [
            reference.cooled(t, cycle, k + n, n, 0.01, "1-sqrt") for t in range(STEPS)
        ]
        applied = run(tx, k, n)["learning_rate"]
        np.testing.assert_allclose(applied, expected, rtol=2e-6)


@pytest.mark.parametrize("count", [2**24 + 1, INT32_MAX - 50])
def test_a_trigger_after_a_long_run(count):
    """Float32 no longer holds such counts."""
    tx = osc.scale_by_learning_rate(0.1, cooldown_shape="linear")
    state = tx.init(GRAD)._replace(count=jnp.int32(count))
    applied = run(tx, 3, 20, state)
    fractions = np.clip((23 - np.arange(STEPS)) / 20, 0, 1)
    np.testing.assert_allclose(applied["learning_rate"], 0.1 * fractions, rtol=1e-6)


def test_the_longest_cooldown_neither_overflows_nor_decays():
    tx = osc.scale_by_learning_rate(0.1)
    state = tx.init(GRAD)._replace(count=jnp.int32(INT32_MAX - 5))
    rates = run(tx, 2, INT32_MAX, state)["learning_rate"]
    np.testing.assert_allclose(rates, 0.1, rtol=1e-3)


def test_an_exponential_decay_from_zero_goes_to_the_end():
    tx = osc.scale_by_learning_rate(
        optax.linear_schedule(0.0, 0.1, 10),
        cooldown_end=0.01,
        cooldown_shape="exponential",
    )
    rates = run(tx, 0, 4)["learning_rate"]
    np.testing.assert_array_equal(rates, np.float32([0.0] + [0.01] * (STEPS - 1)))


@pytest.mark.parametrize("n", [1, 4])
def test_the_record_shows_how_much_of_the_cooldown_is_over(n):
    expected = np.clip((np.arange(STEPS) - 5) / n, 0, 1)
    shown = run(osc.scale_by_learning_rate(0.1), 5, n)["cooldown"]
    np.testing.assert_array_equal(shown, np.float32(expected))


CHAINS = {
    "sgd": lambda last: optax.chain(optax.trace(0.9, nesterov=True), last),
    "adamw": lambda last: optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(0.1), last
    ),
}


ADAMW = CHAINS["adamw"](osc.scale_by_learning_rate(0.1))


def quadratic_loss(params):
    return jnp.sum(jnp.arange(1.0, 9.0) * (params - 1) ** 2)


@functools.partial(jax.jit, static_argnums=0)
def train_step(tx, params, state):
    updates, state = tx.update(jax.grad(quadratic_loss)(params), state, params)
    return optax.apply_updates(params, updates), state


ZEROS = np.zeros(8, np.float32)


def train(tx, begin, end, params=ZEROS, state=None, *, trigger=None):
    """Parameters and state; ``trigger`` is the pair (k, n)."""
    state = tx.init(params) if state is None else state
    for t in range(begin, end):
        if trigger and t == trigger[0]:
            state = osc.start_cooldown(state, trigger[1])
        params, state = train_step(tx, params, state)
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_parameters_follow_the_planned_run(chain):
    for schedule in (0.03, optax.linear_schedule(0.0, 0.03, 10)):
        triggered = chain(osc.scale_by_learning_rate(schedule))
        planned = chain(osc.scale_by_learning_rate(osc.with_cooldown(schedule, 30, 18)))
        ours, _ = train(triggered, 0, 30, trigger=(12, 18))
        theirs, _ = train(planned, 0, 30)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


# --- started again -------------------------------------------------------------------

AGAIN = [("linear", 0.0), ("1-sqrt", 0.01), ("exponential", 1e-4)]


@pytest.mark.parametrize(("shape", "end"), AGAIN)
@pytest.mark.parametrize("length", [1, 6, 20])
def test_a_second_start_goes_on_from_the_present_rate(shape, end, length):
    tx = osc.scale_by_learning_rate(
        SCHEDULES["onecycle"], cooldown_end=end, cooldown_shape=shape
    )

    @jax.jit
    def rates():
        def step(state, t):
            n = jnp.where(t == 5, 12, jnp.where(t == 11, length, 0))
            _, state = tx.update(GRAD, osc.start_cooldown(state, n))
            return state, osc.read_hyperparams(state)["learning_rate"]

        return jax.lax.scan(step, tx.init(GRAD), jnp.arange(STEPS))[1]

    def cycle(t):
        return reference.onecycle(t, 0.1, 30, 9, 0.004, 1e-3, 0, "cosine")

    def first(t):
        return reference.cooled(t, cycle, 17, 12, end, shape)

    expected = [
        reference.cooled(t, first, 11 + length, length, end, shape)
        for t in range(STEPS)
    ]
    np.testing.assert_allclose(rates(), expected, rtol=1e-5, atol=1e-9)


def test_a_second_start_after_the_end_stays_at_the_end():
    state = MANUAL.init(GRAD)
    rates = []
    for t in range(8):
        state = osc.start_cooldown(state, 2) if t in (1, 5) else state
        _, state = MANUAL.update(GRAD, state)
        rates.append(osc.read_hyperparams(state)["learning_rate"])
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.05, 0, 0, 0, 0, 0], rtol=1e-6)


# --- the decision is data ------------------------------------------------------------


def test_one_trace_across_the_trigger():
    tx = osc.scale_by_learning_rate(0.1)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, 1))
    state = tx.init(GRAD)
    for t in range(10):
        state = osc.start_cooldown(state, 3) if t == 4 else state
        _, state = update(GRAD, state, GRAD)
    assert update._cache_size() == 1


def test_start_cooldown_keeps_structure_and_types():
    for tx in (osc.scale_by_learning_rate(0.1), osc.adamw(0.1)):
        state = tx.init(np.zeros((2, 2), "f"))
        for length in (3, np.int64(3), np.int8(3), jnp.int32(3), np.uint32(3)):
            assert types(osc.start_cooldown(state, length)) == types(state)


def test_start_cooldown_leaves_the_given_state_as_it_was():
    state = osc.scale_by_learning_rate(0.1).init(GRAD)
    copy = jax.tree.map(np.asarray, state)
    osc.start_cooldown(state, 3)
    assert_same_bits(state, copy)


@pytest.mark.parametrize("length", [0, -3])
def test_a_traced_length_below_one_starts_nothing(length):
    state = osc.scale_by_learning_rate(0.1).init(GRAD)
    started = jax.jit(osc.start_cooldown)(state, length)
    chex.assert_trees_all_equal(started, state)


def test_state_and_parameters_may_be_donated_across_the_trigger():
    tx = ADAMW
    step = jax.jit(functools.partial(train_step, tx), donate_argnums=(0, 1))
    params = jnp.zeros(8)
    state = tx.init(params)
    for t in range(8):
        if t == 3:
            state = osc.start_cooldown(state, 4)
        params, state = step(params, state)
    expected, _ = train(tx, 0, 8, trigger=(3, 4))
    np.testing.assert_allclose(params, expected, rtol=1e-6)


CONTINUE = """
import sys, jax, jax.numpy as jnp, numpy as np, optax
import orbax.checkpoint as ocp
import optax_superconv as osc
tx = osc.adamw(0.1)
params = jnp.zeros(8)
with ocp.StandardCheckpointer() as checkpointer:
    params, state = checkpointer.restore(sys.argv[1], (params, tx.init(params)))
loss = lambda params: jnp.sum(jnp.arange(1.0, 9.0) * (params - 1) ** 2)
@jax.jit
def step(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state
for _ in range(10):
    params, state = step(params, state)
np.save(sys.argv[2], np.asarray(params))
"""


@pytest.mark.slow
def test_a_triggered_run_continues_bit_for_bit_in_a_new_process(tmp_path):
    tx = osc.adamw(0.1)
    saved = train(tx, 0, 10, trigger=(7, 9))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
    expected, _ = train(tx, 10, 20, *saved)
    arguments = [str(tmp_path / "state"), str(tmp_path / "params.npy")]
    subprocess.run([sys.executable, "-c", CONTINUE, *arguments], check=True)
    assert_same_bits(np.load(tmp_path / "params.npy"), expected)


def test_a_triggered_state_survives_pickle():
    state = osc.start_cooldown(osc.scale_by_learning_rate(0.1).init(GRAD), 3)
    assert_same_bits(pickle.loads(pickle.dumps(state)), state)


# --- at any nesting ------------------------------------------------------------------

NESTINGS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "named_chain": lambda tx: optax.named_chain(("first", optax.identity()), ("b", tx)),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": True}),
    "partition": lambda tx: optax.partition({"all": tx}, {"w": "all", "b": "all"}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally": lambda tx: optax.conditionally_transform(tx, lambda step: True),
    "unfreezing": lambda tx: osc.gradual_unfreezing(
        tx, {0: 0}, osc.label_by_path([(".*", 0)])
    ),
}


def loop(tx, steps, trigger, repeats=1):
    """The updates of a bias, with ``start_cooldown`` before update k."""
    params = {"w": np.ones(3, "f"), "b": GRAD}
    state, applied = tx.init(params), []
    update = jax.jit(tx.update)
    for t in range(steps):
        if t == trigger[0]:
            state = osc.start_cooldown(state, *trigger[1:])
        for _ in range(repeats):
            updates, state = update(params, state, params)
        applied.append(-np.asarray(updates["b"]))
    return np.stack(applied)


EXPECTED = np.float32(0.1) * np.float32([1, 1, 1, 0.75, 0.5, 0.25, 0, 0])


@pytest.mark.parametrize("nest", NESTINGS.values(), ids=NESTINGS)
def test_any_nesting_is_triggered(nest):
    tx = nest(osc.scale_by_learning_rate(0.1, cooldown_shape="linear"))
    np.testing.assert_allclose(loop(tx, 8, (2, 4)), EXPECTED, rtol=1e-6)


def test_under_multi_steps_the_steps_are_optimizer_steps():
    tx = optax.MultiSteps(osc.scale_by_learning_rate(0.1, cooldown_shape="linear"), 3)
    rates = loop(tx, 8, (2, 4), repeats=3)
    np.testing.assert_allclose(rates, EXPECTED, rtol=1e-6)


def test_under_inject_hyperparams():
    tx = optax.inject_hyperparams(
        osc.scale_by_learning_rate, static_args=("cooldown_shape", "flip_sign")
    )(0.1, cooldown_shape="linear")
    np.testing.assert_allclose(loop(tx, 8, (2, 4)), EXPECTED, rtol=1e-6)


def two_rates():
    link = osc.scale_by_learning_rate(0.1, cooldown_shape="linear")
    return optax.partition({0: link, 1: link}, {"w": 0, "b": 1})


def pending(state):
    nodes = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "pending"))
    return [int(node.pending) for node in nodes if hasattr(node, "pending")]


def test_all_rates_cool_down_or_those_of_the_part_that_is_given():
    state = two_rates().init({"w": jnp.ones(3), "b": GRAD})
    assert pending(osc.start_cooldown(state, 5)) == [5, 5]
    part = osc.start_cooldown(state.inner_states[1], 5)
    rest = state._replace(inner_states=state.inner_states | {1: part})
    assert pending(rest) == [0, 5]


class Net(nnx.Module):
    """One layer."""

    def __init__(self):
        self.layer = nnx.Linear(2, 1, rngs=nnx.Rngs(0))


def net_loss(net):
    return (net.layer(jnp.ones((1, 2))) ** 2).sum()


@nnx.jit
def nnx_step(net, optimizer):
    optimizer.update(net, nnx.grad(net_loss)(net))


def nnx_run(trigger):
    """The rates of eight updates with ``trigger(optimizer)`` before the third."""
    net = Net()
    optimizer = nnx.Optimizer(net, MANUAL, wrt=nnx.Param)
    kinds = jax.tree.structure(optimizer.opt_state)
    rates = []
    for t in range(8):
        if t == 2:
            trigger(optimizer)
            assert jax.tree.structure(optimizer.opt_state) == kinds
        nnx_step(net, optimizer)
        rates.append(osc.read_hyperparams(optimizer)["learning_rate"])
    return np.stack(rates)


def assign(optimizer):
    optimizer.opt_state = osc.start_cooldown(optimizer.opt_state, 4)


def update_variables(optimizer):
    started = osc.start_cooldown(optimizer.opt_state, 4)
    nnx.update(optimizer.opt_state, nnx.state(started))


@pytest.mark.parametrize(
    "trigger", [assign, update_variables, nnx.jit(assign), nnx.jit(update_variables)]
)
def test_nnx_optimizer(trigger):
    np.testing.assert_allclose(nnx_run(trigger), EXPECTED, rtol=1e-6)


def test_linen_train_state():
    tx = optax.chain(osc.scale_by_learning_rate(0.1, cooldown_shape="linear"))
    params = {"w": GRAD}
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    step = jax.jit(lambda state: state.apply_gradients(grads=params))
    rates = []
    for t in range(8):
        state = osc.start_cooldown(state, 4) if t == 2 else state
        state = step(state)
        rates.append(osc.read_hyperparams(state)["learning_rate"])
    assert isinstance(state, TrainState)
    np.testing.assert_allclose(rates, EXPECTED, rtol=1e-6)


def test_on_a_mesh():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    alone = np.arange(16, dtype="f")
    params = jax.device_put(alone, sharding)
    tx = optax.chain(optax.scale_by_adam(), osc.scale_by_learning_rate(0.1))
    update = jax.jit(tx.update)

    def final(params):
        state = tx.init(params)
        for t in range(7):
            if t == 3:  # Until then the shardings of the state settle.
                traced = update._cache_size()
                state = osc.start_cooldown(state, 4)
            updates, state = update(params, state, params)
        assert update._cache_size() == traced
        return updates

    updates = final(params)
    assert not updates.sharding.is_fully_replicated
    np.testing.assert_allclose(updates, final(alone), rtol=1e-6)


# --- many cooldowns of one state -----------------------------------------------------

LENGTHS = [1, 2, 5, 30]


def test_one_state_forks_into_cooldowns_of_several_lengths():
    tx = ADAMW
    params, state = train(tx, 0, 6)
    forks = jax.vmap(lambda n: osc.start_cooldown(state, n))(np.asarray(LENGTHS))

    @jax.jit
    @jax.vmap
    def cool(state):
        return jax.lax.fori_loop(
            0, 9, lambda _, carry: train_step(tx, *carry), (params, state)
        )[0]

    for n, forked in zip(LENGTHS, np.asarray(cool(forks)), strict=True):
        alone, _ = train(tx, 6, 15, params, state, trigger=(6, n))
        np.testing.assert_allclose(forked, alone, rtol=1e-5)


@pytest.mark.parametrize("lengths", [4, jnp.asarray(LENGTHS), np.asarray(LENGTHS)])
def test_states_with_a_leading_axis(lengths):
    tx = osc.scale_by_learning_rate(0.1)
    states = jax.vmap(tx.init)(np.ones(4, "f"))
    started = osc.start_cooldown(states, lengths)
    assert types(started) == types(states)
    np.testing.assert_array_equal(
        started.ending.pending, np.broadcast_to(lengths, (4,))
    )


def test_a_clone_of_an_nnx_optimizer_cools_down_alone():
    schedule = osc.phase_schedule(0.0, [(10, 0.1)])
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    tx = osc.scale_by_learning_rate(schedule)
    stable = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    for _ in range(4):
        stable.update(model, grads)
    branch = nnx.clone(stable)
    osc.start_cooldown(branch, 4)
    for _ in range(3):
        branch.update(model, grads)
    stable.update(model, grads)
    applied = osc.read_hyperparams(stable)["learning_rate"]
    np.testing.assert_allclose(applied, 0.04, rtol=1e-6)
