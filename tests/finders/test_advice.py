"""Which rate is advised: one per optimizer everywhere, and asked where unknown."""

import dataclasses
import inspect
import json
import re
from typing import get_args

import documents
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import ROOT
from flax import nnx
from flax.training.train_state import TrainState

import optax_superconv as osc
from optax_superconv.finders import _readings, _steps, _suggestions

PARAMS = {"body": jnp.ones((2, 3)), "head": jnp.ones(3)}
FLOAT32 = {"hyperparam_dtype": jnp.float32}
LABELS = {"body": "a", "head": "b"}


def injected(make, *args, **kwargs):
    return optax.inject_hyperparams(make, **FLOAT32)(*args, **kwargs)


TOLD = {
    "adamw": ("adamw", osc.adamw(0.1)),
    "onecycle_adamw": ("adamw", osc.onecycle_adamw(0.1, 10)),
    "fine_tune_adamw": (
        "adamw",
        osc.fine_tune_adamw(0.1, 10, {"body": 0, "head": 1}, decay=0.5, freeze_steps=2),
    ),
    "optax.adamw": ("adamw", injected(optax.adamw, 0.1)),
    "nadam": ("adamw", injected(optax.nadam, 0.1)),
    "adabelief": ("adamw", injected(optax.adabelief, 0.1)),
    "chain": (
        "adamw",
        optax.chain(optax.scale_by_adam(), osc.scale_by_learning_rate(0.1)),
    ),
    "clipped, averaged": (
        "adamw",
        optax.chain(optax.clip(1.0), osc.adamw(0.1), osc.ema_params(0.9)),
    ),
    "accumulated": ("adamw", optax.MultiSteps(osc.adamw(0.1), 2)),
    "groups": (
        "adamw",
        optax.partition({"a": osc.adamw(0.1), "b": osc.adamw(0.2)}, LABELS),
    ),
    "sgd": ("sgd", osc.sgd(0.1)),
    "no momentum": ("sgd", osc.sgd(0.1, momentum=0.0)),
    "onecycle_sgd": ("sgd", osc.onecycle_sgd(0.1, 10)),
    "optax.sgd": ("sgd", injected(optax.sgd, 0.1, momentum=0.9)),
    "trace": (
        "sgd",
        optax.chain(optax.trace(0.9), osc.scale_by_learning_rate(0.1)),
    ),
    "lion": (None, injected(optax.lion, 0.1)),
    "rmsprop": (None, injected(optax.rmsprop, 0.1)),
    "rmsprop, momentum": (None, injected(optax.rmsprop, 0.1, momentum=0.9)),
    "muon": (None, injected(optax.contrib.muon, 0.1)),
    "adagrad": (None, injected(optax.adagrad, 0.1)),
    "lars": ("sgd", injected(optax.lars, 0.1)),
    "lamb": ("adamw", injected(optax.lamb, 0.1)),
    "optax.sgd without momentum": (None, injected(optax.sgd, 0.1)),
    "both": (
        None,
        optax.partition({"a": osc.adamw(0.1), "b": osc.sgd(0.2)}, LABELS),
    ),
}


@pytest.mark.parametrize(("optimizer", "tx"), TOLD.values(), ids=TOLD)
def test_the_moments_in_the_state_tell_the_optimizer(optimizer, tx):
    assert _steps.optimizer_of((PARAMS, tx.init(PARAMS))) == optimizer


def test_a_train_state_and_an_nnx_optimizer_tell_as_well():
    made = {"params": PARAMS, "apply_fn": None}
    state = TrainState.create(tx=osc.sgd(0.1), **made)
    assert _steps.optimizer_of(state) == "sgd"
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, osc.adamw(0.1), wrt=nnx.Param)
    assert _steps.optimizer_of((model, optimizer)) == "adamw"
    assert _steps.optimizer_of(PARAMS) is None


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_all_finders_keep_whose_rates_they_hold(optimizer):
    tx = getattr(osc, optimizer)(0.1)

    @jax.jit
    def step_fn(state, batch):
        w, opt_state = state
        loss, grads = jax.value_and_grad(lambda w: (jnp.array([1, 9.0]) * w**2).sum())(
            w
        )
        updates, opt_state = tx.update(grads, opt_state, w)
        return (optax.apply_updates(w, updates), opt_state), loss

    w = jnp.ones(2)
    given = step_fn, (w, tx.init(w)), [None]
    tested = osc.range_test(*given)
    grid = osc.grid_test(*given, {"b1": [0.0, 0.9]} if optimizer == "adamw"
                         else {"momentum": [0.0, 0.9]})  # fmt: skip
    top = {"sgd": 10.0, "adamw": 1e4}[optimizer]
    threshold = osc.convergence_threshold(*given, num_steps=50, max_learning_rate=top)
    results = (tested, grid, grid.curve(**grid.best), threshold)
    assert {result.optimizer for result in results} == {optimizer}


# --- what is read, and where nothing tells --------------------------------------------

RATES = np.geomspace(1e-6, 10, 100)
LOSSES = 2.3 - 1.8 / (1 + (10**-2.5 / RATES)) + 2 * RATES**2
CURVE = osc.RangeTestResult(RATES, LOSSES, LOSSES, False)
OF = {name: dataclasses.replace(CURVE, optimizer=name) for name in ("sgd", "adamw")}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_default_is_that_of_the_optimizer(optimizer):
    own, method = OF[optimizer], _suggestions.DEFAULTS[optimizer]
    expected = osc.suggest_learning_rate(CURVE, method=method)
    assert osc.suggest_learning_rate(own) == expected
    assert osc.suggest_learning_rate([own, own]) == expected
    assert osc.suggest_learning_rate(CURVE, optimizer=optimizer) == expected
    assert osc.suggest_interval([own, own]) == (expected, expected)
    assert osc.suggest_interval([CURVE] * 2, optimizer=optimizer)[0] == expected
    for other in OF.values():  # What is asked for outranks what is told.
        assert osc.suggest_learning_rate(other, optimizer=optimizer) == expected
        assert osc.suggest_learning_rate(other, method=method) == expected


def test_the_defaults_differ():
    assert len({osc.suggest_learning_rate(curve) for curve in OF.values()}) == 2


@pytest.mark.parametrize("results", [[CURVE], [*OF.values()], [CURVE, OF["sgd"]]])
@pytest.mark.parametrize("read", [osc.suggest_learning_rate, osc.suggest_interval])
def test_where_nothing_tells_it_asks(results, read):
    with pytest.raises(ValueError, match=r"^`results?` must tell.*optimizer='adamw'"):
        read(results)


@pytest.mark.parametrize("mixed", [[OF["sgd"], CURVE], [*OF.values()]])
def test_curves_of_several_are_drawn_without_a_suggestion(mixed):
    labels = [
        t.get_text() for t in osc.plotting.plot_range_test(mixed).get_legend().texts
    ]
    assert labels == ["loss", "smoothed"]
    with pytest.raises(ValueError, match="`optimizer` must be one of"):
        osc.plotting.plot_range_test(mixed, optimizer="")


def test_a_curve_of_nobody_is_drawn_without_a_suggestion():
    labels = [
        t.get_text() for t in osc.plotting.plot_range_test(CURVE).get_legend().texts
    ]
    assert labels == ["loss", "smoothed"]
    axes = osc.plotting.plot_range_test(CURVE, optimizer="sgd")
    name = _suggestions.DEFAULTS["sgd"]
    assert axes.get_legend().texts[-1].get_text().startswith(f"{name}: ")


# --- one advice -----------------------------------------------------------------------

METHODS = get_args(_readings.Method)
QUALITY = json.loads((harness.RESULTS / "range_test_quality.json").read_text())
TEXTS = {path.name: path.read_text() for path in documents.DOCUMENTS}
TEXTS["help"] = inspect.getdoc(osc.suggest_learning_rate) or ""
CODE = {
    path.name: path.read_text()
    for path in (*documents.DOCUMENTS, *sorted((ROOT / "examples").glob("*.py")))
}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_default_is_the_best_of_its_methods_on_the_tasks_that_chose(optimizer):
    rules = QUALITY["evidence"]["rules"]
    means = {
        method: rules[f"{method}, 200 steps"]["parts"][f"{optimizer}: chose"]["mean"]
        for method in METHODS
    }
    assert min(means, key=means.__getitem__) == _suggestions.DEFAULTS[optimizer]


@pytest.mark.parametrize("name", ["README.md", "find_the_rate.md", "help"])
@pytest.mark.parametrize(("optimizer", "shown"), [("adamw", "AdamW"), ("sgd", "SGD")])
def test_what_is_advised_is_the_default(name, optimizer, shown):
    """Wherever a method is named for an optimizer, and at least once in each place."""
    text = " ".join(TEXTS[name].split())
    named = re.findall(rf'`"(\w+)"`+ for {shown}', text)
    assert named
    assert set(named) == {_suggestions.DEFAULTS[optimizer]}


@pytest.mark.parametrize("name", CODE)
def test_no_other_rate_is_taken_for_a_peak(name):
    """Code takes what is suggested as it is; other rules stand in tables alone."""
    assert not re.search(r"suggest_\w+\([^)]*method=", CODE[name])
    assert not re.search(r"\d \* osc\.suggest|suggest_\w+\([^)]*\) [*/]", CODE[name])
    if name.endswith(".md"):
        prose = re.sub(r"^\|.*$", "", CODE[name], flags=re.MULTILINE)
        assert not re.search(r"half of the (convergence )?threshold", prose)


def test_the_methods_that_are_listed_are_those_that_there_are():
    listed = re.findall(r'^\| `"(\w+)"`', TEXTS["find_the_rate.md"], flags=re.MULTILINE)
    assert set(listed) == set(METHODS)
    explained = re.findall(r'^\s*\* ``"(\w+)"``:', TEXTS["help"], flags=re.MULTILINE)
    assert set(explained) == set(METHODS)


def test_help_has_the_figures_of_the_tasks_that_report():
    """Geometric mean and worst task, as ``1.23 (the worst task 4.56)``."""
    text = " ".join(TEXTS["help"].split())
    found = re.findall(r"(\d+\.\d\d) \(the worst task (\d+\.\d\d)\)", text)
    rules = QUALITY["evidence"]["rules"]
    parts = [rules["default"]["parts"][f"{o}: report"] for o in ("adamw", "sgd")]
    expected = [(f"{p['mean']:.2f}", f"{p['worst']:.2f}") for p in parts]
    assert found == expected
