"""Run all benchmarks, or those named: python -m benchmarks [store] [runtime] [training] [merging] [quality]."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from importlib import import_module

from .options import add_options

ALL = ("store", "runtime", "training", "merging", "quality")


def main(arguments: list[str]) -> int:
    """Run the named benchmarks in turn; each reads its own options from the command line."""
    parser = ArgumentParser(prog="python -m benchmarks", description="Run all benchmarks, or those named.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ALL))
    names: list[str] = add_options(parser).parse_intermixed_args(arguments).names
    unknown = [n for n in names if n not in ALL]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(ALL)}", file=sys.stderr)
        return 2
    for name in names or ALL:
        import_module(f"benchmarks.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
