"""What README and docs/costs.md claim, measured again, on an otherwise idle machine."""

import subprocess
import sys
import time

import harness
import numpy as np
import overhead
import pytest
from common import ROOT, evaluate
from test_schedules import SHAPES, check_onecycle, make_onecycle

pytestmark = pytest.mark.slow


@pytest.mark.timed
@pytest.mark.parametrize("name", ["01_super_convergence", "02_find_the_rate"])
def test_an_example_takes_at_most_three_minutes(name, tmp_path):
    begin = time.perf_counter()
    script = ROOT / "examples" / f"{name}.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True)
    assert time.perf_counter() - begin < 180


def lower_quartile(arms, rounds):
    """Of the ratios of two arms; noise alone moves their median by some per cent."""
    seconds = harness.interleave(arms, rounds)
    ours, base = (seconds[name] for name in arms)
    return harness.quartiles(np.divide(ours, base))[0]


@pytest.mark.timed
@pytest.mark.parametrize("num_groups", [None, 48])
def test_the_dials_cost_at_most_a_tenth(num_groups):
    params, optimizers = overhead.make_params(48, 64), overhead.dials()
    if num_groups:
        optimizers = overhead.groups(overhead.in_groups(params, num_groups))
    pair = {name: optimizers[name] for name in ("onecycle_adamw", "optax.adamw")}
    arms = overhead.update_arms(pair, params, 4, 4)
    assert lower_quartile(arms, 60) <= 1.10
    ours, plain = (overhead.state_bytes(tx, params) for tx in pair.values())
    assert ours - plain <= 4096


@pytest.mark.timed
@pytest.mark.parametrize("form", ["", ", rate passed"])
def test_a_range_test_costs_at_most_a_twentieth(form):
    arms = overhead.range_test_arms(100)
    pair = {name: arms[name] for name in ("range_test" + form, "its steps" + form)}
    assert lower_quartile(pair, 50) <= 1.05


@pytest.mark.parametrize("shape", SHAPES)
def test_onecycle_with_every_warmup_of_a_hundred_steps(shape):
    counts = np.arange(103)
    for warmup in range(100):
        for annihilation in {k for k in (0, 1, 50, 100 - warmup) if warmup + k <= 100}:
            values = evaluate(make_onecycle(100, warmup, annihilation, shape), counts)
            check_onecycle(values, 100, warmup, annihilation, counts)
