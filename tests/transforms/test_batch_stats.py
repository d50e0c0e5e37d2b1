"""Recalibrated statistics against those of the population, in float64 NumPy."""

import gc
import re
import weakref
from collections import OrderedDict

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import assert_same_bits
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial
from reference import batch_stats

from optax_superconv import recalibrate_batch_stats

pytestmark = pytest.mark.slow  # Most of it is compilation.

SIZES = (7, 3, 7)
WIDTH = 4


def inputs(sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    batches = [rng.normal(1 + k, 1 + k, (n, WIDTH)) for k, n in enumerate(sizes)]
    return [jnp.asarray(batch, jnp.float32) for batch in batches]


# --- networks: lists of layers and norms in a row -------------------------------------


class _Dense(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(3)])
        self.norms = nnx.List([nnx.BatchNorm(WIDTH, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jnp.tanh(norm(layer(x)))
        return x


class _LinenDense(nn.Module):
    def setup(self):
        self.layers = [nn.Dense(WIDTH) for _ in range(3)]
        self.norms = [nn.BatchNorm(use_running_average=False) for _ in range(3)]

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jnp.tanh(norm(layer(x)))
        return x


def perturbed(params):
    """Parameters that no statistics have seen."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(7)
    noise = [rng.normal(1, 0.5, np.shape(leaf)) * (leaf + 0.2) for leaf in leaves]
    return structure.unflatten([jnp.asarray(n, jnp.float32) for n in noise])


def read(tree, part, *names):
    """For each of three layers or norms, its arrays of these names."""
    tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    parts = [tree[part][k] if part in tree else tree[f"{part}_{k}"] for k in range(3)]
    return [[part[name] for name in names] for part in parts]


def nnx_dense():
    graph, params, stats = nnx.split(_Dense(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def update_fn(params, stats, batch):
        model = nnx.merge(graph, params, stats)
        model(batch)
        return nnx.state(model, nnx.BatchStat)

    return Partial(update_fn, perturbed(params)), stats


def linen_dense():
    model = _LinenDense()
    variables = jax.jit(model.init)(jax.random.key(0), inputs()[0])

    def update_fn(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, batch, mutable=["batch_stats"])[1]["batch_stats"]

    return Partial(update_fn, perturbed(variables["params"])), variables["batch_stats"]


def assert_population(found, update_fn, batches):
    (params,) = update_fn.args
    layers = read(params, "layers", "kernel", "bias")
    norms = read(params, "norms", "scale", "bias")
    weights = [(*layer, *norm) for layer, norm in zip(layers, norms, strict=True)]
    expected = batch_stats(weights, batches)
    for got, wanted in zip(read(found, "norms", "mean", "var"), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", [nnx_dense, linen_dense])
def test_statistics_are_those_of_all_examples(network):
    update_fn, stats = network()
    found = recalibrate_batch_stats(update_fn, stats, inputs())
    assert_population(found, update_fn, inputs())


def test_one_batch_of_all_is_what_evaluation_needs():
    model = _Dense(nnx.Rngs(0))
    graph, stats, params = nnx.split(model, nnx.BatchStat, ...)
    everything = jnp.concatenate(inputs())

    def update_fn(stats, x):
        model = nnx.merge(graph, stats, params)
        model(x)
        return nnx.state(model, nnx.BatchStat)

    nnx.update(model, recalibrate_batch_stats(update_fn, stats, [everything]))
    trained = nnx.clone(model)(everything)
    model.eval()
    np.testing.assert_allclose(model(everything), trained, rtol=1e-4, atol=1e-5)


# --- plain functions ------------------------------------------------------------------


def averaging(momentum, out=jnp.float32):
    """The forward pass of a single norm."""

    def update_fn(stats, x):
        own = {"mean": x.mean(0), "var": x.var(0)}
        return {
            name: (momentum * old + (1 - momentum) * own[name]).astype(out)
            for name, old in stats.items()
        }

    return update_fn


def fresh(dtype=jnp.float32, size=WIDTH):
    return {"mean": jnp.zeros(size, dtype), "var": jnp.ones(size, dtype)}


def whole(batches=None):
    everything = np.concatenate(inputs() if batches is None else batches)
    return everything.astype(np.float64)


# 1 - m is known to half a unit in the last place of 1.
MOMENTA = {
    **{0.0: 2e-7, 0.1: 3e-7, 0.9: 1e-6, 0.99: 5e-6, 0.999: 5e-5},
    **{1 - 2**-10: 3e-7, 0.9999: 5e-4},
}


@pytest.mark.parametrize("momentum", MOMENTA)
def test_any_momentum_gives_the_same(momentum):
    found = recalibrate_batch_stats(averaging(momentum), fresh(), inputs())
    tolerance = MOMENTA[momentum]
    np.testing.assert_allclose(found["mean"], whole().mean(0), rtol=tolerance)
    np.testing.assert_allclose(found["var"], whole().var(0), rtol=tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.9999])
def test_bfloat16_statistics_are_rounded_once(momentum):
    update_fn = averaging(momentum)
    batches = inputs((5,) * 40)
    found = recalibrate_batch_stats(update_fn, fresh(jnp.bfloat16), batches)
    assert found["var"].dtype == jnp.bfloat16
    var = np.asarray(found["var"], np.float64)
    np.testing.assert_allclose(var, whole(batches).var(0), rtol=2**-8 + 5e-4)


def test_a_large_mean_leaves_a_small_variance_intact():
    rng = np.random.default_rng(0)
    x = (1e3 + rng.normal(size=(4000, WIDTH))).astype(np.float32)
    found = recalibrate_batch_stats(averaging(0.99), fresh(), np.split(x, 250))
    np.testing.assert_allclose(found["mean"], whole([x]).mean(0), rtol=5e-6)
    np.testing.assert_allclose(found["var"], whole([x]).var(0), rtol=1e-4)


def test_float64(x64):
    batches = [np.asarray(batch, np.float64) for batch in inputs()]
    update_fn = averaging(0.9, out=jnp.float64)
    found = recalibrate_batch_stats(update_fn, fresh(jnp.float64), batches)
    np.testing.assert_allclose(found["var"], whole().var(0), rtol=1e-14)


def test_strict_promotion(strict):
    stats = {"norm": fresh(jnp.bfloat16), "other": fresh()}

    def update_fn(stats, x):
        return {name: averaging(0.9)(part, x) for name, part in stats.items()}

    recalibrate_batch_stats(update_fn, stats, inputs())


def test_a_leaf_in_no_pair_is_the_mean_of_the_examples():
    def update_fn(stats, x):
        size = 1e17 * jnp.sqrt(jnp.mean(jnp.square(x)))
        return {**averaging(0.9)(fresh(), x), "size": 0.9 * stats["size"] + 0.1 * size}

    found = recalibrate_batch_stats(update_fn, {**fresh(), "size": 1.0}, inputs())
    sizes = [np.sqrt(np.mean(np.square(batch))) for batch in inputs()]
    expected = 1e17 * np.average(sizes, weights=SIZES)
    np.testing.assert_allclose(found["size"], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [iter, list])
def test_batches_come_from_a_sequence_or_an_iterator(kind):
    batches = inputs((7, 7, 7))
    found = recalibrate_batch_stats(averaging(0.9), fresh(), kind(batches))
    np.testing.assert_allclose(found["var"], whole(batches).var(0), rtol=1e-5)


def test_labels_and_keys_in_a_batch():
    batches = [(x, np.zeros(len(x)), jax.random.key(0)) for x in inputs()]
    update_fn = averaging(0.9)
    found = recalibrate_batch_stats(
        lambda stats, batch: update_fn(stats, batch[0]), fresh(), batches
    )
    np.testing.assert_allclose(found["var"], whole().var(0), rtol=1e-5)


# --- what is not averaged -------------------------------------------------------------


def test_keys_and_counters_stay_as_they_came():
    def update_fn(stats, x):
        kept = jax.random.bernoulli(stats["key"], 0.5, x.shape)
        return {
            "key": jax.random.split(stats["key"])[0],
            "count": stats["count"] + 1,
            "norm": averaging(0.9)(stats["norm"], jnp.where(kept, x, 0)),
        }

    stats = {"key": jax.random.key(3), "count": jnp.int32(5), "norm": fresh()}
    found = recalibrate_batch_stats(update_fn, stats, inputs())
    assert found["key"] == stats["key"]
    assert found["count"] == 5
    masks = [jax.random.bernoulli(jax.random.key(3), 0.5, x.shape) for x in inputs()]
    seen = [np.where(mask, x, 0) for mask, x in zip(masks, inputs(), strict=True)]
    np.testing.assert_allclose(found["norm"]["var"], whole(seen).var(0), rtol=1e-5)


def behind_a_frozen_norm(stats, x):
    frozen = stats["frozen"]
    x = jnp.tanh((x - frozen["mean"]) / jnp.sqrt(frozen["var"] + 1e-5))
    return {"frozen": frozen, "norm": averaging(0.9)(stats["norm"], x)}


FROZEN = {"mean": jnp.full(WIDTH, 0.7), "var": jnp.full(WIDTH, 3.0)}


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_a_frozen_norm_keeps_its_statistics_and_is_used(transform):
    @transform
    def run(stats):
        return recalibrate_batch_stats(behind_a_frozen_norm, stats, inputs())

    found = run({"frozen": FROZEN, "norm": fresh()})
    assert_same_bits(found["frozen"], FROZEN)
    seen = np.tanh((whole() - 0.7) / np.sqrt(np.float32(3) + 1e-5))
    np.testing.assert_allclose(found["norm"]["var"], seen.var(0), rtol=1e-5)


def test_nnx_returns_what_nnx_state_returns():
    update_fn, stats = nnx_dense()
    found = recalibrate_batch_stats(update_fn, stats, inputs())
    assert jax.tree.structure(found) == jax.tree.structure(stats)


def test_the_container_that_is_given_comes_back():
    update_fn, stats = linen_dense()  # Which returns dicts.
    found = recalibrate_batch_stats(update_fn, FrozenDict(stats), inputs())
    assert isinstance(found, FrozenDict)


def test_leaves_are_found_by_their_paths():
    def update_fn(stats, x):
        return OrderedDict(reversed(averaging(0.9)(stats, x).items()))

    found = recalibrate_batch_stats(update_fn, fresh(), inputs())
    np.testing.assert_allclose(found["var"], whole().var(0), rtol=1e-5)


def test_names_of_whole_paths_are_a_pair():
    def update_fn(stats, x):
        new = averaging(0.9)({k: v["norm"] for k, v in stats.items()}, x)
        return {k: {"norm": v} for k, v in new.items()}

    stats = {k: {"norm": v} for k, v in fresh().items()}
    pairs = [("mean/norm", "var/norm")]
    found = recalibrate_batch_stats(update_fn, stats, inputs(), pairs=pairs)
    np.testing.assert_allclose(found["var"]["norm"], whole().var(0), rtol=1e-5)


# --- where the results are ------------------------------------------------------------


def counted(stats, x):
    """With two leaves that a forward pass of averaging leaves as they are."""
    norm = averaging(0.9)({k: stats[k] for k in ("mean", "var")}, x)
    return {**stats, **norm, "count": stats["count"] + 1}


def counted_stats():
    return {**fresh(), "count": jnp.int32(5), "frozen": jnp.ones(3)}


def test_results_outlive_the_statistics_that_were_given():
    stats = counted_stats()
    found = recalibrate_batch_stats(counted, stats, inputs())
    for leaf in jax.tree.leaves(stats):
        leaf.delete()
    assert int(found["count"]) == 5
    np.testing.assert_array_equal(found["frozen"], np.ones(3))


def test_statistics_in_the_memory_of_the_host_stay_there():
    (device,) = jnp.zeros(()).devices()
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    stats = jax.device_put(counted_stats(), host)
    found = recalibrate_batch_stats(counted, stats, inputs())
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(found)}
    assert kinds == {"pinned_host"}
    np.testing.assert_allclose(np.asarray(found["var"]), whole().var(0), rtol=1e-5)


# --- transformations ------------------------------------------------------------------


def test_under_jit():
    update_fn, stats = nnx_dense()
    found = jax.jit(recalibrate_batch_stats)(update_fn, stats, inputs())
    assert_population(found, update_fn, inputs())


@pytest.mark.parametrize("closure", [False, True])
def test_several_weights_under_vmap(closure):
    update_fn, stats = linen_dense()

    def run(scale):
        params = jax.tree.map(lambda p: scale * p, update_fn.args[0])
        new_fn = Partial(update_fn.func, params)
        if closure:
            new_fn = lambda stats, batch: update_fn.func(params, stats, batch)  # noqa: E731
        return recalibrate_batch_stats(new_fn, stats, inputs())

    scales = jnp.array([1.0, 1.5])
    found = jax.jit(jax.vmap(run))(scales)
    for k, scale in enumerate(scales):
        for one, other in zip(
            jax.tree.leaves(found), jax.tree.leaves(run(scale)), strict=True
        ):
            np.testing.assert_allclose(one[k], other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_examples(kind):
    update_fn, stats = linen_dense()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    over_examples = NamedSharding(mesh, PartitionSpec("data"))
    batches = jax.device_put(inputs((16, 8, 16)), over_examples)
    update_fn, stats = jax.device_put((update_fn, stats), everywhere)
    found = recalibrate_batch_stats(update_fn, stats, batches)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(found))
    assert_population(found, update_fn, inputs((16, 8, 16)))


def test_a_function_is_traced_once_per_shape():
    shapes = []

    def update_fn(stats, x):
        shapes.append(x.shape)
        return averaging(0.9)(stats, x)

    recalibrate_batch_stats(update_fn, fresh(), inputs((7, 3, 7, 3)))
    assert shapes == [(7, WIDTH), (3, WIDTH)]


def test_batches_after_the_first_are_evaluated_once():
    sizes = []

    def update_fn(stats, x):
        sizes.append(len(x))
        return averaging(0.9)(stats, x)

    with jax.disable_jit():
        recalibrate_batch_stats(update_fn, fresh(), inputs((6, 5, 4)))
    assert sizes == [6, 6, 6, 5, 4]


def test_what_the_caller_has_compiled_is_not_compiled_again():
    shapes = []

    @jax.jit
    def update_fn(scale, stats, x):
        shapes.append(x.shape)
        return averaging(0.9)(stats, scale * x)

    for scale in (1.0, 2.0):
        forward = Partial(update_fn, scale)
        found = recalibrate_batch_stats(forward, fresh(), inputs())
        np.testing.assert_allclose(found["mean"], scale * whole().mean(0), rtol=1e-5)
    assert shapes == [(7, WIDTH), (3, WIDTH)]


# --- functions whose values change, or cannot be hashed -------------------------------


class _Trainer:
    """Equal to all others, and without a hash."""

    __hash__ = None

    def __init__(self, scale):
        self.scale = scale

    def __eq__(self, other):
        return True

    def __call__(self, stats, x):
        return averaging(0.9)(stats, self.scale * x)


@pytest.mark.parametrize("wrap", [lambda f: lambda *a: f(*a), lambda f: f.__call__])
def test_what_a_function_closes_over_is_read_in_every_call(wrap):
    trainer = _Trainer(1.0)
    update_fn = wrap(trainer)
    for trainer.scale in (1.0, 2.0):
        found = recalibrate_batch_stats(update_fn, fresh(), inputs())
        expected = trainer.scale * whole().mean(0)
        np.testing.assert_allclose(found["mean"], expected, rtol=1e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: Partial(f.__call__)])
def test_a_function_does_not_outlive_its_call(wrap):
    trainer = _Trainer(1.0)
    recalibrate_batch_stats(wrap(trainer), fresh(), inputs())
    reference = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert reference() is None


class _Listed(nn.Module):
    """With an attribute that cannot be hashed, as Flax's ResNet(stage_sizes=[...])."""

    features: list

    @nn.compact
    def __call__(self, x):
        for width in self.features:
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(width)(x))
        return x

    def forward(self, params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        return self.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]


UNHASHABLE = {
    "a method": lambda model, params: Partial(model.forward, params),
    "an argument": lambda model, params: Partial(_Listed.forward, model, params),
    "a closure": lambda model, params: lambda *args: model.forward(params, *args),
}


@pytest.mark.parametrize("name", UNHASHABLE)
def test_modules_that_cannot_be_hashed(name):
    model = _Listed([8, WIDTH])
    variables = jax.jit(model.init)(jax.random.key(0), inputs()[0])
    params, stats = variables["params"], variables["batch_stats"]
    update_fn = UNHASHABLE[name](model, params)
    found = recalibrate_batch_stats(update_fn, stats, inputs())
    seen = whole() @ np.asarray(params["Dense_0"]["kernel"], np.float64)
    np.testing.assert_allclose(found["BatchNorm_0"]["var"], seen.var(0), rtol=1e-5)


def test_an_object_that_cannot_be_hashed():
    found = recalibrate_batch_stats(_Trainer(1.0), fresh(), inputs())
    np.testing.assert_allclose(found["mean"], whole().mean(0), rtol=1e-5)


# --- other frameworks -----------------------------------------------------------------


class _EquinoxDense(eqx.Module):
    layers: list
    norms: list

    def __init__(self, mode):
        keys = jax.random.split(jax.random.key(0), 2)
        self.layers = [eqx.nn.Linear(WIDTH, WIDTH, key=key) for key in keys]
        self.norms = [eqx.nn.BatchNorm(WIDTH, "batch", mode=mode) for _ in keys]

    def __call__(self, x, state):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x, state = norm(layer(x), state)
            x = jnp.tanh(x)
        return x, state


def run_equinox(model, state, x):
    return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
        x, state
    )


def equinox_dense(mode):
    model, state = eqx.nn.make_with_state(_EquinoxDense)(mode)
    return model, state, lambda state, x: run_equinox(model, state, x)[1]


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_equinox_from_a_new_state(mode):
    model, state, update_fn = equinox_dense(mode)
    everything = jnp.concatenate(inputs())
    found = recalibrate_batch_stats(update_fn, state, [everything], pairs=[("0", "1")])
    trained = run_equinox(model, state, everything)[0]
    evaluated = run_equinox(eqx.nn.inference_mode(model), found, everything)[0]
    np.testing.assert_allclose(evaluated, trained, rtol=1e-4, atol=1e-5)


def test_equinox_norms_that_normalise_with_running_averages_are_refused():
    _, state, update_fn = equinox_dense("ema")
    state = jax.jit(update_fn)(state, inputs()[0])  # No longer the first time.
    message = "others at '3/0', '3/1'. Build the norm with a momentum of 0"
    with pytest.raises(ValueError, match=re.escape(message)):
        recalibrate_batch_stats(update_fn, state, inputs(), pairs=[("0", "1")])


HAIKU_PAIRS = [(f"mean_ema/{k}", f"var_ema/{k}") for k in ("hidden", "average")]


def haiku_norm(decay_rate):
    def forward(x, is_training):
        return hk.BatchNorm(True, True, decay_rate)(x, is_training)

    network = hk.transform_with_state(forward)
    params, state = network.init(None, inputs()[0], is_training=True)

    def update_fn(state, x):
        return network.apply(params, state, None, x, is_training=True)[1]

    return state, update_fn


def test_haiku_without_momentum():
    state, update_fn = haiku_norm(0.0)
    found = recalibrate_batch_stats(update_fn, state, inputs(), pairs=HAIKU_PAIRS)
    found = found["batch_norm/~/var_ema"]["average"][0]
    np.testing.assert_allclose(found, whole().var(0), rtol=1e-5)


@pytest.mark.parametrize("steps", [0, 90])
def test_haiku_averages_that_are_debiased_are_refused(steps):
    state, update_fn = haiku_norm(0.9)
    for average in state.values():
        average["counter"] = jnp.int32(steps)
    names = [f"batch_norm/~/{k}_ema/average" for k in ("mean", "var")]
    with pytest.raises(ValueError, match=re.escape(f"others at {str(names)[1:-1]}. ")):
        recalibrate_batch_stats(update_fn, state, inputs(), pairs=HAIKU_PAIRS)


# --- errors ---------------------------------------------------------------------------


def call(update_fn=None, stats=None, batches=None, **options):
    update_fn = averaging(0.9) if update_fn is None else update_fn
    stats = fresh() if stats is None else stats
    batches = inputs() if batches is None else batches
    return lambda: recalibrate_batch_stats(update_fn, stats, batches, **options)


def with_size(size):
    def update_fn(stats, x):
        new = {**stats, **averaging(0.9)({k: stats[k] for k in ("mean", "var")}, x)}
        return {**new, "size": size(stats["size"], jnp.max(x))}

    return update_fn


def sized(size):
    return call(with_size(size), {**fresh(), "size": jnp.float32(1)})


NOT_AVERAGES = {
    "a counter": lambda old, own: old + 1,
    "a sum": lambda old, own: old + own,
    "a product": lambda old, own: old * own,
    "a maximum": lambda old, own: jnp.maximum(old, own),
    "debiased": lambda old, own: (0.9 * old + 0.1 * own) / (1 - 0.9**20),
    "not affine": lambda old, own: jnp.sqrt(0.9 * old**2 + 0.1 * own**2 + 1),
    "overflowing": lambda old, own: 0.9 * old + 0.1 * own + 0 * old**4,
    "too slow": lambda old, own: (1 - 1e-6) * old + 1e-6 * own,
    "a momentum lost in bfloat16": lambda old, own: (0.9 * old + 0.1 * own).astype(
        jnp.bfloat16
    ),
}


@pytest.mark.parametrize("name", NOT_AVERAGES)
def test_what_is_no_running_average_is_refused(name):
    with pytest.raises(ValueError, match=r"others at 'size'\. Build the norm with a"):
        sized(NOT_AVERAGES[name])()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            call(lambda stats, x: stats),
            "`update_fn` must be a forward pass in training mode, which updates "
            "`stats`, got one that returns them as they are.",
        ),
        (
            call(lambda stats, x: {"mean": stats["mean"][:1]}),
            "`update_fn` must be a function that returns `stats` with the same names "
            "and shapes, got others at 'mean', 'var'.",
        ),
        (
            call(stats={"count": jnp.int32(0)}),
            "`stats` must be a pytree with float leaves, got 'count'.",
        ),
        (
            call(stats={"norm": {"mean": jnp.ones(1)}, "norm/mean": jnp.ones(1)}),
            "`stats` must be a pytree with a path per leaf, got 'norm/mean', 'norm/",
        ),
        (call(stats={}), "`stats` must be a pytree with float leaves, got no leaves."),
        (call(batches=[]), "`batches` must be at least one batch, got none."),
        (
            call(batches=[(jnp.ones((2, 4)), jnp.ones(3))]),
            "`batches` must be batches of arrays with one leading axis of examples, at "
            "least 1 (`update_fn` can close over what has none), got lengths [2, 3].",
        ),
        (call(batches=[jnp.ones((0, 4))]), "got lengths [0]."),
        (call(batches=[1.0]), "got lengths []."),
        (
            call(batches=[*inputs(), np.full((7, 4), np.nan, np.float32)]),
            "`batches` must be batches whose statistics are finite, got others at "
            "'mean' in batch 3 (from 0).",
        ),
        (
            call(batches=[np.full((7, 4), np.inf, np.float32)]),
            "got others at 'mean' in batch 0 (from 0).",
        ),
        (
            call(pairs=[("mean", "scale")]),
            "`pairs` must be names of float leaves side by side in `stats`, () if it "
            "has no variance, got ('mean', 'scale') and leaves 'mean', 'var'.",
        ),
        (call(pairs=[("a/mean", "a/var")]), "got ('a/mean', 'a/var') and leaves"),
    ],
)
def test_bad_values(run, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (call(3), "`update_fn` must be callable, got 3 of type int."),
        (call(batches=3), "(a single batch goes in a list), got a single int"),
        # Each would be cut into its examples, whose variance is 0.
        (call(batches=inputs()[0]), "goes in a list), got a single array"),
        (call(batches={"x": inputs()[0]}), "goes in a list), got a single dict"),
        (call(batches=(inputs()[0],) * 2), "goes in a list), got a single tuple"),
        (call(pairs=("mean", "var")), "`pairs` must hold pairs of two names, got 'mea"),
        (call(pairs=[("mean", 1)]), "`pairs` must hold pairs of two names, got ('mean"),
    ],
)
def test_bad_types(run, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        run()
