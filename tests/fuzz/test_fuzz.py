"""Random calls are refused with a sentence, or work."""

import draws
import pytest


def test_a_fault_would_show():
    assert draws.fault(lambda rate: 1 / rate, {"rate": 0}) is not None
    assert draws.fault(lambda rate: lambda count: rate, {"rate": float("nan")})
    assert draws.fault(draws.osc.sgd, {"learning_rate": 0.1}, jitted=True) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(2))
def test_random_calls(seed):
    found, outcomes = draws.faults(1500, seed)
    assert found == []
    assert len(outcomes) == len(draws.FUNCTIONS)
