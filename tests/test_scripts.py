"""Examples, benchmarks and the code in the documents run."""

import os
import pathlib
import re
import subprocess
import sys
import time

import matplotlib
import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))
BENCHMARKS = [
    path
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if path.stem not in ("data", "harness", "networks", "tasks")
]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@pytest.mark.parametrize("path", [*EXAMPLES, *BENCHMARKS], ids=lambda path: path.stem)
def test_smoke(path, tmp_path):
    begin = time.perf_counter()
    run = subprocess.run(
        [sys.executable, path, "--smoke", "--out", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.iterdir())
    # Ten seconds alone on two cores; here it shares them with other tests.
    assert time.perf_counter() - begin < 60


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_code_in_documents_runs(path):
    """The blocks of a document are one script."""
    matplotlib.use("Agg")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S):
        exec(compile(block, path.name, "exec"), names)


def test_readme_opens_with_what_a_new_user_needs():
    head = (ROOT / "README.md").read_text().splitlines()[:30]
    assert head[2].count(".") <= 3
    text = "\n".join(head)
    assert "make demo" in text
    assert "make test" in text
    (example,) = re.findall(r"```python\n(.*?)\n```", text, flags=re.S)
    assert len(example.splitlines()) <= 12
    assert len([line for line in example.splitlines() if "osc" in line]) <= 3
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert (ROOT / picture).stat().st_size > 10_000
