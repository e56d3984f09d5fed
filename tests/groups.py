"""Which tests never run side by side."""

from __future__ import annotations

from typing import Final

SERVERS: Final = "servers"
"""The xdist group of all tests with servers and of their campaigns: one worker runs them, one at a
time. On two cores two of them would only measure each other, and each worker would start its own.
"""
