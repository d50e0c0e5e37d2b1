"""Another process goes on from any step as if nothing had happened, bit for bit."""

import pathlib
import pickle
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
import runs

HERE = pathlib.Path(__file__).parent


def all_runs():
    """What is there before each step, and the ends of the runs from there."""
    saved, ends = {}, {}
    for name, make in runs.MAKERS.items():
        tx, step_fn = runs.make_step(make)
        for number, done in enumerate(runs.DONE.values()):
            params = runs.make_params()
            key = f"{name}, {number}, {{}}".format

            def keep(step, carry, key=key):
                saved[key(step)] = carry

            carry, reads = runs.go_on(step_fn, (params, tx.init(params)), 0, done, keep)
            ends |= {key(k): (carry, reads[k:]) for k in range(runs.STEPS)}
    return saved, ends


def assert_same_bits(found, wanted):
    chex.assert_trees_all_equal_structs(found, wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_pickled_run_goes_on():
    tx, step_fn = runs.make_step(runs.MAKERS["fine_tune_adamw"])
    params, kept = runs.make_params(), {}
    end = runs.go_on(step_fn, (params, tx.init(params)), 0, {}, kept.__setitem__)
    carry = pickle.loads(pickle.dumps(kept[3]))
    again, reads = runs.go_on(step_fn, carry, 3, {})
    assert_same_bits((again, reads), (end[0], end[1][3:]))


@pytest.mark.slow
def test_every_run_goes_on_in_another_process_from_every_step(tmp_path):
    saved, ends = all_runs()
    forms = {form: tmp_path / form for form in ("pickle", "msgpack", "orbax")}
    for form, folder in forms.items():
        folder.mkdir()
        runs.save(form, folder, saved)
    command = [sys.executable, HERE / "runs.py"]
    others = [
        subprocess.Popen([*command, form, folder]) for form, folder in forms.items()
    ]
    assert [other.wait() for other in others] == [0, 0, 0]
    for folder in forms.values():
        found = pickle.loads((folder / "ends").read_bytes())
        assert found.keys() == ends.keys()
        for key, end in ends.items():
            assert_same_bits(found[key], end)
