"""How long to wait before the next try, with the "full jitter" that spreads those who wait.

Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
"""

from __future__ import annotations

from typing import NamedTuple


class Backoff(NamedTuple):
    """Full jitter: a random part of a bound that doubles with every failure in a row."""

    base_s: float = 0.5
    cap_s: float = 60.0

    def delay_s(self, failures: int, jitter: float) -> float:
        """Return the seconds to wait before the next attempt.

        Args:
            failures: in a row; 0 after a good one.
            jitter: uniform in [0, 1).
        """
        return jitter * min(self.cap_s, self.base_s * 2.0 ** min(failures, 32))
