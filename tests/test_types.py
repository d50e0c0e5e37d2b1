"""What do a user's type checkers see, and is ours silenced only with a reason?"""

import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
from common import ROOT

import optax_superconv as osc

PACKAGE = pathlib.Path(osc.__file__).parent
CONSUMER = ROOT / "tests" / "consumer.py"
SOURCES = [
    path
    for folder in (PACKAGE, ROOT / "benchmarks", ROOT / "examples")
    for path in sorted(folder.rglob("*.py"))
]
IGNORE = re.compile(r"# pyright: ignore\[report\w+(, report\w+)*\]  # \w.*")

# A user has to tell mypy to read Optax's annotations, because Optax has no py.typed.
MYPY = """
[mypy]
strict = true
[mypy-optax.*]
follow_untyped_imports = true
"""

MISTAKES = """
import optax
import optax_superconv as osc
schedule = osc.onecycle_schedule(1.0, 10)
osc.onecycle_schedule("a", 10)  # mistake
osc.onecycle_schedule(1.0, total_steps=1.5)  # mistake
osc.onecycle_schedule(1.0, 10, shape="sine")  # mistake
osc.onecycle_adamw(1.0, 10, peak=1.0)  # mistake
osc.sgd("fast")  # mistake
osc.adamw(1.0, nesterov=0.9, mu=1.0)  # mistake
osc.scale_by_learning_rate(1.0, cooldown_shape="sine")  # mistake
osc.set_hyperparams((), {"learning_rate": "fast"})  # mistake
osc.suggest_learning_rate(schedule)  # mistake
osc.read_hyperparams(())["learning_rate"].upper()  # mistake
optax.chain(osc.ema_params(0.9), schedule)  # mistake
osc.gradual_unfreezing(optax.sgd(1.0), {0: 1.5}, 0)  # mistake
"""


@pytest.fixture
def installed(tmp_path):
    """The Python of an environment that has the package as users have it."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    shutil.copytree(PACKAGE, site / PACKAGE.name)
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["pyright", "mypy"])
def test_users_see_types(checker, installed, tmp_path):
    shutil.copy(CONSUMER, tmp_path / "consumer.py")
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    (tmp_path / "mypy.ini").write_text(MYPY)
    options = {
        "pyright": ["--pythonpath", installed],
        "mypy": ["--python-executable", installed, "--config-file", "mypy.ini"],
    }
    files = "consumer.py", "mistakes.py"
    run = subprocess.run(
        [sys.executable, "-m", checker, *options[checker], *files],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    errors = re.findall(r"(\w+\.py):(\d+).*\berror:", run.stdout)
    lines = enumerate(MISTAKES.splitlines(), start=1)
    expected = {("mistakes.py", str(n)) for n, line in lines if "# mistake" in line}
    assert {*errors} == expected, run.stdout + run.stderr
    assert run.returncode == 1


@pytest.mark.slow
def test_what_passes_the_type_checkers_runs():
    run = subprocess.run([sys.executable, CONSUMER], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_ignored_rules_have_names_and_reasons(path):
    for line in path.read_text().splitlines():
        assert not re.search(r"#\s*type:\s*ignore", line), line
        if re.search(r"#\s*pyright:\s*ignore", line):
            assert IGNORE.search(line), line
