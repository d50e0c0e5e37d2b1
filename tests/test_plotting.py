"""What is drawn where, and what happens without matplotlib."""

import dataclasses
import sys

import jax
import matplotlib
import numpy as np
import optax
import pytest

import optax_superconv as osc
from optax_superconv.finders import _grid_results, _readings

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


cycle = jax.jit(osc.onecycle_schedule(1.0, 50))


def make_result(losses):
    rates = np.geomspace(1e-6, 10, 100, dtype=np.float32)[: len(losses)]
    return osc.RangeTestResult(rates, losses, losses, False, optimizer="adamw")


def test_draws_a_schedule_over_all_steps():
    (line,) = osc.plotting.plot_schedule(cycle, 50).get_lines()
    np.testing.assert_array_equal(line.get_xdata(), np.arange(51))
    np.testing.assert_allclose(line.get_ydata(), cycle(np.arange(51)), rtol=1e-6)


def test_draws_in_the_axes_it_is_given():
    _, ax = plt.subplots()
    assert osc.plotting.plot_schedule(cycle, 50, ax) is ax
    result = make_result(2 - np.linspace(0, 1, 100))
    assert osc.plotting.plot_range_test(result, ax) is ax


def test_draws_optax_schedules_and_long_runs():
    schedule = optax.cosine_onecycle_schedule(10**8, 1.0)
    (line,) = osc.plotting.plot_schedule(schedule, 10**8).get_lines()
    assert len(line.get_xdata()) == 2001
    assert line.get_ydata().max() == pytest.approx(1.0, abs=1e-4)


def test_each_schedule_of_a_mapping_has_its_own_axis():
    names = ("rate", "momentum", "decay")
    axes = osc.plotting.plot_schedule(dict.fromkeys(names, cycle), 50).figure.axes
    assert [ax.get_ylabel() for ax in axes] == list(names)
    assert axes[2].spines["right"].get_position() == ("axes", 1.15)
    figure = axes[0].figure
    figure.canvas.draw()
    for ax in axes:  # Labels and ticks lie inside the figure.
        box = ax.get_tightbbox().transformed(figure.transFigure.inverted())
        assert box.x1 <= 1.001


# --- the dials of an optimizer --------------------------------------------------------


RATE = np.asarray(cycle(np.arange(50)))


def drawn(ax):
    """The lines by label, of all y-axes."""
    lines = [line for axes in ax.figure.axes for line in axes.get_lines()]
    return {line.get_label(): line.get_ydata() for line in lines}


def grouped(multipliers):
    """Groups of a leaf each, and their parameters."""
    labels = {str(label): label for label in multipliers}
    tx = osc.scale_by_learning_rate(cycle, multipliers=multipliers, param_labels=labels)
    return tx, {name: np.zeros((3, 3)) for name in labels}


def test_draws_what_every_update_of_an_optimizer_applies():
    ax = osc.plotting.plot_schedule(osc.onecycle_sgd(1.0, 50), 50)
    lines = drawn(ax)
    np.testing.assert_allclose(lines["learning_rate"], RATE, rtol=1e-5)
    momentum = osc.onecycle_momentum_schedule(50)(np.arange(50))
    np.testing.assert_allclose(lines["momentum"], momentum, rtol=1e-5)
    labels = [axes.get_ylabel() for axes in ax.figure.axes]
    assert labels == ["learning_rate", "momentum"]
    np.testing.assert_array_equal(ax.get_lines()[0].get_xdata(), np.arange(50))


def test_draws_the_steps_that_it_shows_after_all_before_them():
    schedule = optax.linear_schedule(0.0, 9999.0, 9999)
    (line,) = osc.plotting.plot_schedule(osc.sgd(schedule), 10_000).get_lines()
    assert len(line.get_xdata()) == 2001
    np.testing.assert_allclose(line.get_ydata(), line.get_xdata(), atol=0.01)


def test_steps_of_multi_steps_are_micro_steps():
    tx = optax.MultiSteps(osc.scale_by_learning_rate(cycle), 2)
    (line,) = osc.plotting.plot_schedule(tx, 9).get_lines()
    applied = RATE[[0, 0, 0, 1, 1, 2, 2, 3, 3]]  # Before the first, that of step 0.
    np.testing.assert_allclose(line.get_ydata(), applied, rtol=1e-5)


def test_groups_of_a_dial_share_an_axis():
    tx, params = grouped({0: 0.25, 1: 0.5, 2: 1.0})
    ax = osc.plotting.plot_schedule(tx, 50, params=params)
    assert len(ax.figure.axes) == 1
    lines = drawn(ax)
    assert sorted(lines) == [f"learning_rate/{k}" for k in range(3)]
    np.testing.assert_allclose(lines["learning_rate/1"], RATE / 2, rtol=1e-5)
    assert legend_of(ax) == [f"learning_rate/{k}" for k in range(3)]


def test_a_rate_that_no_group_has_is_drawn_beside_them():
    tx, params = grouped({0: 0.25, 1: 0.5})
    lines = drawn(osc.plotting.plot_schedule(tx, 50, params=params))
    np.testing.assert_allclose(lines["learning_rate"], RATE, rtol=1e-5)


def test_of_many_groups_the_first_and_the_last_are_named():
    tx, params = grouped({k: 0.95 ** (11 - k) for k in range(12)})
    ax = osc.plotting.plot_schedule(tx, 50, params=params)
    assert len({str(line.get_color()) for line in ax.get_lines()}) == 12
    assert legend_of(ax) == ["learning_rate/0", "learning_rate/11"]


@pytest.mark.parametrize(("factor", "scale"), [(0.9, "linear"), (0.01, "log")])
def test_groups_far_apart_are_drawn_in_the_logarithm(factor, scale):
    tx, params = grouped({0: factor, 1: 1.0})
    ax = osc.plotting.plot_schedule(tx, 50, params=params)
    assert ax.get_yscale() == scale
    low, high = ax.get_ylim()
    assert low < factor * RATE.max() < 1 < high


def test_what_is_frozen_is_not_drawn():
    labels = {"body": "body", "head": "head", "stem": "stem"}
    tx = osc.gradual_unfreezing(
        osc.sgd(cycle), {"body": 20, "head": 0, "stem": None}, labels
    )
    params = {name: np.zeros(2) for name in labels}
    lines = drawn(osc.plotting.plot_schedule(tx, 50, params=params))
    body = np.concatenate([np.full(20, np.nan), RATE[:30]])
    np.testing.assert_allclose(lines["learning_rate/body"], body, rtol=1e-5)
    np.testing.assert_allclose(lines["learning_rate/head"], RATE, rtol=1e-5)
    assert "learning_rate/stem" not in lines


def test_stand_ins_keep_the_leading_axis_and_the_number_of_axes():
    shapes = {"layers": (3, 10**6, 10**6), "norm": (5,), "head": (7, 10**6)}
    params = {
        name: jax.ShapeDtypeStruct(shape, np.float16) for name, shape in shapes.items()
    }
    seen = []

    def labels(params):
        seen.append(jax.tree.map(lambda x: (x.shape, str(x.dtype)), params))
        return jax.tree.map(np.ndim, params)

    tx = osc.scale_by_learning_rate(
        cycle,
        multipliers={3: np.array([0.2, 0.5, 1.0]), 2: 0.8, 1: 0.4},
        param_labels=labels,
    )
    lines = drawn(osc.plotting.plot_schedule(tx, 50, params=params))
    small = {"layers": (3, 1, 1), "norm": (5,), "head": (7, 1)}
    assert seen[0] == {name: (shape, "float32") for name, shape in small.items()}
    np.testing.assert_allclose(lines["learning_rate/3[1]"], RATE / 2, rtol=1e-5)
    np.testing.assert_allclose(lines["learning_rate/1"], 0.4 * RATE, rtol=1e-5)


def test_a_dial_that_never_moves_stands_in_the_title():
    tx = osc.sgd(cycle, 0.9, weight_decay=0.01)
    ax = osc.plotting.plot_schedule(tx, 50)
    assert sorted(ax.get_title().split(", ")) == [
        "momentum = 0.9",
        "weight_decay = 0.01",
    ]
    assert [axes.get_ylabel() for axes in ax.figure.axes] == ["learning_rate"]


def test_a_constant_rate_is_drawn():
    ax = osc.plotting.plot_schedule(osc.sgd(0.5), 10)
    np.testing.assert_array_equal(drawn(ax)["learning_rate"], 0.5)


def test_an_optimizer_without_dials_is_refused():
    with pytest.raises(ValueError, match=r"`dials` must .*osc\.adamw.*ScaleByAdam"):
        osc.plotting.plot_schedule(optax.adam(0.1), 10)


def test_says_that_labels_need_the_parameters():
    tx, _ = grouped({0: 0.5})
    with pytest.raises(ValueError, match="label") as error:
        osc.plotting.plot_schedule(tx, 10)
    assert "`params`" in error.value.__notes__[0]


# --- range tests ----------------------------------------------------------------------


def noisy(seed=0, shift=0.0, noise=0.05):
    """Losses that fall from 2 to 1 at a rate of 1e-3, and explode above 1."""
    x, rng = np.linspace(-6, 1, 100), np.random.default_rng(seed)
    losses = 2 + shift - 1 / (1 + np.exp(-3 * (x + 3))) + noise * rng.normal(size=100)
    return make_result(np.where(x > 0, 1e9, losses))


AT_ONCE = make_result(np.array([2.0, 3.0, 1e7, np.inf]))
FROM_THE_START = make_result(2 + np.exp(np.arange(40.0)))


def lines_of(ax, style):
    """The data of the lines of a style, by what a legend would say."""
    found = [line for line in ax.get_lines() if line.get_linestyle() == style]
    return [line.get_xydata() for line in found]


def dots_of(ax):
    (dots,) = [line for line in ax.get_lines() if line.get_marker() == "o"]
    return dots.get_xydata()


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("method", ["knee", "halfway"])
def test_the_suggestion_lies_on_the_smoothing_it_is_read_from(method):
    result = noisy()
    ax = osc.plotting.plot_range_test(result, method=method)
    raw, smooth = lines_of(ax, "-")
    (mark,) = lines_of(ax, "--")
    rate = osc.suggest_learning_rate(result, method=method)
    np.testing.assert_array_equal(mark[:, 0], rate)
    np.testing.assert_array_equal(raw[:, 1], result.losses)
    ((at, height),) = dots_of(ax)
    assert at == rate
    assert height == pytest.approx(np.interp(rate, *smooth.T), rel=0.01)
    # Nine tenths, or half, of the fall of what is drawn is done there.
    bottom = smooth[:, 1].argmin()
    top = smooth[:bottom, 1].max()
    done = (top - height) / (top - smooth[bottom, 1])
    assert done == pytest.approx({"knee": 0.9, "halfway": 0.5}[method], abs=0.01)


@pytest.mark.parametrize("shift", [0.0, -1.5, 1000.0])
def test_the_fall_fills_the_axes_whatever_explodes(shift):
    low, high = osc.plotting.plot_range_test(noisy(shift=shift)).get_ylim()
    assert low < 1 + shift
    assert 2 + shift < high
    assert high - low < 1.6


def test_draws_repeats_with_their_median_and_interval():
    results = [noisy(seed) for seed in range(3)]
    ax = osc.plotting.plot_range_test(results)
    ((median, _), _) = lines_of(ax, "--")[0]
    assert median == osc.suggest_learning_rate(results)
    (band,) = ax.patches
    low, high = osc.suggest_interval(results)
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((low, high))
    each = [osc.suggest_learning_rate(result) for result in results]
    np.testing.assert_array_equal(dots_of(ax)[:, 0], each)
    drawn = lines_of(ax, "-")
    for result, line in zip(results, drawn[:3], strict=True):
        np.testing.assert_array_equal(line[:, 1], result.losses)
    assert len(drawn) == 6


def test_repeats_are_grey_and_their_reading_is_not():
    ax = osc.plotting.plot_range_test([noisy(seed) for seed in range(3)])
    colors = {"-": set(), "--": set()}
    for line in ax.get_lines():
        if line.get_linestyle() in colors:
            color = matplotlib.colors.to_rgb(line.get_color())
            colors[line.get_linestyle()].add(color)
    assert all(len({*color}) == 1 for color in colors["-"])
    assert len(colors["-"]) == 2
    assert all(len({*color}) == 3 for color in colors["--"])


@pytest.mark.parametrize("bad", [AT_ONCE, FROM_THE_START])
def test_a_repeat_that_diverges_at_once_is_counted_and_left_out(bad, recwarn):
    results = [noisy(seed) for seed in range(4)]
    ax = osc.plotting.plot_range_test([bad, *results])
    rate = osc.suggest_learning_rate(results)
    assert f"knee: {rate:.2g} (4 of 5)" in legend_of(ax)
    assert "smoothed" in legend_of(ax)
    alone = osc.plotting.plot_range_test(results)
    assert ax.get_ylim() == alone.get_ylim()
    assert not recwarn


def test_shows_the_first_losses_of_what_diverges_at_once():
    ax = osc.plotting.plot_range_test(AT_ONCE)
    low, high = ax.get_ylim()
    assert 0 < low < 2
    assert 3 < high < 10
    assert legend_of(ax) == ["loss", "knee: none"]


def test_the_noise_of_a_flat_curve_does_not_fill_the_axes():
    losses = 2 + 0.001 * np.random.default_rng(0).normal(size=100)
    low, high = osc.plotting.plot_range_test(make_result(losses)).get_ylim()
    assert (low, high) == pytest.approx((1.9, 2.1), abs=0.02)


def test_draws_the_held_out_losses_that_are_read():
    x = np.linspace(-6, 1, 100)
    losses = 2 - 1 / (1 + np.exp(-3 * (x + 3)))
    result = dataclasses.replace(make_result(losses), eval_losses=losses + 10)
    ax = osc.plotting.plot_range_test(result)
    assert ax.get_ylabel() == "held-out loss"
    assert all(np.min(line[:, 1]) > 10 for line in lines_of(ax, "-"))


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


def step_fn(state, rate, batch):
    return state + float(rate), 1.0


def test_progress_says_which_extra_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"optax-superconv\[progress\]"):
        osc.range_test(step_fn, 0.0, [None], pass_hyperparams=True, progress=True)


def test_progress_counts_the_steps(capsys):
    osc.range_test(
        step_fn, 0.0, [None], num_steps=20, pass_hyperparams=True, progress=True
    )
    assert "100%" in capsys.readouterr().out


# --- the grid and the threshold -------------------------------------------------------


def grid_result(mode="range", num_steps=30, **axes):
    """Losses that fall by the sum of the hyperparameters; those below 0 diverge."""

    def step_fn(state, hyperparams, batch):
        step, rate = state
        values = {"learning_rate": rate} | hyperparams
        rate = values.pop("learning_rate")  # The state shows that it acts.
        bad = min(values.values()) < 0 and step > 3
        loss = np.nan if bad else 9.0 - float(sum(values.values())) * min(step / 10, 1)
        return (step + 1, rate), loss

    return osc.grid_test(
        step_fn,
        (0, np.float32(0.0)),
        [None],
        grid=axes,
        mode=mode,
        num_steps=num_steps,
        pass_hyperparams=True,
    )


def drawn_stars(ax):
    """Where the full star is, and the hollow ones."""
    lines = [line for line in ax.get_lines() if line.get_marker() == "*"]
    full, hollow = [], []
    for line in lines:
        face = line.get_markerfacecolor()
        (hollow if face == "w" else full).extend(line.get_xydata().tolist())
    (full,) = full
    return full, hollow


def curves_of(ax):
    return [line for line in ax.get_lines() if line.get_marker() != "*"]


def apart(errors, **axes):
    """A result of which each score is that many standard errors above the best.

    Differences of the last hundred losses take turns one above and one below their
    mean, so that their standard error is known.
    """
    turns = np.resize([1.0, -1.0], 1000)
    error = np.sqrt(100 / 99) / 10
    losses = np.array([turns * (x > 0) + 5 + x * error for x in errors])
    losses[np.isnan(errors), 4:] = np.nan
    axes = {name: np.array(axis, np.float64) for name, axis in axes.items()}
    return _grid_results.compare(losses, None, axes)


@pytest.mark.parametrize("errors", [2.7, 2.9])
def test_at_climbing_rates_the_errors_of_both_curves_count(errors):
    rng, rates = np.random.default_rng(1), np.geomspace(1e-6, 10, 100, dtype="f4")
    losses = 2 - 1 / (1 + (1e-3 / rates) ** 2) + 0.1 * rng.normal(size=100)
    curve = osc.RangeTestResult(rates, losses, losses, False, optimizer="adamw")
    smooth = _readings.smooth_curve(curve)
    # The same errors of both, so theirs together is higher by the root of 2.
    both = np.stack([losses, losses + errors * smooth.errors[smooth.values.argmin()]])
    result = _grid_results.compare(both, rates, {"a": np.array([1.0, 2.0])})
    assert result.margin_in_errors == pytest.approx(errors / np.sqrt(2))
    assert _grid_results.tied(result).tolist() == [True, errors < 2 * np.sqrt(2)]


def test_ties_are_equal_scores_and_margins_below_two_errors():
    result = apart([1.9, 0, np.nan, 2.1, 0, 30], a=[1, 2], b=[1, 2, 3])
    assert result.best == {"a": 1.0, "b": 2.0}
    expected = [[True, True, False], [False, True, False]]
    assert _grid_results.tied(result).tolist() == expected


def test_of_few_steps_only_equal_scores_are_tied():
    losses = np.full((3, 20), 3.0)
    losses[1] = np.resize([1.1, 5.1], 20)  # Higher by 0.1 with an error of 2.
    axes = {"a": np.arange(3.0)}
    result = _grid_results.compare(losses, None, axes)
    assert _grid_results.tied(result).tolist() == [True, False, True]


def test_marks_the_ties_in_a_map():
    result = apart([1.9, 0, np.nan, 2.1, 0, 30], a=[1, 2], b=[1, 2, 3])
    ax = osc.plotting.plot_grid(result)
    full, hollow = drawn_stars(ax)
    assert np.round(full).tolist() == [1, 0]
    assert np.round(hollow).tolist() == [[0, 0], [1, 1]]
    assert ax.get_title() == "hollow star: not told apart from the best"


def test_a_cell_is_tied_if_any_value_of_a_further_axis_is():
    errors = [30, 30, 0, 30, 30, 1.9, 30, 30]
    result = apart(errors, a=[1, 2], b=[1, 2], c=[1, 2])
    full, hollow = drawn_stars(osc.plotting.plot_grid(result))
    assert np.round(full).tolist() == [1, 0]
    assert np.round(hollow).tolist() == [[0, 1]]


def test_marks_the_ties_of_one_axis():
    result = apart([30, 0, 1.9, np.nan], a=[4, 3, 2, 1])
    ax = osc.plotting.plot_grid(result, kind="scores")
    full, hollow = drawn_stars(ax)
    assert full[0] == 2
    assert [x for x, _ in hollow] == [1]
    assert legend_of(ax) == ["best: 3", "not told apart from the best"]


def test_marks_the_ties_at_the_ends_of_the_curves():
    result = apart([30, 0, 1.9, np.nan], a=[4, 3, 2, 1])
    ax = osc.plotting.plot_grid(result, kind="curves")
    full, hollow = drawn_stars(ax)
    assert [full[0], hollow[0][0]] == [999, 999]
    assert full[1] == pytest.approx(5)
    assert hollow[0][1] == pytest.approx(5 + 0.19, abs=0.1)
    assert len(hollow) == 1
    assert "not told apart from the best" in legend_of(ax)


def test_marks_the_lowest_points_of_the_curves_of_a_range_test():
    rates = np.geomspace(1e-6, 10, 100, dtype="f4")
    x = np.log10(rates)
    losses = np.stack([2 + (x + 1) ** 2 / 20, 2 + (x + 3) ** 2 / 20])
    losses += 0.02 * np.random.default_rng(0).normal(size=losses.shape)
    result = _grid_results.compare(losses, rates, {"a": np.array([1.0, 2.0])})
    full, hollow = drawn_stars(osc.plotting.plot_grid(result))
    places = sorted(np.log10([full[0], hollow[0][0]]))
    np.testing.assert_allclose(places, [-3, -1], atol=0.4)


@pytest.mark.parametrize("mode", ["range", "constant"])
def test_draws_the_curve_of_every_combination(mode):
    ax = osc.plotting.plot_grid(grid_result(mode, a=[1.0, 3.0, 2.0]))
    assert [line.get_linewidth() for line in ax.get_lines()].count(2.5) == 1
    assert legend_of(ax) == ["a = 3 (best)", "a = 2", "a = 1"]
    assert ax.get_xscale() == ("log" if mode == "range" else "linear")
    ends = [line.get_ydata()[-1] for line in curves_of(ax)]
    np.testing.assert_allclose(ends, [8.0, 7.0, 6.0], atol=0.3)
    low, high = ax.get_ylim()
    assert 5 < low < 6.1
    assert 9 <= high < 11


@pytest.mark.parametrize("mode", ["range", "constant"])
def test_draws_curves_of_which_some_diverged(mode):
    result = grid_result(mode, a=[-1.0, 1.0, 2.0])
    assert result.diverged.tolist() == [True, False, False]
    ax = osc.plotting.plot_grid(result)
    assert len(curves_of(ax)) == (2 if mode == "range" else 3)
    assert ax.get_ylim()[1] < 12


def test_many_curves_name_the_best_alone():
    result = grid_result(a=[1.0, 2.0, 3.0], b=[0.0, 0.5, 1.0])
    ax = osc.plotting.plot_grid(result, kind="curves")
    assert len(curves_of(ax)) == 9
    assert legend_of(ax) == ["a = 3, b = 1 (best)"]


def test_draws_the_scores_of_one_axis():
    result = grid_result("constant", a=[3.0, -1.0, 1.0], b=[0.5])
    ax = osc.plotting.plot_grid(result, kind="scores")
    points, star = ax.get_lines()
    np.testing.assert_array_equal(points.get_ydata(), [np.nan, 7.5, 5.5])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["-1", "1", "3"]
    np.testing.assert_array_equal(star.get_xydata(), [[2, 5.5]])


def test_draws_a_map_of_two_axes_with_the_best_marked():
    result = grid_result("constant", a=[1.0, 2.0], one=[0.5], b=[0.0, 1.0, -1.0])
    ax = osc.plotting.plot_grid(result)
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("a", "b")
    (image,) = ax.get_images()
    expected = [[7.5, 6.5, np.nan], [6.5, 5.5, np.nan]]
    np.testing.assert_allclose(image.get_array().filled(np.nan), expected)
    assert [t.get_text() for t in ax.texts].count("diverged") == 2
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1", "-1"]
    (star,) = ax.get_lines()
    assert np.round(star.get_xydata()).tolist() == [[1, 1]]
    assert ax.get_title() == ""


def test_a_map_of_three_axes_shows_the_best_of_the_third():
    result = grid_result("constant", a=[1.0, 2.0], b=[0.0, 1.0], c=[0.5, 0.0])
    ax = osc.plotting.plot_grid(result)
    expected = [[7.5, 6.5], [6.5, 5.5]]
    np.testing.assert_allclose(ax.get_images()[0].get_array(), expected)
    assert ax.get_title() == "lowest over c; star: c = 0.5"


def test_an_exploded_score_leaves_the_others_their_colours():
    result = grid_result("constant", a=[1.0, 2.0], b=[0.0, 1.0])
    result.scores[0, 0] = 1e9
    assert osc.plotting.plot_grid(result).get_images()[0].get_clim() == (6.0, 9.0)


def threshold_result():
    return osc.convergence_threshold(
        lambda w, rate, batch: (w - 2 * rate * w, float(w) ** 2),
        1.0,
        [None],
        num_steps=40,
        num_rates=8,
        pass_hyperparams=True,
    )


def test_draws_the_end_losses_by_regime_and_the_threshold():
    result = threshold_result()
    ax = osc.plotting.plot_threshold(result)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    drawn = np.concatenate(
        [line.get_xdata() for line in ax.get_lines() if line.get_linestyle() == "None"]
    )
    assert sorted(drawn) == sorted(result.rates)
    marks = [
        line.get_xdata()[0]
        for line in ax.get_lines()
        if len(line.get_xdata()) == 2 and line.get_linestyle() == "--"
    ]
    assert marks == [result.threshold]
    assert {*legend_of(ax)} >= {
        "too slow",
        "regime 1",
        "regime 3",
        "target",
        "before fine-tuning",
    }
    low, high = ax.get_ylim()
    assert low < result.target_loss < 1.0 < high < 100
    for line in ax.get_lines():
        assert np.isfinite(line.get_ydata()).all()


def test_draws_losses_below_zero():
    result = threshold_result()
    shifted = dataclasses.replace(
        result,
        losses=result.losses - 1,
        end_losses=result.end_losses - 1,
        target_loss=-0.9,
    )
    ax = osc.plotting.plot_threshold(shifted)
    assert ax.get_yscale() == "linear"
    low, high = ax.get_ylim()
    assert low < -0.9 < 0.0 < high < 2


def test_draws_grid_and_threshold_in_the_axes_they_are_given():
    for plot, result in (
        (osc.plotting.plot_grid, grid_result(a=[1.0, 2.0])),
        (osc.plotting.plot_grid, grid_result(a=[1.0, 2.0], b=[1.0, 2.0])),
        (osc.plotting.plot_threshold, threshold_result()),
    ):
        _, ax = plt.subplots()
        assert plot(result, ax) is ax


def test_what_grid_and_threshold_plots_refuse():
    with pytest.raises(TypeError, match="`result` must be a GridTestResult, got a lis"):
        osc.plotting.plot_grid([])
    with pytest.raises(TypeError, match="`result` must be a ThresholdResult, got a l"):
        osc.plotting.plot_threshold([])
    with pytest.raises(ValueError, match="`kind` must be one of 'curves', 'scores'"):
        osc.plotting.plot_grid(grid_result(a=[1.0]), kind="surface")
