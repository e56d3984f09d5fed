"""What docs/guides/lake.md shows runs as it stands, on a small lake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.lake.lakes import WrittenLake, at, post

from blueflow import cli

GUIDE = (Path(__file__).parents[1] / "docs" / "guides" / "lake.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
# What writes the lake is a run without an end; the tests of the runners have those.
COMMANDS = re.findall(r"^\$ blueflow (lake .*?)(?:\s+#.*)?$", GUIDE, re.MULTILINE)
(SQL,) = re.findall(r"^```sql\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lake = WrittenLake(tmp_path / "data-lake")
    (lake.folder / "_blueflow" / "staging").mkdir()
    lake.publish("posts", [post(at(0, 10), 1), post(at(2, 10), 2, rkey="2")])
    lake.publish("posts", [post(at(2, 40), 3, rkey="2", operation="delete")])
    lake.compact("posts", at(0) // 3_600_000_000)


def test_every_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for block in BLOCKS:
        if not block.startswith("# not run here"):
            exec(compile(block, "lake.md", "exec"), names)  # noqa: S102 - it is what is tested
            printed.append(capsys.readouterr().out)
    assert len(printed) == 8
    assert "posts " in printed[0]
    assert printed[1] == "2\n"
    assert names["posts"].to_table()["text"].to_pylist() == ["post 1"]
    assert names["top"] == [("en", 1)]
    assert "post 2" in printed[5]
    assert "raw 2026-07-04 16:00:00+00:00" in printed[6]
    assert printed[7] == "3 1\n"
    names["lake"].close()


def test_the_sql_runs() -> None:
    import duckdb  # noqa: PLC0415 - only here

    with duckdb.connect() as connection:
        assert [row[1] for row in connection.execute(SQL).fetchall()] == [1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.split()) == 0
    assert capsys.readouterr().err == ""


def test_there_are_commands() -> None:
    verbs = {command.split()[1] for command in COMMANDS}
    assert verbs == {"stats", "files", "verify", "compact", "expire"}
