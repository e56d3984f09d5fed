"""A stream across the cells of a real notebook kernel, where an event loop is always running."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import blueflow

FRAMES = Path(__file__).parents[1] / "data" / "firehose" / "frames.bin"
URL = f"replay:{FRAMES}"
KERNEL_S = 60
SETUP = f"""
import asyncio, gc, json, threading
import blueflow

URL = {URL!r}

def tell(value):
    print(json.dumps(value))

def left():
    tasks = [task.get_name() for task in asyncio.all_tasks() if "irehose" in task.get_name()]
    return tasks + [one.name for one in threading.enumerate() if "blueflow-" in one.name]
"""

pytestmark = pytest.mark.timeout(120)  # each test starts a kernel


class Notebook:
    """Runs cells in one kernel, in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setenv("PYTHONPATH", str(Path(blueflow.__file__).parents[1]))
        monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))

    def run(self, *cells: str) -> list[Any]:
        """Return what each cell printed, as JSON values."""
        made = [nbformat.v4.new_code_cell(cell) for cell in (SETUP, *cells)]
        notebook = nbformat.v4.new_notebook(cells=made)
        resources = {"metadata": {"path": str(self.folder)}}
        NotebookClient(notebook, timeout=KERNEL_S, resources=resources).execute()
        texts = ["".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells]
        return [json.loads(text) if text else None for text in texts[1:]]


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notebook:
    return Notebook(tmp_path, monkeypatch)


def test_a_stream_lives_across_cells(notebook: Notebook) -> None:
    *_, first, rest, after = notebook.run(
        "stream = await blueflow.firehose(URL, cursor='my.cursor').start()",
        "first = [await anext(stream) for _ in range(3)]",
        "tell([event.seq for event in first])",
        """
rest = []
async for events in stream.batches():
    rest += events
tell(len(rest))""",
        """
await stream.stop()
tell([len(left()), [event.seq async for event in stream], open("my.cursor").read()])""",
    )
    assert first == [31_527_015_322, 31_527_015_323, 31_527_015_324]
    assert rest == 99
    assert after[:2] == [0, []]
    assert json.loads(after[2])["seq"] == 31_527_015_421


def test_sync_works_inside_the_kernel_and_goes_on(notebook: Notebook) -> None:
    first, interrupted, rest, after = notebook.run(
        "tell([e.seq for e in blueflow.firehose(URL, cursor='c').sync(limit=40)])",
        """
for event in blueflow.firehose(URL, cursor='c').sync():
    break
tell(event.seq)""",
        "tell([e.seq for e in blueflow.firehose(URL, cursor='c').sync()])",
        "tell(left())",
    )
    everything = [event.seq for event in blueflow.firehose(URL).sync()]
    assert first == everything[:40]
    assert interrupted == everything[40]
    assert rest == everything[40:]
    assert after == []


def test_a_wait_that_is_given_up_and_a_cell_that_is_run_again_lose_and_leave_nothing(
    notebook: Notebook,
) -> None:
    """Against the simulated relay, over a real websocket."""
    start = "stream = await blueflow.firehose('sim', sim_rate=200).start()"
    _, first, seqs, _, after = notebook.run(
        start,
        """
first = await asyncio.wait_for(anext(stream), 20)
tell(first.seq)""",
        """
seqs = []
while len(seqs) < 50:
    try:
        seqs.append((await asyncio.wait_for(anext(stream), 0.002)).seq)
    except TimeoutError:
        pass
tell(seqs)""",
        start,  # the stream of the first run of this cell is forgotten
        """
gc.collect()
for _ in range(1000):
    if left().count("firehose-reader") == 1:
        break
    await asyncio.sleep(0.01)
running = left().count("firehose-reader")
await anext(stream)
await stream.stop()
tell([running, left()])""",
    )
    assert sorted(seqs) == seqs
    assert seqs[0] >= first
    assert after == [1, []]


def test_a_damaged_cursor_file_is_an_error_in_its_cell(notebook: Notebook) -> None:
    (notebook.folder / "c").write_text("nonsense")
    with pytest.raises(CellExecutionError, match="CursorFileError"):
        notebook.run("stream = await blueflow.firehose(URL, cursor='c').start()")
    assert (notebook.folder / "c").read_text() == "nonsense"
