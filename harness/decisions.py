"""The learner's decision records: progress/decisions/*.md, after TEMPLATE.md there."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from harness.paths import PROGRESS

FOLDER = PROGRESS / "decisions"
TEMPLATE = "TEMPLATE.md"
FIELD = re.compile(r"^- (Kata|Date|Status): *(.*)$", re.MULTILINE)
SECTIONS = ("Context", "Choice", "Evidence", "Consequences")


@dataclass(frozen=True)
class Decision:
    """One record; `missing` names the sections without a text of the learner's."""

    file: str
    title: str
    kata: str
    date: str
    status: str
    missing: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read(kata: str | None = None) -> list[Decision]:
    """The records, by file name; of one kata if its id is given."""
    files = [path for path in sorted(FOLDER.glob("*.md")) if path.name != TEMPLATE]
    found = [parse(path.name, path.read_text(encoding="utf-8", errors="replace")) for path in files]
    return [each for each in found if kata in (None, each.kata)]


def parse(file: str, text: str) -> Decision:
    fields = dict(FIELD.findall(text))
    title = text.lstrip().partition("\n")[0].removeprefix("#").strip()
    return Decision(
        file=file,
        title=title or file,
        kata=fields.get("Kata", "").strip(),
        date=fields.get("Date", "").strip(),
        status=fields.get("Status", "").strip(),
        missing=tuple(name for name in SECTIONS if not body(text, name)),
    )


def body(text: str, section: str) -> str:
    """The text under a heading, unless it is the template's."""
    return under(text, section) if under(text, section) != under(template(), section) else ""


def under(text: str, section: str) -> str:
    match = re.search(rf"^## {section}\s*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return match[1].strip() if match else ""


def template() -> str:
    try:
        return (FOLDER / TEMPLATE).read_text(encoding="utf-8")
    except OSError:
        return ""
