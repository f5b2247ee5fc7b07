"""What ruff knows: its bugbear rules and the like, in the review's form."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.review import Finding

# bugs rather than style; a stub's leftovers (unused imports) are none
SELECT = "B006,B008,B023,E711,E722,F601,F632,F811,F821,F823,PLE,S110,S301"


def findings(path: Path, name: str) -> Iterator[Finding]:
    """Run ruff on one file; nothing where it is not installed."""
    if importlib.util.find_spec("ruff") is None:
        return
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--quiet"]
    command += ["--select", SELECT, "--output-format", "json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout or "[]")
    except ValueError:
        return
    for each in found:
        code = each.get("code") or "syntax"
        yield Finding(
            file=name,
            line=each["location"]["row"],
            rule=f"ruff-{code}",
            what=each["message"],
            why="ruff's rules of this kind catch bugs, not style",
            read=each.get("url") or "https://docs.astral.sh/ruff/rules",
        )
