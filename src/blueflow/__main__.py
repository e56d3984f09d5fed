"""`python -m blueflow`: the same as the `blueflow` command."""

from __future__ import annotations

import sys

from blueflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
