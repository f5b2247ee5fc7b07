"""Records docs/first-hour.md: a learner's first hour at a terminal, made by living it.

    python -m reference_tests.first_hour

A copy of the checkout, in a folder whose name holds a space and an umlaut, 80 columns, no colour.
The learner writes kata 01 function by function, makes two of the listed mistakes on the way, and
mends them; every line below a `$` is what the command printed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import catalog, stubs
from harness.bench.loop import COPIED
from harness.paths import REFERENCE, ROOT
from reference_tests.strength import catalogue

DOCUMENT = ROOT / "docs/first-hour.md"
FILE = "models/embedding.py"
COPIED_TOO = ("README.md", "constraints.txt", "progress")
WIDTH = 80


class Learner:
    """Somebody who edits a file, runs commands, and keeps what the terminal showed."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.kata = catalog.find("01")
        self.names = self.kata.files[FILE]
        self.lines: list[str] = []
        env = {k: v for k, v in os.environ.items() if not k.startswith(("KATA_", "PYTEST_"))}
        self.env = env | {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}

    def thinks(self, text: str) -> None:
        self.lines += ["", text]

    def writes(self, written: int, mistake: str = "") -> None:
        """The first `written` functions of the kata, with a listed mistake in them."""
        source = (REFERENCE / "recsys" / FILE).read_text(encoding="utf-8")
        if mistake:
            known = {each.id: each for each in catalogue.mistakes_of(self.kata)}
            source = known[mistake].texts[FILE]
        rest = tuple(name for name in self.names[written:])
        text = stubs.stub_text(source, rest, self.names[:written], self.kata.number, FILE)
        (self.checkout / "src/recsys" / FILE).write_text(text, encoding="utf-8")

    def runs(self, command: str, most: int = 40) -> None:
        """Run `kata ...` or `pytest ...` and keep what it printed, `most` lines of it."""
        module, *arguments = command.split()
        module = {"./kata": "harness"}.get(module, module)
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=self.checkout,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        shown = [line.rstrip() for line in done.stdout.splitlines()]
        assert not re.search("\x1b", done.stdout), "colours where there is no terminal"
        as_written = arguments[:1] in (["guide"], ["solution"])  # Markdown, code
        wide = [line for line in shown if len(line) > WIDTH and not as_written]
        assert not wide, f"{command} prints more than {WIDTH} columns: {wide}"
        if len(shown) > most:
            shown = [*shown[:most], f"(and {len(shown) - most} lines more)"]
        self.lines += ["", "```", f"$ {command}", *shown, "```"]


def live(learner: Learner) -> None:
    """The hour."""
    learner.thinks("The system runs from the first day; the board says where to begin.")
    learner.runs("./kata run", most=60)
    learner.runs("./kata")
    learner.runs("./kata guide 01", most=30)
    learner.thinks("Nothing is written yet.")
    learner.runs("./kata test 01")
    learner.thinks("The table, and the lookup. One thing about rows without an id is missed.")
    learner.writes(3, "padding-learns")
    learner.runs("./kata test 01")
    learner.runs("./kata hint 01")
    learner.thinks("Plain pytest says the same, in an editor too.")
    learner.runs("pytest katas/01_embedding_table")
    learner.thinks("Mended; and now bags.")
    learner.writes(4, "mean-counts-padding")
    learner.runs("./kata test 01")
    learner.thinks("That is a mistake it knows. With it mended, hashing is left.")
    learner.writes(len(learner.names))
    learner.runs("./kata test 01")
    learner.runs("./kata review 01")
    learner.thinks("Green: now the reference may be compared, and the board goes on.")
    learner.runs("./kata solution 01", most=12)
    learner.runs("./kata")
    learner.thinks("The system, with a table of one's own in it; and something for the mentor.")
    learner.runs("./kata run", most=60)
    learner.runs("./kata report")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="kata-") as folder:
        checkout = Path(folder) / "erste Übung"
        for name in (*COPIED, *COPIED_TOO):
            source, target = ROOT / name, checkout / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "report.md", "report.png")
                shutil.copytree(source, target, ignore=ignored)
            elif source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        learner = Learner(checkout)
        live(learner)
        head = ["# A first hour", *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines()]
        text = "\n".join([head[0], "", *head[1:], *learner.lines, ""])
        text = text.replace(str(checkout), "recsys-katas")
        assert folder not in text, "a path of this machine"
        DOCUMENT.write_text(text, encoding="utf-8")
        print(f"wrote {DOCUMENT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
