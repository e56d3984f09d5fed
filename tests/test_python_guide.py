"""The Python of docs/guides/python.md runs as it stands, but on recorded frames."""

from __future__ import annotations

import ast
import re
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blueflow.client import _APPLICABLE
from blueflow.settings import SETTINGS

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "guides" / "python.md").read_text(encoding="utf-8")
FRAMES = ROOT / "tests" / "data" / "firehose" / "frames.bin"
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


async def run(block: str, names: dict[str, Any]) -> None:
    code = block.replace("firehose(", f'firehose("replay:{FRAMES}", ')
    compiled = compile(code, "python.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = types.FunctionType(compiled, names)()
    if result is not None:  # a block that awaits is a coroutine
        await result


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_every_block_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for block in BLOCKS:
        await run(block, names)
        printed.append(capsys.readouterr().out)
    assert len(BLOCKS) == 6
    assert printed[0].count("at://") == 10
    assert printed[1].count("RepoOp") >= 1
    assert printed[2].count("at://") == 5
    assert printed[4] == "10 likes up to seq 31527015334\n"
    assert names_in(tmp_path) == ["batches.cursor", "my.cursor"]


def test_settings_and_codes_that_it_names_exist() -> None:
    assert set(_APPLICABLE) <= set(SETTINGS)
    for name in ("check", "connect_wait_s", "buffer_bytes_max"):
        assert name in GUIDE
        assert name in _APPLICABLE
    assert SETTINGS["connect_wait_s"].default == 30
    assert SETTINGS["buffer_bytes_max"].default == 32 * 1024 * 1024
    assert "`BF-122`" in GUIDE
