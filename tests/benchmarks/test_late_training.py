"""The parts of the benchmark of cooldowns: arms, forks, weights, plane, table."""

import functools
import itertools

import jax
import jax.numpy as jnp
import late_decay_training as benchmark
import numpy as np
import optax
import pytest
import tasks
from flax import nnx

import optax_superconv as osc

pytestmark = pytest.mark.slow

RATE, SEED, LENGTH = 0.1, 3, 20


@pytest.fixture(scope="module")
def setup():
    return benchmark.digits(smoke=True)


@pytest.fixture(scope="module")
def constant(setup):
    make_tx = functools.partial(benchmark.make_tx, setup, "constant", LENGTH)
    return tasks.Training(setup.task, make_tx)


def branches_of(setup, training, points):
    run = benchmark.run_branches
    return run(setup, training, RATE, SEED, points, lambda _, state: weights(state))


def weights(state):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state[:2])])


# --- arms and forks -------------------------------------------------------------------


def test_the_cosine_arm_is_that_of_optax(setup):
    params = {"kernel": jnp.array([[3.0, -1.0]]), "bias": jnp.array([2.0])}
    schedule = optax.warmup_cosine_decay_schedule(0, RATE, setup.warmup_steps, LENGTH)
    arms = [
        benchmark.make_tx(setup, "cosine", LENGTH, RATE),
        optax.chain(
            optax.add_decayed_weights(5e-4, {"kernel": True, "bias": False}),
            optax.sgd(schedule, 0.9, nesterov=True),
        ),
    ]
    ends = []
    for tx in arms:
        moved, state = params, tx.init(params)
        for _ in range(LENGTH):
            updates, state = tx.update(jax.tree.map(jnp.sin, moved), state, moved)
            moved = optax.apply_updates(moved, updates)
        ends.append(moved)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *ends)


def test_cooldowns_end_at_the_lengths():
    found = benchmark.forks(("constant", 200), (100, 200), (0, 20))
    assert found == {
        "constant, 100": (100, 0),
        "20 % cooldown, 100": (80, 20),
        "constant, 200": (200, 0),
        "20 % cooldown, 200": (160, 40),
    }
    assert benchmark.forks(("cosine", 100), (100, 200), (0, 20)) == {
        "cosine, 100": (100, 0)
    }


def test_steps_come_out_even_at_any_size():
    for smoke, percent in itertools.product((True, False), benchmark.PERCENTS):
        setup = benchmark.digits(smoke)
        for length in setup.lengths:
            assert length * percent % (100 * setup.chunk) == 0


# --- training -------------------------------------------------------------------------


def test_a_branch_is_the_run_that_had_its_cooldown_from_the_start(setup, constant):
    (branch,) = branches_of(setup, constant, {"": (16, 4)}).values()

    def make_tx(rate):
        schedule = osc.warmup_stable_decay_schedule(
            rate, LENGTH, warmup_steps=setup.warmup_steps, decay_steps=4
        )
        return osc.sgd(schedule, weight_decay=5e-4)

    scheduled = tasks.Training(setup.task, make_tx)
    state = scheduled.start(SEED)
    state = benchmark.advance(setup, scheduled, state, RATE, SEED, 0, LENGTH)
    np.testing.assert_allclose(branch, weights(state), rtol=1e-4, atol=1e-6)


def test_branches_leave_the_run_as_it_was(setup, constant):
    points = {"early": (10, 5), "late": (16, 4), "run": (LENGTH, 0)}
    among = branches_of(setup, constant, points)
    alone = branches_of(setup, constant, {"run": (LENGTH, 0)})
    np.testing.assert_array_equal(among["run"], alone["run"])
    assert not np.array_equal(among["late"], among["run"])


@pytest.mark.parametrize("smoke", [True, False])
def test_the_last_snapshot_is_that_of_the_last_step(smoke):
    setup = benchmark.digits(smoke)
    tx = benchmark.averages(setup)
    params, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    for _ in range(setup.lengths[0]):
        _, state = tx.update(jnp.ones(()), state, params)
        params += 1.0
    last = setup.lengths[0] - setup.chunk * 2  # The third of the last five.
    assert osc.eval_params(state, params, name="lawa") == last


# --- weights --------------------------------------------------------------------------


def test_scores_of_a_network_by_hand(setup, constant):
    state = constant.start(SEED)
    state = benchmark.advance(setup, constant, state, RATE, SEED, 0, LENGTH)
    scores = benchmark.scores_of(setup, state)
    model = setup.task.make_model(nnx.Rngs(0))
    nnx.update(model, *state[:2])
    model.eval()
    images, labels = setup.test
    accuracy = 100 * np.mean(np.argmax(model(images), -1) == labels)
    np.testing.assert_allclose(scores["last"][0], accuracy, rtol=1e-5)
    loss = tasks.cross_entropy(model, setup.test)
    np.testing.assert_allclose(scores["last"][1], loss, rtol=1e-4)
    assert len({score[1].item() for score in scores.values()}) == len(scores)


def test_rates_and_reports_have_images_of_their_own(setup):
    parts = setup.task.train, setup.task.held_out, setup.test
    seen = [{image.tobytes() for image in np.asarray(part[0])} for part in parts]
    assert sum(map(len, seen)) == len(set.union(*seen))


# --- the plane ------------------------------------------------------------------------


def test_the_main_plane_of_points_in_a_plane():
    rng = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    ellipse = np.stack([3 * np.cos(angle), np.sin(angle)], -1)
    basis, _ = np.linalg.qr(rng.normal(size=(10, 2)))
    offset = rng.normal(size=10)
    centre, directions, shares = benchmark.main_plane(ellipse @ basis.T + offset)
    np.testing.assert_allclose(centre, offset, atol=1e-12)
    np.testing.assert_allclose(np.abs(directions @ basis), np.eye(2), atol=1e-12)
    np.testing.assert_allclose(shares, [0.9, 0.1])


def test_the_grid_of_the_plane_has_the_losses_of_its_weights(setup, constant):
    found = benchmark.plane(setup, constant, RATE, SEED)
    assert found["at"] == [2, 5, 7, 10, 15, 20]
    # The second axis of the plane is the first of the grid, as contours have it.
    (x, y), path = found["axes"], np.asarray(found["path"])
    assert x[0] < path[:, 0].min() < path[:, 0].max() < x[-1]
    assert y[0] < path[:, 1].min() < path[:, 1].max() < y[-1]
    assert np.shape(found["train"]) == (len(y), len(x))
    losses = np.array(found["losses"])
    assert losses.shape == (6, 2, 2)
    assert losses[0, 0, 0] > losses[-1, 0, 0]  # The run trains.


# --- what comes out -------------------------------------------------------------------


def test_a_row_compares_with_the_cosine_of_its_length_and_seed():
    def scores(*accuracies):
        pairs = np.array([[accuracy, 1.0] for accuracy in accuracies])
        return dict.fromkeys(benchmark.WEIGHTS, pairs)

    rows = benchmark.table(
        {
            "cosine, 10": scores(50.0, 60.0),
            "cosine, 20": scores(70.0, 80.0),
            "constant, 10": scores(51.0, 63.0),
            "constant, 20": scores(70.0, 80.0),
        },
        (10, 20),
        {("cosine", 10): 0.2, ("cosine", 20): 0.4, ("constant", 20): 0.1},
        [0.1, 0.2, 0.4],
    )
    assert [(row["steps"], row["arm"]) for row in rows] == [
        (10, "cosine"),
        (10, "constant"),
        (20, "cosine"),
        (20, "constant"),
    ]
    assert [row["less cosine"] for row in rows] == [
        "",
        "+2.00 ± 1.00",
        "",
        "+0.00 ± 0.00",
    ]
    rates = ["0.2", "0.1 (edge)", "0.4 (edge)", "0.1 (edge)"]
    assert [row["peak rate"] for row in rows] == rates


def test_steps_in_all():
    # 2 to tune and 1 to run; the run to 160, and cooldowns of 20 and 40.
    assert benchmark.costs((100, 200), 2, 1) == [3 * 300, 2 * 200 + 160 + 20 + 40]
