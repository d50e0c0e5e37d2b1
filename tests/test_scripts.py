"""Examples, benchmarks and the code in the documents run."""

import json
import re
import runpy
import sys
import time

import matplotlib
import pytest
from common import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))
BENCHMARKS = [
    path
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if re.search("^if __name__", path.read_text(), flags=re.M)
    and path.stem != "documents"
]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@pytest.mark.slow
@pytest.mark.parametrize("path", [*EXAMPLES, *BENCHMARKS], ids=lambda path: path.stem)
def test_smoke(path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), "--smoke", "--out", str(tmp_path)])
    monkeypatch.setenv("COLUMNS", "120")
    matplotlib.use("Agg")
    begin = time.perf_counter()
    runpy.run_path(str(path), run_name="__main__")
    assert list(tmp_path.iterdir())
    # Ten seconds alone on two cores; here it shares them with other tests, and the same
    # machine was seen at half its speed.
    assert time.perf_counter() - begin < 120
    stored = ROOT / "examples" / "results" / f"{path.stem}.json"
    if stored.exists():
        records = [json.loads(f.read_text()) for f in (stored, tmp_path / stored.name)]
        # A smoke run has other numbers of steps in its headings.
        columns = [{re.sub("[0-9,]+", "", c) for c in r["rows"][0]} for r in records]
        assert columns[0] == columns[1]
        assert records[0].keys() == records[1].keys()


@pytest.mark.parametrize(
    "path",
    [DOCUMENTS[0], *(pytest.param(p, marks=pytest.mark.slow) for p in DOCUMENTS[1:])],
    ids=lambda path: path.stem,
)
def test_code_in_documents_runs(path):
    """The blocks of a document are one script."""
    matplotlib.use("Agg")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S):
        exec(compile(block, path.name, "exec"), names)


def test_readme_opens_with_what_a_new_user_needs():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    head = lines[:30]
    assert head[2].count(".") <= 3
    assert any(line.startswith("pip install .") for line in head[:20])
    text = "\n".join(head)
    assert "make demo" in text
    assert "make test" in text
    (example,) = re.findall(r"```python\n(.*?)\n```", text, flags=re.S)
    assert len(example.splitlines()) <= 12
    assert len([line for line in example.splitlines() if "osc" in line]) <= 3
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert (ROOT / picture).stat().st_size > 10_000


def test_documents_show_every_picture_and_no_other():
    shown = {
        (document.parent / path).resolve()
        for document in DOCUMENTS
        for path in re.findall(r"!\[.*?\]\((.*?)\)", document.read_text())
    }
    assert shown == {path.resolve() for path in (ROOT / "docs").glob("*.png")}


def test_links_between_documents_lead_somewhere():
    for document in DOCUMENTS:
        links = re.findall(r"(?<!!)\[[^]]*\]\(([^)]*)\)", document.read_text())
        for link in links:
            if not link.startswith("https://"):
                path, _, heading = link.partition("#")
                target = document.parent / path if path else document
                headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)
                anchors = {re.sub(r"[^\w -]", "", h).lower() for h in headings}
                assert not heading or heading.replace("-", " ") in anchors, link


def test_contributing_names_tests_that_exist():
    table = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`(test_\w+)::(test_\w+)`", table)
    assert len(named) >= 15
    for module, name in named:
        (path,) = (ROOT / "tests").rglob(f"{module}.py")
        assert f"def {name}(" in path.read_text(), name
