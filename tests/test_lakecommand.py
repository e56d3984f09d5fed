"""`blueflow lake`, as people and scripts use it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.lake.lakes import H16, WrittenLake, at, post

import blueflow
from blueflow import cli
from blueflow.lake.joined import Joined
from blueflow.lake.local import LocalStore
from blueflow.lakecommand import main

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WrittenLake:
    """Hour 0 compacted, hour 1 in fresh."""
    monkeypatch.chdir(tmp_path)
    lake = WrittenLake(tmp_path / "lake")
    (lake.folder / "_blueflow" / "staging").mkdir()
    lake.publish("posts", [post(at(0), 1), post(at(1), 2)])
    lake.compact("posts", H16)
    return lake


@pytest.fixture
def run(lake: WrittenLake, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a verb over the lake; return its code and the lines that it printed, as JSON values."""

    def run(verb: str, *arguments: str) -> tuple[int, list[Any], str]:
        code = cli.main(["lake", verb, str(lake.folder), *arguments])
        printed = capsys.readouterr()
        return code, [json.loads(line) for line in printed.out.splitlines()], printed.err

    return run


def test_stats_has_a_line_per_dataset(run: Callable[..., Any]) -> None:
    code, lines, _ = run("stats")
    assert code == 0
    assert [line["dataset"] for line in lines][:2] == ["posts", "likes"]
    assert (lines[0]["rows"], lines[0]["hours"], lines[0]["marked_hours"]) == (2, 2, 1)
    assert lines[0]["first_hour"] == "2026-07-04T16:00:00Z"
    assert run("stats", "--start", "2026-07-04T17")[1][0]["rows"] == 1


def test_files_are_those_that_hold_each_row_once(run: Callable[..., Any]) -> None:
    code, lines, _ = run("files", "posts")
    assert code == 0
    assert [line["root"] for line in lines] == ["raw", "fresh"]
    assert all(Path(line["path"]).stat().st_size == line["size"] for line in lines)
    assert len(run("files", "posts", "--end", "2026-07-04T17")[1]) == 1


def test_verify_tells_errors_by_its_exit_code(lake: WrittenLake, run: Callable[..., Any]) -> None:
    assert run("verify", "--deep")[0] == 0
    next((lake.folder / "raw").rglob("*.parquet")).unlink()
    code, lines, _ = run("verify")
    assert code == 1
    assert lines[0]["severity"] == "error"
    assert lines[0]["what"] == "a marker names it, and it is not there"


def test_compact_does_what_is_due_once(lake: WrittenLake, run: Callable[..., Any]) -> None:
    code, lines, error = run("compact", "--keep-fresh", "0s")
    assert (code, error) == (0, "")
    done = {(line["dataset"], line["hour"]): line["outcome"] for line in lines[:-1]}
    assert done["posts", "2026-07-04T17"] == "compacted"
    assert done["likes", "2026-07-04T16"] == "compacted"
    assert all(outcome == "compacted" for outcome in done.values())
    assert len(done) == 11
    assert [line["root"] for line in run("files", "posts")[1]] == ["raw", "raw"]
    code, lines, _ = run("compact", "--keep-fresh", "0s")
    assert (code, lines) == (0, [{"removed_fresh_files": 2}])
    assert not list((lake.folder / "fresh").rglob("*.parquet"))
    assert run("verify", "--deep")[:2] == (0, [])


def test_an_hour_that_cannot_be_compacted_is_told_and_fails(
    lake: WrittenLake, run: Callable[..., Any]
) -> None:
    path = next(path for path in (lake.folder / "fresh").rglob("hour=17/*.parquet"))
    path.write_bytes(path.read_bytes()[:-10])
    code, lines, _ = run("compact")
    assert code == 1
    (failed,) = [line for line in lines if line.get("outcome") == "failed"]
    assert failed["error"].startswith("BF-248 posts/2026-07-04T17") or "BF-248" in failed["error"]


def test_expire_can_be_tried_first(lake: WrittenLake, run: Callable[..., Any]) -> None:
    days = str((time.time() - at(1) / 1e6) / 86_400)
    code, lines, _ = run("expire", "--raw-days", days, "--dry-run")
    assert (code, lines[0]["hours"], lines[0]["dry_run"]) == (0, 1, True)
    assert len(run("files", "posts")[1]) == 2
    assert run("expire", "--raw-days", days)[1][0]["hours"] == 1
    assert [line["root"] for line in run("files", "posts")[1]] == ["fresh"]
    assert run("verify", "--deep")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stats", "nowhere"], "BF-247: nowhere holds no lake"),
        (["files", "lake", "post"], "'post' is none of posts, likes"),
        (["stats", "lake", "--start", "2026-07-05", "--end", "2026-07-04"], "before the start"),
        (["stats", "lake", "--start", "soon"], "'soon' is no time such as 2026-07-04T16"),
        (["expire", "lake", "--raw-days", "-1"], "-1 is no number of days"),
        (["expire", "lake", "--raw-days", "nan"], "nan is no number of days"),
        (["expire", "lake", "--raw-days", "x"], "invalid"),
        (["stats", "lake", "--for", "5s"], "unrecognized arguments"),
        ([], "WHAT"),
    ],
)
def test_what_cannot_be_done_says_why_and_exits_with_2(
    lake: WrittenLake, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else -1
    assert code == 2
    assert said in capsys.readouterr().err


def test_a_damaged_lake_is_one_line(lake: WrittenLake, run: Callable[..., Any]) -> None:
    marker = next((lake.folder / "raw").rglob("_complete*"))
    marker.write_bytes(b"{}")
    code, lines, error = run("stats")
    assert (code, lines) == (78, [])
    assert error.startswith("BF-204")
    assert error.count("\n") == 1


def test_a_terminal_gets_a_table(
    lake: WrittenLake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    wanted = {
        "stats": "dataset   rows",
        "files": "hour=17/test-0-of-1-000000000002.parquet",
        "verify": "0 findings, 0 of them errors",
        "expire": "0 files, 0 bytes would be removed",
        "compact": "posts 2026-07-04T17 compacted",
    }
    more = {"files": ["posts"], "expire": ["--raw-days", "99999", "--dry-run"]}
    for verb in ("stats", "files", "expire", "compact", "verify"):
        assert main([verb, "lake", *more.get(verb, [])]) == 0
        assert wanted[verb] in capsys.readouterr().out
    assert main(["stats", "lake", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["dataset"] == "posts"


def test_the_setting_names_the_lake_when_nobody_does(
    lake: WrittenLake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLUEFLOW_LAKE", str(lake.folder))
    assert main(["stats"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["rows"] == 2


async def test_the_store_is_closed_after_an_error(
    lake: WrittenLake, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    close = LocalStore.close

    async def noted(store: LocalStore) -> None:
        closed.append(store)
        await close(store)

    async def failing(*_: Any) -> Any:
        raise RuntimeError("x")

    monkeypatch.setattr(LocalStore, "close", noted)
    monkeypatch.setattr(Joined, "hours", failing)
    from blueflow.config import load  # noqa: PLC0415
    from blueflow.lakecommand import _parser  # noqa: PLC0415
    from blueflow.lakejob import run as run_job  # noqa: PLC0415

    args = _parser().parse_args(["stats", str(lake.folder)])
    with pytest.raises(RuntimeError):
        await run_job(args, load(args))
    assert len(closed) == 1


@pytest.mark.parametrize("arguments", [["--help"], ["stats", "--help"], ["verify", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom blueflow import cli\n"
        f"try:\n    cli.main(['lake', *{arguments!r}])\nexcept SystemExit:\n    pass\n"
        "heavy = {'anyio', 'asyncio', 'pyarrow', 'aiobotocore', 'msgspec', 'prometheus_client'}\n"
        "print('loaded:', *sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(Path(blueflow.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-1] == "loaded:"
    assert "--json" in run.stdout or arguments == ["--help"]
