"""The options of `python -m benchmarks`, for all benchmarks together."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path


def add_options(parser: ArgumentParser) -> ArgumentParser:
    """Add them; a benchmark reads its own and lets the others pass."""
    parser.add_argument("--peer", action="store_true", help="quality: train with PEFT and Trainer as well")
    parser.add_argument("--quick", action="store_true", help="all but quality: little work, to see that it runs")
    parser.add_argument("--long", action="store_true", help="training: a classifier to its end on both sides as well")
    parser.add_argument("--quantize", default="none", help="runtime: none, int8 or nf4")
    parser.add_argument("--with-mlflow", action="store_true", help="store: beside MLflow, in a venv under build/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all but quality: write the figures there as well")
    return parser
