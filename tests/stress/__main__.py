"""`python -m tests.stress [PYTEST OPTIONS]`: every harness at full length, then one table. Fails on a violation."""

from __future__ import annotations

import os
import sys

os.environ["AHL_STRESS"] = "long"  # before the tests are imported

import pytest

STORE = [f"tests/store/test_store_{part}.py" for part in ("crash", "power_loss", "migration", "damage", "processes")]

if __name__ == "__main__":
    sys.exit(pytest.main(["tests/stress", *STORE, *sys.argv[1:]]))
