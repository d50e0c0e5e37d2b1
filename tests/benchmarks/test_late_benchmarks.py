"""The benchmarks of late decay and of large rates are what they say."""

import jax
import jax.numpy as jnp
import large_rate_regimes as regimes
import late_decay_minimum_norm as minimum_norm
import numpy as np
import optax
import pytest

pytestmark = pytest.mark.slow

# --- the minimum-norm model -----------------------------------------------------------


def stacked(make, seeds, *args):
    return jax.tree.map(
        lambda *arrays: np.stack(arrays), *[make(seed, *args) for seed in seeds]
    )


@pytest.mark.parametrize("seed", [0, 7])
def test_start_and_shortest_are_interpolators(seed):
    problem = minimum_norm.make_problem(seed)
    for alpha in (problem.start, problem.minimum_norm, problem.teacher):
        np.testing.assert_allclose(problem.inputs @ alpha, problem.labels, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(problem.start), 3.0, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(problem.teacher), 1.0, rtol=1e-6)
    shortest = np.linalg.lstsq(problem.inputs, problem.labels, rcond=None)[0]
    np.testing.assert_allclose(problem.minimum_norm, shortest, atol=1e-5)


def test_the_model_is_inverted():
    alpha = np.random.default_rng(0).normal(size=5).astype(np.float32)
    w = minimum_norm.to_w(alpha)
    np.testing.assert_allclose(minimum_norm.to_alpha(w), alpha, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(w) ** 3, np.linalg.norm(alpha), rtol=1e-5)


def test_an_arm_keeps_its_rate_and_then_drops_it():
    arm = minimum_norm.Arm(0.01, 3, then_steps=2)
    np.testing.assert_allclose(arm.rates, [0.01] * 3 + [2e-4] * 2, rtol=1e-6)
    assert arm.num_steps == 5
    np.testing.assert_allclose(arm._replace(steps=0).rates, [2e-4] * 2, rtol=1e-6)


def test_training_is_sgd_on_noisy_labels():
    num_steps, padding = 40, 5
    rates = np.geomspace(0.01, 0.001, num_steps)
    problems = stacked(minimum_norm.make_problem, range(2))
    examples = minimum_norm.draw_examples(2, num_steps + padding)
    padded = np.pad(rates, (0, padding)).astype(np.float32)
    found = minimum_norm.train(problems, examples, padded, 0.5, num_steps)
    for k, alpha in enumerate(problems.start.astype(np.float64)):
        w = alpha / np.linalg.norm(alpha) ** (2 / 3)
        for rate, chosen, noise in zip(
            rates, examples.chosen[k], examples.noise[k], strict=False
        ):
            x, y = (array[k][chosen] for array in (problems.inputs, problems.labels))
            square = w @ w
            error = square * (w @ x) - (y + 0.5 * float(noise))
            w = w - rate * error * (square * x + 2 * (w @ x) * w)
        np.testing.assert_allclose(found[k], (w @ w) * w, rtol=2e-3, atol=2e-4)


def test_measures_are_those_of_the_definitions():
    problems = stacked(minimum_norm.make_problem, range(3))
    found = minimum_norm.measure(problems, problems.teacher + np.eye(3, 40))
    np.testing.assert_allclose(found["test loss"], 0.5, rtol=1e-6)
    at_shortest = minimum_norm.measure(problems, problems.minimum_norm)
    np.testing.assert_array_equal(at_shortest["distance"], 0)
    diverged = minimum_norm.measure(problems, np.full((3, 40), np.nan))
    assert not minimum_norm.is_stable(diverged["norm"]).any()


def test_late_decay_comes_nearer_to_the_minimum_norm():
    problems = stacked(minimum_norm.make_problem, range(16))
    arms = [minimum_norm.Arm(0.01, steps, then_steps=500) for steps in (0, 300, 3000)]
    examples = minimum_norm.draw_examples(16, 3500)
    medians = []
    for arm in arms:
        rates = np.pad(arm.rates, (0, 3500 - arm.num_steps))
        alphas = minimum_norm.train(problems, examples, rates, 0.5, arm.num_steps)
        found = minimum_norm.measure(problems, alphas)
        medians.append({name: np.median(values) for name, values in found.items()})
    for name in ("norm", "distance", "test loss"):
        assert medians[0][name] > medians[1][name] > medians[2][name]
    assert medians[2]["test loss"] < 0.1 * medians[0]["test loss"]


@pytest.mark.parametrize(
    ("changed", "holds"),
    [({}, [True, True]), ({3000: 0.46}, [False, False]), ({300: 1.4}, [True, False])],
)
def test_verdict_on_late_decay(changed, holds):
    losses = {0: 4.5, 100: 1.34, 300: 0.77, 1000: 0.42, 3000: 0.285, 10_000: 0.2435}
    losses[20_000] = 0.2449  # No longer falls, and need not.
    assert [*minimum_norm.verdicts(losses | changed).values()] == holds


# --- the tick task --------------------------------------------------------------------

BUDGET = regimes.Budget(64, 100, 30, 128, 16, spacing=2)


@pytest.mark.parametrize(
    ("point", "label"),
    [
        ((0, -1), 0),
        ((1, -0.15), 0),
        ((-1, -0.15), 0),
        ((0, 0.15), 1),
        ((1, 1.15), 1),
        ((-1, 1.15), 1),
        ((1.5, -1.9), 1),
        ((0, 0), -1),
        ((1, 1.1), -1),
        ((1, -1), -1),
        ((1, -1.1), -1),
    ],
)
def test_classes_lie_inside_and_outside_of_the_tick(point, label):
    assert regimes.classify(np.array(point)) == label


def test_points_are_of_their_class_and_fill_it():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (400, 3))
    points = regimes.draw_points(rng, labels)
    np.testing.assert_array_equal(regimes.classify(points), labels)
    assert np.abs(points).max() <= 2
    for label in (0, 1):
        # Symmetric, on both sides; the second class above and below.
        of_class = points[labels == label]
        assert abs(of_class[:, 0].mean()) < 0.2
        assert of_class[:, 1].std() > 0.6


def test_every_feature_says_the_class():
    problem = regimes.make_problem(3, BUDGET)
    for inputs, labels in (problem.train, problem.test):
        classes = regimes.classify(inputs.reshape(len(labels), 16, 2))
        np.testing.assert_array_equal(classes, np.repeat(labels[:, None], 16, axis=1))


def test_one_feature_alone_says_the_class():
    inputs, labels = regimes.make_problem(3, BUDGET).features
    assert inputs.shape == (16, 30, 32)
    points = inputs.reshape(16, 30, 16, 2)
    for feature in range(16):
        classes = regimes.classify(points[feature])
        np.testing.assert_array_equal(classes[:, feature], labels[feature])
        others = np.delete(points[feature], feature, axis=1)
        above = others[..., 1] - np.abs(others[..., 0])
        np.testing.assert_allclose(np.abs(above + 1), 1, atol=1e-5)
        assert np.abs(others).max() <= 2


def test_a_seed_has_its_own_problem():
    first, again, other = (regimes.make_problem(seed, BUDGET) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    differ = jax.tree.map(lambda a, b: not np.array_equal(a, b), first, other)
    assert all(jax.tree.leaves(differ))


def test_the_network_norms_each_layer():
    problem = jax.tree.map(np.float64, regimes.make_problem(3, BUDGET))
    hidden = problem.test[0]
    for kernel in problem.start:
        hidden = hidden @ kernel
        hidden = hidden - hidden.mean(1, keepdims=True)
        hidden = np.maximum(hidden / np.sqrt(hidden.var(1, keepdims=True) + 1e-7), 0)
    found = regimes.logits_of(problem.start, problem.head, problem.test[0])
    np.testing.assert_allclose(found, hidden @ problem.head, atol=1e-3)
    twice = [2 * kernel for kernel in problem.start]
    again = regimes.logits_of(twice, problem.head, problem.test[0])
    np.testing.assert_allclose(again, found, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(problem.head), 10, rtol=1e-6)


def by_hand(problem, rate, order):
    """Parameters after each step of SGD, divided by their joint norm."""
    params = [jnp.asarray(kernel) for kernel in problem.start]
    grad_fn = jax.jit(jax.grad(regimes.loss_fn))
    history = []
    for chosen in order:
        batch = [part[chosen] for part in problem.train]
        grads = grad_fn(params, problem.head, batch)
        moved = [p - rate * g for p, g in zip(params, grads, strict=True)]
        norm = np.sqrt(sum(float(jnp.sum(p**2)) for p in moved))
        params = [p / norm for p in moved]
        history.append(params)
    return history


def repeated(params, count):
    return jax.tree.map(lambda a: np.repeat(a[:, None], count, axis=1), params)


@pytest.fixture(scope="module")
def trained():
    """Two seeds, two rates, 24 steps; the averages of the last 5 of each second."""
    seeds, rates = (3, 4), np.array([3e-4, 1e-3], np.float32)
    problems = stacked(regimes.make_problem, seeds, BUDGET)
    orders = np.stack([regimes.make_orders(seed, BUDGET)[0][:100] for seed in seeds])
    start = repeated(problems.start, len(rates))
    return problems, rates, orders, regimes.train(start, rates, problems, orders, 2)


def test_training_is_sgd_on_the_sphere(trained):
    problems, rates, orders, (params, averages) = trained
    for k, rate in enumerate(rates):
        for seed in range(2):
            problem = jax.tree.map(lambda a, seed=seed: a[seed], problems)
            history = by_hand(problem, rate, orders[seed])
            last = [leaf[seed, k] for leaf in params]
            np.testing.assert_allclose(optax.tree.norm(last), 1, rtol=1e-6)
            for leaf, expected in zip(last, history[-1], strict=True):
                np.testing.assert_allclose(leaf, expected, atol=2e-4)
            for count in (5, 20, 50):
                samples = history[::-2][:count]
                mean = jax.tree.map(lambda *a: np.mean(a, axis=0), *samples)
                found = [leaf[seed, k] for leaf in averages[f"SWA{count}"]]
                for leaf, expected in zip(found, mean, strict=True):
                    np.testing.assert_allclose(leaf, expected, atol=2e-4)


def test_a_run_in_two_parts_is_the_same_run(trained):
    problems, rates, orders, (params, _) = trained
    start = repeated(problems.start, len(rates))
    half, _ = regimes.train(start, rates, problems, orders[:, :50])
    both, _ = regimes.train(half, rates, problems, orders[:, 50:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), both, params)


def test_the_search_for_the_threshold_trains_as_the_rest():
    problem, order = regimes.make_problem(3, BUDGET), regimes.make_orders(3, BUDGET)[0]
    params, loss = regimes.epoch(
        problem.start, 0.05, order[:4], problem.train, problem.head
    )
    history = by_hand(problem, 0.05, order[:4])
    for leaf, expected in zip(params, history[-1], strict=True):
        np.testing.assert_allclose(leaf, expected, atol=1e-5)
    losses = [
        regimes.loss_fn(p, problem.head, [part[chosen] for part in problem.train])
        for p, chosen in zip([problem.start, *history[:-1]], order[:4], strict=True)
    ]
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)


def test_barrier_is_the_error_above_the_line_between_the_ends():
    problems = stacked(regimes.make_problem, (3,), BUDGET)
    other = stacked(regimes.make_problem, (4,), BUDGET)
    first, second = (repeated(p.start, 1) for p in (problems, other))
    found = regimes.compare(first, second, problems)
    head, examples = problems.head[0], [part[0] for part in problems.test]
    errors = []
    for t in np.linspace(0, 1, 21):
        params = [
            (1 - t) * a[0, 0] + t * b[0, 0] for a, b in zip(first, second, strict=True)
        ]
        logits = regimes.logits_of(params, head, examples[0])
        errors.append(100 * np.mean((logits > 0) != examples[1]))
    line = np.linspace(errors[0], errors[-1], 21)
    assert np.max(errors - line) > 0
    np.testing.assert_allclose(found["test barrier"], np.max(errors - line), atol=1.01)
    cosine = sum(np.vdot(a, b) for a, b in zip(first, second, strict=True))
    np.testing.assert_allclose(found["angle"], np.arccos(cosine), rtol=1e-5)
    same = regimes.compare(first, first, problems)
    for name in ("train barrier", "test barrier", "angle"):
        np.testing.assert_allclose(same[name], 0, atol=1e-3)


def test_groups_of_seeds_are_joined_by_rate():
    one, two = np.ones((2, 2, 16)), np.full((1, 2, 16), 2.0)
    one[1, 0, 3], one[1, 0, 5] = 9, 7
    groups = [
        {"low": {"test": [[1, 2], [3, 4]], "features": one}},
        {"low": {"test": [[5, 6]], "features": two}},
    ]
    found = regimes.by_rate(groups, (0.1, 0.2))
    np.testing.assert_array_equal(found[0.1]["low"]["test"], [1, 3, 5])
    np.testing.assert_array_equal(found[0.2]["low"]["test"], [2, 4, 6])
    np.testing.assert_array_equal(found[0.1]["low"]["best feature"], [1, 9, 2])
    np.testing.assert_array_equal(found[0.1]["low"]["second feature"], [1, 7, 2])
    np.testing.assert_array_equal(found[0.1]["low"]["median feature"], [1, 1, 2])


def results_where_all_hold():
    noise = np.array([-0.5, 0.5, -0.25, 0.25])

    def at(train, test, low, high, average, best):
        stages = {"pre-trained": test, "low": low, "high": high, "SWA20": average}
        found = {
            stage: dict.fromkeys(regimes.BEST, best + noise)
            | {"test": mean + k * noise}
            for k, (stage, mean) in enumerate(stages.items())
        }
        found["pre-trained"]["train"] = train + noise
        return found

    return {
        regimes.DIRECT: at(99.9, 75, 75, 75, 75, 56),
        regimes.ABOVE: at(86, 68, 78, 78, 81, 67),
        regimes.TOO_LARGE: at(77, 62, 73, 76, 69, 60),
    }


@pytest.mark.parametrize(
    ("number", "rate", "stage", "measure", "value"),
    [
        (None, None, None, None, None),
        (1, regimes.ABOVE, "pre-trained", "train", 91.0),
        (1, regimes.DIRECT, "pre-trained", "train", 99.0),
        (2, regimes.ABOVE, "low", "best feature", 56.0),
        (3, regimes.ABOVE, "pre-trained", "test", 78.0),
        (4, regimes.TOO_LARGE, "low", "test", 79.0),
        (5, regimes.DIRECT, "pre-trained", "test", 78.0),
        (6, regimes.ABOVE, "high", "test", 75.0),
        (7, regimes.ABOVE, "SWA20", "test", 78.0),
    ],
)
def test_a_claim_falls_with_what_it_is_about(number, rate, stage, measure, value):
    results = results_where_all_hold()
    if number is not None:
        measured = results[rate][stage][measure]
        results[rate][stage][measure] = measured - measured.max() + value
    claims = [claim for claim in regimes.judge(results) if claim.asked]
    assert [claim.claim[0] for claim in claims] == list("1234567")
    fallen = [int(claim.claim[0]) for claim in claims if not claim.holds]
    assert fallen == ([] if number is None else [number])
