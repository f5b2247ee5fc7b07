"""The record of results: one JSON file in .kata/, written whole or not at all.

Only runs of the learner's own code are in it. A result is stale when the kata's tests, its fixtures
or its learner files are not those that it was made with.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from harness.catalog import DIGESTS, Kata
from harness.paths import FIXTURES, SRC, STATE

VERSION = 1
RECORD = STATE / "record.json"
WHEN = "%Y-%m-%dT%H:%M:%S%z"


@dataclass
class Result:
    """How a kata went the last time."""

    digest: str  # of all that the result depends on
    rungs: dict[str, str] = field(default_factory=dict)  # rung -> "passed" or "failed"
    reason: str = ""  # why there is no result, if there is none
    seconds: float = 0.0
    when: str = ""

    @property
    def passed(self) -> int:
        return sum(outcome == "passed" for outcome in self.rungs.values())


def read() -> dict[str, Result]:
    """Kata -> its last result. A file that cannot be read is set aside, and that is said."""
    try:
        text = RECORD.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return set_aside(str(error))
    try:
        table = json.loads(text)
        if table["version"] != VERSION:
            return set_aside(f"its version is {table['version']}, not {VERSION}")
        return {kata: Result(**result) for kata, result in table["katas"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return set_aside(f"{type(error).__name__}: {error}")


def set_aside(why: str) -> dict[str, Result]:
    aside = RECORD.with_name(f"record-unreadable-{time.strftime('%Y-%m-%d-%H%M%S')}.json")
    try:
        os.replace(RECORD, aside)
    except OSError:
        aside = RECORD
    print(
        f"kata: the record of results cannot be read ({why}); it is set aside as {aside} and a new "
        "one begins: `kata test` fills it again",
        file=sys.stderr,
    )
    return {}


def write(kata: Kata, rungs: dict[str, str], *, digest: str, reason: str, seconds: float) -> None:
    """Put one kata's result into the record, beside those of the others."""
    when = time.strftime(WHEN)
    with locked():
        results = read()
        results[kata.id] = Result(digest, rungs, reason, round(seconds, 2), when)
        remember(kata.id, results[kata.id])
        table: dict[str, Any] = {"version": VERSION}
        table["katas"] = {name: asdict(result) for name, result in sorted(results.items())}
        save(RECORD, json.dumps(table, indent=1) + "\n")


def remember(kata: str, result: Result) -> None:
    """Append a line to the history: when which kata passed how many of its rungs."""
    passed, total = result.passed, len(result.rungs)
    line = {"when": result.when, "kata": kata, "passed": passed, "total": total}
    with open(STATE / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def history() -> list[dict[str, Any]]:
    """All results ever recorded, oldest first; a line that is not whole is left out."""
    found = []
    try:
        text = (STATE / "history.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            each = json.loads(line)
            time.strptime(each["when"], WHEN)
            found.append({key: each[key] for key in ("when", "kata", "passed", "total")})
        except (ValueError, KeyError, TypeError):
            continue
    return found


def save(path: Path, text: str) -> None:
    """Whoever is killed at any moment leaves the old file or the new one."""
    made = path.with_name(f"{path.name}.{os.getpid()}.new")
    with open(made, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(made, path)


@contextmanager
def locked() -> Iterator[None]:
    """One writer at a time; the lock of a process that died is free."""
    STATE.mkdir(parents=True, exist_ok=True)
    with open(STATE / "record.lock", "a") as file:
        try:
            import fcntl
        except ImportError:  # Windows: the write itself is still whole or not at all
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest_of(kata: Kata) -> str:
    """What a result depends on as it is now, a word for each part: `spec:1f.. fixtures:..`."""
    words = []
    for part, files in dependencies(kata).items():
        total = sha256()
        for file in files:
            total.update(file.name.encode() + b"\0")
            total.update(file.read_bytes() if file.is_file() else b"(missing)")
            total.update(b"\0")
        words.append(f"{part}:{total.hexdigest()[:16]}")
    return " ".join(words)


def dependencies(kata: Kata) -> dict[str, list[Path]]:
    """The files of each part; `task` is what the stubs say."""
    folder = [file for file in sorted(kata.folder.rglob("*")) if file.suffix in (".py", ".toml")]
    fixtures = [file for file in sorted((FIXTURES / kata.id).rglob("*")) if file.is_file()]
    return {
        "spec": folder,
        "fixtures": fixtures,
        "code": [SRC / "recsys" / file for file in kata.files],
        "task": [kata.folder / DIGESTS],
    }


def changed(kata: Kata, result: Result) -> list[str]:
    """The parts (see `dependencies`) that are not those that the result was made with."""
    made_with = result.digest.split()
    return [word.partition(":")[0] for word in digest_of(kata).split() if word not in made_with]


def is_stale(kata: Kata, result: Result) -> bool:
    """Whether the result may be another today. A task that only reads differently is no reason."""
    return changed(kata, result) not in ([], ["task"])
