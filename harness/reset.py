"""`kata reset NN`: a fresh stub; the old work is kept."""

from __future__ import annotations

import argparse

from harness import catalog
from harness.stubs import generate, replace, show


def main(args: argparse.Namespace) -> int:
    """Replace the learner files of one kata by their stubs."""
    kata = catalog.find(args.kata)
    stubs = {file: generate(kata, file) for file in kata.files}  # all or none
    for file, stub in stubs.items():
        attempted = catalog.is_attempted(kata, file)
        kept = replace(file, stub, keep=attempted)
        print(f"src/recsys/{file} is a fresh stub" + (f"; yours is {show(kept)}" if kept else ""))
    return 0
