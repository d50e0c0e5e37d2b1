"""``runs.py`` and ``finds.py`` on a mesh: ``processes.py INDEX COUNT PORT FILE``.

The arrays of the parameters are cut along their first axis, over all processes.
"""

import functools
import pathlib
import pickle
import sys

import finds
import jax
import numpy as np
import runs
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import optax_superconv as osc

DEVICES = 4


def start(index, count, port):
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index)


def spread(params, mesh):
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(
            leaf.shape, sharding, np.asarray(leaf).__getitem__
        ),
        params,
    )


def main(index, count, port, path):
    start(index, count, port)
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(auto,))
    ends = {}
    for name, make in runs.MAKERS.items():
        tx, step_fn = runs.make_step(make)
        params = spread(jax.device_get(runs.make_params()), mesh)
        state = jax.jit(tx.init)(params)
        for number, done in enumerate(filter(None, runs.DONE.values())):
            (after, end), reads = runs.go_on(
                step_fn, (params, state), 0, done, fetch=lambda tree: tree
            )
            found = [after, end, reads]
            if name.endswith("_params"):
                found.append(osc.eval_params(end, after))
            ends[name, number] = multihost_utils.process_allgather(found, tiled=True)
    ends |= finds.finds(functools.partial(spread, mesh=mesh))
    if index == 0:
        pathlib.Path(path).write_bytes(pickle.dumps(ends))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
