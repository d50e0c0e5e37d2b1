"""What enters an average, where does it lie, and which states are refused?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_same_bits
from flax import linen as nn
from flax import nnx, serialization
from jax.sharding import NamedSharding, PartitionSpec

import optax_superconv as osc

PARAMS = {"k": np.ones((8, 4), "f"), "b": np.zeros(4, "f")}
AVERAGES = {
    "ema": osc.ema_params(0.9),
    "swa": osc.swa_params(0),
    "average": osc.average_params(power=2),
    "lawa": osc.lawa_params(3),
}
each = pytest.mark.parametrize("tx", AVERAGES.values(), ids=AVERAGES)


def sampled(tx, samples, state=None):
    """The state after these parameters."""
    zeros = jax.tree.map(jnp.zeros_like, samples[0])
    state = tx.init(zeros) if state is None else state
    update = jax.jit(tx.update)
    for sample in samples:
        _, state = update(zeros, state, sample)
    return state


def filled(value, like=PARAMS):
    return jax.tree.map(lambda p: np.full_like(p, value), like)


# --- samples that are not finite -----------------------------------------------------


@each
@pytest.mark.parametrize(
    ("when", "bad"), [(0, np.nan), (2, -np.inf)], ids=["first", "later"]
)
def test_a_sample_that_is_not_finite_is_as_if_it_had_not_been_one(tx, when, bad):
    good = [filled(value) for value in (1, 2, 4, 8, 16)]
    spoiled = {**filled(1e9), "b": np.asarray([0, bad, 0, 0], "f")}
    state = sampled(tx, [*good[:when], spoiled, *good[when:]])
    expected = sampled(tx, good)
    assert_same_bits(state._replace(count=expected.count), expected)
    assert state.count == expected.count + 1


@each
def test_leaves_of_any_shape_are_sampled(tx):
    leaves = [np.zeros(shape, "f") for shape in ((), (0,), (0, 3), (3, 0), (2, 1, 3))]
    state = sampled(tx, [filled(3, leaves)])
    assert state.num_samples == 1
    read = osc.eval_params(state, leaves)
    assert_same_bits(jax.device_get(read), filled(3, leaves))


def test_a_gradient_that_is_not_finite_does_not_enter_a_record():
    tx = osc.record_gradient_norms(4, ord=2, num_samples=2)
    state = tx.init(None)
    for gradient in (np.nan, np.inf, np.inf, 3.0):
        _, state = tx.update(np.full(1, gradient, "f"), state)
        assert np.isfinite(state.gradient_norms).all()
    np.testing.assert_array_equal(state.gradient_norms, [-1, 3])


# --- where snapshots lie -------------------------------------------------------------


def two_axes(axis="Auto"):
    kind = getattr(jax.sharding.AxisType, axis)
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def specs(tree):
    """The sharding of each kernel."""
    return [x.sharding.spec for x in jax.tree.leaves(tree) if x.ndim == 2]


KERNEL = PartitionSpec("data", "model")
TX = optax.chain(optax.sgd(0.1), osc.lawa_params(3))


@pytest.mark.parametrize(
    "axis", ["Auto", pytest.param("Explicit", marks=pytest.mark.slow)]
)
def test_snapshots_in_an_nnx_optimizer_are_sharded_like_their_parameter(axis):
    init = nnx.with_partitioning(nnx.initializers.ones, ("data", "model"))
    with jax.set_mesh(two_axes(axis)):
        model = nnx.Linear(8, 4, kernel_init=init, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
        params = nnx.state(model, nnx.Param)
        nnx.jit(lambda model, opt, grads: opt.update(model, grads))(
            model, optimizer, params
        )
        state = nnx.state(optimizer, nnx.optimizer.OptState)
        assert specs(state) == [KERNEL] * 3
        read = osc.eval_params(optimizer, params)
        assert specs(read) == [KERNEL]


def test_snapshots_take_the_shardings_that_map_params_gives_the_parameters():
    mesh = two_axes()
    shardings = {
        "k": NamedSharding(mesh, KERNEL),
        "b": NamedSharding(mesh, PartitionSpec("model")),
    }
    everywhere = NamedSharding(mesh, PartitionSpec())
    of_state = optax.tree.map_params(
        TX,
        lambda _, sharding: sharding,
        jax.eval_shape(TX.init, PARAMS),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    state = jax.jit(TX.init, out_shardings=of_state)(PARAMS)
    assert specs(state) == [KERNEL] * 3
    update = jax.jit(TX.update, out_shardings=(shardings, of_state))
    assert specs(update(PARAMS, state, PARAMS)[1]) == [KERNEL] * 3


def test_snapshots_have_the_logical_axes_of_linen():
    init = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
    model = nn.Dense(4, kernel_init=init)

    def initialise():
        params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
        return TX.init(params)

    names = nn.get_partition_spec(jax.eval_shape(initialise))
    rules = [("embed", "data"), ("mlp", "model")]
    shardings = nn.logical_to_mesh_sharding(names, two_axes(), rules)
    state = jax.jit(initialise, out_shardings=shardings)()
    assert specs(state) == [KERNEL] * 3


# --- resuming with another set-up ----------------------------------------------------

THAWS = osc.gradual_unfreezing(optax.sgd(0.1), {"k": 1, "b": 0}, {"k": "k", "b": "b"})
OTHERS = osc.gradual_unfreezing(optax.sgd(0.1), {"x": 1, "b": 0}, {"k": "x", "b": "b"})
RESUMED = {
    "window": (
        osc.lawa_params(3), osc.lawa_params(2), PARAMS,
        "`state` must be of 2 snapshots, the `window`, got one of 3.",
    ),
    "record": (
        osc.record_gradient_norms(9, ord=2), osc.record_gradient_norms(5, ord=2),
        PARAMS, "`state` must be of a record of 5 samples, got one of 9.",
    ),
    "ema-swa": (
        osc.ema_params(0.9), osc.swa_params(0), PARAMS,
        "`state` must be of an average named 'swa', got one named 'ema'.",
    ),
    "lawa-name": (
        osc.lawa_params(2), osc.lawa_params(2, name="mine"), PARAMS,
        "`state` must be of an average named 'mine', got one named 'lawa'.",
    ),
    "ema-shape": (
        osc.ema_params(0.9), osc.ema_params(0.9),
        {"k": np.ones((8, 1), "f"), "b": PARAMS["b"]},
        "`state` must be of parameters of these shapes ((8, 1) at 'k'), got one of "
        "parameters of shape (8, 4).",
    ),
    "lawa-shape": (
        osc.lawa_params(2), osc.lawa_params(2), {"k": PARAMS["k"], "b": np.ones(1)},
        "`state` must be of parameters of these shapes ((1,) at 'b'), got one of "
        "parameters of shape (4,).",
    ),
    "labels": (
        THAWS, OTHERS, PARAMS,
        "`state` must be of groups with these labels (frozen/b, frozen/x), got one "
        "with frozen/b, frozen/k.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("old", "new", "params", "message"), RESUMED.values(), ids=RESUMED
)
def test_a_state_of_another_set_up_is_refused(old, new, params, message, jit):
    update = jax.jit(new.update) if jit else new.update
    with pytest.raises(ValueError) as error:  # noqa: PT011
        update(params, old.init(PARAMS), params)
    assert str(error.value) == message


def test_an_average_goes_on_with_another_decay():
    zeros, ones = jnp.zeros(2), jnp.ones(2)
    state = osc.ema_params(0.5).init(zeros)
    _, state = osc.ema_params(0.5).update(zeros, state, zeros)
    _, state = osc.ema_params(0.75).update(zeros, state, ones)
    # Weights 1/2 * 3/4 and 1/4.
    np.testing.assert_allclose(osc.eval_params(state, ones), 0.4, rtol=1e-6)


# --- reading -------------------------------------------------------------------------


@each
def test_a_blend_is_between_parameters_and_average(tx):
    state = sampled(tx, [filled(3)])

    def read(blend):
        return osc.eval_params(state, filled(1), blend=blend)["k"]

    traced = jax.jit(read)
    for blend in (0.0, 0.25, 1.0, -0.5, 2.0):
        np.testing.assert_allclose(read(blend), 1 + 2 * blend)
        np.testing.assert_allclose(traced(blend), 1 + 2 * blend)


def test_a_blend_is_computed_in_float32():
    tx, low = osc.swa_params(0), jnp.full(1, 257.0).astype(jnp.bfloat16)  # 256
    state = sampled(tx, [low * 0])
    read = osc.eval_params(state, low, blend=1 / 3)
    assert read.dtype == jnp.bfloat16
    assert read == jnp.asarray(256 * 2 / 3).astype(jnp.bfloat16)


def test_the_average_needs_no_finite_parameters():
    state = sampled(AVERAGES["ema"], [filled(3)])
    np.testing.assert_array_equal(osc.eval_params(state, filled(np.nan))["k"], 3)


def test_before_the_first_sample_a_blend_is_the_parameters():
    state = AVERAGES["swa"].init(PARAMS)
    assert_same_bits(osc.eval_params(state, PARAMS, blend=0.3), PARAMS)


@pytest.mark.parametrize(
    ("blend", "kind", "message"),
    [
        (np.nan, ValueError, r"^`blend` must be finite, got nan\.$"),
        ("half", TypeError, r"^`blend` must be a number"),
        (np.ones(2), TypeError, r"^`blend` must be a single number"),
    ],
)
def test_a_blend_must_be_a_finite_number(blend, kind, message):
    with pytest.raises(kind, match=message):
        osc.eval_params(AVERAGES["swa"].init(PARAMS), PARAMS, blend=blend)


@each
def test_an_abstract_state_gives_shapes_and_dtypes(tx):
    tx = optax.chain(optax.sgd(0.1), tx)
    state, shapes = jax.eval_shape(lambda p: (tx.init(p), p), PARAMS)
    for params in (PARAMS, shapes):
        assert osc.eval_params(state, params) == shapes


@each
def test_a_state_without_its_containers_is_refused(tx):
    state = optax.chain(optax.sgd(0.1), tx).init(PARAMS)
    bare = serialization.to_state_dict(state)
    for tree in (bare, list(bare.values())):
        with pytest.raises(ValueError, match=r"^`opt_state` must be in the containers"):
            osc.eval_params(tree, PARAMS)


class Spectral(nn.Module):
    """A layer whose largest singular value is to be 1."""

    @nn.compact
    def __call__(self, x, train):
        """Improves the estimate of that value if ``train``."""
        return nn.SpectralNorm(nn.Dense(8, use_bias=False))(x, update_stats=train)


@pytest.mark.slow
def test_forward_passes_in_training_mode_suit_a_spectral_norm_to_other_weights():
    net, inputs = Spectral(), jnp.eye(16)
    variables = net.init(jax.random.key(0), inputs, train=False)
    keys = iter(jax.random.split(jax.random.key(1), 9))
    other = jax.tree.map(
        lambda p: 3 * jax.random.normal(next(keys), p.shape), variables["params"]
    )
    variables = {**variables, "params": other}

    def norm():
        return np.linalg.norm(net.apply(variables, inputs, train=False), 2)

    assert norm() > 1.2
    forward = jax.jit(
        lambda v: net.apply(v, inputs, train=True, mutable=["batch_stats"])[1]
    )
    for _ in range(20):
        variables |= forward(variables)
    np.testing.assert_allclose(norm(), 1, rtol=1e-2)


# --- dtypes --------------------------------------------------------------------------

ACCUMULATING = {
    "ema": (lambda d: osc.ema_params(0.5, accumulator_dtype=d), "accumulator_dtype"),
    "swa": (lambda d: osc.swa_params(0, accumulator_dtype=d), "accumulator_dtype"),
    "average": (
        lambda d: osc.average_params(0.5, accumulator_dtype=d),
        "accumulator_dtype",
    ),
    "trace": (
        lambda d: osc.scheduled_trace(0.5, accumulator_dtype=d),
        "accumulator_dtype",
    ),
    "adam": (lambda d: osc.scale_by_scheduled_adam(0.5, mu_dtype=d), "mu_dtype"),
}
accumulating = pytest.mark.parametrize(
    ("make", "name"), ACCUMULATING.values(), ids=ACCUMULATING
)


@accumulating
@pytest.mark.parametrize("bad", [int, "int8", "nonsense", 5, complex, bool])
def test_an_accumulator_of_no_floating_point_type_is_refused(make, name, bad):
    with pytest.raises(ValueError, match=f"^`{name}` must be a floating-point type, "):
        make(bad)


@accumulating
@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)]
)
def test_accumulators_of_complex_leaves_are_complex(make, name, dtype):
    del name
    tx, leaf = make(dtype), np.asarray([1 + 2j, -3j], np.complex64)
    state = tx.init(leaf)
    _, state = tx.update(np.zeros_like(leaf), tx.update(leaf, state, 0 * leaf)[1], leaf)
    kept = [x for x in jax.tree.leaves(state) if jnp.iscomplexobj(x)]
    (accumulator,) = kept
    assert accumulator.dtype == jnp.complex64
    np.testing.assert_allclose(accumulator / accumulator[0] * leaf[0], leaf, rtol=1e-6)


def test_snapshots_of_complex_leaves_are_complex():
    leaf = np.asarray([1 + 2j, -3j], np.complex64)
    state = sampled(osc.lawa_params(2), [leaf, 3 * leaf])
    np.testing.assert_allclose(osc.eval_params(state, leaf), 2 * leaf, rtol=1e-6)
