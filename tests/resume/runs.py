"""Short runs of everything that has a state, which a process can take over at any step.

As a script, ``runs.py FORMAT FOLDER`` goes on from what was saved there.
"""

import pathlib
import pickle
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import optax_superconv as osc

STEPS = 6


def label(params):
    return {name: int(name == "head") for name in params}


def make_params():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "embed": {"kernel": normal(4, 2), "scale": normal(4)},
        "layers": {"kernel": normal(4, 2, 2).astype(jnp.bfloat16)},
        "head": {"kernel": normal(4, 3), "bias": normal(4).astype(jnp.bfloat16)},
    }


def behind_sgd(average):
    return optax.chain(osc.sgd(0.1), average)


GROUPS: dict = {"multipliers": {0: 0.5, 1: 1.0}, "param_labels": label}
LAYERS: dict = {
    "multipliers": {0: 0.5, 1: np.linspace(0.1, 1, 4)},
    "param_labels": label,
}
MAKERS = {
    "sgd": lambda: osc.sgd(0.1, weight_decay=0.1),
    "adamw": lambda: osc.adamw(lambda t: 0.1 / (1.0 + t), nesterov=True),
    "adamw of groups": lambda: osc.adamw(0.1, **GROUPS),
    "adamw of layers": lambda: osc.adamw(0.1, mu_dtype=jnp.bfloat16, **LAYERS),
    "onecycle_sgd": lambda: osc.onecycle_sgd(0.1, STEPS),
    "onecycle_adamw": lambda: osc.onecycle_adamw(0.1, STEPS, **GROUPS),
    "fine_tune_adamw": lambda: osc.fine_tune_adamw(0.1, STEPS, label, freeze_steps=2),
    "gradual_unfreezing": lambda: osc.gradual_unfreezing(
        osc.onecycle_adamw(0.1, STEPS), {0: 3, 1: 0}, label
    ),
    "scale_by_group": lambda: optax.chain(
        optax.scale_by_lion(),
        osc.scale_by_group({0: lambda t: 0.5 + t, 1: 1.0}, label),
        optax.scale_by_learning_rate(0.1),
    ),
    "ema_params": lambda: behind_sgd(osc.ema_params(0.8, start_step=1)),
    "swa_params": lambda: behind_sgd(osc.swa_params(2)),
    "average_params": lambda: behind_sgd(osc.average_params(power=2.0, every=2)),
    "lawa_params": lambda: behind_sgd(osc.lawa_params(3)),
    "record_gradient_norms": lambda: optax.chain(
        osc.record_gradient_norms(STEPS, ord=2, num_samples=3), osc.adamw(0.1)
    ),
    "MultiSteps": lambda: optax.MultiSteps(osc.onecycle_sgd(0.1, STEPS // 2), 2),
}


def named(state, *kinds):
    return [k for k in osc.read_hyperparams(state) if k.partition("/")[0] in kinds]


def set_rates(state):
    names = named(state, "learning_rate", "multiplier", "momentum")
    return osc.set_hyperparams(state, dict.fromkeys(names, 0.25))


def cool_down(state):
    return osc.start_cooldown(state, 3) if named(state, "cooldown") else state


# What is done to the state before a step.
DONE = {
    "left alone": {},
    "set, then cooled down": {1: set_rates, 3: cool_down},
    "cooled down, then restarted": {1: cool_down, 4: osc.restart_schedules},
}


def make_step(make):
    tx = make()

    @jax.jit
    def step_fn(params, state):
        grads = jax.tree.map(lambda p: jnp.sin(3 * p), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step_fn


def go_on(
    step_fn,
    carry,
    begin,
    done,
    keep=lambda step, carry: None,
    fetch=jax.device_get,
):
    """From before a step to the end: the last carry and what was read on the way."""
    reads = []
    for step in range(begin, STEPS):
        params, state = carry
        keep(step, carry)
        state = done.get(step, lambda state: state)(state)
        carry = step_fn(params, state)
        reads.append(osc.read_hyperparams(carry[1]))
    return fetch((carry, reads))


def restored(form, folder, likes):
    """What was saved, by key, in the structures of ``likes``."""
    if form == "pickle":
        return pickle.loads((folder / "saved").read_bytes())
    if form == "msgpack":
        return flax.serialization.from_bytes(likes, (folder / "saved").read_bytes())
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((folder / "saved").absolute(), likes)


def save(form, folder, carries):
    if form == "pickle":
        (folder / "saved").write_bytes(pickle.dumps(carries))
    elif form == "msgpack":
        (folder / "saved").write_bytes(flax.serialization.to_bytes(carries))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / "saved").absolute(), carries)


def main(form, folder):
    """Goes on from all that was saved; leaves the ends beside it."""
    tools = {name: make_step(make) for name, make in MAKERS.items()}
    abstract = jax.eval_shape(make_params)
    likes = {
        f"{name}, {done}, {step}": (abstract, jax.eval_shape(tx.init, abstract))
        for name, (tx, _) in tools.items()
        for done in range(len(DONE))
        for step in range(STEPS)
    }
    if form == "msgpack":
        likes = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), likes)
    ends = {}
    for key, carry in restored(form, folder, likes).items():
        name, done, step = key.split(", ")
        actions = [*DONE.values()][int(done)]
        ends[key] = go_on(tools[name][1], carry, int(step), actions)
    (folder / "ends").write_bytes(pickle.dumps(ends))


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
