"""The three finders on arrays that are spread over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_superconv as osc


def make_params():
    rng = np.random.default_rng(1)
    shapes = {"in": (8, 8), "out": (8, 1)}
    return {k: np.float32(0.5 * rng.normal(size=s)) for k, s in shapes.items()}


def make_batches():
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(5, 8, 8)))
    return list(zip(x, np.tanh(x.sum(-1, keepdims=True)), strict=True))


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)


def finds(spread):
    """The losses of each finder in each form; ``spread`` puts a tree on the mesh."""
    own = osc.onecycle_adamw(0.1, 50)
    params, batches = spread(make_params()), list(map(spread, make_batches()))
    ends = {"min_learning_rate": 1e-4, "max_learning_rate": 1.0}

    def update(tx, state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def own_step(state, batch):
        return update(own, state, batch)

    @jax.jit
    def passed_step(state, hyperparams, batch):
        rate = hyperparams["learning_rate"]
        return update(osc.sgd(rate, 0.5), state, batch)

    def rate_step(state, rate, batch):
        return passed_step(state, {"learning_rate": rate}, batch)

    state = params, jax.jit(own.init)(params)
    plain = params, jax.jit(osc.sgd(0.1, 0.5).init)(params)
    passed = {"pass_hyperparams": True}
    # Above these rates rounding grows.
    short = {"num_steps": 30, "num_rates": 8, "rtol": 1.0}
    return {
        "range": osc.range_test(
            own_step, state, batches, num_steps=12, accumulation_steps=2, **ends
        ).losses,
        "range, passed": osc.range_test(
            rate_step, plain, batches, num_steps=12, **ends, **passed
        ).losses,
        "threshold": osc.convergence_threshold(
            own_step, state, batches, **short
        ).losses[:4],
        "threshold, passed": osc.convergence_threshold(
            rate_step, plain, batches, **short, **passed
        ).losses[:4],
        "grid": osc.grid_test(
            own_step, state, batches, {"b1": [0.5, 0.9]}, num_steps=12, **ends
        ).losses,
        "grid, passed": osc.grid_test(
            passed_step,
            plain,
            batches,
            {"learning_rate": [0.01, 0.1]},
            num_steps=12,
            mode="constant",
            **passed,
        ).losses,
    }
