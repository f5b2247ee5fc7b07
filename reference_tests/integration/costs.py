"""How often a right system is red for what it costs: the reference, timed beside itself.

Ratios of costs are noisy, and more so on a machine that does other work. Each verdict starts two
processes of the reference and compares what they cost, as `kata gate` does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import culprit, system
from harness.paths import REFERENCE, SRC
from reference_tests.integration.margins import clopper_pearson

RESULTS = Path(__file__).with_name("costs.json")
WHAT = (*system.WORK, system.SERVICE)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verdicts", type=int, default=60)


def main(args: argparse.Namespace) -> int:
    """Measure and write costs.json anew after each verdict."""
    ratios: dict[str, list[float]] = {name: [] for name in WHAT}
    red, load = 0, []
    with tempfile.TemporaryDirectory(prefix="kata-costs-") as name:
        folder = Path(name).resolve()
        job = system.make_job(folder)
        with culprit.Trials(job, folder, what=WHAT) as trials:
            for count in range(1, args.verdicts + 1):
                found = trials.costs([REFERENCE, SRC], rounds=system.ROUNDS)
                for finding in found:
                    if "ratio" in finding.detail:
                        what = finding.name.removeprefix("speed_")
                        ratios[what].append(round(finding.detail["ratio"], 3))
                red += any(finding.good is False for finding in found)
                load.append(os.getloadavg()[0])
                made = record(count, red, ratios, load)
                RESULTS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
                print({key: made[key] for key in ("verdicts", "red", "largest")}, flush=True)
    return 0


def record(
    verdicts: int, red: int, ratios: dict[str, list[float]], load: Sequence[float]
) -> dict[str, Any]:
    """What is kept: how many were red, and the largest ratios."""
    return {
        "made_by": f"python -m reference_tests.integration costs --verdicts {verdicts}",
        "date": date.today().isoformat(),
        "torch": version("torch").partition("+")[0],
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": [round(min(load), 1), round(max(load), 1)],
        "verdicts": verdicts,
        "red": red,
        "interval_95": [round(end, 4) for end in clopper_pearson(red, verdicts)],
        "largest": {name: max(found) for name, found in ratios.items()},
        "ratios": ratios,
    }
