"""`kata data NAME`: fetch a data set if it is not here, check it, and say what is in it."""

from __future__ import annotations

import argparse
import sys
import time

from harness import overlay
from harness.errors import UsageError
from harness.paths import SRC


def main(args: argparse.Namespace) -> int:
    """0 if the data set is here and whole; otherwise a sentence says what was expected."""
    overlay.install([overlay.Root("src", SRC)])
    from recsys.data.errors import DataError
    from recsys.data.load import load

    progress = Progress()
    try:
        dataset = load(args.name, progress=progress)
    except DataError as error:
        raise UsageError(str(error)) from None
    finally:
        progress.end()
    print(
        f"{dataset.name}: {dataset.num_users:,} users, {dataset.num_items:,} items, "
        f"{dataset.num_interactions:,} interactions, {len(dataset.genre_names)} genres"
    )
    for note in dataset.notes:
        print(f"note: {note}")
    return 0


class Progress:
    """Bytes so far: a line rewritten on a terminal, elsewhere one every ten seconds."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.shown = float("-inf")
        self.open = False

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self.shown < (0.1 if self.live else 10) and done != total:
            return
        self.shown = now
        of = f" of {total / 2**20:.1f}" if total else ""
        start, end = ("\r\033[K", "") if self.live else ("", "\n")
        text = f"{start}{what}: {done / 2**20:.1f}{of} MiB"
        print(text, end=end, file=sys.stderr, flush=True)
        self.open = self.live

    def end(self) -> None:
        """Leave the line that is rewritten."""
        if self.open:
            print(file=sys.stderr)
