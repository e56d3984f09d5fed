"""`docs/lake.ipynb` runs from its first cell to its last, and was stored as it ran."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from nbclient import NotebookClient

import blueflow

if TYPE_CHECKING:
    from collections.abc import Sequence

NOTEBOOK = Path(__file__).parents[2] / "docs" / "lake.ipynb"
KERNEL_S = 60


def outputs_of(notebook: Any) -> list[list[str]]:
    """Return for each code cell which kinds of output it has, or what it printed."""
    return [
        [one["text"] if one.output_type == "stream" else max(one["data"]) for one in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def text_of(notebook: Any) -> str:
    return nbformat.writes(notebook)


def kinds(outputs: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[kind for kind in cell if "/" in kind] for cell in outputs]


def test_it_was_stored_with_the_outputs_of_a_run_and_says_that_they_are_simulated() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    outputs = outputs_of(notebook)
    assert all(outputs[:-1])
    assert outputs[-1] == []
    assert text_of(notebook).count("image/png") == 2
    assert "demo-lake (simulated data)" in text_of(notebook)
    assert '(simulated)\\" * lake.simulated' in text_of(notebook)


@pytest.mark.timeout(120)  # it starts a kernel, and the simulated network for 5 s
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(blueflow.__file__).parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PROMETHEUS_PORT", "0")
    notebook = nbformat.read(NOTEBOOK, 4)
    stored = kinds(outputs_of(notebook))
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert '"20s"' in first.source
    first.source = first.source.replace('"20s"', '"5s"')
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=KERNEL_S, resources=resources).execute()
    assert kinds(outputs_of(notebook)) == stored
    (told,) = [text for cell in outputs_of(notebook) for text in cell if "operations on" in text]
    operations, posts = (int(word) for word in told.split() if word.isdigit())
    assert 50 < posts < operations
