"""What is drawn where, and what happens without matplotlib."""

import sys

import matplotlib
import numpy as np
import optax
import pytest

import optax_superconv as osc

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def make_result(losses):
    rates = np.geomspace(1e-6, 10, 100, dtype=np.float32)[: len(losses)]
    return osc.RangeTestResult(rates, losses, losses, False)


def test_draws_a_schedule_over_all_steps():
    schedule = osc.onecycle_schedule(1.0, 50)
    (line,) = osc.plotting.plot_schedule(schedule, 50).get_lines()
    np.testing.assert_array_equal(line.get_xdata(), np.arange(51))
    np.testing.assert_allclose(line.get_ydata(), schedule(np.arange(51)), rtol=1e-6)


def test_draws_in_the_axes_it_is_given():
    _, ax = plt.subplots()
    assert osc.plotting.plot_schedule(osc.onecycle_schedule(1.0, 50), 50, ax) is ax
    result = make_result(2 - np.linspace(0, 1, 100))
    assert osc.plotting.plot_range_test(result, ax) is ax


def test_draws_optax_schedules_and_long_runs():
    schedule = optax.cosine_onecycle_schedule(10**8, 1.0)
    (line,) = osc.plotting.plot_schedule(schedule, 10**8).get_lines()
    assert len(line.get_xdata()) == 2001
    assert line.get_ydata().max() == pytest.approx(1.0, abs=1e-4)


def test_each_schedule_of_a_mapping_has_its_own_axis():
    names = ("rate", "momentum", "decay")
    axes = osc.plotting.plot_schedule(
        {name: osc.onecycle_schedule(1.0, 10) for name in names}, 10
    ).figure.axes
    assert [ax.get_ylabel() for ax in axes] == list(names)
    assert axes[2].spines["right"].get_position() == ("axes", 1.15)
    figure = axes[0].figure
    figure.canvas.draw()
    for ax in axes:  # Labels and ticks lie inside the figure.
        box = ax.get_tightbbox().transformed(figure.transFigure.inverted())
        assert box.x1 <= 1.001


def test_marks_the_suggestion_and_keeps_an_explosion_out_of_view():
    x = np.linspace(-6, 1, 100)
    losses = np.where(x > 0, 1e9, 2 - 1 / (1 + np.exp(-3 * (x + 3))))
    result = make_result(losses)
    ax = osc.plotting.plot_range_test(result, method="steepest")
    assert ax.get_ylim()[1] < 3
    marks = [
        line.get_xdata()[0] for line in ax.get_lines() if len(line.get_xdata()) == 2
    ]
    assert marks == [osc.suggest_learning_rate(result, method="steepest")]


@pytest.mark.parametrize("losses", [np.full(100, 2.0), np.array([1.0, np.nan])])
def test_draws_a_curve_without_suggestion(losses):
    assert osc.plotting.plot_range_test(make_result(losses)).get_lines()


@pytest.mark.parametrize(
    "plot",
    [
        lambda: osc.plotting.plot_schedule(lambda t: t, 10),
        lambda: osc.plotting.plot_range_test(make_result(np.linspace(2, 1, 100))),
    ],
)
def test_says_which_extra_is_missing(plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"optax-superconv\[plot\]"):
        plot()


def test_progress_says_which_extra_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"optax-superconv\[progress\]"):
        osc.range_test(lambda s, r, b: (s, 1.0), 0, [None], progress=True)


def test_progress_counts_the_steps(capsys):
    osc.range_test(lambda s, r, b: (s, 1.0), 0, [None], num_steps=20, progress=True)
    assert "100%" in capsys.readouterr().out
