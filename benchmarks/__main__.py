"""Run all benchmarks, or those named: python -m benchmarks [swap] [mixed_batch]."""

from __future__ import annotations

import sys
from importlib import import_module

ALL = ("swap", "mixed_batch", "quality")


def main(names: list[str]) -> int:
    """Run the named benchmarks in turn."""
    names = [n for n in names if not n.startswith("--")]
    unknown = [n for n in names if n not in ALL]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(ALL)}", file=sys.stderr)
        return 2
    for name in names or ALL:
        import_module(f"benchmarks.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
