"""Other libraries' schedules are special cases: docs/schedules.md gives these calls."""

import math
import re

import jax
import numpy as np
import optax
import pytest
import reference
from common import ROOT, evaluate

import optax_superconv as osc

# --- published test values ------------------------------------------------------------


def test_pytorch_linear():
    """test_lrscheduler.py, test_onecycle_lr_linear_annealing: max 25, total 10."""
    rate = osc.onecycle_schedule(
        25.0, 9, warmup_steps=2, init_value=1.0, end_value=0.5, shape="linear"
    )
    expected = [1, 13, 25, 21.5, 18, 14.5, 11, 7.5, 4, 0.5]
    np.testing.assert_allclose(evaluate(rate, np.arange(10)), expected, rtol=1e-6)
    # Their momentum runs between 22 and 1, which ours does at 1/23 of the scale.
    momentum = osc.onecycle_momentum_schedule(
        9, warmup_steps=2, max_momentum=22 / 23, base_momentum=1 / 23, shape="linear"
    )
    expected = [22, 11.5, 1, 4, 7, 10, 13, 16, 19, 22]
    np.testing.assert_allclose(
        23 * evaluate(momentum, np.arange(10)), expected, rtol=1e-6
    )


def test_pytorch_linear_three_phases():
    """test_onecycle_lr_linear_annealing_three_phases: warm-up 40 %, total 10."""
    cycle = {"warmup_steps": 3, "annihilation_steps": 3, "shape": "linear"}
    rate = osc.onecycle_schedule(25.0, 9, init_value=1.0, end_value=0.25, **cycle)
    expected = [1, 9, 17, 25, 17, 9, 1, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(evaluate(rate, np.arange(10)), expected, rtol=1e-6)
    momentum = osc.onecycle_momentum_schedule(
        9, max_momentum=22 / 23, base_momentum=1 / 23, **cycle
    )
    expected = [22, 15, 8, 1, 8, 15, 22, 22, 22, 22]
    np.testing.assert_allclose(
        23 * evaluate(momentum, np.arange(10)), expected, rtol=1e-6
    )


def test_pytorch_cosine():
    """test_onecycle_lr_cosine_annealing."""
    rate = osc.onecycle_schedule(25.0, 9, warmup_steps=2, init_value=1.0, end_value=0.5)
    tail = [0.5 + 24.5 / 2 * (1 + math.cos(math.pi * k / 7)) for k in range(1, 8)]
    np.testing.assert_allclose(
        evaluate(rate, np.arange(10)), [1, 13, 25, *tail], rtol=1e-6
    )


def test_optax_linear_onecycle():
    """optax/schedules/_schedule_test.py, OneCycleTest.test_linear."""
    schedule = osc.onecycle_schedule(
        1000.0,
        10,
        warmup_steps=3,
        init_value=100.0,
        end_value=1.0,
        annihilation_steps=3,
        shape="linear",
    )
    expected = [100, 400, 700, 1000, 775, 550, 325, 100, 67, 34, 1, 1]
    np.testing.assert_allclose(evaluate(schedule, np.arange(12)), expected, rtol=1e-6)


def test_optax_cosine_onecycle():
    """optax/schedules/_schedule_test.py, OneCycleTest.test_cosine."""
    schedule = osc.onecycle_schedule(
        1000.0, 5, warmup_steps=2, init_value=100.0, end_value=1.0
    )
    expected = [100, 550, 1000, 750.25, 250.75, 1, 1]
    np.testing.assert_allclose(evaluate(schedule, np.arange(7)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("start", "shape", "expected"),
    [
        (0.0, "linear", [0.0, 0.5, 1.0, 1.5, 2.0]),
        (0.0, "cosine", [0.0, 0.29289, 1.0, 1.70711, 2.0]),
        (1.0, "exponential", [1.0, 1.18921, 1.41421, 1.68179, 2.0]),
        # SchedPoly(0, 2, 2) rises in what has elapsed: 1 - g(r) = (1 - r)**2.
        (0.0, lambda r: 1 - (1 - r) ** 2, [0.0, 0.125, 0.5, 1.125, 2.0]),
    ],
)
def test_fastai_annealers(start, shape, expected):
    """nbs/14_callback.schedule.ipynb: SchedLin, SchedCos, SchedExp, SchedPoly."""
    schedule = osc.phase_schedule(start, [osc.Phase(4, 2.0, shape)])
    np.testing.assert_allclose(evaluate(schedule, np.arange(5)), expected, atol=1e-5)


def test_fastai_combined_schedules():
    """The same notebook: combine_scheds([0.3, 0.2, 0.5], ...) and combined_cos."""
    schedule = osc.phase_schedule(
        0.0,
        [osc.Phase(6, 1.0), osc.Phase(4, 1.0), osc.Phase(10, 0.0, "cosine")],
    )
    expected = [0.0, 0.5, 1.0, 1.0, 1.0, 0.65451, 0.0]
    np.testing.assert_allclose(
        evaluate(schedule, [0, 3, 6, 8, 10, 14, 20]), expected, atol=1e-5
    )
    combined = osc.onecycle_schedule(1.0, 20, warmup_steps=5, init_value=0.5)
    expected = [0.5, 0.67275, 1.0, 0.75, 0.0]
    np.testing.assert_allclose(
        evaluate(combined, [0, 2, 5, 10, 20]), expected, atol=1e-5
    )


def test_clr_golden_values():
    """Smith (2017): base 0.001, peak 0.006, half-cycle of 2000 steps."""
    make = lambda mode: osc.cyclical_schedule(  # noqa: E731
        0.001, 0.006, 2000, mode=mode, gamma=0.99994
    )
    np.testing.assert_allclose(
        evaluate(make("triangular"), [0, 1000, 2000, 3000, 4000, 6000]),
        [0.001, 0.0035, 0.006, 0.0035, 0.001, 0.006],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        evaluate(make("triangular2"), [2000, 6000, 10000]),
        [0.006, 0.0035, 0.00225],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        evaluate(make("exp_range"), [2000, 6000]), [0.005435, 0.004488], rtol=1e-4
    )


# --- translations, over whole runs ----------------------------------------------------


@pytest.mark.parametrize("total", [10, 100, 1000])
@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_pytorch_onecycle(total, shape):
    schedule = osc.onecycle_schedule(
        0.1,
        total - 1,
        warmup_steps=round(0.3 * total) - 1,
        init_value=0.1 / 25,
        end_value=0.1 / 25e4,
        shape=shape,
    )
    counts = np.arange(total)
    expected = [
        reference.torch_onecycle(t, 0.1, total, anneal=reference.SHAPES[shape])
        for t in counts
    ]
    np.testing.assert_allclose(evaluate(schedule, counts), expected, rtol=1e-5)
    momentum = osc.onecycle_momentum_schedule(
        total - 1, warmup_steps=round(0.3 * total) - 1, shape=shape
    )
    expected = [
        reference.torch_cyclical_momentum(t, total, anneal=reference.SHAPES[shape])
        for t in counts
    ]
    np.testing.assert_allclose(evaluate(momentum, counts), expected, atol=1e-6)


@pytest.mark.parametrize(("total", "stated"), [(8, 0.18), (101, 0.009), (1001, 9e-4)])
def test_pytorch_onecycle_with_its_peak_between_steps(total, stated):
    """The nearest step, with the deviation that docs/schedules.md states."""
    schedule = osc.onecycle_schedule(
        1.0,
        total - 1,
        warmup_steps=round(0.3 * total - 1),
        init_value=1 / 25,
        end_value=1 / 25e4,
    )
    expected = [reference.torch_onecycle(t, 1.0, total) for t in range(total)]
    deviation = np.abs(evaluate(schedule, np.arange(total)) - expected).max()
    assert deviation == pytest.approx(stated, rel=0.05)


@pytest.mark.parametrize("total", [10, 200])
def test_pytorch_three_phases(total):
    warmup = round(0.4 * total) - 1
    schedule = osc.onecycle_schedule(
        0.1,
        total - 1,
        warmup_steps=warmup,
        init_value=0.1 / 25,
        end_value=0.1 / 25e4,
        annihilation_steps=total - 1 - 2 * warmup,
    )
    counts = np.arange(total)
    expected = [
        reference.torch_onecycle(t, 0.1, total, pct_start=0.4, three_phase=True)
        for t in counts
    ]
    np.testing.assert_allclose(evaluate(schedule, counts), expected, atol=1e-6)


def test_optax_onecycle_over_a_run():
    ours = osc.onecycle_schedule(
        0.1, 100, warmup_steps=30, init_value=0.1 / 25, end_value=0.1 / 25e4
    )
    theirs = jax.jit(optax.cosine_onecycle_schedule(100, 0.1, 0.3, 25.0, 1e4))
    expected = [theirs(t) for t in range(110)]
    np.testing.assert_allclose(evaluate(ours, np.arange(110)), expected, atol=1e-6)


def test_fastai_fit_one_cycle():
    total, peak = 40, 1e-2
    schedule = osc.onecycle_schedule(
        peak, total, warmup_steps=10, init_value=peak / 25, end_value=peak / 1e5
    )
    expected = [
        reference.combined_cos(t / total, 0.25, peak / 25, peak, peak / 1e5)
        for t in range(total)
    ]
    np.testing.assert_allclose(
        evaluate(schedule, np.arange(total)), expected, atol=1e-6
    )


def test_fastai_fit_flat_cos():
    total, rate = 40, 1e-2
    schedule = osc.phase_schedule(
        rate, [osc.Phase(30, rate), osc.Phase(10, rate / 1e5, "cosine")]
    )
    expected = [
        reference.combined_cos(t / total, 0.75, rate, rate, rate / 1e5)
        for t in range(total)
    ]
    np.testing.assert_allclose(
        evaluate(schedule, np.arange(total)), expected, atol=1e-6
    )


def test_slanted_triangular():
    schedule = osc.onecycle_schedule(
        0.01,
        1000,
        warmup_steps=100,
        init_value=0.01 / 32,
        end_value=0.01 / 32,
        shape="linear",
    )
    counts = np.arange(1001)
    expected = [reference.slanted_triangular(t, 1000) for t in counts]
    np.testing.assert_allclose(evaluate(schedule, counts), expected, atol=1e-6)
    np.testing.assert_allclose(  # The figures that go with the paper's defaults.
        evaluate(schedule, [0, 50, 100, 550, 1000]),
        [3.125e-4, 0.00515625, 0.01, 0.00515625, 3.125e-4],
        rtol=1e-5,
    )


def test_sgdr():
    restarts = []
    for length in (10, 20, 40):
        restarts += [osc.Phase(length, 0.01, "cosine"), osc.Phase(0, 1.0)]
    schedule = osc.phase_schedule(1.0, restarts)
    counts = np.arange(70)
    expected = [reference.sgdr(t, 1.0, 0.01, 10, 2) for t in counts]
    np.testing.assert_allclose(evaluate(schedule, counts), expected, atol=1e-6)


def test_swa_schedule():
    start, rate, swa_rate = 100, 0.1, 0.05
    schedule = osc.phase_schedule(
        rate,
        [osc.Phase(start // 2, rate), osc.Phase(start * 4 // 10, swa_rate)],
    )
    counts = np.arange(150)
    expected = [reference.swa_schedule(t, start, rate, swa_rate) for t in counts]
    np.testing.assert_allclose(evaluate(schedule, counts), expected, atol=1e-6)


def test_airbench_triangle():
    """The CIFAR-10 speed run's 0.2 to 1 to 0.07, by linear interpolation."""
    schedule = osc.onecycle_schedule(
        1.0, 100, warmup_steps=23, init_value=0.2, end_value=0.07, shape="linear"
    )
    expected = np.interp(np.arange(101), [0, 23, 100], [0.2, 1.0, 0.07])
    np.testing.assert_allclose(evaluate(schedule, np.arange(101)), expected, atol=1e-6)


# --- the table of docs/schedules.md, as it stands there -------------------------------

T, m, p, b, u, W, S, r = 100, 0.2, 0.3, 0.01, 7, 29, 50, 0.05
D, q, h = 20, 0.1, 6.0
DOCUMENT = ROOT / "docs" / "schedules.md"
ROWS = re.findall(r"^\| (.*) \| `(.*)` \|$", DOCUMENT.read_text(), flags=re.M)
TORCH = {"pct_start": p, "anneal": reference.cosine}
WSD = {"lr": m, "total": T, "warmup": W, "decay": D}
HF = {**WSD, "min_lr_ratio": q}
TIMM = {"lr": m, "t_initial": T - W, "decay_t": D, "warmup_t": W, "lr_min": q * m}
THERE = [  # In the order of the rows: count -> value, and how far it is defined.
    (lambda t: reference.torch_onecycle(t, m, T, **TORCH), T),
    (lambda t: reference.torch_onecycle(t, m, T, p, reference.linear), T),
    (lambda t: reference.torch_cyclical_momentum(t, T, p), T),
    (lambda t: reference.torch_onecycle(t, m, T, **TORCH, three_phase=True), T),
    (lambda t: reference.cyclical(t, b, m, u, u, "exp_range", 0.99), 5 * T),
    (lambda t: reference.cyclical(t, 0.9, 0.8, u, u, "exp_range", 0.99), 5 * T),
    (jax.jit(optax.cosine_onecycle_schedule(T, m, p)), 2 * T),
    (jax.jit(optax.linear_onecycle_schedule(T, m, p, 0.85)), 2 * T),
    (lambda t: reference.combined_cos(t / T, p, m / 25, m, m / 1e5), T),
    (lambda t: reference.combined_cos(t / T, p, 0.95, 0.85, 0.95), T),
    (lambda t: reference.combined_cos(t / T, p, m, m, m / 1e5), T),
    (lambda t: reference.slanted_triangular(t, T, p, 32, m), T),
    (lambda t: reference.sgdr(t, m, b, 10, 2), 70),
    (lambda t: reference.torch_warm_restarts(t, m, b, 10, 2), 70),
    (lambda t: reference.swa_schedule(t, S, m, r), 2 * S),
    (lambda t: reference.torch_swalr(t - S, m, r, 10), 2 * S),
    (lambda t: reference.torch_swalr(t - S, m, r, 10, "linear"), 2 * S),
    (lambda t: m * min(t / W, (T - t) / (T - W)), T),
    (lambda t: reference.transformers_cosine(t, m, T, W), T),
    (lambda t: reference.transformers_wsd(t, **HF), 2 * T),
    (lambda t: reference.transformers_wsd(t, **HF, decay_type="linear"), 2 * T),
    (lambda t: reference.transformers_wsd(t, **HF, decay_type="1-sqrt"), 2 * T),
    (lambda t: reference.transformers_wsd(t, **HF, warmup_type="cosine"), 2 * T),
    (lambda t: reference.transformers_wsd(t, **HF, warmup_type="1-sqrt"), 2 * T),
    (lambda t: reference.timm_wsd(t, **TIMM), 2 * T),
    (lambda t: reference.timm_wsd(t, **TIMM, decay_fn="linear"), 2 * T),
    (lambda t: reference.timm_wsd(t, **TIMM, decay_fn="exp"), 2 * T),
    (lambda t: reference.maxtext_wsd(t, **WSD, final=q * m), 2 * T),
    (lambda t: reference.maxtext_wsd(t, **WSD, final=q * m, style="cosine"), T),
    (lambda t: reference.maxtext_wsd(t, **WSD, final=q * m, tail=True), 2 * T),
    (lambda t: reference.levanter_wsd(t, **WSD, min_lr_ratio=q), 2 * T),
    (lambda t: reference.minicpm_wsd(t, **WSD, half_life=h), T),
    (lambda t: reference.hagele_wsd(t, **WSD), T),
]


@pytest.mark.parametrize(
    ("row", "there"), [*zip(ROWS, THERE, strict=True)], ids=[row[0] for row in ROWS]
)
def test_each_row_of_the_document(row, there):
    names = {name: getattr(osc, name) for name in osc.__all__}
    dials = {"T": T, "m": m, "p": p, "b": b, "u": u, "W": W, "S": S, "r": r}
    dials |= {"D": D, "q": q, "h": h}
    schedule = eval(row[1], names | dials)
    expected, length = there
    np.testing.assert_allclose(
        evaluate(schedule, np.arange(length)),
        [expected(t) for t in range(length)],
        atol=1e-6,
    )
