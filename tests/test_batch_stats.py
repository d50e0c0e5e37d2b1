"""Recalibrated statistics against those of the whole data set, in float64 NumPy."""

import functools
import re
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_superconv.transforms._batch_stats import recalibrate_batch_stats

SIZES = (7, 1, 7, 1)  # A program for each size.
WIDTH = 4


def inputs(sizes=SIZES, shape=(4,), seed=0):
    rng = np.random.default_rng(seed)
    batches = [rng.normal(1 + k, 1 + k, (size, *shape)) for k, size in enumerate(sizes)]
    return [jnp.asarray(batch, jnp.float32) for batch in batches]


class _Dense(nnx.Module):
    """Three norms in a row, with dropout that is active as built."""

    def __init__(self, rngs, **norm):
        sizes = (4, WIDTH, WIDTH, WIDTH)
        self.layers = nnx.List(
            [nnx.Linear(*sizes[k : k + 2], rngs=rngs) for k in range(3)]
        )
        self.norms = nnx.List(
            [nnx.BatchNorm(WIDTH, rngs=rngs, **norm) for _ in range(3)]
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.dropout(jnp.tanh(norm(layer(x))))
        return x


class _LinenDense(nn.Module):
    train: bool = True
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        norm = nn.remat(nn.BatchNorm) if self.remat else nn.BatchNorm
        for k in range(3):
            x = nn.Dense(WIDTH, name=f"layer{k}")(x)
            x = norm(use_running_average=not self.train, name=f"norm{k}")(x)
            x = nn.Dropout(0.5, deterministic=not self.train)(jnp.tanh(x))
        return x


class _Conv(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, WIDTH, (1, 1), rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


def perturbed(tree, seed=7):
    """Parameters that no statistics have seen."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    leaves = [np.asarray(leaf) + np.float32(0.2) for leaf in leaves]
    noise = [rng.normal(1, 0.5, leaf.shape) * leaf for leaf in leaves]
    return structure.unflatten([jnp.asarray(n, jnp.float32) for n in noise])


def dense_reference(weights, x, batches=None):
    """(mean, variance) of each norm of three: over ``x``, or batch by batch.

    ``weights``: (kernel, bias, scale, offset) per layer. With ``batches`` every batch
    is normalised by its own statistics, and their moments are pooled.
    """
    parts = [np.asarray(b, np.float64) for b in ([x] if batches is None else batches)]
    found = []
    for layer in weights:
        kernel, bias, scale, offset = (np.asarray(w, np.float64) for w in layer)
        parts = [part @ kernel + bias for part in parts]
        everything = np.concatenate(parts)
        found.append((everything.mean(0), everything.var(0)))
        parts = [
            np.tanh((p - p.mean(0)) / np.sqrt(p.var(0) + 1e-5) * scale + offset)
            for p in parts
        ]
    return found


def nnx_weights(params):
    params = nnx.to_pure_dict(params)
    return [
        (
            *(params["layers"][k][name] for name in ("kernel", "bias")),
            *(params["norms"][k][name] for name in ("scale", "bias")),
        )
        for k in range(3)
    ]


def linen_weights(params):
    return [
        (
            *(params[f"layer{k}"][name] for name in ("kernel", "bias")),
            *(params[f"norm{k}"][name] for name in ("scale", "bias")),
        )
        for k in range(3)
    ]


def pairs(stats):
    """(mean, variance) of each norm of ``_Dense`` or ``_LinenDense``."""
    if isinstance(stats, nnx.State):
        norms = [stats["norms"][k] for k in range(3)]
        return [(norm["mean"][...], norm["var"][...]) for norm in norms]
    return [(stats[f"norm{k}"]["mean"], stats[f"norm{k}"]["var"]) for k in range(3)]


def assert_close(found, expected, tolerance=1e-5):
    for got, wanted in zip(found, expected, strict=True):
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture
def dense():
    model = _Dense(nnx.Rngs(0))
    return model, perturbed(nnx.state(model, nnx.Param))


@pytest.fixture(scope="module")
def linen_dense():
    model = _LinenDense()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(model.init)(keys, inputs()[0])
    return model, {**variables, "params": perturbed(variables["params"])}


def test_deep_nnx_equals_the_whole_data_set(dense):
    model, params = dense
    stats = recalibrate_batch_stats(model, params, inputs())
    whole = np.concatenate(inputs())
    assert_close(pairs(stats), dense_reference(nnx_weights(params), whole))


def test_deep_linen_equals_the_whole_data_set(linen_dense):
    model, variables = linen_dense
    stats = recalibrate_batch_stats(model, variables, inputs())
    whole = np.concatenate(inputs())
    assert_close(
        pairs(stats), dense_reference(linen_weights(variables["params"]), whole)
    )


def test_a_first_batch_that_shows_nothing_ends_no_pass(dense):
    model, params = dense
    batches = [np.zeros((0, 4), np.float32), *inputs()]
    stats = recalibrate_batch_stats(model, params, batches)
    expected = dense_reference(nnx_weights(params), np.concatenate(inputs()))
    assert_close(pairs(stats), expected)


def test_what_training_mode_finds_on_the_whole_data_set(dense):
    model, params = dense
    stats = recalibrate_batch_stats(model, params, inputs())
    nnx.update(model, params)
    model.set_attributes(momentum=0.0)
    model.dropout.deterministic = True
    nnx.jit(lambda model, x: model(x))(model, np.concatenate(inputs()))
    assert_close(pairs(stats), pairs(nnx.state(model, nnx.BatchStat)))


def test_convolutional_statistics_are_over_all_pixels():
    model = _Conv(nnx.Rngs(0))
    params = perturbed(nnx.state(model, nnx.Param))
    batches = inputs(shape=(3, 5, 2))
    stats = recalibrate_batch_stats(model, params, iter(batches))
    conv = nnx.to_pure_dict(params)["conv"]
    kernel = np.asarray(conv["kernel"], np.float64)[0, 0]
    x = np.asarray(np.concatenate(batches), np.float64) @ kernel + np.asarray(
        conv["bias"]
    )
    np.testing.assert_allclose(stats["norm"]["mean"][...], x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(stats["norm"]["var"][...], x.var((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("batches", [iter, list], ids=["iterator", "one pass"])
def test_one_pass_is_the_average_of_training_mode(dense, batches):
    model, params = dense
    passes = None if batches is iter else 1
    stats = recalibrate_batch_stats(model, params, batches(inputs()), num_passes=passes)
    weights = nnx_weights(params)
    assert_close(pairs(stats), dense_reference(weights, None, inputs()))


def test_every_pass_makes_one_more_norm_exact(dense):
    model, params = dense
    expected = dense_reference(nnx_weights(params), np.concatenate(inputs()))
    for passes in (1, 2, 3):
        stats = recalibrate_batch_stats(model, params, inputs(), num_passes=passes)
        errors = [
            np.max(np.abs(var - wanted) / wanted)
            for (_, var), (_, wanted) in zip(pairs(stats), expected, strict=True)
        ]
        assert [error < 1e-5 for error in errors] == [k < passes for k in range(3)]


@pytest.mark.slow
def test_passes_stay_bounded_in_a_deep_network():
    # Feeding all statistics of one pass into the next would reach 1e15 on the way.
    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List(
                [
                    nnx.Sequential(
                        nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
                    )
                    for _ in range(12)
                ]
            )

        def __call__(self, x):
            for layer in self.layers:
                x = jax.nn.relu(layer(x))

    model = Deep(nnx.Rngs(0))
    batches = inputs((16, 16, 16), (8,))
    for passes in (3, 6, 9):
        stats = recalibrate_batch_stats(
            model, nnx.state(model, nnx.Param), batches, num_passes=passes
        )
        assert all(np.max(np.abs(leaf)) < 1e3 for leaf in jax.tree.leaves(stats))


def test_passes_are_as_many_as_norms_in_a_row():
    class Parallel(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs) for _ in range(5)])

        def __call__(self, x):
            return self.norms[4](sum(norm(x) for norm in self.norms[:4]))

    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(inputs())

    model, loader = Parallel(nnx.Rngs(0)), Loader()
    recalibrate_batch_stats(model, nnx.state(model, nnx.Param), loader)
    assert loader.passes == 3  # The third finds what the second did.


def test_stacked_batches(dense):
    model, params = dense
    stacked = np.stack(inputs((7, 7, 7)))
    stats = recalibrate_batch_stats(model, params, {"x": stacked}, forward=by_name)
    expected = dense_reference(nnx_weights(params), np.concatenate(stacked))
    assert_close(pairs(stats), expected)


def by_name(model, batch):
    return model(batch["x"])


def test_tuples_give_their_first_to_the_network(dense):
    model, params = dense
    labelled = [(batch, jnp.zeros(len(batch))) for batch in inputs()]
    assert_close(
        pairs(recalibrate_batch_stats(model, params, labelled)),
        pairs(recalibrate_batch_stats(model, params, inputs())),
        0.0,
    )


def test_means_far_from_zero_leave_the_variance_intact():
    model = nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x = (1e3 + rng.normal(size=(4000, WIDTH))).astype(np.float32)
    stats = recalibrate_batch_stats(
        model, nnx.state(model, nnx.Param), np.split(x, 250)
    )
    wide = x.astype(np.float64)
    np.testing.assert_allclose(stats["mean"][...], wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats["var"][...], wide.var(0), rtol=1e-4)


def test_masked_examples_do_not_count():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            return nn.BatchNorm(use_running_average=False)(x, mask=mask)

    x, mask = inputs((24,))[0], np.arange(24) % 3 > 0
    model = Masked()
    variables = jax.jit(model.init)(jax.random.key(0), x, mask[:, None])
    batches = [(x[k : k + 10], mask[k : k + 10, None]) for k in (0, 10, 20)]
    batches.append((x[:4], np.zeros((4, 1), bool)))
    stats = recalibrate_batch_stats(
        model, variables, batches, forward=lambda model, batch: model(*batch)
    )["BatchNorm_0"]
    kept = np.asarray(x, np.float64)[mask]
    np.testing.assert_allclose(stats["mean"], kept.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], kept.var(0), rtol=1e-5)


def test_a_shared_norm_gets_the_statistics_of_all_its_calls():
    class Twins(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(x), self.norm(3 * x[::2])

    model = Twins(nnx.Rngs(0))
    batches = inputs((6, 4))
    stats = recalibrate_batch_stats(model, nnx.state(model, nnx.Param), batches)
    seen = np.concatenate([np.concatenate([b, 3 * b[::2]]) for b in batches])
    np.testing.assert_allclose(stats["norm"]["mean"][...], seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["norm"]["var"][...], seen.var(0), rtol=1e-5)


def test_features_on_another_axis():
    model = nnx.BatchNorm(WIDTH, axis=1, rngs=nnx.Rngs(0))
    batches = inputs(shape=(WIDTH, 5))
    stats = recalibrate_batch_stats(model, nnx.state(model, nnx.Param), batches)
    whole = np.concatenate(batches)
    np.testing.assert_allclose(stats["var"][...], whole.var((0, 2)), rtol=1e-5)


def test_the_model_stays_as_it_is(dense):
    model, params = dense
    graph, state = nnx.split(model)
    before = jax.tree.leaves(state)
    recalibrate_batch_stats(model, params, inputs())
    after_graph, after = nnx.split(model)
    assert after_graph == graph
    assert type(model.norms[0]) is nnx.BatchNorm
    for one, other in zip(before, jax.tree.leaves(after), strict=True):
        assert jnp.array_equal(one, other)


def test_nnx_returns_what_nnx_state_returns(dense):
    model, params = dense
    stats = recalibrate_batch_stats(model, params, inputs())
    expected = nnx.state(model, nnx.BatchStat)
    assert jax.tree.structure(stats) == jax.tree.structure(expected)
    nnx.update(model, params, stats)
    assert_close(pairs(nnx.state(model, nnx.BatchStat)), pairs(stats), 0.0)


@pytest.mark.parametrize("container", [dict, FrozenDict])
def test_linen_returns_the_container_it_was_given(linen_dense, container):
    model, variables = linen_dense
    variables = container(variables)
    stats = recalibrate_batch_stats(model, variables, inputs())
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])


def test_dtypes_stay():
    stats = {name: np.ones(WIDTH, jnp.bfloat16) for name in ("mean", "var")}
    variables = {"params": VARIABLES["params"], "batch_stats": stats}
    recalibrate = lambda v: recalibrate_batch_stats(LINEN, v, inputs())  # noqa: E731
    found = jax.eval_shape(recalibrate, variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("kind", ["dict", "pure state"])
def test_parameters_may_be_pure(dense, kind):
    model, params = dense
    pure = nnx.to_pure_dict(params)
    given = pure if kind == "dict" else nnx.State(pure)
    assert_close(
        pairs(recalibrate_batch_stats(model, given, inputs())),
        pairs(recalibrate_batch_stats(model, params, inputs())),
        0.0,
    )


def test_parameters_that_are_not_given_are_the_models(dense):
    model, params = dense
    nnx.update(model, params)
    part = {"layers": {0: {"bias": jnp.ones(WIDTH)}}}
    stats = recalibrate_batch_stats(model, part, inputs())
    nnx.update(model, part)
    weights = nnx_weights(nnx.state(model, nnx.Param))
    assert_close(pairs(stats), dense_reference(weights, np.concatenate(inputs())))


@pytest.mark.parametrize("network", ["dense", "linen_dense"])
def test_several_averages_under_vmap(network, request):
    model, params = request.getfixturevalue(network)
    batches = inputs((7, 1))
    scaled = lambda k: jax.tree.map(lambda p: np.asarray(p) * np.float32(k), params)  # noqa: E731
    several = [scaled(k) for k in (1.0, 1.5)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *several)
    recalibrate = jax.vmap(lambda p: recalibrate_batch_stats(model, p, batches))
    found = jax.jit(recalibrate)(stacked)
    for k, each in enumerate(several):
        alone = recalibrate_batch_stats(model, each, batches)
        for one, other in zip(
            jax.tree.leaves(found), jax.tree.leaves(alone), strict=True
        ):
            np.testing.assert_allclose(one[k], other, rtol=2e-5, atol=1e-6)


def test_under_jit(dense):
    model, params = dense

    @jax.jit
    def run(params, batches):
        return recalibrate_batch_stats(model, params, batches)

    batches = inputs((7, 1))
    expected = dense_reference(nnx_weights(params), np.concatenate(batches))
    assert_close(pairs(run(params, batches)), expected)


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "axis_name", [pytest.param(None, marks=pytest.mark.slow), "data"]
)
def test_sharded(axis_name, kind):
    model = _Dense(nnx.Rngs(0), axis_name=axis_name)
    params = perturbed(nnx.state(model, nnx.Param))
    expected = dense_reference(nnx_weights(params), np.concatenate(inputs((16, 8, 16))))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    over_examples = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(params, everywhere)
    batches = jax.device_put(inputs((16, 8, 16)), over_examples)
    stats = recalibrate_batch_stats(model, params, batches)
    assert_close(pairs(stats), expected)


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_a_bound_axis_is_summed_over(framework):
    x = inputs((16,))[0]
    if framework == "nnx":
        model = nnx.BatchNorm(4, axis_name="data", rngs=nnx.Rngs(0))
        params = nnx.state(model, nnx.Param)
    else:
        model = nn.BatchNorm(use_running_average=True, axis_name="data")
        params = jax.jit(model.init)(jax.random.key(0), x)

    @functools.partial(jax.vmap, axis_name="data")
    def run(part):
        return jax.tree.leaves(recalibrate_batch_stats(model, params, [part]))

    mean, var = jax.jit(run)(np.reshape(x, (8, 2, 4)))
    np.testing.assert_allclose(mean, np.tile(np.mean(x, 0), (8, 1)), rtol=1e-5)
    np.testing.assert_allclose(var, np.tile(np.var(x, 0), (8, 1)), rtol=1e-5)


def test_half_precision_activations_have_float32_statistics():
    model = nnx.BatchNorm(WIDTH, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x = (8 + rng.normal(size=(4096, WIDTH))).astype(jnp.bfloat16)
    stats = recalibrate_batch_stats(model, nnx.state(model, nnx.Param), np.split(x, 16))
    wide = np.asarray(x, np.float64)
    assert stats["mean"][...].dtype == jnp.float32
    np.testing.assert_allclose(stats["mean"][...], wide.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"][...], wide.var(0), rtol=1e-5)


def test_deep_half_precision_network_is_exact_up_to_its_rounding(dense):
    _, params = dense
    model = _Dense(nnx.Rngs(0), dtype=jnp.bfloat16)
    stats = recalibrate_batch_stats(model, params, inputs())
    expected = dense_reference(nnx_weights(params), np.concatenate(inputs()))
    assert_close(pairs(stats), expected, 0.03)


def test_flags_may_be_passed_by_forward():
    class Explicit(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, use_running_average=None, rngs=rngs)
            self.dropout = nnx.Dropout(0.9, deterministic=None, rngs=rngs)
            self.last = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x, train):
            x = self.norm(x, use_running_average=not train)
            x = self.dropout(x, deterministic=not train)
            return self.last(x, not train)

    model = Explicit(nnx.Rngs(0))
    for train in (True, False):
        stats = recalibrate_batch_stats(
            model,
            nnx.state(model, nnx.Param),
            inputs(),
            forward=lambda model, batch, train=train: model(batch, train=train),
        )
        whole = np.concatenate(inputs())
        np.testing.assert_allclose(stats["norm"]["var"][...], whole.var(0), rtol=1e-5)
        np.testing.assert_allclose(stats["last"]["mean"][...], 0, atol=1e-5)
        np.testing.assert_allclose(stats["last"]["var"][...], 1, rtol=1e-4)


class _DoubledNNX(nnx.BatchNorm):
    def __call__(self, x):
        return super().__call__(2 * x)


class _DoubledLinen(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return super().__call__(2 * x, use_running_average=False)


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_a_subclass_is_watched_where_it_calls_its_super(framework):
    if framework == "nnx":
        model = _DoubledNNX(4, rngs=nnx.Rngs(0))
        params = nnx.state(model, nnx.Param)
    else:
        model = _DoubledLinen()
        params = jax.jit(model.init)(jax.random.key(0), inputs()[0])
    stats = recalibrate_batch_stats(model, params, inputs())
    whole = 2 * np.concatenate(inputs())
    mean, var = jax.tree.leaves(stats)
    np.testing.assert_allclose(mean, whole.mean(0), rtol=1e-5)
    np.testing.assert_allclose(var, whole.var(0), rtol=1e-5)


class _Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.norm(self.linear(x)))


class _Scanned(nnx.Module):
    """Three blocks whose variables are stacked."""

    def __init__(self, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(_Block))
        self.blocks = make(rngs)

    def __call__(self, x):
        return nnx.scan(
            lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )(x, self.blocks)


def block_weights(params):
    kernel, bias = params["linear"]["kernel"], params["linear"]["bias"]
    scale, offset = params["norm"]["scale"], params["norm"]["bias"]
    return list(zip(kernel, bias, scale, offset, strict=True))


@pytest.mark.slow
def test_scanned_nnx_layers():
    model = nnx.jit(lambda: _Scanned(nnx.Rngs(0)))()
    params = perturbed(nnx.state(model, nnx.Param))
    stats = recalibrate_batch_stats(model, params, inputs())["blocks"]["norm"]
    found = zip(stats["mean"][...], stats["var"][...], strict=True)
    weights = block_weights(nnx.to_pure_dict(params)["blocks"])
    assert_close(found, dense_reference(weights, np.concatenate(inputs())))


@pytest.mark.slow
def test_scanned_linen_layers():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.BatchNorm(use_running_average=False, name="norm")(
                nn.Dense(4, name="linear")(x)
            )
            return jnp.tanh(x), None

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                nn.remat(Layer),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=3,
            )
            return scanned(name="blocks")(x, None)

    model = Network()
    variables = jax.jit(model.init)(jax.random.key(0), inputs()[0])
    variables = {**variables, "params": perturbed(variables["params"])}
    stats = recalibrate_batch_stats(model, variables, inputs())["blocks"]["norm"]
    weights = block_weights(variables["params"]["blocks"])
    found = zip(stats["mean"], stats["var"], strict=True)
    assert_close(found, dense_reference(weights, np.concatenate(inputs())))


@pytest.mark.parametrize("transform", [nnx.remat, nnx.jit])
def test_transformed_nnx_layers(dense, transform):
    class Transformed(_Dense):
        __call__ = transform(_Dense.__call__)

    model = Transformed(nnx.Rngs(0))
    model(inputs()[0])  # What is compiled here must not be used below.
    _, params = dense
    expected = dense_reference(nnx_weights(params), np.concatenate(inputs()))
    for forward in (None, lambda model, batch: model(batch)):
        stats = recalibrate_batch_stats(model, params, inputs(), forward=forward)
        assert_close(pairs(stats), expected)


def test_remat_in_linen(linen_dense):
    _, variables = linen_dense
    stats = recalibrate_batch_stats(_LinenDense(remat=True), variables, inputs())
    expected = dense_reference(
        linen_weights(variables["params"]), np.concatenate(inputs())
    )
    assert_close(pairs(stats), expected)


@pytest.mark.parametrize("network", ["dense", "linen_dense"])
def test_traced_once_per_shape(network, request):
    model, params = request.getfixturevalue(network)
    shapes = []

    def forward(model, batch):
        shapes.append(batch.shape)
        return model(batch)

    for scale in (1.0, 2.0):
        params = jax.tree.map(lambda p, scale=scale: scale * p, params)
        batches = inputs((1, 7, 1, 7, 7))
        recalibrate_batch_stats(model, params, batches, forward=forward)
    assert sorted(shapes) == [(1, 4), (7, 4)]


def test_threads_do_not_meet(dense, linen_dense):
    found = {}

    def run(name, model, params):
        forward = lambda model, batch: model(batch)  # noqa: E731
        found[name] = pairs(
            recalibrate_batch_stats(model, params, inputs(), forward=forward)
        )

    networks = {"nnx": dense, "linen": linen_dense}
    threads = [
        threading.Thread(target=run, args=(name, *network))
        for name, network in networks.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, network in networks.items():
        assert_close(
            found[name], pairs(recalibrate_batch_stats(*network, inputs())), 0.0
        )


def test_what_forward_does_not_use_stays():
    class Heads(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.auxiliary = nnx.BatchNorm(4, rngs=rngs)
            self.other = nnx.BatchStat(jnp.arange(3.0))

        def __call__(self, x):
            return self.norm(x)

    model = Heads(nnx.Rngs(0))
    model.auxiliary.mean[...] = jnp.full(4, 0.7)
    stats = recalibrate_batch_stats(model, nnx.state(model, nnx.Param), inputs())
    old = np.full(4, 0.7, np.float32)
    np.testing.assert_array_equal(stats["auxiliary"]["mean"][...], old)
    np.testing.assert_array_equal(stats["auxiliary"]["var"][...], np.ones(4))
    np.testing.assert_array_equal(stats["other"][...], np.arange(3.0))


def test_strict_promotion(dense, strict):
    model, params = dense
    jax.eval_shape(lambda p: recalibrate_batch_stats(model, p, inputs()), params)


def test_float64(x64):
    model = nn.BatchNorm(use_running_average=True)
    whole = np.concatenate(inputs()).astype(np.float64)
    variables = {
        "params": {"scale": np.ones(WIDTH), "bias": np.zeros(WIDTH)},
        "batch_stats": {"mean": np.zeros(WIDTH), "var": np.ones(WIDTH)},
    }
    recalibrate = jax.jit(lambda *args: recalibrate_batch_stats(model, *args))
    stats = recalibrate(variables, np.split(whole, 4))
    np.testing.assert_allclose(stats["var"], whole.var(0), rtol=1e-13)


class _Normless(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)


class _Once:
    """Says that it can start again, and cannot."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


def call(model, params, **options):
    batches = options.pop("batches", inputs())
    return lambda: recalibrate_batch_stats(model, params, batches, **options)


NET = _Dense(nnx.Rngs(0))
WEIGHTS = nnx.state(NET, nnx.Param)
NORMLESS = _Normless(nnx.Rngs(0))
LINEN = nn.BatchNorm(use_running_average=True)
VARIABLES = jax.eval_shape(LINEN.init, jax.random.key(0), jnp.ones((2, 4)))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            call(NORMLESS, nnx.state(NORMLESS, nnx.Param)),
            "`model` must be a network with batch norms (nnx.BatchNorm), got a "
            "_Normless of LayerNorm, Linear.",
        ),
        (
            call(LINEN, {"params": VARIABLES["params"]}),
            "`params` must be Linen variables with a collection 'batch_stats' of means "
            "and variances, got collections ['params'].",
        ),
        (call(NET, WEIGHTS, batches=[]), "`batches` must hold at least one batch"),
        (call(NET, WEIGHTS, batches=iter([])), "`batches` must hold at least one"),
        (call(NET, WEIGHTS, batches=_Once(inputs())), "got none in pass 2."),
        (call(NET, WEIGHTS, num_passes=0), "`num_passes` must be at least 1, got 0."),
        (
            call(NET, WEIGHTS, num_passes=2, batches=iter(inputs())),
            "`num_passes` must be 1 for an iterator, which cannot start again (a "
            "sequence can), got 2.",
        ),
        (
            call(NET, WEIGHTS, forward=lambda model, batch: model.layers[0](batch)),
            "`forward` must be a function that calls a batch norm of `model`, got <",
        ),
        (
            call(NET, {"layers": {0: {"kernel": jnp.ones((2, 4, WIDTH))}}}),
            "`params` must be parameters of `model`, which has (4, 4) at ('layers', 0, "
            "'kernel'), got an array of shape (2, 4, 4).",
        ),
        (call(NET, {"head": jnp.ones(3)}), "which has nothing at ('head',)"),
    ],
)
def test_bad_values(run, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (call(_Dense, WEIGHTS), "`model` must be a Flax module, NNX or Linen, got <cl"),
        (call("net", {}), "`model` must be a Flax module, NNX or Linen, got 'net'"),
        (call(NET, [1.0]), "`params` must be an nnx.State or a dict of an NNX `model`"),
        (call(LINEN, 3), "`params` must be the dict of variables of a Linen `model`"),
        (call(NET, WEIGHTS, forward=3), "`forward` must be callable, got 3"),
        (call(NET, WEIGHTS, num_passes=1.5), "`num_passes` must be a whole number"),
        (call(NET, WEIGHTS, batches=3), "`batches` must be a sequence, an iterator"),
    ],
)
def test_bad_types(run, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        run()


def test_a_linen_norm_without_statistics_is_named(linen_dense):
    model, variables = linen_dense
    stats = dict(variables["batch_stats"])
    del stats["norm1"]
    with pytest.raises(ValueError, match="got none for norm1"):
        recalibrate_batch_stats(model, {**variables, "batch_stats": stats}, inputs())
