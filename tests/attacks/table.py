"""Every hostile input, in one table; and where the rows of the matrix are tried that are no inputs.

I1 to I17 are imports and formats, S1 to S20 what happens to a store. C1 (recipes) and M4 (targets of an export) come in
by the same doors.
"""

from __future__ import annotations

from tests.attacks import rows_archives, rows_files, rows_stores, rows_texts
from tests.attacks.attack import Attack
from tests.attacks.rows_stores import Damage

ATTACKS: list[Attack] = [*rows_archives.ATTACKS, *rows_files.ATTACKS, *rows_texts.ATTACKS]
"""What comes in from elsewhere."""

DAMAGES: list[Damage] = rows_stores.DAMAGES
"""Stores that are not as they should be."""

ELSEWHERE = {
    "I13": "tests/attacks/test_bases.py",
    "I17": "tests/workflows/test_hub_adapters.py",
    "S1": "tests/store/test_store_crash.py",
    "S2": "tests/store/test_store_crash.py",
    "S3": "tests/store/test_store_power_loss.py",
    "S4": "tests/store/test_store_crash.py",
    "S5": "tests/store/test_store_crash.py",
    "S6": "tests/store/test_store_crash.py",
    "S7": "tests/store/test_store_processes.py",
    "S8": "tests/store/test_store_gc.py",
    "S9": "tests/store/test_store_processes.py",
    "S10": "tests/store/test_store_processes.py",
    "S19": "tests/benchmarks/test_store_benchmark.py",
    **dict.fromkeys(("S11", "S14", "S16", "S17", "S18", "S20"), "tests/attacks/test_circumstances.py"),
}
"""Row -> the file whose tests are of it; beside them other files may be."""
