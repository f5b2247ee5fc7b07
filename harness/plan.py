"""The learner's plan of study, `progress/plan.toml`: hours a week, maybe a deadline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

from harness.catalog import tomllib
from harness.errors import UsageError
from harness.paths import PROGRESS

FILE = PROGRESS / "plan.toml"
LONGEST = 5200  # weeks: beyond, no date is named


@dataclass(frozen=True)
class Plan:
    """Hours a week, and the day by which the core katas are to pass."""

    hours_a_week: float = 5
    deadline: date | None = None

    def line(self, hours: float, today: date) -> str:
        """What this plan comes to for so many hours that are left."""
        weeks = math.ceil(hours / self.hours_a_week)
        said = f"{hours:g} hours left, {self.hours_a_week:g} a week"
        if self.deadline is None:
            if weeks > LONGEST:
                return f"{said}: {weeks} weeks"
            return f"{said}: done by {today + timedelta(weeks=weeks)}"
        days = (self.deadline - today).days
        if days <= 0:
            return f"{said}: the deadline was {self.deadline}" if days else f"{said}: due today"
        needed = hours * 7 / max(days, 7)
        return f"{said}: {self.deadline} takes {needed:.1f} a week"


def read(file: Path = FILE) -> Plan:
    """The plan; the usual five hours a week where the learner has none. UsageError for another."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Plan()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"progress/{file.name} cannot be read: {error}") from None
    if unknown := sorted(table.keys() - {"hours_a_week", "deadline"}):
        raise UsageError(
            f"progress/{file.name}: unknown {unknown[0]!r}; expected hours_a_week and deadline"
        )
    hours, deadline = table.get("hours_a_week", 5), table.get("deadline")
    if isinstance(hours, bool) or not isinstance(hours, (int, float)) or not 0 < hours <= 168:
        raise UsageError(
            f"progress/{file.name}: hours_a_week is {hours!r}; expected a number above 0, "
            "at most 168"
        )
    if deadline is not None and (not isinstance(deadline, date) or isinstance(deadline, datetime)):
        raise UsageError(
            f"progress/{file.name}: deadline is {deadline!r}; expected a day without quotes, "
            "as in 2027-06-30"
        )
    return Plan(hours, deadline)
