"""What the tests of the dials share: recipes, runs, and a count of compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import at, make_grads, make_params

import optax_superconv as osc

TOTAL = 12
PARAMS = make_params("body", "head")
GRADS = make_grads(2 * TOTAL, "body", "head")
LABELS = {"body": 0, "head": 1}
MULTIPLIERS = {0: 0.5, 1: 1.0}


def falling(t):
    return 0.1 / (1.0 + jnp.asarray(t, jnp.float32))


RECIPES = {
    "sgd": lambda: osc.sgd(0.1),
    "sgd-decay": lambda: osc.sgd(falling, weight_decay=0.01),
    "adamw": lambda: osc.adamw(0.1),
    "adamw-schedules": lambda: osc.adamw(
        falling, lambda t: 0.5 + falling(t), weight_decay=falling, nesterov=True
    ),
    "onecycle_sgd": lambda: osc.onecycle_sgd(0.1, TOTAL),
    "onecycle_adamw": lambda: osc.onecycle_adamw(0.1, TOTAL),
    "groups": lambda: osc.onecycle_adamw(
        0.1, TOTAL, multipliers=MULTIPLIERS, param_labels=LABELS
    ),
    "fine_tune": lambda: osc.fine_tune_adamw(0.1, TOTAL, LABELS),
    "fine_tune-freeze": lambda: osc.fine_tune_adamw(0.1, TOTAL, LABELS, freeze_steps=3),
}
UNFREEZING = {
    "unfreezing": lambda: osc.gradual_unfreezing(
        osc.onecycle_adamw(0.1, TOTAL - 3), {0: 3, 1: 0}, LABELS
    ),
    "unfreezing-sgd": lambda: osc.gradual_unfreezing(
        osc.onecycle_sgd(0.1, TOTAL - 3, weight_decay=0.1), {0: 3, 1: 0}, LABELS
    ),
}


def setting(name, value):
    """For :func:`follow`: sets one dial."""
    return lambda state: osc.set_hyperparams(state, {name: value})


def follow(tx, steps, actions=None, *, params=PARAMS, state=None, update=None):
    """Parameters after each step and what was read, stacked, and the last state.

    ``actions`` are functions of the state, by the step before which they act.
    """
    update = update or jax.jit(tx.update)
    state = tx.init(params) if state is None else state
    history, reads = [], []
    for t in range(steps):
        state = (actions or {}).get(t, lambda state: state)(state)
        updates, state = update(at(GRADS, t), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
        # In NumPy, since a donating step takes the arrays away.
        reads.append(jax.tree.map(np.asarray, osc.read_hyperparams(state)))
    stack = [
        jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
        for trees in (history, reads)
    ]
    return *stack, state


def rates(tx, steps, actions=None, name="learning_rate", **options):
    """What was applied of one dial."""
    return follow(tx, steps, actions, **options)[1][name]


class Link:
    """A bare rate link on a scalar, without ``jit``: quick, and easy to reckon."""

    def __init__(self, *args, **options):
        self.tx = osc.scale_by_learning_rate(*args, **options)
        self.state = self.tx.init({"body": jnp.ones(()), "head": jnp.ones(())})

    def step(self, name="learning_rate"):
        """The rate that one update applies."""
        ones = {"body": jnp.ones(()), "head": jnp.ones(())}
        _, self.state = self.tx.update(ones, self.state)
        return float(osc.read_hyperparams(self.state)[name])

    def set(self, **values):
        """Sets dials, whose names have ``__`` for ``/``."""
        values = {k.replace("__", "/"): v for k, v in values.items()}
        self.state = osc.set_hyperparams(self.state, values)
        return self

    def cool(self, steps):
        """Starts a cooldown."""
        self.state = osc.start_cooldown(self.state, steps)
        return self


class Compiled:
    """A jitted function that counts how often it was traced and compiled."""

    def __init__(self, function, **options):
        self.traces = 0

        def counted(*args):
            self.traces += 1
            return function(*args)

        self.jitted = jax.jit(counted, **options)

    def __call__(self, *args):
        """As the function."""
        return self.jitted(*args)

    @property
    def counts(self):
        """Traces, and compiled programs."""
        return self.traces, self.jitted._cache_size()


def kinds(tree):
    """All of a leaf that a compiled program depends on."""
    return jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type, x.sharding, x.committed), tree
    )
