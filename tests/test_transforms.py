"""The contract of every transformation."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from descriptors import TOTAL, TRANSFORMS, make_grads, make_params
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

import optax_superconv as osc

STEPS = TOTAL + 5
every = pytest.mark.parametrize("case", TRANSFORMS, ids=lambda case: case.name)


def at(grads, t):
    return jax.tree.map(lambda g: g[t], grads)


def train(tx, params, grads, update=None):
    """Parameters after each step, stacked, and the last state."""
    update = update or jax.jit(tx.update)
    state, history = tx.init(params), []
    for t in range(len(jax.tree.leaves(grads)[0])):
        updates, state = update(at(grads, t), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *history), state


def scan_train(tx, params, grads):
    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), history = jax.lax.scan(step, (params, tx.init(params)), grads)
    return history, state


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.aval.weak_type), tree)


@every
def test_matches_reference(case):
    params, grads = make_params(), make_grads(STEPS)
    history, _ = scan_train(case.make(case.value), params, grads)
    for name in params:
        expected = case.reference(
            np.asarray(params[name], np.float64), np.asarray(grads[name], np.float64)
        )
        np.testing.assert_allclose(history[name], expected, rtol=1e-4, atol=1e-5)


@every
def test_eager_jit_and_scan_agree(case):
    tx, params, grads = case.make(case.value), make_params(), make_grads(STEPS)
    eager, _ = train(tx, params, grads, tx.update)
    jitted, _ = train(tx, params, grads)
    scanned, _ = scan_train(tx, params, grads)
    chex.assert_trees_all_close(eager, jitted, scanned, rtol=1e-4, atol=1e-6)


@every
def test_value_may_be_batched(case):
    params, grads = make_params(), make_grads(STEPS)
    values = case.value * jnp.array([1.0, 0.5])
    batched = jax.vmap(lambda v: scan_train(case.make(v), params, grads)[0])(values)
    for k, value in enumerate(values):
        single, _ = scan_train(case.make(value), params, grads)
        chex.assert_trees_all_close(at(batched, k), single, rtol=1e-4, atol=1e-6)


@every
@pytest.mark.slow
def test_derivative_in_the_value_is_the_finite_difference(case, x64):
    params, grads = make_params(jnp.float64), make_grads(STEPS, jnp.float64)

    def final(value):
        return scan_train(case.make(value), params, grads)[0]["kernel"][-1].sum()

    # The dials are float32, so the step must be large and the difference central.
    value, step = case.value, 1e-2 * case.value
    slope = (final(value + step) - final(value - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(final)(value), slope, rtol=1e-2)


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed"])
def test_dtypes_and_structure_never_change(case, dtype, strict):
    params, grads = make_params(), make_grads(3)
    if dtype == "mixed":
        params["kernel"] = params["kernel"].astype(jnp.bfloat16)
        grads["kernel"] = grads["kernel"].astype(jnp.bfloat16)
    else:
        params, grads = jax.tree.map(lambda x: x.astype(dtype), (params, grads))
    tx = case.make(case.value)
    state = tx.init(params)
    for t in range(3):
        updates, new_state = tx.update(at(grads, t), state, params)
        assert types(new_state) == types(state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        state = new_state


@every
def test_keeps_float64(case, x64):
    params, grads = make_params(jnp.float64), make_grads(3, jnp.float64)
    history, _ = train(case.make(case.value), params, grads)
    assert {leaf.dtype for leaf in jax.tree.leaves(history)} == {jnp.dtype("float64")}


@every
def test_one_trace_for_many_steps(case):
    tx, params, grads = case.make(case.value), make_params(), make_grads(5)
    chex.clear_trace_counter()
    train(tx, params, grads, jax.jit(chex.assert_max_traces(tx.update, 1)))


@every
def test_leaks_no_tracer(case):
    params, grads = make_params(), make_grads(2)
    with jax.checking_leaks():
        jax.jit(lambda v: scan_train(case.make(v), params, grads)[0])(case.value)


@every
def test_state_may_be_donated(case):
    tx, params, grads = case.make(case.value), make_params(), make_grads(STEPS)
    donating = jax.jit(tx.update, donate_argnums=1)
    kept, _ = train(tx, params, grads)
    donated, _ = train(tx, params, grads, donating)
    chex.assert_trees_all_equal(kept, donated)


@every
def test_state_survives_pickle_and_flatten(case):
    tx, params, grads = case.make(case.value), make_params(), make_grads(3)
    _, state = train(tx, params, grads)
    leaves, treedef = jax.tree.flatten(state)
    for copy in (
        pickle.loads(pickle.dumps(state)),
        jax.tree.unflatten(treedef, leaves),
    ):
        chex.assert_trees_all_equal(copy, state)
        assert jax.tree.structure(copy) == treedef


@every
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(0, marks=pytest.mark.slow),
        7,
        pytest.param(TOTAL, marks=pytest.mark.slow),
    ],
)
def test_continues_bit_for_bit_after_a_checkpoint(case, step, tmp_path):
    tx, params, grads = case.make(case.value), make_params(), make_grads(STEPS)
    update = jax.jit(tx.update)
    whole, _ = train(tx, params, grads, update)
    state = tx.init(params)
    for t in range(step):
        updates, state = update(at(grads, t), state, params)
        params = optax.apply_updates(params, updates)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", (params, tx.init(params)))
    params, state = restored
    for t in range(step, STEPS):
        updates, state = update(at(grads, t), state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal(params, at(whole, t))


@every
def test_multi_steps_counts_optimizer_steps(case):
    params, grads = make_params(), make_grads(6)
    whole, plain_state = train(case.make(case.value), params, grads)
    multi = optax.MultiSteps(case.make(case.value), every_k_schedule=3)
    thrice = jax.tree.map(lambda g: jnp.repeat(g, 3, axis=0), grads)
    accumulated, state = train(multi, params, thrice)
    every_third = jax.tree.map(lambda p: p[2::3], accumulated)
    chex.assert_trees_all_close(every_third, whole, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        osc.read_hyperparams(state), osc.read_hyperparams(plain_state), rtol=1e-6
    )


@every
@pytest.mark.parametrize("wrapper", ["masked", "partition", "apply_if_finite"])
def test_wrappers_change_nothing_for_what_they_pass_on(case, wrapper):
    params, grads = make_params(), make_grads(6)
    tx = case.make(case.value)
    wrapped = {
        "masked": lambda: optax.masked(tx, {"kernel": True, "bias": False}),
        "partition": lambda: optax.partition(
            {"on": tx, "off": optax.set_to_zero()}, {"kernel": "on", "bias": "off"}
        ),
        "apply_if_finite": lambda: optax.apply_if_finite(tx, 3),
    }[wrapper]()
    alone, _ = train(tx, params, grads)
    inside, _ = train(wrapped, params, grads)
    chex.assert_trees_all_close(inside["kernel"], alone["kernel"], rtol=1e-5, atol=1e-6)


@every
def test_inject_hyperparams_gives_the_same(case):
    factory, arguments, static = case.inject
    params, grads = make_params(), make_grads(6)
    injected = optax.inject_hyperparams(factory, static_args=static)(**arguments)
    inside, _ = train(injected, params, grads)
    plain, _ = train(factory(**arguments), params, grads)
    chex.assert_trees_all_close(inside, plain, rtol=1e-5)


@every
def test_sharded_over_eight_devices_gives_the_same(case):
    params, grads = make_params(), make_grads(6)
    tx = case.make(case.value)
    single, _ = train(tx, params, grads)
    mesh = jax.make_mesh((8,), ("data",))

    def place(leaf, axis):
        spec = [None] * leaf.ndim
        if leaf.shape[axis] % 8 == 0:
            spec[axis] = "data"
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    sharded_params = jax.tree.map(lambda p: place(p, 0), params)
    sharded_grads = jax.tree.map(lambda g: place(g, 1), grads)
    sharded, state = train(tx, sharded_params, sharded_grads)
    chex.assert_trees_all_close(sharded, single, rtol=1e-6)
    for leaf in jax.tree.leaves(state):
        if leaf.shape == params["kernel"].shape:
            assert not leaf.sharding.is_fully_replicated


@every
def test_exports_for_all_platforms(case):
    tx, params = case.make(case.value), make_params()
    exported = export.export(jax.jit(tx.update), platforms=("cpu", "cuda", "tpu"))(
        params, tx.init(params), params
    )
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_leaves_the_dials_alone(case, bad):
    tx, params, grads = case.make(case.value), make_params(), make_grads(6)
    spoiled = jax.tree.map(lambda g: g.at[2].set(bad), grads)
    _, good = train(tx, params, grads)
    _, state = train(tx, params, spoiled)
    chex.assert_trees_all_equal(osc.read_hyperparams(state), osc.read_hyperparams(good))


@every
def test_passes_leaves_that_are_none(case):
    params, grads = make_params(), make_grads(2)
    tx = case.make(case.value)
    with_none, _ = train(tx, {**params, "absent": None}, {**grads, "absent": None})
    without, _ = train(tx, params, grads)
    assert with_none.pop("absent") is None
    chex.assert_trees_all_equal(with_none, without)


@every
def test_reads_back_the_names_it_promises(case):
    state = case.make(case.value).init(make_params())
    assert tuple(osc.read_hyperparams(state)) == case.keys


def test_constant_and_schedule_share_one_structure():
    params = make_params()
    for make in (
        osc.scale_by_learning_rate,
        osc.scheduled_trace,
        osc.scale_by_scheduled_adam,
        functools.partial(osc.onecycle_sgd, 0.1, 10, weight_decay_mask=None),
    ):
        name = {"weight_decay": 0.0} if isinstance(make, functools.partial) else None
        constant = make(**name) if name else make(0.5)
        scheduled = make(weight_decay=lambda t: 0.5) if name else make(lambda t: 0.5)
        assert types(constant.init(params)) == types(scheduled.init(params))


def test_onecycle_adamw_keeps_at_most_four_kibibytes_more_than_adamw():
    params = {f"leaf_{k}": jnp.zeros((4, 4)) for k in range(576)}

    def size(tx):
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    assert size(osc.onecycle_adamw(0.1, 10)) <= size(optax.adamw(0.1)) + 4096


@every
def test_the_count_saturates_and_the_dials_stay_at_their_end(case):
    tx, params, grads = case.make(case.value), make_params(), make_grads(2)
    last = jnp.int32(np.iinfo(np.int32).max)
    state = jax.tree.map(
        lambda leaf: last if leaf.dtype == jnp.int32 else leaf, tx.init(params)
    )
    for t in range(2):
        updates, state = tx.update(at(grads, t), state, params)
        chex.assert_tree_all_finite(updates)
    counts = [x for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
    assert counts
    assert all(count == last for count in counts)


@pytest.mark.parametrize("nesterov", [False, True])
def test_recipes_pass_every_option_on(nesterov):
    rates = {
        "warmup_steps": 3,
        "annihilation_steps": 5,
        "shape": "linear",
    }
    rate = osc.onecycle_schedule(0.1, TOTAL, init_value=0.05, end_value=0.01, **rates)
    momentum = osc.onecycle_momentum_schedule(
        TOTAL, max_momentum=0.9, base_momentum=0.7, **rates
    )
    recipe = {
        "init_learning_rate": 0.05,
        "end_learning_rate": 0.01,
        "nesterov": nesterov,
    }
    decay = {"weight_decay": 0.3, "weight_decay_mask": {"kernel": False, "bias": True}}
    decayed = optax.add_decayed_weights(0.3, mask=decay["weight_decay_mask"])
    sgd = osc.onecycle_sgd(
        0.1, TOTAL, max_momentum=0.9, base_momentum=0.7,
        accumulator_dtype=jnp.bfloat16, **recipe, **rates, **decay,
    )  # fmt: skip
    sgd_chain = optax.chain(
        decayed,
        osc.scheduled_trace(
            momentum, nesterov=nesterov, accumulator_dtype=jnp.bfloat16
        ),
        optax.scale_by_learning_rate(rate),
    )
    adamw = osc.onecycle_adamw(
        0.1, TOTAL, max_b1=0.9, base_b1=0.7, b2=0.9, eps=0.1,
        mu_dtype=jnp.bfloat16, **recipe, **rates, **decay,
    )  # fmt: skip
    adamw_chain = optax.chain(
        osc.scale_by_scheduled_adam(
            momentum, 0.9, eps=0.1, mu_dtype=jnp.bfloat16, nesterov=nesterov
        ),
        decayed,
        optax.scale_by_learning_rate(rate),
    )
    params, grads = make_params(), make_grads(STEPS)
    for ready, chain in ((sgd, sgd_chain), (adamw, adamw_chain)):
        ours, _ = scan_train(ready, params, grads)
        theirs, _ = scan_train(chain, params, grads)
        chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-6)
