"""One cycle without dials: what is probed, what is chosen, and what is refused."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_superconv as osc

TXS = {
    "adamw": lambda: osc.adamw(1e-3, b2=0.95),
    "sgd": lambda: osc.sgd(0.1, weight_decay=1e-4),
}
optimizers = pytest.mark.parametrize("optimizer", TXS)


def make_batches(n=7):
    rng = np.random.default_rng(0)
    true = rng.normal(size=(3, 2))
    inputs = rng.normal(size=(n, 16, 3))
    targets = inputs @ true + 0.1 * rng.normal(size=(n, 16, 2))
    return list(zip(np.float32(inputs), np.float32(targets), strict=True))


def loss_fn(params, batch):
    hidden = jnp.tanh(batch[0] @ params["in"])
    return jnp.mean((hidden @ params["out"] - batch[1]) ** 2)


def start(tx, scale=0.5):
    rng = np.random.default_rng(1)
    shapes = {"in": (3, 8), "out": (8, 2)}
    params = {k: jnp.float32(scale * rng.normal(size=s)) for k, s in shapes.items()}
    return params, tx.init(params)


def plain_step(tx, state, batch):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


def step_with(tx):
    return jax.jit(functools.partial(plain_step, tx))


@functools.cache
def step_of(optimizer):
    """A training step that counts its calls."""
    tx, calls = TXS[optimizer](), []
    compiled = step_with(tx)

    def step_fn(state, batch):
        calls.append(None)
        return compiled(state, batch)

    return tx, step_fn, calls


@functools.cache
def found_with(optimizer, budget=0.25, total_steps=1000, scale=0.5):
    tx, step_fn, _ = step_of(optimizer)
    state, batches = start(tx, scale), make_batches()
    return osc.auto_onecycle(step_fn, state, batches, total_steps, budget=budget)


# --- what is probed -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`budget` leaves")
@optimizers
@pytest.mark.parametrize("budget", [0.02, 0.05, 0.25, 0.5])
def test_the_probes_stay_within_the_budget_and_count_their_steps(optimizer, budget):
    tx, step_fn, calls = step_of(optimizer)
    calls.clear()
    found = osc.auto_onecycle(step_fn, start(tx), make_batches(), 1000, budget=budget)
    assert len(calls) == found.steps_used <= budget * 1000
    assert found.steps_used > 0.4 * min(budget * 1000, 200)


@optimizers
def test_without_a_budget_nothing_is_trained(optimizer):
    def step_fn(state, batch):
        raise AssertionError

    state = start(TXS[optimizer]())
    found = osc.auto_onecycle(step_fn, state, make_batches(), 50, budget=0)
    assert found.steps_used == 0
    assert found.range_test is found.short_cycles is None
    assert "was not measured" in found.report()


def test_adamw_takes_three_times_what_a_range_test_suggests():
    tx, step_fn, _ = step_of("adamw")
    num_steps = 250 - 3 * 1000 // 40 - 2  # For cycles, and two steps made twice.
    test = osc.range_test(step_fn, start(tx), make_batches(), num_steps=num_steps)
    found = found_with("adamw")
    np.testing.assert_array_equal(found.range_test.losses, test.losses)
    peak = found.hyperparams["peak_learning_rate"]
    np.testing.assert_allclose(peak, 3 * osc.suggest_learning_rate(test), rtol=1e-3)
    assert found.short_cycles is None


def test_no_peak_is_three_times_the_suggested_one_where_that_diverged():
    """Divergence comes at twice the rate at which most of the fall is done."""
    tx = osc.adamw(1e-3)

    @jax.jit
    def step_fn(state, batch):
        w, opt_state = state
        updates, opt_state = tx.update(jnp.ones(()), opt_state, w)
        rate = osc.read_hyperparams(opt_state)["learning_rate"]
        loss = jnp.where(rate < 0.02, 1 / (1 + (rate / 0.003) ** 4), jnp.inf)
        return (w + updates, opt_state), loss + 1e-3 * batch

    noise = np.float32(np.random.default_rng(0).normal(size=500))
    state = jnp.zeros(()), tx.init(jnp.zeros(()))
    found = osc.auto_onecycle(step_fn, state, noise, 1000, stacked=True)
    suggested = osc.suggest_learning_rate(found.range_test)
    assert suggested < found.range_test.learning_rates[-1] < 3 * suggested
    peak = found.hyperparams["peak_learning_rate"]
    np.testing.assert_allclose(peak, suggested, rtol=1e-3)
    assert "is three times that" not in found.report()


injected = optax.inject_hyperparams(optax.adamw, hyperparam_dtype=jnp.float32)


@pytest.mark.parametrize(
    "tx",
    [osc.adamw(1e-3, weight_decay=0.0), injected(1e-3, weight_decay=0.0)],
    ids=["no dial", "a dial of 0"],
)
def test_adamw_without_a_decay_takes_what_a_range_test_suggests(tx):
    found = osc.auto_onecycle(step_with(tx), start(tx), make_batches(), 1000)
    peak = found.hyperparams["peak_learning_rate"]
    suggested = osc.suggest_learning_rate(found.range_test)
    np.testing.assert_allclose(peak, suggested, rtol=1e-3)
    assert "is three times that" not in found.report()
    assert found.hyperparams["weight_decay"] == 0


def alone(peak, num_steps, weight_decay, batches):
    """The losses of a short run by SGD's recipe, in a plain loop."""
    tx = osc.onecycle_sgd(peak, num_steps, weight_decay=weight_decay)
    state, losses, step_fn = start(tx), [], step_with(tx)
    for batch in itertools.islice(batches, num_steps):
        state, loss = step_fn(state, batch)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize(
    ("budget", "decades"),
    [(0.25, [-0.5, 0.0, 0.5]), (0.5, [-0.5, -0.25, 0.0, 0.25, 0.5])],
)
def test_short_cycles_are_the_recipe_at_several_peaks(budget, decades):
    found = found_with("sgd", budget)
    cycles = found.short_cycles
    peaks, num_steps = cycles.peak_learning_rates, cycles.losses.shape[1]
    drawn = found.steps_used - len(peaks) * num_steps - 2  # By the range test, before.
    suggested = osc.suggest_learning_rate(found.range_test)
    np.testing.assert_allclose(np.log10(peaks / suggested), decades, atol=1e-5)
    assert num_steps == 50
    for peak, losses in zip(peaks, cycles.losses, strict=True):
        batches = itertools.islice(itertools.cycle(make_batches()), drawn, None)
        expected = alone(peak, num_steps, 0.1 / (peak * 1000), batches)
        # Later, one that diverges is chaos.
        np.testing.assert_allclose(losses[:20], expected[:20], rtol=1e-4)
    np.testing.assert_allclose(cycles.scores, cycles.losses[:, 25:].mean(axis=1))
    taken = found.hyperparams["peak_learning_rate"]
    np.testing.assert_allclose(peaks[cycles.scores.argmin()], taken, rtol=1e-3)


def plateau_step(state, batch):
    """Learns once the rate has been between 0.05 and 0.5 for 40 steps."""
    w, opt_state, steps = state
    tx = osc.adamw(1e-3)
    rate = osc.read_hyperparams(opt_state)["learning_rate"]
    updates, opt_state = tx.update(jnp.ones(()), opt_state, w)
    steps += (rate > 0.05) & (rate < 0.5)
    return (w + updates, opt_state, steps), jnp.where(steps > 40, 0.5, 1.0) + batch


def on_a_plateau(total_steps, **options):
    w, noise = jnp.zeros(()), np.random.default_rng(0).normal(scale=0.05, size=500)
    state = w, osc.adamw(1e-3).init(w), jnp.zeros((), int)
    step_fn = jax.jit(plateau_step)
    options |= {"stacked": True}
    return osc.auto_onecycle(step_fn, state, np.float32(noise), total_steps, **options)


def test_a_plateau_is_left_to_short_cycles_a_decade_apart():
    found = on_a_plateau(2000)
    peaks = found.short_cycles.peak_learning_rates
    np.testing.assert_allclose(peaks[1:] / peaks[:-1], 10, rtol=1e-5)
    assert 3 <= len(peaks) <= 5
    numbers = found.hyperparams
    product = numbers["peak_learning_rate"] * numbers["weight_decay"] * 2000
    np.testing.assert_allclose(product, 1.0, rtol=1e-3)
    assert "suggests no rate" in found.report()
    assert 0.05 < found.hyperparams["peak_learning_rate"] < 0.5


def test_a_ladder_of_cycles_stays_below_divergence():
    """A quadratic that SGD's usual rates would blow up."""
    tx, noise = osc.sgd(0.1), np.random.default_rng(0).normal(scale=300, size=500)

    @jax.jit
    def step_fn(state, x):
        w, opt_state = state
        loss, grad = jax.value_and_grad(lambda w: 5e5 * (w - 1e-3) ** 2 + x)(w)
        updates, opt_state = tx.update(grad, opt_state, w)
        return (w + updates, opt_state), loss

    w = jnp.zeros(())
    state = w, tx.init(w)
    batches = np.float32(noise)
    with pytest.raises(ValueError, match=r"step_fn.*lowers the loss") as error:
        osc.auto_onecycle(step_fn, state, batches, 1000, stacked=True)
    peaks = re.findall(r" at ([\d.]+e-\d\d)", str(error.value))
    assert max(map(float, peaks[1:])) < 1e-4
    with pytest.raises(ValueError, match=r"budget.*the usual one, 0.16, diverges"):
        osc.auto_onecycle(step_fn, state, batches, 100, stacked=True)


def test_a_budget_too_small_for_short_cycles_warns_of_a_usual_peak():
    message = r"`budget` leaves 60 steps.*A `budget` of 0.12 would pay for short cycles"
    with pytest.warns(UserWarning, match=message) as caught:
        found = on_a_plateau(1200, budget=0.05)
    assert caught[0].filename == __file__  # The caller's line.
    assert found.hyperparams["peak_learning_rate"] == 0.016
    assert "was not measured" in found.report()


def test_cycles_too_short_to_leave_a_plateau_warn_of_a_usual_peak():
    message = r"Short cycles of 30 steps.*there is a plateau.*A larger `budget`"
    with pytest.warns(UserWarning, match=message) as caught:
        found = on_a_plateau(1200, budget=0.12)
    assert caught[0].filename == __file__
    assert found.hyperparams["peak_learning_rate"] == 0.016
    assert found.short_cycles is not None
    assert "was not measured" in found.report()


# --- what is chosen -------------------------------------------------------------------


@optimizers
def test_the_recipe_is_made_of_the_numbers(optimizer):
    found = found_with(optimizer)
    numbers = found.hyperparams
    cycle = osc.onecycle(numbers["peak_learning_rate"], 1000)
    decay = numbers["weight_decay"]
    tx = {
        "adamw": lambda: osc.adamw(*cycle, b2=0.95, weight_decay=decay),
        "sgd": lambda: osc.sgd(*cycle, weight_decay=decay),
    }[optimizer]()
    params, states = start(tx)[0], [x.init(start(tx)[0]) for x in (tx, found.tx)]
    for count in range(3):
        pairs = zip([tx, found.tx], states, strict=True)
        both = [x.update(params, state, params) for x, state in pairs]
        states = [state for _, state in both]
        np.testing.assert_array_equal(both[0][0]["in"], both[1][0]["in"])
        read = osc.read_hyperparams(states[1])
        np.testing.assert_allclose(read["learning_rate"], found.learning_rate(count))
        name = {"adamw": "b1", "sgd": "momentum"}[optimizer]
        np.testing.assert_allclose(read[name], found.momentum(count))


@pytest.mark.parametrize(
    ("optimizer", "budget", "total_steps", "product"),
    [
        ("adamw", 0, 1000, 1.0),
        ("adamw", 0, 100, 0.25),
        ("adamw", 0.25, 1000, 2.5),
        ("adamw", 0.06, 4000, 5.0),
        ("sgd", 0, 1000, 0.1),
        ("sgd", 0, 100, 0.025),
        ("sgd", 0.25, 1000, 0.1),
    ],
)
def test_peak_decay_and_steps_have_one_product(optimizer, budget, total_steps, product):
    found = found_with(optimizer, budget, total_steps)
    numbers = found.hyperparams
    peak, decay = numbers["peak_learning_rate"], numbers["weight_decay"]
    np.testing.assert_allclose(peak * decay * total_steps, product, rtol=1e-3)
    assert f"steps is {product:.2g}," in " ".join(found.report().split())


def test_a_state_without_a_decay_gets_none():
    state = start(osc.sgd(0.1))
    found = osc.auto_onecycle(step_of("sgd")[1], state, make_batches(), 100, budget=0)
    assert found.hyperparams["weight_decay"] == 0
    assert "weight_decay" not in osc.read_hyperparams(found.tx.init(jnp.zeros(3)))


# --- whose step it is -----------------------------------------------------------------


def test_the_callers_model_and_optimizer_survive_in_nnx():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, osc.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        def loss_fn(model):
            return jnp.mean((model(batch[0]) - batch[1]) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    def step_fn(state, batch):
        return state, train_step(*state, batch)

    state = model, optimizer
    before = jax.tree.map(np.asarray, nnx.state(state))
    found = osc.auto_onecycle(step_fn, state, make_batches(), 1000)
    assert found.short_cycles is not None
    after = jax.tree.map(np.asarray, nnx.state(state))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_accumulated_steps_count_once():
    tx = optax.MultiSteps(osc.sgd(0.1), 2)

    drawn = []

    def supply():
        for batch in itertools.cycle(make_batches()):
            drawn.append(None)
            yield batch

    found = osc.auto_onecycle(
        step_with(tx), start(tx), supply(), 1000, accumulation_steps=2
    )
    assert found.steps_used == 250
    assert found.short_cycles.losses.shape == (3, 50)
    assert len(drawn) == 2 * (250 - 2 * 50 - 2)  # Cycles share theirs.


def test_b2_and_decay_are_found_in_inject_hyperparams():
    make = optax.inject_hyperparams(optax.adamw, hyperparam_dtype=jnp.float32)
    tx = make(1e-3, b2=0.97)
    found = osc.auto_onecycle(step_with(tx), start(tx), make_batches(), 400)
    assert found.hyperparams["b2"] == 0.97
    assert found.hyperparams["weight_decay"] > 0


def test_dials_of_inject_hyperparams_cycle_as_the_recipe_does():
    make = optax.inject_hyperparams(optax.sgd, hyperparam_dtype=jnp.float32)
    tx = make(0.1, momentum=0.9, nesterov=True)
    found = osc.auto_onecycle(step_with(tx), start(tx), make_batches(), 1000)
    cycles = found.short_cycles
    drawn = 250 - 3 * 50 - 2
    for peak, losses in zip(cycles.peak_learning_rates, cycles.losses, strict=True):
        batches = itertools.islice(itertools.cycle(make_batches()), drawn, None)
        expected = alone(peak, 50, 0.0, batches)
        np.testing.assert_allclose(losses[:20], expected[:20], rtol=1e-4)


def test_all_probes_share_one_trace_and_may_donate():
    tx, traces = osc.sgd(0.1, weight_decay=1e-4), []

    @functools.partial(jax.jit, donate_argnums=0)
    def step_fn(state, batch):
        traces.append(None)
        return plain_step(tx, state, batch)

    state = start(tx)
    found = osc.auto_onecycle(step_fn, state, make_batches(), 1000)
    assert found.short_cycles is not None
    assert len(traces) == 1
    assert not state[0]["in"].is_deleted()


def test_groups_are_said_to_be_left_to_the_caller():
    tx = osc.sgd(
        0.1,
        multipliers={"in": 0.1, "out": 1.0},
        param_labels=lambda p: {"in": "in", "out": "out"},
    )

    found = osc.auto_onecycle(step_with(tx), start(tx), make_batches(), 400)
    assert "`tx` has no groups" in " ".join(found.report().split())


@pytest.mark.parametrize(
    ("optimizer", "budget", "names"),
    [
        ("sgd", 0.25, ["range_test", "short_cycles"]),
        ("adamw", 0.25, ["range_test"]),
        ("adamw", 0, []),
    ],
)
def test_the_evidence_is_the_probes_that_were_made(optimizer, budget, names):
    found = found_with(optimizer, budget)
    assert found.evidence == {name: getattr(found, name) for name in names}


# --- what is shown --------------------------------------------------------------------


def test_the_picture_shows_what_ended_and_what_was_taken():
    found = found_with("sgd", 0.5)
    lost = np.where(np.arange(5) == 4, np.inf, found.short_cycles.scores)
    cycles = dataclasses.replace(found.short_cycles, scores=lost)
    ax = osc.plotting.plot_auto(dataclasses.replace(found, short_cycles=cycles))
    lines = {line.get_label(): line for line in ax.get_lines()}
    points = lines["short cycles"]
    np.testing.assert_array_equal(points.get_xdata(), cycles.peak_learning_rates[:4])
    np.testing.assert_array_equal(points.get_ydata(), lost[:4])
    peak = found.hyperparams["peak_learning_rate"]
    assert lines[f"peak: {peak:.2g}"].get_xdata() == [peak, peak]
    low, high = ax.get_ylim()
    assert low <= lost[:4].min()
    assert lost[:4].max() <= high


def test_nothing_is_drawn_without_a_probe():
    with pytest.raises(ValueError, match=r"`result`.*`budget` above 0"):
        osc.plotting.plot_auto(found_with("adamw", 0))
    with pytest.raises(TypeError, match=r"AutoOneCycleResult, got a dict"):
        osc.plotting.plot_auto({})


# --- what is refused ------------------------------------------------------------------


def diverging(state, batch):
    """Steps whose loss is lost as soon as a rate has acted."""
    w, opt_state = state
    updates, opt_state = osc.sgd(0.1).update(jnp.ones(()), opt_state, w)
    return (w + updates, opt_state), jnp.where(w == 0, 1.0, jnp.nan)


def noisy(state, batch):
    w, opt_state = state
    updates, opt_state = osc.sgd(0.1).update(jnp.ones(()), opt_state, w)
    return (w + updates, opt_state), batch


def worsening(state, batch):
    (w, opt_state), noise = noisy(state, batch)
    return (w, opt_state), 10 * w**2 + 0.01 * noise


def unmoved(state, batch):
    w, opt_state = state
    return (w, osc.sgd(0.1).update(jnp.ones(()), opt_state, w)[1]), batch


SCALAR = (jnp.zeros(()), osc.sgd(0.1).init(jnp.zeros(())))
RATELESS = (jnp.zeros(()), osc.scheduled_trace(0.9).init(jnp.zeros(())))
NOISE = list(np.float32(np.random.default_rng(0).normal(size=500)))


@pytest.mark.parametrize(
    ("step_fn", "state", "batches", "options", "message"),
    [
        (
            noisy,
            SCALAR,
            NOISE,
            {"total_steps": 79},
            r"total_steps.*at least 80.*budget=0",
        ),
        (noisy, SCALAR, NOISE, {"budget": -0.1}, r"budget.*-0.1"),
        (noisy, SCALAR, NOISE, {"budget": np.nan}, r"budget.*nan"),
        (noisy, SCALAR, NOISE, {"optimizer": "lion"}, r"optimizer.*'sgd', 'adamw'"),
        (noisy, SCALAR, iter(NOISE[:60]), {}, r"batches.*98 steps.*ran dry after 60"),
        (
            worsening,
            SCALAR,
            NOISE,
            {},
            r"step_fn.*lowers the loss.*Range test.*Short cycles",
        ),
        (diverging, SCALAR, NOISE, {}, r"step_fn.*nan at .*nan at"),
        (noisy, SCALAR, [np.float32(np.nan)], {}, r"step_fn.*finite"),
        (unmoved, SCALAR, NOISE, {}, r"step_fn.*react"),
        (
            noisy,
            (SCALAR[0], optax.sgd(0.1).init(1.0)),
            NOISE,
            {},
            r"tell its optimizer",
        ),
        (noisy, SCALAR, NOISE, {"optimizer": "adamw"}, r"state.*dial 'b1'"),
        (noisy, (SCALAR, SCALAR), NOISE, {}, r"state.*one dial 'learning_rate'"),
        (noisy, RATELESS, NOISE, {}, r"state.*dial 'learning_rate'"),
        (lambda w, rate, batch: (w, batch), SCALAR, NOISE, {}, r"step_fn.*must take"),
    ],
)
def test_what_cannot_be_probed_is_an_error(step_fn, state, batches, options, message):
    options = {"total_steps": 1000} | options
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}") as error:
        osc.auto_onecycle(step_fn, state, batches, **options)
    assert "pass_hyperparams" not in str(error.value)  # Which it does not have.
