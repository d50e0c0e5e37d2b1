"""The public names: which there are, how they are documented, what they import."""

import ast
import graphlib
import inspect
import re
import subprocess
import sys

import pytest
from common import ROOT

import optax_superconv as osc

PACKAGE = ROOT / "optax_superconv"

# Imports point down this list of rooms. Those of one line do not import each other.
ROOMS = [
    {"__init__"},
    {"plotting"},
    {"finders"},
    {"recipes"},
    {"transforms"},
    {"_restarts"},
    {"_settings"},
    {"_records"},
    {"schedules", "_dials"},
    {"_trees", "_batches"},
    {"_numerics"},
    {"_checks"},
]
MODULES = sorted(PACKAGE.rglob("*.py"))
FUNCTIONS = [
    getattr(osc, name) for name in osc.__all__ if inspect.isfunction(getattr(osc, name))
] + [getattr(osc.plotting, name) for name in osc.plotting.__all__]


def imports_of(path):
    """Every name that a module imports, ``from a import b`` as ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_all_is_what_the_package_binds():
    bound = {
        name
        for name, value in vars(osc).items()
        if not name.startswith("_")
        and (not inspect.ismodule(value) or value is osc.plotting)
    }
    assert set(osc.__all__) == bound
    assert len(osc.__all__) == len(bound)


def test_readme_names_every_public_name_and_no_other():
    readme = (ROOT / "README.md").read_text()
    names = re.search(r"## What is in it\n(.*?)\n## ", readme, flags=re.S)[1]
    assert set(re.findall(r"`(\w+)`", names)) == set(osc.__all__)


def test_changelog_names_every_public_name():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    for name in osc.__all__:
        assert f"`{name}" in changelog or name == "RangeTestResult"


def module_of(path):
    """The dotted name of a module inside of the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_point_down(path):
    own = module_of(path).partition(".")[0]
    level = next(k for k, rooms in enumerate(ROOMS) if own in rooms)
    allowed = {own}.union(*ROOMS[level + 1 :])
    for name in imports_of(path):
        parts = name.split(".")
        assert "_src" not in parts
        if parts[0] == "optax_superconv":
            assert parts[1] in allowed, f"{module_of(path)} imports {name}"


def test_no_two_modules_import_each_other():
    modules = {module_of(path): path for path in MODULES}
    prefix = "optax_superconv."
    graph = {
        module: {
            other
            for name in imports_of(path)
            for other in (
                name.removeprefix(prefix),
                name[len(prefix) :].rpartition(".")[0],
            )
            if name.startswith(prefix) and other in modules
        }
        for module, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # Raises where there is a cycle.


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_a_module_fits_in_one_reading(path):
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_code_names_flax_in_one_room(path):
    """Docstrings may: they say which containers of Flax a function takes."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            body.pop(0)
    names_it = re.search("flax|nnx|linen", ast.unparse(tree), flags=re.I)
    assert bool(names_it) == (module_of(path) == "_trees")


def section(doc, title):
    """The entries of a section of a docstring, each from its name on."""
    body = re.search(rf"^{title}:\n((?: .*\n|\n(?= ))+)", doc + "\n", flags=re.M)
    return re.split(r"^  (?=[*\w])", body[1], flags=re.M)[1:] if body else []


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_docstrings_are_complete(function):
    doc = inspect.getdoc(function)
    first, blank, *_ = doc.splitlines()
    assert re.fullmatch(r"(?!See |This )[A-Z].*\.", first)
    assert not blank
    assert section(doc, "Returns")
    assert ">>> " in doc
    assert "References:" not in doc or "<https://" in doc.partition("References:")[2]
    entries = dict(entry.split(": ", 1) for entry in section(doc, "Args"))
    parameters = inspect.signature(function).parameters
    assert list(entries) == list(parameters)
    for name, parameter in parameters.items():
        if parameter.default is None:
            assert re.search("None|see :func:", entries[name]), f"what None is: {name}"


# In a clause that also names an argument, these words state a rule. It belongs in
# `Args:`.
RULE = (
    r"negative|positive|above|below|outside|at least|at most|(less|fewer) than|finite"
    r"|numbers?|unknown|empty|wrong|bad|rules?|out of range"
)
ANY_ARGUMENT = r"arguments?|values?|durations?|steps?|constant|expression"
RUN_TIME = ("At ``init``", "In ``update``", "Under ``jit``", "When the function ")


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_raises_does_not_repeat_args(function):
    names = "|".join([ANY_ARGUMENT, *inspect.signature(function).parameters])
    for entry in section(inspect.getdoc(function), "Raises"):
        error, when = entry.split(": ", 1)
        for clause in re.split(r"; |\. ", " ".join(when.split())):
            names_one = re.search(rf"\b({names})\b", clause)
            gives_a_rule = re.search(rf"\b({RULE})\b", clause)
            repeats = error == "TypeError" or (names_one and gives_a_rule)
            assert not repeats or clause.startswith(RUN_TIME), clause


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_at_most_three_arguments_are_positional(function):
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    positional = sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)
    names = "auto_onecycle", "cyclical_schedule", "grid_test", "transfer_peak"
    assert positional <= (4 if function.__name__ in names else 3)


def test_importing_the_package_imports_no_extra():
    code = "import optax_superconv, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    imported = set(run.stdout.split())
    assert "optax" in imported  # So an import would show.
    assert not imported & {"matplotlib", "flax", "rich", "sklearn"}


def test_an_import_leaves_the_backend_to_be_set_up():
    """Or ``jax.distributed.initialize`` and counts of devices would come too late."""
    code = (
        "import jax, optax_superconv, optax_superconv.plotting\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "assert jax.device_count() == 3\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
