"""A user's program, in the types that a user sees; read by two type checkers."""

from collections.abc import Iterator
from typing import assert_type

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.axes import Axes

import optax_superconv as osc

Params = dict[str, jax.Array]
State = tuple[Params, optax.OptState]
Batch = tuple[jax.Array, jax.Array]

STEPS = 40


def init() -> Params:
    return {"slope": jnp.zeros(3), "offset": jnp.zeros(())}


def batches() -> Iterator[Batch]:
    rng = np.random.default_rng(0)
    while True:
        x = rng.normal(size=(16, 3))
        yield jnp.asarray(x), jnp.asarray(x.sum(1) + 1)


def loss_fn(params: Params, batch: Batch) -> jax.Array:
    x, y = batch
    return jnp.square(x @ params["slope"] + params["offset"] - y).mean()


def update(
    tx: optax.GradientTransformationExtraArgs, state: State, batch: Batch
) -> tuple[State, jax.Array]:
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, value=loss)
    params = jax.tree.map(jnp.add, params, updates)
    return (params, opt_state), loss


def train(tx: optax.GradientTransformation) -> State:
    params = init()
    chain = optax.chain(tx)
    state: State = params, chain.init(params)
    for _, batch in zip(range(STEPS), batches(), strict=False):
        state, _ = update(chain, state, batch)
    return state


def schedules() -> dict[str, optax.Schedule]:
    rate = osc.onecycle_schedule(1e-2, STEPS, warmup_steps=10, shape="linear")
    assert_type(rate, optax.Schedule)
    momentum = osc.onecycle_momentum_schedule(STEPS, max_momentum=np.float32(0.9))
    assert_type(momentum, optax.Schedule)
    phases = [osc.Phase(10, 1.0), osc.Phase(10, 0.1, lambda left: left)]
    assert_type(phases[0].steps, int)
    return {
        "rate": rate,
        "momentum": momentum,
        "phases": osc.phase_schedule(jnp.zeros(()), phases),
        "tuples": osc.phase_schedule(0, [(10, 1.0), (10, 0.1, "1-sqrt")]),
        "cycles": osc.cyclical_schedule(0.1, 1.0, 5, mode="triangular2"),
        "late": osc.warmup_stable_decay_schedule(1e-2, STEPS, warmup_steps=4),
        "cooled": osc.with_cooldown(rate, STEPS, 10, end_value=1e-4),
    }


def chains() -> dict[str, optax.GradientTransformation]:
    rate = osc.onecycle_schedule(1e-2, STEPS)
    label = osc.label_by_path([("offset", 0), ("slope", 1)])
    multipliers = osc.layerwise_multipliers(range(2), 0.5)
    recipe = osc.onecycle_adamw(1e-2, STEPS, weight_decay=rate)
    assert_type(recipe, optax.GradientTransformationExtraArgs)
    link = osc.scale_by_learning_rate(rate)
    assert_type(link, optax.GradientTransformationExtraArgs)
    return {
        "optax": optax.adamw(rate),
        "recipe": recipe,
        "cycle": osc.onecycle_sgd(1e-2, STEPS, base_momentum=jnp.asarray(0.8)),
        "fine_tune": osc.fine_tune_adamw(1e-2, STEPS, label, freeze_steps=4),
        "sgd": optax.chain(osc.sgd(1e-2, nesterov=False), osc.lawa_params(2)),
        "adamw": osc.adamw(
            *osc.onecycle(1e-2, STEPS), b2=0.95, eps=lambda count: 1e-8, mask=None
        ),
        "groups": osc.adamw(rate, multipliers=multipliers, param_labels=label),
        "links": optax.chain(
            optax.clip_by_global_norm(1.0),
            osc.record_gradient_norms(STEPS, ord=1, num_samples=10),
            osc.scale_by_scheduled_adam(osc.onecycle_momentum_schedule(STEPS)),
            osc.scale_by_group(multipliers, label),
            link,
            osc.ema_params(0.9, warmup=2 / 3),
        ),
        "sum": optax.chain(
            osc.scheduled_trace(0.9, nesterov=True),
            osc.add_decayed_weights(rate, mask=lambda params: True),
            osc.scale_by_learning_rate(
                rate, cooldown_end=1e-4, cooldown_shape="linear"
            ),
            osc.swa_params(10, every=5),
        ),
        "thawed": osc.gradual_unfreezing(
            lambda step: optax.sgd(lambda count: rate(count + step)),
            {0: None, 1: 5},
            label,
        ),
    }


def read(state: State) -> None:
    params, opt_state = state
    hyperparams = osc.read_hyperparams(opt_state)
    assert_type(hyperparams, dict[str, jax.Array])
    print({name: float(value) for name, value in hyperparams.items()})
    opt_state = osc.set_hyperparams(
        opt_state, {"learning_rate": 0.1, "b1": jnp.asarray(0.8), "b2": None}
    )
    opt_state = osc.restart_schedules(osc.start_cooldown(opt_state, 10))
    averaged: Params = osc.eval_params(opt_state, params, name="ema")
    print(averaged["slope"].sum())
    print(osc.describe_groups(params, osc.label_by_path([(".*", "all")])))


def find() -> None:
    tx = osc.scheduled_trace(0.9)

    own = optax.chain(tx, osc.scale_by_learning_rate(1.0))

    @jax.jit
    def step_fn(state: State, batch: Batch) -> tuple[State, jax.Array]:
        return update(own, state, batch)

    def grid_step_fn(
        state: State, hyperparams: dict[str, jax.Array], batch: Batch
    ) -> tuple[State, jax.Array]:
        link = osc.scale_by_learning_rate(hyperparams["learning_rate"])
        decay = optax.add_decayed_weights(hyperparams["decay"])
        return update(optax.chain(decay, tx, link), state, batch)

    params = init()
    start: State = params, own.init(params)
    result = osc.range_test(step_fn, start, batches(), num_steps=60)
    assert_type(result, osc.RangeTestResult)
    assert_type(result.diverged, bool)
    rate = osc.suggest_learning_rate(result, method="knee")
    assert_type(rate, float)
    low, high = osc.suggest_interval([result, result, result])
    assert_type(low, float)
    link = osc.scale_by_learning_rate(1.0)
    decayed = optax.chain(optax.add_decayed_weights(0.0), tx, link)
    grid = osc.grid_test(
        grid_step_fn,
        (params, decayed.init(params)),
        batches(),
        {"decay": [0.0, 1e-2]},
        num_steps=60,
        pass_hyperparams=True,
    )
    assert_type(grid.best, dict[str, float])
    axes = osc.plotting.plot_range_test(result)
    assert_type(axes, Axes)
    osc.plotting.plot_grid(grid, axes)
    osc.plotting.plot_schedule({"rate": osc.onecycle_schedule(rate, STEPS)}, STEPS)
    print(low, high, grid.best)


if __name__ == "__main__":
    matplotlib.use("agg")
    for schedule in schedules().values():
        print(schedule(jnp.arange(STEPS)))
    states = {name: train(tx) for name, tx in chains().items()}
    read(states["links"])
    find()
