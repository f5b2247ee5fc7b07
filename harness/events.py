"""What a pytest run tells the runner: JSON lines in the file that KATA_RESULTS names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = "KATA_RESULTS"


def emit(event: dict[str, Any]) -> None:
    """Append an event, if somebody wants to know and this is no worker of pytest-xdist."""
    file = os.environ.get(RESULTS)
    if file and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(event) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """The events in a file; a last line that was cut off is left out."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
