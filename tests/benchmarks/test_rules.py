"""What judges the rules: regret, fitted factors, and which task is in which half."""

import hashlib

import data
import numpy as np
import pytest
import range_test_quality as quality
import range_test_spread as spread
import rules
import suite
import tasks
from peaks_and_probes import MINI_PEAKS
from sklearn import datasets

PEAKS = np.logspace(-4, 1, 21)


def cell(best=1e-2, chooses=True, optimizer="adamw", probes=(), task="a", seeds=5):
    """A loss of 2 at the best peak, ten times that three decades away."""
    losses = 2 * np.exp(np.log(10) * (np.log10(PEAKS / best) / 3) ** 2)
    each = losses[:, None] * np.linspace(0.9, 1.1, seeds)
    untrained = np.full(seeds, 200.0)
    return rules.Cell(
        task, optimizer, chooses, 1000, PEAKS, each, untrained, list(probes)
    )


# --- regret ---------------------------------------------------------------------------


def test_regret_is_the_loss_over_that_at_the_best_of_the_grid():
    assert rules.regret(cell(), 1e-2) == pytest.approx(1)
    assert rules.regret(cell(), 10.0) == pytest.approx(10)
    pair = [rules.regret(cell(), peak) for peak in PEAKS[[12, 13]]]
    between = rules.regret(cell(), np.sqrt(PEAKS[12] * PEAKS[13]))
    assert between == pytest.approx(np.sqrt(np.prod(pair)))


def test_no_rate_and_rates_far_off_the_grid_count_as_the_untrained_network():
    for rate in (np.nan, np.inf, 0.0, 1e-7, 1e-12, 100.0, 1e9):
        assert rules.regret(cell(), rate) == pytest.approx(100)
    assert 10 < rules.regret(cell(), 30.0) < 100


def test_what_finds_no_rate_takes_another_one_which_no_factor_multiplies():
    found = rules.regret_of(cell(), [1e-2, np.nan], factor=10.0, otherwise=10.0)
    assert found == pytest.approx((rules.regret(cell(), 0.1) + 10) / 2)


def test_the_fitted_factor_leads_to_the_best_peak():
    cells = [cell(1e-2), cell(1e-1)]
    assert rules.fitted_factor(cells, [[1e-3], [1e-2]]) == pytest.approx(10)
    assert rules.fitted_factor(cells, [[1.0], [1.0]]) == pytest.approx(10**-1.5)


def test_factors_and_constants_come_from_the_half_that_chooses():
    parts = quality.parts_of(
        [
            cell(best, chooses, optimizer, [{}])
            for best, chooses in ((1e-2, True), (1.0, False))
            for optimizer in ("adamw", "sgd")
        ]
    )
    constants = quality.best_constants(parts)
    assert constants == pytest.approx({"adamw": 1e-2, "sgd": 1e-2})
    rule = rules.Rule(lambda cell, probe: [1e-3], lambda cell, probe: 100)
    plain, fitted = (found for _, found in quality.of_rule("x", rule, parts, 50))
    assert fitted["factors"] == pytest.approx({"adamw": 10.0, "sgd": 10.0})
    assert fitted["parts"]["sgd", "chose"]["mean"] == pytest.approx(1)
    assert fitted["parts"]["sgd", "report"]["mean"] == pytest.approx(
        rules.regret(cell(1.0), 1e-2)
    )
    assert plain["factors"] == {"adamw": 1.0, "sgd": 1.0}
    assert plain["share"] == pytest.approx(0.1)


def test_the_grid_is_judged_on_a_seed_that_did_not_choose():
    """Here every seed has a best peak of its own, so the others choose wrongly."""
    losses = np.full((21, 5), 2.0)
    losses[range(5), range(5)] = 1.0
    odd = cell()._replace(losses=losses)
    assert quality.all_but_one(odd) == pytest.approx(2.0 / 1.8)
    assert quality.all_but_one(cell()) == pytest.approx(1)


def test_the_interval_is_over_tasks():
    found = quality.bootstrap({"a": 1.0, "b": 4.0}, 2000)
    assert found["mean"] == pytest.approx(2)
    np.testing.assert_allclose(found["mean_interval"], [1, 4])
    np.testing.assert_allclose(found["worst_interval"], [1, 4])
    assert found["worst"] == 4


# --- rules ----------------------------------------------------------------------------


def test_medians_are_of_repeats_that_follow_each_other():
    curves = [1.0, 9.0, 2.0, np.nan, 5.0]
    probe = {"curves": curves}

    def medians(size):
        rule = rules.of_curves(lambda curve: curve, size=size)
        return rule.read(cell(), probe)

    np.testing.assert_array_equal(medians(1), curves)
    np.testing.assert_array_equal(medians(3), [2, 5.5, 3.5, 3, 5])
    np.testing.assert_array_equal(medians(5), [3.5])


def test_the_lowest_short_cycle_is_refined_by_a_parabola():
    x = np.log(MINI_PEAKS["adamw"])
    for best in (x[3], x[3] + 0.3 * (x[1] - x[0]), x[0], x[-1]):
        losses = np.exp((x - best) ** 2 / 10)
        probe = {"minis": [losses.tolist(), [1.0] * 8]}
        (found,) = rules.lowest_mini(20).read(cell(), probe)
        assert np.log(found) == pytest.approx(best)
    diverged = {"minis": [[3.0, 2.0, 1.0, None, None, None, None, None]] * 2}
    (found,) = rules.lowest_mini(40).read(cell(), diverged)
    assert found == pytest.approx(MINI_PEAKS["adamw"][2])


def test_the_threshold_gives_way_to_the_curvature_where_that_is_lower():
    for curvature, expected in ((0.01, 0.01), (1.0, 0.2)):
        probe = {"threshold": {"rate": 0.4, "steps": 1}, "curvature": curvature}
        rule = rules.half_threshold_below_curvature()
        assert rule.read(cell(), probe) == [expected]
    missing = {"threshold": {"rate": None, "steps": 1}, "curvature": 1.0}
    assert np.isnan(rules.half_threshold().read(cell(), missing))


def test_a_stored_curve_is_the_range_test_that_it_was():
    losses = np.append(np.linspace(2, 1, 60), np.full(40, np.nan))
    found = rules.as_result(losses, 1e-6, True, "sgd")
    np.testing.assert_array_equal(found.losses, np.linspace(2, 1, 60))
    np.testing.assert_allclose(found.learning_rates, np.geomspace(1e-6, 10, 100)[:60])
    average = correction = 0.0
    for loss in found.losses:
        average = 0.98 * average + 0.02 * loss
        correction = 0.98 * correction + 0.02
    assert found.smoothed_losses[-1] == pytest.approx(average / correction)
    assert (found.diverged, found.optimizer) == (True, "sgd")


def test_the_spread_is_between_quantiles_of_what_was_found():
    found = np.append(np.geomspace(1, 100, 101), np.nan)
    assert spread.high_over_low(found, 0.05) == pytest.approx(100**0.9)
    assert spread.high_over_low(found, 0) == pytest.approx(100)


# --- tasks ----------------------------------------------------------------------------


def test_of_each_kind_one_task_chooses_by_the_hash_of_its_name():
    members = suite.members(with_cifar10=True)
    assert len(members) == 26
    for optimizer, count in (("adamw", 8), ("sgd", 5)):
        for half in (True, False):
            found = [k for k, v in members.items() if k[1] == optimizer and v == half]
            assert len(found) == count
    for pair in suite.KINDS.values():
        names = sorted(
            (make.__name__ for make in pair),
            key=lambda name: hashlib.sha256(name.encode()).hexdigest(),
        )
        assert [members[name, "adamw"] for name in names] == [True, False]
    assert not any("cifar10" in name for name, _ in suite.members(with_cifar10=False))


def test_tables_are_scaled_by_their_rows_to_train_on():
    task = suite.diabetes()
    for train, held_out in zip(task.train, task.held_out, strict=True):
        np.testing.assert_allclose(train.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(train.std(0), 1, atol=1e-5)
        assert np.abs(held_out.mean(0)).max() > 1e-3
    inputs, targets = datasets.load_diabetes(return_X_y=True)
    (x, _), _ = data.split(inputs, targets, 300)
    np.testing.assert_allclose(task.train[0], (x - x.mean(0)) / x.std(0), atol=1e-4)


def test_a_seventh_of_the_labels_to_train_on_is_wrong_and_none_to_test():
    task = suite.noisy_cancer()
    inputs, targets = datasets.load_breast_cancer(return_X_y=True)
    (_, y), (_, held_out) = data.split(inputs, targets, 300)
    assert 0.1 < np.mean(np.asarray(task.train[1] != y)) < 0.2
    np.testing.assert_array_equal(task.held_out[1], held_out)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for name, _ in suite.members(False)}))
def test_every_task_trains(name):
    task = suite.task_of(name, None)
    import optax_superconv as osc

    training = tasks.Training(task, lambda rate: osc.adamw(rate))
    state = training.start(0)
    before = training.held_out_loss(state)
    indices = tasks.batch_indices(task, 60, 0)
    state, losses = training.run(state, np.float32(1e-2), indices, 0)
    assert np.isfinite(losses).all()
    assert training.held_out_loss(state) < before
