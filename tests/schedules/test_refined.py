"""Norms of a finished run, and the schedule that they ask for."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from common import evaluate
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import optax_superconv as osc

INT32_MAX = np.iinfo(np.int32).max


def noisy_norms(size, seed=0):
    """Falling, with noise and an outlier now and then, as of a real run."""
    rng = np.random.default_rng(seed)
    norms = np.linspace(2.0, 0.5, size) * rng.lognormal(sigma=0.3, size=size)
    return np.where(rng.random(size) < 0.01, 50.0, norms)


# --- the schedule ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [("sgd", [0.375, 1.0, 0.5, 0.0]), ("adam", [0.75, 1.0, 0.5, 0.0])],
)
def test_published_formula_on_four_norms(optimizer, expected):
    schedule = osc.refined_schedule(
        [2, 1, 1, 1], 1.0, 30, optimizer=optimizer, smoothing=0.0
    )
    np.testing.assert_allclose(evaluate(schedule, [0, 10, 20, 30]), expected)


@pytest.mark.parametrize("size", [6, 100, 20_000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_constant_norms_give_a_linear_decay(size, smoothing, optimizer):
    schedule = osc.refined_schedule(
        np.full(size, 7.0), 1.0, 50, optimizer=optimizer, smoothing=smoothing
    )
    counts = np.arange(51)
    np.testing.assert_allclose(evaluate(schedule, counts), 1 - counts / 50, atol=1e-6)


smoothed_norms = functools.cache(
    lambda size, smoothing: reference.smoothed_norms(noisy_norms(size), smoothing)
)


@pytest.mark.parametrize(("size", "smoothing"), [(300, 0.1), (300, 0.9), (12_000, 0.1)])
@pytest.mark.parametrize(("optimizer", "power"), [("adam", 1), ("sgd", 2)])
def test_smoothing_matches_the_paper(size, smoothing, optimizer, power):
    counts = np.arange(0, 1001, 50)
    schedule = osc.refined_schedule(
        noisy_norms(size), 0.3, 1000, optimizer=optimizer, smoothing=smoothing
    )
    smooth = smoothed_norms(size, smoothing)
    expected = reference.refined_schedule(counts, smooth, power, 0.3, 1000)
    np.testing.assert_allclose(evaluate(schedule, counts), expected, rtol=1e-4)


@pytest.mark.parametrize("size", [1004, 50_004])
def test_the_window_is_a_fraction_of_the_run_however_many_norms(size):
    # A burst shorter than half the window leaves no trace.
    progress = np.linspace(0, 1, size)
    norms = np.where(abs(progress - 0.5) < 0.02, 100.0, 1.0)
    schedule = osc.refined_schedule(norms, 1.0, 100)
    counts = np.arange(101)
    np.testing.assert_allclose(evaluate(schedule, counts), 1 - counts / 100, atol=1e-6)


def test_smoothing_leaves_out_two_norms_at_either_end():
    spoiled = np.ones(9)
    spoiled[[0, 1, -2, -1]] = [1e6, 0.0, 0.0, 1e6]
    counts = np.arange(11)
    # Five are left, of which a narrow window keeps each.
    schedule = osc.refined_schedule(spoiled, 1.0, 10, smoothing=1e-3)
    np.testing.assert_allclose(evaluate(schedule, counts), 1 - counts / 10, atol=1e-6)


def test_the_length_of_the_run_to_come_is_free():
    counts = np.linspace(0, 1, 11)
    short, long = (
        jax.jit(osc.refined_schedule(noisy_norms(100), 1.0, total))(counts * total)
        for total in (10, 10**6)
    )
    np.testing.assert_allclose(short, long, rtol=1e-3)


@pytest.mark.parametrize("total", [1, 7, 10**8, INT32_MAX])
def test_it_starts_at_the_first_value_and_ends_at_zero(total):
    norms = noisy_norms(50_000)
    schedule = jax.jit(osc.refined_schedule(norms, 0.3, total, smoothing=0.0))
    first = 0.3 * reference.refined(norms, 1)[0]
    np.testing.assert_allclose(schedule(jnp.array([-1, 0])), [first] * 2, rtol=1e-6)
    past = np.minimum(total + np.array([0, 1, 9, INT32_MAX]), INT32_MAX)
    np.testing.assert_array_equal(schedule(jnp.asarray(past)), 0)


@pytest.mark.parametrize("size", [2, 1000, 50_000])
@pytest.mark.parametrize("total", [1000, 10**8])
def test_tail_keeps_its_relative_precision(size, total):
    norms, counts = noisy_norms(size), np.arange(total - 300, total)
    schedule = osc.refined_schedule(norms, 0.3, total, smoothing=0.0)
    with jax.enable_x64(True):
        exact = jax.jit(schedule)(counts)
    assert exact.dtype == jnp.float64
    np.testing.assert_allclose(evaluate(schedule, counts), exact, rtol=1e-5)


@pytest.mark.parametrize("total", [10**6 + 1, 10**8, INT32_MAX])
def test_rough_norms_are_met_at_the_right_step(total):
    norms = noisy_norms(50_000)
    schedule = jax.jit(osc.refined_schedule(norms, 0.3, total, smoothing=0.0))
    counts = np.random.default_rng(0).integers(0, total, 10_000)
    expected = reference.refined_schedule(counts, norms, 1, 0.3, total)
    np.testing.assert_allclose(schedule(jnp.asarray(counts)), expected, rtol=1e-5)


def test_the_peak_is_reached_and_never_passed():
    schedule = osc.refined_schedule(noisy_norms(101), 0.3, 100, smoothing=0.0)
    assert evaluate(schedule, np.arange(101)).max() == np.float32(0.3)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_the_scale_of_the_norms_does_not_matter(scale):
    norms = noisy_norms(50)
    scaled = osc.refined_schedule(scale * norms, 1.0, 49, optimizer="sgd")
    plain = osc.refined_schedule(norms, 1.0, 49, optimizer="sgd")
    counts = np.arange(50)
    np.testing.assert_allclose(
        evaluate(scaled, counts), evaluate(plain, counts), rtol=1e-6
    )


@pytest.mark.parametrize("convert", [tuple, jnp.asarray, np.float16, np.int8])
def test_norms_of_any_real_type(convert):
    schedule = osc.refined_schedule(convert([2, 1, 1, 1]), 1.0, 3, smoothing=0)
    np.testing.assert_allclose(evaluate(schedule, np.arange(4)), [0.75, 1.0, 0.5, 0.0])


# --- the record -----------------------------------------------------------------------


def record(tx, grads, update=None):
    """The norms after an update with each of ``grads``, and the state."""
    update = update or jax.jit(tx.update)
    state = tx.init(grads[0])
    for g in grads:
        _, state = update(g, state)
    return optax.tree.get(state, "gradient_norms"), state


def random_grads(steps, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"a": np.float32(rng.normal(size=(4, 8))), "b": np.full(3, t, np.float32)}
        for t in range(steps)
    ]


def norms_of(grads, ord):
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in grads]
    return np.array([np.linalg.norm(x.astype(np.float64), ord) for x in flat])


@pytest.mark.parametrize("ord", [1, 2, 1.0, np.int64(2), np.float32(2)])
def test_records_the_norm_of_every_step(ord):
    grads = random_grads(7)
    norms, _ = record(osc.record_gradient_norms(7, ord=ord), grads)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, norms_of(grads, ord), rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "value"), [("bfloat16", 1.0), ("float16", 300.0), ("bfloat16", 1e10)]
)
@pytest.mark.parametrize("ord", [1, 2])
def test_accumulates_low_precision_in_float32(dtype, value, ord):
    gradient = np.full(5000, value, dtype)
    norms, _ = record(osc.record_gradient_norms(1, ord=ord), [gradient])
    expected = float(gradient[0]) * 5000 ** (1 / ord)
    np.testing.assert_allclose(norms, [expected], rtol=1e-5)


@pytest.mark.parametrize(("ord", "expected"), [(1, 12.0), (2, np.sqrt(74))])
def test_complex_gradients_count_by_their_modulus(ord, expected):
    gradient = {"complex": jnp.array([3 + 4j, 0 + 0j]), "real": jnp.array([-7.0])}
    norms, _ = record(osc.record_gradient_norms(1, ord=ord), [gradient])
    np.testing.assert_allclose(norms, [expected], rtol=1e-6)


def test_mixed_dtypes_under_strict_promotion(x64, strict):
    gradient = {"a": jnp.float64(3e30), "b": jnp.bfloat16(4), "c": jnp.int8(2)}
    norms, state = record(osc.record_gradient_norms(1, ord=2), [gradient])
    np.testing.assert_allclose(norms, [3e30], rtol=1e-6)
    assert [leaf.dtype for leaf in state] == [jnp.int32, jnp.float32, jnp.int32]


def test_leaves_that_are_none_and_trees_without_leaves():
    norms, _ = record(
        osc.record_gradient_norms(1, ord=2), [{"a": None, "b": jnp.array([3.0, 4.0])}]
    )
    assert norms == 5
    norms, _ = record(osc.record_gradient_norms(1, ord=2), [{}])
    assert norms == 0


def test_updates_are_passed_on_untouched():
    tx = osc.record_gradient_norms(3, ord=1)

    def check(gradient):
        updates, _ = tx.update(gradient, tx.init(gradient), value=1.0)
        assert updates is gradient

    jax.eval_shape(check, random_grads(1)[0])


@pytest.mark.parametrize("total", [1, 2, 7, 12])
def test_samples_are_the_means_of_parts_as_equal_as_can_be(total):
    def recorded(samples, norms):
        tx = osc.record_gradient_norms(total, ord=1, num_samples=samples)
        step = lambda state, g: (tx.update(g, state)[1], None)  # noqa: E731
        return jax.lax.scan(step, tx.init(norms[0]), norms)[0].gradient_norms

    several = (1, 2, 3, 5, 7, 12, 1000)
    norms = np.random.default_rng(0).random(total).astype(np.float32)
    records = jax.jit(lambda norms: [recorded(k, norms) for k in several])(norms)
    for samples, record in zip(several, records, strict=True):
        parts = np.array_split(norms, min(samples, total))
        expected = [part.mean() for part in parts]
        np.testing.assert_allclose(record, expected, rtol=1e-6, err_msg=f"{samples}")


def test_a_norm_that_is_not_finite_is_left_out():
    steps = [1.0, np.nan, 3.0, np.inf, 5.0, 7.0, np.nan, np.inf, -np.inf]
    norms, _ = record(
        osc.record_gradient_norms(9, ord=1, num_samples=3),
        [jnp.float32(x) for x in steps],
    )
    np.testing.assert_array_equal(norms, [2.0, 6.0, -1.0])


def test_what_is_not_reached_is_negative_and_what_is_beyond_is_not_recorded():
    tx = osc.record_gradient_norms(4, ord=1, num_samples=2)
    steps = [jnp.float32(x) for x in (1, 2, 3, 4, 100, 100)]
    np.testing.assert_array_equal(record(tx, steps[:2])[0], [1.5, -1.0])
    np.testing.assert_array_equal(record(tx, steps[:3])[0], [1.5, 3.0])
    np.testing.assert_array_equal(record(tx, steps)[0], [1.5, 3.5])


@pytest.mark.parametrize("total", [10**8, INT32_MAX - 1, INT32_MAX])
@pytest.mark.parametrize("samples", [1, 3, 1000, 1024])
def test_parts_of_the_longest_runs(total, samples):
    tx = osc.record_gradient_norms(total, ord=1, num_samples=samples)
    update = jax.jit(tx.update)
    short, longer = divmod(total, samples)
    begins = [k * short + min(k, longer) for k in range(samples)]
    middle = {max(longer - 1, 0), min(longer, samples - 1)}
    for k in {0, samples - 1} | middle:
        last = (begins[k + 1] if k + 1 < samples else total) - 1
        for count in (begins[k], last):
            state = tx.init(None)._replace(count=jnp.int32(count))
            _, state = update(jnp.float32(3), state)
            (recorded,) = np.flatnonzero(state.gradient_norms >= 0)
            assert recorded == k


def test_a_record_has_no_part_in_derivatives():
    tx = osc.record_gradient_norms(2, ord=2)

    def after(gradient):
        updates, state = tx.update(gradient, tx.init(gradient))
        return updates.sum() + state.gradient_norms[0]

    np.testing.assert_array_equal(jax.jit(jax.grad(after))(np.zeros(3)), np.ones(3))


def test_one_trace_and_one_structure_for_a_whole_run():
    tx, grads = osc.record_gradient_norms(5, ord=1), random_grads(8)
    chex.clear_trace_counter()
    _, state = record(tx, grads, jax.jit(chex.assert_max_traces(tx.update, 1)))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(grads[0]))


@pytest.mark.slow
def test_every_way_to_run_it_records_the_same():
    tx, grads = osc.record_gradient_norms(6, ord=2, num_samples=4), random_grads(6)
    eager, _ = record(tx, grads, tx.update)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *grads)

    def scan(stacked):
        step = lambda state, g: (tx.update(g, state)[1], None)  # noqa: E731
        return jax.lax.scan(step, tx.init(grads[0]), stacked)[0].gradient_norms

    mesh = jax.make_mesh((8,), ("data",))
    spread = NamedSharding(mesh, PartitionSpec(None, "data"))
    sharded = [{**g, "a": jax.device_put(g["a"], spread)} for g in grads]
    twice = jax.tree.map(lambda x: np.stack([x, 2 * x], axis=1), stacked)
    batched = np.asarray(jax.jit(jax.vmap(scan, in_axes=1))(twice))
    accumulated = optax.MultiSteps(tx, every_k_schedule=3)
    thrice = [g for g in grads for _ in range(3)]
    for norms in (
        record(tx, grads)[0],
        record(tx, grads, jax.jit(tx.update, donate_argnums=1))[0],
        jax.jit(scan)(stacked),
        batched[0],
        batched[1] / 2,
        record(tx, sharded)[0],
        record(accumulated, thrice)[0],
        record(optax.chain(optax.identity(), optax.chain(tx)), grads)[0],
    ):
        np.testing.assert_allclose(norms, eager, rtol=1e-6)


def test_what_is_masked_does_not_count():
    tx = optax.masked(osc.record_gradient_norms(3, ord=1), {"a": True, "b": False})
    grads = random_grads(3)
    expected = norms_of([g["a"] for g in grads], 1)
    np.testing.assert_allclose(record(tx, grads)[0], expected, rtol=1e-6)


# --- from one run to the next ---------------------------------------------------------


def regression(learning_rate, ord, total):
    """Noisy least squares by Adam or SGD: the record, the gradients, the last error."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(total, 16, 8))
    solution = rng.normal(size=8)
    targets = inputs @ solution + rng.normal(size=(total, 16))
    batches = np.float32(inputs), np.float32(targets)
    tx = optax.chain(
        osc.record_gradient_norms(total, ord=ord, num_samples=50),
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam() if ord == 1 else optax.identity(),
        osc.scale_by_learning_rate(learning_rate),
    )

    def loss(weights, batch):
        inputs, targets = batch
        return jnp.mean((inputs @ weights - targets) ** 2)

    def step(carry, batch):
        weights, state = carry
        gradient = jax.grad(loss)(weights, batch)
        updates, state = tx.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), gradient

    @jax.jit
    def run(batches):
        weights = jnp.zeros(8)
        return jax.lax.scan(step, (weights, tx.init(weights)), batches)

    (weights, state), grads = run(batches)
    error = np.sum((np.asarray(weights) - solution) ** 2) / np.sum(solution**2)
    return optax.tree.get(state, "gradient_norms"), grads, error


@pytest.mark.slow
@pytest.mark.parametrize(("ord", "optimizer"), [(1, "adam"), (2, "sgd")])
def test_from_a_run_to_the_schedule_of_the_next(ord, optimizer):
    norms, grads, _ = regression(0.1, ord, 200)
    # Before the clipping that follows: 200 norms, by fours.
    exact = norms_of(np.asarray(grads), ord).reshape(50, 4).mean(1)
    np.testing.assert_allclose(norms, exact, rtol=1e-5)
    schedule = osc.refined_schedule(norms, 0.1, 100, optimizer=optimizer)
    values = evaluate(schedule, np.arange(101))
    np.testing.assert_allclose(values.max(), 0.1, rtol=0.02)
    assert values[100] == 0
    assert values.min() >= 0
    assert regression(schedule, ord, 100)[2] < regression(0.1, ord, 100)[2]


def test_a_record_is_read_from_an_nnx_optimizer():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(osc.record_gradient_norms(2, ord=2), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: (m(jnp.ones(2)) ** 2).sum())(model)
        optimizer.update(model, grads)
        return grads

    grads = step(model, optimizer)
    norms = optax.tree.get(optimizer.opt_state, "gradient_norms")
    expected = norms_of([grads], 2)[0]
    np.testing.assert_allclose(norms[...], [expected, -1.0], rtol=1e-6)


def test_a_run_that_did_not_end_is_refused():
    norms, _ = record(osc.record_gradient_norms(8, ord=1), random_grads(5))
    with pytest.raises(ValueError, match=r"a record is -1 .*got -1\.0 at index 5\.$"):
        osc.refined_schedule(norms, 1.0, 10)
    finite = np.asarray(norms)[norms >= 0]
    osc.refined_schedule(finite, 1.0, 10, smoothing=0)


refine = functools.partial(osc.refined_schedule, peak_value=1.0, total_steps=10)

BAD_VALUES = [
    # call, argument, rule, value
    (lambda: refine([]), "gradient_norms", "at least 6 norms", "0"),
    (lambda: refine([1.0] * 5), "gradient_norms", "at least 6 norms", "5"),
    (lambda: refine([1.0], smoothing=0), "gradient_norms", "at least 2 norms", "1"),
    (lambda: refine(3.0), "gradient_norms", "one-dimensional", "shape ()"),
    (lambda: refine(np.ones((3, 4))), "gradient_norms", "one-d", "shape (3, 4)"),
    (
        lambda: refine([1.0, 1, 1, 1, 1, -0.5]),
        "gradient_norms",
        "finite and at least 0",
        "-0.5 at index 5",
    ),
    (
        lambda: refine([1.0, np.inf, 1, 1, 1, 1]),
        "gradient_norms",
        "finite and at least 0",
        "inf at index 1",
    ),
    (
        lambda: refine(np.zeros(100)),
        "gradient_norms",
        "above 0 after the smoothing",
        "0.0",
    ),
    (
        lambda: refine([1.0, 0.0, 1.0], smoothing=0),
        "gradient_norms",
        "above 0",
        "0.0",
    ),
    (lambda: refine(np.ones(9), peak_value=-1.0), "peak_value", "at least 0", "-1.0"),
    (lambda: refine(np.ones(9), total_steps=0), "total_steps", "at least 1", "0"),
    (
        lambda: refine(np.ones(9), optimizer="adamw"),
        "optimizer",
        "one of 'adam', 'sgd'",
        "'adamw'",
    ),
    (lambda: refine(np.ones(9), smoothing=1.0), "smoothing", "less than 1", "1.0"),
    (lambda: refine(np.ones(9), smoothing=-0.1), "smoothing", "at least 0", "-0.1"),
    (lambda: osc.record_gradient_norms(0, ord=1), "total_steps", "at least 1", "0"),
    (lambda: osc.record_gradient_norms(9, ord=3), "ord", "1 (for Adam) or 2", "3"),
    (lambda: osc.record_gradient_norms(9, ord=1.5), "ord", "1 (for Adam)", "1.5"),
    (lambda: osc.record_gradient_norms(9, ord=np.inf), "ord", "1 (for Adam)", "inf"),
    (
        lambda: osc.record_gradient_norms(9, ord=1, num_samples=0),
        "num_samples",
        "at least 1",
        "0",
    ),
]


@pytest.mark.parametrize(("call", "argument", "rule", "value"), BAD_VALUES)
def test_a_bad_value_is_named_with_its_rule(call, argument, rule, value):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    message = str(error.value)
    assert message.startswith(f"`{argument}` must be")
    assert rule in message
    assert message.endswith(f"got {value}.")


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: jax.jit(lambda g: refine(g)(0))(jnp.ones(9)), "gradient_norms"),
        (lambda: refine(["a"] * 9), "gradient_norms"),
        (lambda: refine(np.ones(9) * 1j), "gradient_norms"),
        (lambda: refine(np.ones(9), peak_value="1"), "peak_value"),
        (lambda: refine(np.ones(9), total_steps=10.0), "total_steps"),
        (lambda: refine(np.ones(9), optimizer=1), "optimizer"),
        (lambda: refine(np.ones(9), smoothing=None), "smoothing"),
        (lambda: osc.record_gradient_norms(9.0, ord=1), "total_steps"),
        (lambda: osc.record_gradient_norms(9, ord="1"), "ord"),
        (lambda: osc.record_gradient_norms(9, ord=True), "ord"),
        (lambda: osc.record_gradient_norms(9, ord=1, num_samples=2.5), "num_samples"),
    ],
)
def test_a_bad_type_is_named(call, argument):
    with pytest.raises(TypeError, match=f"^`{argument}` must be"):
        call()
