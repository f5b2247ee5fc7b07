"""`kata guide NN`: the guide in the terminal."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from harness import catalog
from harness.catalog import Kata
from harness.errors import UsageError
from harness.paths import ROOT

GUIDES = ROOT / "docs" / "guides"
OVERVIEW = GUIDES / "00-overview.md"


def main(args: argparse.Namespace) -> int:
    """Print a guide, 00 for the overview: laid out on a terminal, as it is written elsewhere."""
    path = OVERVIEW if args.kata in ("0", "00") else file_of(catalog.find(args.kata))
    if not path.is_file():
        raise UsageError(f"there is no {path.relative_to(ROOT).as_posix()}")
    text = path.read_text(encoding="utf-8")
    if not sys.stdout.isatty():
        print(text, end="")
        return 0
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=min(80, shutil.get_terminal_size().columns))
    with console.pager(styles=True):
        console.print(Markdown(text))
    return 0


def file_of(kata: Kata) -> Path:
    """Where its guide is, or would be."""
    return GUIDES / f"{kata.id.replace('_', '-')}.md"
