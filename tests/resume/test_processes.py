"""Two processes compute what one does: updates, averages, dials, finders."""

import functools
import pathlib
import pickle
import socket
import subprocess
import sys

import chex
import finds
import jax
import processes
import pytest

HERE = pathlib.Path(__file__).parent


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    port = str(free_port())
    members = [(0, 1, tmp_path / "one"), (0, 2, tmp_path / "two"), (1, 2, "nowhere")]
    started = [
        subprocess.Popen(
            [sys.executable, HERE / "processes.py", str(k), str(count), port, path]
        )
        for k, count, path in members
    ]
    try:
        assert [process.wait(timeout=300) for process in started] == [0, 0, 0]
    finally:
        for process in started:
            process.kill()
    one, two = (pickle.loads((tmp_path / name).read_bytes()) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, wanted in one.items():
        chex.assert_trees_all_close(two[key], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_finders_on_eight_devices_equal_one():
    mesh = jax.sharding.Mesh(jax.devices(), ("devices",))
    spread = finds.finds(functools.partial(processes.spread, mesh=mesh))
    chex.assert_trees_all_close(spread, finds.finds(lambda tree: tree), rtol=1e-5)
