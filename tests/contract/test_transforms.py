"""The contract of every transformation: a row runs once, and its properties look on."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from common import at, make_grads, make_params, nothing, scan, scan_steps, train, types
from descriptors import TOTAL, TRANSFORMS
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

import optax_superconv as osc

STEPS = TOTAL + 5
SOME = slice(6)
PARAMS = make_params()
GRADS = jax.tree.map(np.asarray, make_grads(STEPS))
assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


# Rows that vary another row.
VARIANTS = {"sgd", "adamw", "onecycle_sgd", "scale_by_learning_rate-cooling"}
VARIANTS |= {"scheduled_trace-True", "scale_by_scheduled_adam-True"}
VARIANTS |= {"scale_by_learning_rate-groups", "scale_by_learning_rate-groups-cooling"}


@pytest.fixture(
    params=[
        pytest.param(case, marks=[pytest.mark.slow] * (case.name in VARIANTS))
        for case in TRANSFORMS
    ],
    ids=lambda case: case.name,
    scope="module",
)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def tx(case):
    return case.make(case.value)


@pytest.fixture(scope="module")
def whole(tx):
    """Parameters and states after each step of one compiled run."""
    return scan(tx, PARAMS, GRADS)


@pytest.fixture(scope="module")
def update(tx):
    """Compiled once, or it raises; the state that it is given is donated."""
    chex.clear_trace_counter()
    return jax.jit(chex.assert_max_traces(tx.update, 1), donate_argnums=1)


@pytest.fixture(scope="module")
def looped(tx, update):
    """Parameters after each step of a loop."""
    return train(tx, PARAMS, GRADS, update=update)[0]


def test_matches_reference(case, whole):
    for name in PARAMS:
        expected = case.reference(
            np.asarray(PARAMS[name], np.float64), np.asarray(GRADS[name], np.float64)
        )
        np.testing.assert_allclose(whole[0][name], expected, rtol=1e-4, atol=1e-5)


def test_a_loop_that_donates_traces_once_and_gives_the_same(whole, looped):
    chex.assert_trees_all_close(looped, whole[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [0, 3, 4, TOTAL - 1, TOTAL])
def test_an_eager_update_gives_the_same(tx, whole, step):
    before = at(whole, step - 1) if step else (PARAMS, tx.init(PARAMS))
    updates, _ = tx.update(at(GRADS, step), before[1], before[0])
    params = optax.apply_updates(before[0], updates)
    chex.assert_trees_all_close(params, at(whole[0], step), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_value_may_be_traced_and_batched(case, whole):
    def run(value):
        return scan_steps(case.make(value), PARAMS, GRADS, read=nothing)[0]

    batched = jax.jit(jax.vmap(run))(case.value * np.float32([1.0, 0.5]))
    chex.assert_trees_all_close(at(batched, 0), whole[0], rtol=1e-4, atol=1e-6)
    halved = case.make(case.value / 2)
    single, _ = train(halved, PARAMS, at(GRADS, SOME), update=halved.update)
    chex.assert_trees_all_close(at(batched, (1, SOME)), single, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_derivative_in_the_value_is_the_finite_difference(case, x64):
    params, grads = make_params(dtype="float64"), make_grads(STEPS, dtype="float64")

    def final(value):
        return scan_steps(case.make(value), params, grads)[0]["kernel"][-1].sum()

    # The dials are float32, so the step must be large and the difference central.
    value, step = case.value, 1e-2 * case.value
    slope = (final(value + step) - final(value - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(final)(value), slope, rtol=1e-2)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float64", "mixed"]
)
def test_dtypes_and_structure_never_change(case, dtype, strict):
    with jax.enable_x64(dtype == "float64"):
        tx = case.make(case.value)
        params = make_params(dtype="float32" if dtype == "mixed" else dtype)
        if dtype == "mixed":
            params["kernel"] = params["kernel"].astype(jnp.bfloat16)
        state = jax.eval_shape(tx.init, params)
        updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert types(new_state) == types(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_leaks_no_tracer(case):
    def run(value):
        return scan_steps(case.make(value), PARAMS, at(GRADS, SOME))[0]

    with jax.checking_leaks():
        jax.make_jaxpr(run)(case.value)


def test_state_survives_pickle_and_flatten(whole):
    state = at(whole[1], 2)
    leaves, treedef = jax.tree.flatten(state)
    for copy in (
        pickle.loads(pickle.dumps(state)),
        jax.tree.unflatten(treedef, leaves),
    ):
        chex.assert_trees_all_equal(copy, state)
        assert jax.tree.structure(copy) == treedef


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(0, marks=pytest.mark.slow),
        7,
        pytest.param(TOTAL, marks=pytest.mark.slow),
    ],
)
def test_continues_bit_for_bit_after_a_checkpoint(tx, update, looped, step, tmp_path):
    params, state = PARAMS, tx.init(PARAMS)
    if step:
        history, state = train(tx, PARAMS, at(GRADS, slice(step)), update=update)
        params = at(history, -1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", (PARAMS, tx.init(PARAMS)))
    # Arrays that a checkpoint bound to their device would be compiled for again.
    params, state = jax.device_get(restored)
    rest = slice(step, STEPS)
    history, _ = train(tx, params, at(GRADS, rest), state, update=update)
    chex.assert_trees_all_equal(history, at(looped, rest))


def test_multi_steps_counts_optimizer_steps(tx, whole):
    thrice = jax.tree.map(lambda g: np.repeat(g[SOME], 3, axis=0), GRADS)
    multi = optax.MultiSteps(tx, every_k_schedule=3)
    found = scan(multi, PARAMS, thrice, read=osc.read_hyperparams)
    params, dials = at(found, slice(2, None, 3))
    assert_close(params, at(whole[0], SOME))
    expected = osc.read_hyperparams(at(whole[1], SOME))
    chex.assert_trees_all_close(dials, expected, rtol=1e-6)


WRAPPERS = {
    "masked": lambda tx: optax.masked(tx, {"kernel": True, "bias": False}),
    "partition": lambda tx: optax.partition(
        {"on": tx, "off": optax.set_to_zero()}, {"kernel": "on", "bias": "off"}
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_change_nothing_for_what_they_pass_on(tx, whole, wrap):
    wrapped = wrap(tx)
    # Eagerly: operations are compiled once for all rows, programs for each.
    params, _ = train(wrapped, PARAMS, at(GRADS, SOME), update=wrapped.update)
    assert_close(params["kernel"], whole[0]["kernel"][SOME])


@pytest.mark.slow
def test_apply_if_finite_changes_nothing(tx, whole):
    finite = optax.apply_if_finite(tx, 3)
    params, _ = scan(finite, PARAMS, at(GRADS, SOME), read=nothing)
    assert_close(params, at(whole[0], SOME))


def test_inject_hyperparams_gives_the_same(case):
    factory, arguments, static = case.inject
    injected = optax.inject_hyperparams(factory, static_args=static)(**arguments)
    plain = factory(**arguments)
    inside, outside = (
        train(tx, PARAMS, at(GRADS, SOME), update=tx.update)[0]
        for tx in (injected, plain)
    )
    chex.assert_trees_all_close(inside, outside, rtol=1e-5)


@pytest.mark.slow
def test_sharded_over_eight_devices_gives_the_same(tx, whole):
    mesh = jax.make_mesh((8,), ("data",))

    def place(leaf, axis):
        spec = [None] * leaf.ndim
        if leaf.shape[axis] % 8 == 0:
            spec[axis] = "data"
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    params = jax.tree.map(lambda p: place(p, 0), PARAMS)
    grads = jax.tree.map(lambda g: place(g, 1), at(GRADS, SOME))
    sharded, states = scan(tx, params, grads, tx.init(params))
    chex.assert_trees_all_close(sharded, at(whole[0], SOME), rtol=1e-6)
    for leaf in jax.tree.leaves(states):
        if leaf.shape[1:] == PARAMS["kernel"].shape:
            assert not leaf.sharding.is_fully_replicated


def test_exports_for_all_platforms(tx):
    exported = export.export(jax.jit(tx.update), platforms=("cpu", "cuda", "tpu"))(
        PARAMS, tx.init(PARAMS), PARAMS
    )
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_leaves_the_dials_alone(tx, whole, bad):
    spoiled = jax.tree.map(np.copy, GRADS)
    for leaf in spoiled.values():
        leaf[2] = bad
    _, states = scan(tx, PARAMS, spoiled)
    read, expected = map(osc.read_hyperparams, (states, whole[1]))
    chex.assert_trees_all_equal(read, expected)


def test_passes_leaves_that_are_none(tx, whole):
    grads = {**GRADS, "absent": None}
    with_none, _ = scan(tx, {**PARAMS, "absent": None}, grads)
    assert with_none.pop("absent") is None
    chex.assert_trees_all_equal(with_none, whole[0])


def test_reads_back_the_names_it_promises(case, tx):
    assert tuple(osc.read_hyperparams(tx.init(PARAMS))) == case.keys


def test_the_counts_saturate(tx, update):
    last = np.int32(np.iinfo(np.int32).max)

    def is_count(path, leaf):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return leaf.dtype == last.dtype and "ending" not in names

    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(last) if is_count(path, leaf) else leaf,
        tx.init(PARAMS),
    )
    for t in range(2):
        updates, state = update(at(GRADS, t), state, PARAMS)
        chex.assert_tree_all_finite(updates)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    counts = [leaf for path, leaf in leaves if is_count(path, leaf)]
    assert counts
    assert all(count == last for count in counts)


@pytest.mark.parametrize(
    "make",
    [
        osc.scale_by_learning_rate,
        osc.scheduled_trace,
        osc.scale_by_scheduled_adam,
        osc.add_decayed_weights,
        lambda value: osc.scale_by_scheduled_adam(0.9, value, eps=value),
        lambda value: osc.sgd(value, value, weight_decay=value),
        lambda value: osc.adamw(value, value, value, eps=value, weight_decay=value),
    ],
    ids=["rate", "trace", "adam", "decay", "adam_of_b2_and_eps", "sgd", "adamw"],
)
def test_constant_and_schedule_share_one_structure(make):
    constant, scheduled = (
        types(jax.eval_shape(make(value).init, PARAMS))
        for value in (0.5, lambda t: 0.5)
    )
    assert constant == scheduled


def test_onecycle_adamw_keeps_at_most_four_kibibytes_more_than_adamw():
    params = {f"leaf_{k}": jnp.zeros((4, 4)) for k in range(576)}

    def size(tx):
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    assert size(osc.onecycle_adamw(0.1, 10)) <= size(optax.adamw(0.1)) + 4096


def assert_same_run(ready, chain):
    ours, _ = scan(ready, PARAMS, GRADS, read=nothing)
    theirs, _ = scan(chain, PARAMS, GRADS, read=nothing)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-6)


BIASES = {"kernel": False, "bias": True}
RATE = osc.onecycle_schedule(0.1, TOTAL)
MOMENTUM = osc.onecycle_momentum_schedule(TOTAL)
DECAYED = optax.add_decayed_weights(0.3, mask=BIASES)
GROUPS = {"multipliers": {0: 0.5, 1: 2.0}}
GROUPS["param_labels"] = osc.label_by_path([("kernel", 0), ("bias", 1)])


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_passes_every_option_on(nesterov):
    options = {"nesterov": nesterov, "accumulator_dtype": jnp.bfloat16}
    ready = osc.sgd(RATE, MOMENTUM, weight_decay=0.3, mask=BIASES, **GROUPS, **options)
    chain = optax.chain(
        DECAYED,
        osc.scheduled_trace(MOMENTUM, **options),
        osc.scale_by_group(**GROUPS),
        optax.scale_by_learning_rate(RATE),
    )
    assert_same_run(ready, chain)


@pytest.mark.parametrize("nesterov", [False, True])
def test_adamw_passes_every_option_on(nesterov):
    options = {"eps": 0.1, "nesterov": nesterov, "mu_dtype": jnp.bfloat16}
    ready = osc.adamw(
        RATE, MOMENTUM, 0.9, weight_decay=0.3, mask=BIASES, **GROUPS, **options
    )
    chain = optax.chain(
        osc.scale_by_scheduled_adam(MOMENTUM, 0.9, **options),
        DECAYED,
        osc.scale_by_group(**GROUPS),
        optax.scale_by_learning_rate(RATE),
    )
    assert_same_run(ready, chain)


@pytest.mark.parametrize(
    ("cycle", "plain"), [(osc.onecycle_sgd, osc.sgd), (osc.onecycle_adamw, osc.adamw)]
)
def test_recipes_pass_every_option_on(cycle, plain):
    phases = {"warmup_steps": 3, "annihilation_steps": 5, "shape": "linear"}
    rate = osc.onecycle_schedule(0.1, TOTAL, init_value=0.05, end_value=0.01, **phases)
    momentum = osc.onecycle_momentum_schedule(
        TOTAL, max_momentum=0.9, base_momentum=0.7, **phases
    )
    rest = {"weight_decay": 0.3, "mask": BIASES, **GROUPS}
    ready = cycle(
        0.1, TOTAL, init_learning_rate=0.05, end_learning_rate=0.01,
        max_momentum=0.9, base_momentum=0.7, **phases, **rest,
    )  # fmt: skip
    assert_same_run(ready, plain(rate, momentum, **rest))
