"""What has shapes and dtypes only: initialised, read and set as arrays are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dialed import LABELS, PARAMS, RECIPES, UNFREEZING
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import optax_superconv as osc

MAKERS = {
    **RECIPES,
    **UNFREEZING,
    "stacked": lambda: osc.adamw(
        0.1,
        multipliers={0: np.ones(8), 1: 0.5},
        param_labels=lambda params: jax.tree.map(
            lambda leaf: +(leaf.shape[0] != 8), params
        ),
    ),
    "links": lambda: optax.chain(
        osc.record_gradient_norms(10, ord=2),
        optax.scale_by_lion(),
        osc.add_decayed_weights(0.1),
        osc.scale_by_group({0: 1.0, 1: 0.5}, LABELS),
        osc.scale_by_learning_rate(0.1),
        osc.ema_params(0.9),
    ),
    "lawa": lambda: optax.chain(osc.sgd(0.1), osc.lawa_params(3)),
    "swa": lambda: optax.chain(osc.sgd(0.1), osc.swa_params(2)),
    "micro-steps": lambda: optax.MultiSteps(osc.adamw(0.1), 2),
}
ABSTRACT = jax.eval_shape(lambda: PARAMS)


def set_all(state, value):
    names = [*osc.read_hyperparams(state)]
    dials = [k for k in names if k.partition("/")[0] not in ("cooldown", "frozen")]
    return osc.set_hyperparams(state, dict.fromkeys(dials, value))


USES = {
    "read": osc.read_hyperparams,
    "set": functools.partial(set_all, value=0.5),
    "release": functools.partial(set_all, value=None),
    "restart": osc.restart_schedules,
    "cooldown": lambda state: osc.start_cooldown(state, 4),
}


def form(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def assert_abstract(found, wanted):
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found)
    )
    assert form(found) == form(wanted)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_init_takes_shapes(make):
    found, wanted = make().init(ABSTRACT), make().init(PARAMS)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert form(found) == form(wanted)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_is_read_and_set_is_abstract_too(make, use):
    state = jax.eval_shape(make().init, PARAMS)
    assert_abstract(use(state), use(make().init(PARAMS)))


@pytest.mark.parametrize("make", [MAKERS["links"], MAKERS["lawa"], MAKERS["swa"]])
def test_averages_of_abstract_states(make):
    state = jax.eval_shape(make().init, PARAMS)
    assert_abstract(osc.eval_params(state, ABSTRACT), PARAMS)


def test_complex_and_narrow_leaves():
    params = {
        "c": jnp.ones(2, jnp.complex64),
        "b": jnp.ones(2, jnp.bfloat16),
        "i": jnp.ones(2, jnp.int32),
    }
    for make in (osc.adamw, osc.sgd, osc.ema_params, osc.lawa_params):
        tx = make(1) if make is osc.lawa_params else make(0.1)
        assert form(tx.init(jax.eval_shape(lambda: params))) == form(tx.init(params))


def test_other_leaves_are_the_same_objects_and_shardings_are_kept():
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    sharding = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(osc.adamw(0.1).init, PARAMS),
    )
    assert osc.read_hyperparams(state)["b1"].sharding == sharding
    after = osc.start_cooldown(osc.set_hyperparams(state, {"b1": 0.5}), 3)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert one == other
        assert one.sharding == other.sharding


def test_an_abstract_nnx_optimizer():
    def make():
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        return nnx.Optimizer(model, osc.onecycle_adamw(0.1, 10), wrt=nnx.Param)

    optimizer = nnx.eval_shape(make)
    before = form(nnx.state(optimizer))
    assert osc.read_hyperparams(optimizer)["learning_rate"].shape == ()
    osc.set_hyperparams(optimizer, {"learning_rate": 0.5})
    osc.start_cooldown(osc.restart_schedules(optimizer), 3)
    assert form(nnx.state(optimizer)) == before


def test_the_rules_hold_for_abstract_states_too():
    state = jax.eval_shape(osc.adamw(0.1).init, PARAMS)
    for values, message in [
        ({"b1": 1.5}, "less than 1"),
        ({"lr": 0.1}, "names that the state holds"),
        ({"cooldown": 0.1}, "cannot be set"),
    ]:
        with pytest.raises(ValueError, match=message):
            osc.set_hyperparams(state, values)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_trace_of_shapes_is_that_of_arrays(use):
    tx = osc.onecycle_adamw(0.1, 10)
    found = jax.eval_shape(functools.partial(use), jax.eval_shape(tx.init, PARAMS))
    assert form(found) == form(use(tx.init(PARAMS)))
