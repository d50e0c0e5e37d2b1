"""The top of the Hessian, and the limit it sets."""

import gc
import weakref
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_superconv as osc

pytestmark = pytest.mark.slow  # Most of it is compilation.

OPTIMIZERS = ["gd", "heavy_ball", "nesterov", "adam"]


def quadratic(params, curvature):
    return 0.5 * jnp.sum(curvature * params**2)


def dict_quadratic(params, curvature):
    return quadratic(params["w"], curvature)


def matrix_loss(params, matrix):
    """A quadratic over all leaves of a tree, with a dense Hessian."""
    leaves = jax.tree.leaves(params)
    theta = jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in leaves])
    return 0.5 * theta @ matrix @ theta


def symmetric(n, seed=0):
    matrix = np.random.default_rng(seed).normal(size=(n, n))
    return (matrix + matrix.T) / 2


def top(matrix):
    return np.linalg.eigvalsh(np.asarray(matrix, float))[-1]


# --- sharpness: value and residual ---------------------------------------------------


@pytest.mark.parametrize("n", [10, pytest.param(100, marks=pytest.mark.slow), 300])
def test_twenty_products_find_the_top(n):
    """Within 1 % over eight starts, at random and at the minimum; none beyond 5 %."""
    rng = np.random.default_rng(n)
    starts = np.zeros((16, n), np.float32)
    starts[:8] = rng.normal(size=(8, n))
    keys = jax.random.split(jax.random.key(n), 16)

    @jax.jit
    def measure(curvature):
        def one(start, key):
            return osc.sharpness(quadratic, start, curvature, key=key)

        return jax.vmap(one)(starts, keys)

    for name, eigenvalues in reference.spectra(n, rng).items():
        values = np.asarray(measure(jnp.asarray(eigenvalues, jnp.float32)).value)
        errors = np.abs(1 - values / eigenvalues.max())
        assert errors[:8].mean() < 0.01, name
        assert errors[8:].mean() < 0.01, name
        assert errors.max() < 0.05, name
        if n == 10:  # The whole space in half of the products.
            assert errors.max() < 1e-5, name


@pytest.mark.parametrize("num_iterations", [1, 3])
def test_an_eigenvalue_lies_within_the_residual(num_iterations):
    for seed in range(5):
        matrix = symmetric(30, seed)
        result = osc.sharpness(
            matrix_loss, jnp.ones(30), matrix, num_iterations=num_iterations
        )
        value, residual = result.value, result.residual
        distance = np.abs(np.linalg.eigvalsh(matrix) - value).min()
        assert distance < residual
        assert residual < np.linalg.norm(matrix, 2)
        assert value < top(matrix)


def test_the_residual_is_that_of_the_start_vector_after_one_product():
    """At 1 product the unit vector is known: the gradient's half and the noise's."""
    curvature = jnp.array([1.0, 3.0])
    result = osc.sharpness(quadratic, jnp.ones(2), curvature, num_iterations=1)
    value, residual = result.value, result.residual
    # v = (c, s): value = c² + 3 s², residual = 2 |c s|.
    s2 = (float(value) - 1) / 2
    np.testing.assert_allclose(residual, 2 * np.sqrt(s2 * (1 - s2)), rtol=1e-5)


@pytest.mark.parametrize(
    ("curvature", "expected"),
    [
        ([5.0], 5.0),
        ([-5.0], -5.0),
        ([0.0], 0.0),
        ([1.0, 4.0, 4.0], 4.0),
        ([-1.0, -4.0, -4.0], -1.0),
        ([0.0, 0.0, 0.0], 0.0),
        ([0.0, 0.0, -2.0], 0.0),
        ([3.0] * 60, 3.0),
        ([-3.0] * 60, -3.0),
        ([7.0] * 20 + [-1.0] * 20 + [2.0] * 20, 7.0),
        ([1e-12, 3e-12, 3e-12], 3e-12),
    ],
)
def test_is_exact_where_the_space_ends_early(curvature, expected):
    params = np.linspace(1.0, 2.0, len(curvature), dtype=np.float32)
    result = osc.sharpness(quadratic, params, np.float32(curvature))
    value, residual = result.value, result.residual
    scale = np.abs(curvature).max()
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6 * scale)
    assert 0 <= residual <= 1e-5 * scale


def test_a_linear_loss_has_no_curvature():
    result = osc.sharpness(lambda p: jnp.sum(3 * p), jnp.ones(4))
    value, residual = result.value, result.residual
    assert (float(value), float(residual)) == (0.0, 0.0)


def test_a_loss_that_is_not_finite_shows():
    result = osc.sharpness(quadratic, jnp.ones(3), jnp.array([1, jnp.inf, 1]))
    value, residual = result.value, result.residual
    assert np.isnan(value)
    assert np.isnan(residual)


def network_loss(params, x, labels):
    logits = jnp.tanh(x @ params["w1"]) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def network(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 16), "w2": (16, 4)}
    params = {k: jnp.asarray(rng.normal(size=s) / 3, dtype) for k, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(64, 8)), dtype)
    return params, x, jnp.asarray(rng.integers(4, size=64))


@pytest.mark.slow
def test_a_network_against_its_dense_hessian():
    params, *batch = network()
    theta, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda theta: network_loss(unravel(theta), *batch)))
    dense = hessian(theta)
    value = osc.sharpness(network_loss, params, *batch).value
    np.testing.assert_allclose(value, top(dense), rtol=1e-4)

    # Preconditioned: P^-1/2 H P^-1/2.
    rng = np.random.default_rng(1)
    p = np.exp(rng.normal(size=theta.shape))
    value = osc.sharpness(
        network_loss, params, *batch, preconditioner=unravel(jnp.float32(p))
    ).value
    expected = top(np.asarray(dense, float) / np.sqrt(np.outer(p, p)))
    np.testing.assert_allclose(value, expected, rtol=1e-3)


@pytest.mark.slow
def test_a_network_in_bfloat16():
    expected = osc.sharpness(network_loss, *network()).value
    result = osc.sharpness(network_loss, *network(jnp.bfloat16))
    assert result.value.dtype == result.residual.dtype == jnp.float32
    np.testing.assert_allclose(result.value, expected, rtol=0.01)


def test_float64_parameters_keep_their_precision(x64):
    matrix = symmetric(12)
    value = osc.sharpness(matrix_loss64, jnp.ones(12), jnp.asarray(matrix)).value
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, top(matrix), rtol=1e-12)


def matrix_loss64(theta, matrix):
    return 0.5 * theta @ matrix @ theta


# --- sharpness: pytrees and transformations ------------------------------------------


class Pair(NamedTuple):
    """Parameters beside things that are none."""

    weight: jax.Array
    name: str
    steps: jax.Array
    rate: float
    nothing: None


PYTREES = {
    "dict": {"a": {"b": jnp.ones((2, 3))}, "c": [jnp.ones(()), (jnp.ones(2),)]},
    "bfloat16": {"a": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(3)},
    "numpy, one empty": [np.ones((3, 3), np.float32), np.ones((0, 3), np.float32)],
}


@pytest.mark.parametrize("name", PYTREES)
def test_any_tree_of_parameters(name):
    matrix = symmetric(9)
    value = osc.sharpness(matrix_loss, PYTREES[name], jnp.float32(matrix)).value
    rtol = 0.01 if name == "bfloat16" else 1e-5
    np.testing.assert_allclose(value, top(matrix), rtol=rtol)


def test_leaves_that_are_no_parameters_are_held_fixed():
    params = Pair(jnp.ones(3), "three", jnp.arange(3), 0.5, None)

    def loss_fn(params, factor, name):
        assert (params.name, params.rate, params.nothing) == ("three", 0.5, None)
        assert name == "four"
        assert params.steps.dtype == jnp.int32
        return factor * params.rate * jnp.sum(params.steps * params.weight**2)

    value = osc.sharpness(loss_fn, params, 3.0, "four").value
    np.testing.assert_allclose(value, 6.0, rtol=1e-5)


def test_the_loss_sees_parameters_in_their_own_dtype():
    seen = set()

    def loss_fn(params):
        seen.add(params.dtype)
        return jnp.sum(params**2)

    params = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    jax.eval_shape(lambda params: osc.sharpness(loss_fn, params), params)
    assert seen == {jnp.dtype(jnp.bfloat16)}


def linear_data():
    """Inputs, and the sharpness of a linear layer under the mean square."""
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    return x, 2 * top(x.T @ x / 20)


@pytest.mark.slow
def test_flax_models():
    x, expected = linear_data()
    model = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    value = osc.sharpness(
        lambda params, x: jnp.mean(nnx.merge(graph, params)(x) ** 2), params, x
    ).value
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.slow
def test_equinox_models():
    def loss_fn(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    x, expected = linear_data()
    linear = eqx.nn.Linear(3, 1, use_bias=False, key=jax.random.key(0))
    negative, identity = eqx.nn.Lambda(jnp.negative), eqx.nn.Identity()
    model = eqx.nn.Sequential([linear, negative, identity])
    value = osc.sharpness(loss_fn, model, x).value
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # What an optimizer of its arrays holds: None where the model has functions.
    fours = jax.tree.map(lambda a: jnp.full_like(a, 4), eqx.filter(model, eqx.is_array))
    value = osc.sharpness(loss_fn, model, x, preconditioner=fours).value
    np.testing.assert_allclose(value, expected / 4, rtol=1e-5)


def test_under_jit_it_is_traced_once_and_agrees():
    traces = []

    def loss_fn(params, curvature):
        traces.append(None)
        return quadratic(params["w"], curvature)

    params, curvature = {"w": jnp.ones(6)}, jnp.arange(6.0)
    measure = jax.jit(lambda p, c: osc.sharpness(loss_fn, p, c))
    first = measure(params, curvature)
    count = len(traces)
    second = measure({"w": 2 * params["w"]}, 2 * curvature)
    assert len(traces) == count
    np.testing.assert_allclose([first.value, second.value], [5, 10], rtol=1e-5)
    eager = osc.sharpness(loss_fn, params, curvature)
    np.testing.assert_allclose(eager.value, first.value, rtol=1e-6)


class _Problem:
    """Its methods are equal by value, whatever it holds."""

    curvature = 1.0

    def loss(self, w):
        return 0.5 * jnp.sum(self.curvature * w**2)


def test_what_a_loss_closes_over_may_change():
    problem = _Problem()
    values = []
    for problem.curvature in (1.0, 3.0):
        values.append(osc.sharpness(problem.loss, jnp.ones(2), num_iterations=2).value)
    np.testing.assert_allclose(values, [1.0, 3.0], rtol=1e-5)


def test_a_loss_does_not_outlive_its_call():
    problem = _Problem()
    reference = weakref.ref(problem)
    osc.sharpness(problem.loss, jnp.ones(2), num_iterations=2)
    del problem
    gc.collect()
    assert reference() is None


def test_vmap_over_parameters():
    def quartic(params):
        return jnp.sum(params["w"] ** 4)  # Curvature 12 w².

    params = {"w": jnp.array([[1.0, 2.0], [3.0, 1.0], [0.0, 0.0]])}
    result = jax.vmap(lambda p: osc.sharpness(quartic, p))(params)
    np.testing.assert_allclose(result.value, [48.0, 108.0, 0.0], rtol=1e-5)


def test_the_key_moves_the_start_alone():
    matrix = jnp.float32(symmetric(30))
    first, again, other = (
        osc.sharpness(matrix_loss, jnp.ones(30), matrix, key=key, num_iterations=3)
        for key in (None, None, jax.random.key(1))
    )
    assert first.value == again.value != other.value


@pytest.mark.parametrize(
    "axis_type",
    [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)],
)
def test_sharded_parameters_give_the_same_and_stay_sharded(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    where = NamedSharding(mesh, PartitionSpec("data"))
    curvature = jnp.linspace(0.0, 1.0, 128).reshape(16, 8) ** 2
    params = jnp.ones((16, 8))
    expected = osc.sharpness(quadratic, params, curvature)
    with jax.set_mesh(mesh):
        sharded = jax.device_put((params, curvature), (where, where))
        function = jax.jit(lambda p, c: osc.sharpness(quadratic, p, c))
        program = function.lower(*sharded).compile()
    result = program(*sharded)
    np.testing.assert_allclose(result.value, expected.value, rtol=1e-5)
    np.testing.assert_allclose(result.residual, expected.residual, rtol=1e-2)
    # Twenty vectors, each in eight parts; nothing is gathered.
    assert "f32[20,2,8]" in program.as_text()
    assert "all-gather" not in program.as_text()


# --- stability_limit -----------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_limit_is_where_the_spectral_radius_passes_one(optimizer, momentum):
    limit = osc.stability_limit(7.0, optimizer=optimizer, momentum=momentum)
    expected = reference.largest_stable_step(optimizer, momentum) / 7
    np.testing.assert_allclose(limit, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "published"),
    [("gd", 2.0), ("heavy_ball", 3.8), ("nesterov", 1.3571), ("adam", 38.0)],
)
def test_limits_of_the_papers(optimizer, published):
    limit = osc.stability_limit(1.0, optimizer=optimizer)
    assert isinstance(limit, float)
    np.testing.assert_allclose(limit, published, rtol=1e-4)


def test_limit_of_numbers_arrays_results_and_tracers():
    assert osc.stability_limit(4) == 0.5
    assert osc.stability_limit(0.0) == osc.stability_limit(-1.0) == float("inf")
    assert np.isnan(osc.stability_limit(float("nan")))
    curvature = jnp.array([4.0, 0.0, -1.0, jnp.nan])
    expected = [0.5, np.inf, np.inf, np.nan]
    np.testing.assert_array_equal(osc.stability_limit(curvature), expected)
    np.testing.assert_array_equal(jax.jit(osc.stability_limit)(curvature), expected)
    result = osc.SharpnessResult(jnp.float32(4.0), jnp.float32(0.0))
    assert osc.stability_limit(result) == jax.jit(osc.stability_limit)(result) == 0.5
    momentum = jnp.array([0.0, 0.9, 0.0, 0.9])
    limits = osc.stability_limit(1.0, optimizer="heavy_ball", momentum=momentum)
    np.testing.assert_allclose(limits, [2.0, 3.8, 2.0, 3.8], rtol=1e-6)
    # No infinity in the derivative of the branch that is not taken.
    assert np.isfinite(jax.jit(jax.grad(osc.stability_limit))(0.0))


def frozen_adam(rate, divisor):
    """Optax's Adam in its old age: nu is fixed and nothing is left of the bias."""
    tx = optax.adam(rate, b1=0.9, b2=1 - 2.0**-24, eps=0.0)

    def init_fn(params):
        state = optax.tree.set(tx.init(params), count=jnp.int32(2**30))
        return optax.tree.set(state, nu=divisor**2)

    return optax.GradientTransformation(init_fn, tx.update)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_real_optimizers_are_stable_below_and_not_above(optimizer):
    curvature = jnp.array([0.3, 2.0, 5.0])
    divisor = jnp.array([0.1, 4.0, 2.0])
    result = osc.sharpness(
        quadratic,
        jnp.ones(3),
        curvature,
        preconditioner=divisor if optimizer == "adam" else None,
    )
    np.testing.assert_allclose(result.value, 3.0 if optimizer == "adam" else 5.0, 1e-5)
    limit = osc.stability_limit(result, optimizer=optimizer)
    make = {
        "gd": optax.sgd,
        "heavy_ball": lambda rate: optax.sgd(rate, momentum=0.9),
        "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
        "adam": lambda rate: frozen_adam(rate, divisor),
    }[optimizer]

    @jax.jit
    def growth(rate):
        tx = make(rate)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(curvature * params, state)
            params = optax.apply_updates(params, updates)
            return (params, state), jnp.abs(params).max()

        params = jnp.full(3, 1e-20)  # So small that Adam's nu stays at rest.
        sizes = jax.lax.scan(step, (params, tx.init(params)), length=200)[1]
        return sizes[150:].max() / sizes[50:100].max()

    assert growth(0.98 * limit) < 0.5
    assert growth(1.02 * limit) > 2.0


@pytest.mark.parametrize("ours", [False, True])
def test_documented_divisor_is_what_adam_divides_by(ours):
    """Read from a state after three steps, far from the end of the bias."""
    b2, eps = 0.99, 1e-3
    make = osc.scale_by_scheduled_adam if ours else optax.scale_by_adam
    tx = optax.chain(make(b1=0.0, b2=b2, eps=eps), optax.scale(-0.1))
    g = {"w": np.float32([0.1, -2.0, 30.0])}
    state, update = tx.init(g), jax.jit(tx.update)
    for factor in (1.0, 0.5, 2.0):
        scaled = {"w": np.float32(factor) * g["w"]}
        updates, state = update(scaled, state)
    if ours:
        adam = optax.tree.get(state, "ScaleByScheduledAdamState")
        nu_hat = jax.tree.map(lambda nu: nu / adam.nu_weight, adam.nu)
    else:
        adam = optax.tree.get(state, "ScaleByAdamState")
        nu_hat = optax.tree.bias_correction(adam.nu, b2, adam.count)
    divisor = jax.tree.map(lambda nu: jnp.sqrt(nu) + eps, nu_hat)
    np.testing.assert_allclose(
        updates["w"], -0.1 * scaled["w"] / divisor["w"], rtol=1e-4
    )
    curvature = jnp.array([1.0, 2.0, 3.0])
    value = osc.sharpness(dict_quadratic, g, curvature, preconditioner=divisor).value
    np.testing.assert_allclose(value, np.max(curvature / divisor["w"]), rtol=1e-5)


# --- bad input -----------------------------------------------------------------------

TREE = {"w": jnp.ones(3)}


def measure(loss_fn=lambda p: jnp.sum(p["w"] ** 2), params=TREE, **options):
    return osc.sharpness(loss_fn, params, **options)


BAD_INPUT = [
    # call, error, argument, rule, value
    (
        lambda: measure(num_iterations=0),
        ValueError,
        "num_iterations",
        "at least 1",
        "0",
    ),
    (
        lambda: measure(num_iterations=2.0),
        TypeError,
        "num_iterations",
        "a Python int",
        "2.0",
    ),
    (lambda: measure(3.0), TypeError, "loss_fn", "callable", "3.0"),
    (lambda: measure(lambda p: p["w"]), ValueError, "loss_fn", "shape ()", "(3,)"),
    (lambda: measure(lambda p: (1.0, p)), ValueError, "loss_fn", "real", "tuple"),
    (
        lambda: measure(lambda p: jnp.sum(p["w"]) > 0),
        ValueError,
        "loss_fn",
        "real",
        "bool",
    ),
    (
        lambda: measure(params={"w": jnp.arange(3), "b": 1.0}),
        ValueError,
        "params",
        "floating-point",
        "'b': 1.0",
    ),
    (
        lambda: measure(preconditioner={"v": jnp.ones(3)}),
        ValueError,
        "preconditioner",
        "shape (3,) at ['w']",
        "nothing",
    ),
    (
        lambda: measure(preconditioner={"w": jnp.ones(3), "v": jnp.ones(2)}),
        ValueError,
        "preconditioner",
        "like `params`, with nothing at ['v']",
        "shape (2,)",
    ),
    (
        lambda: measure(preconditioner={"w": jnp.ones(2)}),
        ValueError,
        "preconditioner",
        "shape (3,) at ['w']",
        "shape (2,)",
    ),
    (
        lambda: measure(preconditioner={"w": jnp.array([1.0, 0.0, 1.0])}),
        ValueError,
        "preconditioner",
        "positive",
        "0.0",
    ),
    (
        lambda: measure(preconditioner={"w": jnp.array([1.0, np.nan, 1.0])}),
        ValueError,
        "preconditioner",
        "positive",
        "nan",
    ),
    (
        lambda: osc.stability_limit(1.0, optimizer="sgd"),
        ValueError,
        "optimizer",
        "one of 'gd', 'heavy_ball', 'nesterov', 'adam'",
        "'sgd'",
    ),
    (
        lambda: osc.stability_limit(1.0, optimizer="adam", momentum=1.0),
        ValueError,
        "momentum",
        "at least 0 and less than 1",
        "1.0",
    ),
    (lambda: osc.stability_limit("1"), TypeError, "sharpness", "a number", "'1'"),
    (lambda: osc.stability_limit(None), TypeError, "sharpness", "a number", "None"),
]


@pytest.mark.parametrize(("call", "error", "argument", "rule", "value"), BAD_INPUT)
def test_bad_input_is_named(call, error, argument, rule, value):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"`{argument}` must be ")
    told, _, got = message.partition(", got ")
    assert rule in told
    assert value in got


def test_nothing_raises_under_jit():
    jax.eval_shape(lambda p: measure(preconditioner=p), {"w": jnp.zeros(3)})
    jax.jit(lambda m: osc.stability_limit(1.0, momentum=m))(1.0)


def test_equal_constants_of_different_types_are_told_apart():
    """``1 == True``, and both are static."""
    seen = set()

    def loss_fn(params, constant):
        seen.add(type(constant))
        return jnp.sum(params**2)

    for constant in (True, 1):
        jax.eval_shape(lambda p, c=constant: osc.sharpness(loss_fn, p, c), np.ones(2))
    assert seen == {bool, int}


@pytest.mark.parametrize("seed", range(3))
def test_dense_quadratics_are_within_one_per_cent(seed):
    """Rotated; eigenvalues over four decades, linear, and of a Wishart matrix."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(50, 50)))[0]
    factor = rng.normal(size=(50, 100))
    for matrix in (
        rotation * np.geomspace(1e-4, 3.0, 50) @ rotation.T,
        rotation * np.linspace(0.1, 20.0, 50) @ rotation.T,
        factor @ factor.T / 100,
    ):
        top = np.linalg.eigvalsh(matrix)[-1]
        params = jnp.asarray(rng.normal(size=50), jnp.float32)
        found = osc.sharpness(quadratic_form, params, jnp.asarray(matrix, jnp.float32))
        assert found.value == pytest.approx(top, rel=0.01)


def quadratic_form(params, matrix):
    return 0.5 * params @ matrix @ params
