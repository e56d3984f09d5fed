from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow.errors import Exit, SettingError
from blueflow.testing.faultplan import CLOSE_CODES, FAULTS, Fault, FaultPlan

plans = st.lists(
    st.builds(
        Fault, st.sampled_from(sorted(FAULTS)), st.integers(0, 10**9), times=st.integers(1, 9)
    )
)


def test_a_plan_is_read_and_sorted() -> None:
    plan = FaultPlan("stall@800:5s, close:1001@500,garbage@900x2,garbage-stays@1200,http:429/2@0")
    assert list(plan.faults) == [
        Fault("http", 0, "429/2"),
        Fault("close", 500, "1001"),
        Fault("stall", 800, "5s"),
        Fault("garbage", 900, times=2),
        Fault("garbage-stays", 1200),
    ]
    assert [fault.number for fault in plan.faults[:3]] == [429, 1001, 5]


@given(plans)
def test_text_and_plan_are_the_same(faults: list[Fault]) -> None:
    plan = FaultPlan(faults)
    assert FaultPlan(str(plan)).faults == plan.faults
    assert FaultPlan(str(plan)).fired == plan.fired


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("close", "'close' is not kind"),
        ("close@-1", "is not kind"),
        ("meteor@5", "no fault 'meteor'"),
        ("close:1002@5", "codes are"),
        ("stall:long@5", "needs a number"),
        ("garbage@5x0", "fires 0 times"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(text: str, problem: str) -> None:
    with pytest.raises(SettingError, match=problem) as caught:
        FaultPlan(text)
    assert caught.value.exit_code is Exit.USAGE


def test_faults_of_the_wire_are_used_up_and_counted() -> None:
    plan = FaultPlan("garbage@3x2,duplicate@3")
    taken = [plan.take_wire(3) for _ in range(4)]
    assert [fault.kind for fault in taken if fault] == ["garbage", "garbage", "duplicate"]
    assert plan.take_wire(4) is None
    assert plan.unfired == ["garbage@3x2", "duplicate@3"]  # taking is not yet doing
    for fault in filter(None, taken):
        plan.note(fault)
    assert plan.fired == {"garbage@3x2": 2, "duplicate@3": 1}
    assert plan.unfired == []


def test_refusals_wait_for_their_event() -> None:
    plan = FaultPlan("http:503@10,http:429/7@0")
    assert plan.take_handshake(0) == Fault("http", 0, "429/7")
    assert plan.take_handshake(9) is None
    assert plan.take_handshake(10) == Fault("http", 10, "503")
    assert plan.take_handshake(10) is None


def test_a_random_plan_is_repeatable() -> None:
    plan = FaultPlan.random(5, events=1000, kinds=("close", "gap"), count=20)
    assert str(plan) == str(FaultPlan.random(5, events=1000, kinds=("close", "gap"), count=20))
    assert str(plan) != str(FaultPlan.random(6, events=1000, kinds=("close", "gap"), count=20))
    assert len(plan.faults) == 20
    assert {f.number for f in plan.faults if f.kind == "close"} <= set(CLOSE_CODES)
