"""Render what the benchmarks wrote as one page, and fail where a ratio is below its goal.

Usage: python benchmarks/render.py FOLDER OUTPUT, where FOLDER has one JSON file per benchmark:
`{"name", "cases": [{"case", "ours", "peer", "unit", "ratio"}], "versions", "machine"}`; `peer` and
`ratio` are null where there is nobody to compare with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import msgspec

# The least ratio to the peer that a change has to keep. Ratios are stable from machine to machine,
# rates are not, so rates are shown and never gated.
GOALS = {
    ("decode", "json_unhashed_vs_sdk"): 6.0,
    ("decode", "json_hashed_vs_sdk"): 3.3,
    ("decode", "posts_only_vs_sdk"): 20.0,
    ("kafka_sink", "idempotent_vs_aioproducer"): 2.0,
    ("kafka_sink", "idempotent_vs_send"): 4.0,
    ("kafka_sink", "transactional_vs_send"): 4.0,
    ("lake", "json_to_parquet_vs_pyarrow"): 2.0,
    ("lake", "compacted_vs_small_files"): 4.0,
    ("produce_kafka", "sustained"): 5.0,
    ("websocket", "relay_to_sink_vs_sdk"): 5.0,
}

HEAD = """# Benchmark results

Written by `make bench`; do not edit. Ours and the peer run in turn in one run, on the same input.
The ratio carries over to other machines, the rates do not.
"""


class Case(msgspec.Struct, frozen=True):
    """One measured comparison; `ours` and `peer` are in `unit`, `ratio` is ours to the peer's."""

    case: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None


class Benchmark(msgspec.Struct, frozen=True):
    """What one script of `benchmarks/` wrote."""

    name: str
    cases: list[Case]
    versions: dict[str, str]
    machine: dict[str, Any] | str


def main(arguments: list[str] | None = None) -> int:
    """Write the page; return 1 when a ratio is below its goal, or a goal was not measured."""
    parser = argparse.ArgumentParser(description="Render benchmark results as Markdown.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    chosen = parser.parse_args(arguments)
    benchmarks = [
        msgspec.json.decode(path.read_bytes(), type=Benchmark)
        for path in sorted(chosen.folder.glob("*.json"))
    ]
    chosen.output.write_text(render(benchmarks), encoding="utf-8")
    problems = shortfalls(benchmarks)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def render(benchmarks: list[Benchmark]) -> str:
    """Return the page, one section per benchmark."""
    return "\n".join([HEAD, *map(_section, benchmarks)])


def shortfalls(benchmarks: list[Benchmark]) -> list[str]:
    """Name each goal that was missed, or not measured although its benchmark ran."""
    measured = {b.name: {case.case: case.ratio for case in b.cases} for b in benchmarks}
    problems = []
    for (name, case), goal in GOALS.items():
        if name not in measured:
            continue
        ratio = measured[name].get(case)
        if ratio is None:
            problems.append(f"{name}: {case} was not measured; its goal is {goal:g} x the peer")
        elif ratio < goal:
            problems.append(f"{name}: {case} is {ratio:.2f} x the peer, below its goal of {goal:g}")
    return problems


def _section(benchmark: Benchmark) -> str:
    lines = [
        f"## {benchmark.name}",
        "",
        f"`python benchmarks/{benchmark.name}.py`",
        "",
        "| case | blueflow | peer | unit | ratio | goal |",
        "|---|---:|---:|---|---:|---|",
    ]
    lines += [_row(benchmark.name, case) for case in benchmark.cases]
    versions = ", ".join(f"{name} {version}" for name, version in benchmark.versions.items())
    lines += ["", f"Versions: {versions}.", "", f"Machine: {_machine(benchmark.machine)}.", ""]
    return "\n".join(lines)


def _row(name: str, case: Case) -> str:
    goal = GOALS.get((name, case.case))
    verdict = ""
    if goal is not None:
        reached = case.ratio is not None and case.ratio >= goal
        verdict = f"at least {goal:g}: {'reached' if reached else 'missed'}"
    cells = (
        case.case,
        _number(case.ours),
        _number(case.peer),
        case.unit,
        "" if case.ratio is None else f"{case.ratio:.2f}",
        verdict,
    )
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004 - three digits


def _machine(machine: dict[str, Any] | str) -> str:
    if isinstance(machine, str):
        return machine
    return ", ".join(f"{name} {value}" for name, value in machine.items())


if __name__ == "__main__":
    sys.exit(main())
