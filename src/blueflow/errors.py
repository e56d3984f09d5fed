"""Every error that blueflow raises on purpose.

A class stands for one decision that its catcher can take. `code` is stable and has an entry in
`docs/errors.md`; `exit_code` is what a command exits with when nobody catches the error.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class Exit(IntEnum):
    """Exit codes of every command; `docs/errors.md` tells what a supervisor should do with each."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2  # argparse's own code: flags or settings are wrong
    UNAVAILABLE = 69  # EX_UNAVAILABLE: a service is away; a restart can help
    BROKEN_PROMISE = 70  # EX_SOFTWARE: an invariant of ours does not hold
    CANNOT_WRITE = 73  # EX_CANTCREAT: the output cannot be written
    REFUSED = 78  # EX_CONFIG: an operator has to decide; do not restart


class BlueflowError(Exception):
    """What happened, where, with which values, what to do, and whether another try can help."""

    code: ClassVar[str] = "BF-000"
    remedy: ClassVar[str] = ""
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[Exit] = Exit.UNEXPECTED

    def what(self) -> str:
        """Say in one sentence what happened; the subclass has the values."""
        return " ".join(str(arg) for arg in self.args)

    def __str__(self) -> str:
        return f"{self.code}: {self.what()} {self.remedy}".rstrip()


class InvariantError(BlueflowError):
    """A promise of blueflow's own does not hold; the process ends before it stores a lie."""

    code = "BF-001"
    remedy = "This is a bug in blueflow: keep the output as it is and report this line."
    exit_code = Exit.BROKEN_PROMISE

    def __init__(self, promise: str) -> None:
        super().__init__(promise)
        self.promise = promise

    def what(self) -> str:
        return f"broken promise: {self.promise}."


class SettingError(BlueflowError):
    """A setting has no usable value."""

    code = "BF-002"
    exit_code = Exit.USAGE

    def __init__(self, name: str, origin: str, problem: str) -> None:
        super().__init__(name, origin, problem)
        self.name, self.origin, self.problem = name, origin, problem

    def what(self) -> str:
        return f"{self.name} (from {self.origin}): {self.problem}."

    remedy = "`blueflow config` shows every setting, its value and where it came from."
