"""The Python of README.md runs as it stands, but on recorded frames in place of the network."""

from __future__ import annotations

import ast
import json
import re
import types
from pathlib import Path

import msgspec
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FIREHOSE = ROOT / "tests" / "data" / "firehose"
KERNEL_S = 60


@pytest.fixture(scope="module")
def snippet() -> str:
    """The one Python block of the README, reading the recording."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert block.count("blueflow.firehose(") == 1
    return block.replace("firehose(", f'firehose("replay:{FIREHOSE / "frames.bin"}", ')


@pytest.fixture(scope="module")
def posts() -> set[str]:
    """What the snippet prints for each post that a production Jetstream saw in the same frames."""
    printed = set()
    for line in (FIREHOSE / "jetstream_v1.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        commit = event["commit"]
        if commit["collection"] == "app.bsky.feed.post" and "record" in commit:
            uri = f"at://{event['did']}/{commit['collection']}/{commit['rkey']}"
            printed.add(f"{uri} {commit['record']['text']}")
    assert len(printed) > 3
    return printed


async def test_the_snippet_prints_every_recorded_post_once(
    snippet: str,
    posts: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = compile(snippet, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for expected in ("\n".join(posts), ""):  # the second run resumes from the cursor file
        await types.FunctionType(code, {"__name__": "__main__"})()
        output = capsys.readouterr().out
        assert sorted(output.split()) == sorted(expected.split())
    assert (tmp_path / "my.cursor").exists()


@pytest.mark.timeout(120)  # starts a kernel
def test_the_snippet_runs_in_a_notebook_and_a_stream_lives_across_cells(
    snippet: str, posts: set[str], tmp_path: Path
) -> None:
    url = f"replay:{FIREHOSE / 'frames.bin'}"
    cells = [
        snippet,
        f'stream = await blueflow.firehose("{url}", collections=["app.bsky.feed.post"]).start()',
        "first = await anext(stream)",
        "second = await anext(stream)",
        "await stream.stop()\nprint(first.uri, second.uri)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=KERNEL_S, resources=resources).execute()
    outputs = ["".join(out.get("text", "") for out in cell.outputs) for cell in notebook.cells]
    assert sorted(outputs[0].split()) == sorted("\n".join(posts).split())
    assert len(set(re.findall(r"at://\S+", outputs[-1]))) == 2
    assert msgspec.json.decode((tmp_path / "my.cursor").read_bytes())
