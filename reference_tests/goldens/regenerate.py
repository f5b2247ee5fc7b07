"""Write the golden values of the katas, or check that they are current.

    python reference_tests/goldens/regenerate.py [--check] [NN_name ...]

Each script `NN_name.py` beside this file has a docstring, a `SEED` and a function `golden()` that
returns what `fixtures/NN_name/golden.json` holds: inputs, and what float64 NumPy makes of them. A
script never sees an implementation, so a golden value is an opinion of its own. Numbers are
rounded to 9 significant digits, so that the last bits of a CPU's exp or sum do not show.

`--check` writes nothing; it demands the same bytes under the NumPy that wrote the file, and the
same values within 1e-8 under another one. Exit code 1 if something is not current.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parents[1] / "fixtures"
DIGITS = 9
RELATIVE, ABSOLUTE = 1e-8, 1e-10


def scripts(names: Sequence[str] = ()) -> list[Path]:
    """The scripts in order, or those of `names`."""
    found = sorted(path for path in HERE.glob("*.py") if re.match(r"\d\d_", path.name))
    unknown = set(names) - {path.stem for path in found}
    if unknown:
        raise SystemExit(
            f"no script for {', '.join(sorted(unknown))}; there are "
            f"{', '.join(path.stem for path in found)}"
        )
    return [path for path in found if not names or path.stem in names]


def build(script: Path) -> str:
    """The text of the golden file that a script makes."""
    spec = spec_from_file_location(f"golden_{script.stem}", script)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    provenance = {
        "script": f"reference_tests/goldens/{script.name}",
        "numpy": np.__version__,
        "seed": module.SEED,
    }
    return dump({"provenance": provenance, **module.golden()})


def dump(value: object) -> str:
    """JSON with a line for each innermost list, so that it stays small and diffs well."""
    text = json.dumps(plain(value), indent=1, allow_nan=False)
    return re.sub(r"\[[^][{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text) + "\n"


def plain(value: object) -> object:
    """Dicts, lists and rounded numbers from whatever holds arrays."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    number = float(value)
    return float(f"{number:.{DIGITS}g}") + 0.0  # no negative zero


def same(one: object, other: object) -> bool:
    """Equal, numbers within a tolerance."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def is_current(old: str, new: str) -> bool:
    """Whether a golden file's text holds against a fresh one."""
    if old == new:
        return True
    try:
        before, after = json.loads(old), json.loads(new)
        versions = [table["provenance"].pop("numpy") for table in (before, after)]
    except (ValueError, KeyError, TypeError):  # not what a script writes
        return False
    return versions[0] != versions[1] and same(before, after)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    parser.add_argument("names", nargs="*", metavar="NN_name", help="default: all")
    options = parser.parse_args(arguments)
    stale = 0
    for script in scripts(options.names):
        path = FIXTURES / script.stem / "golden.json"
        new = build(script)
        old = path.read_text(encoding="utf-8") if path.is_file() else None
        if old is not None and is_current(old, new):
            continue
        stale += 1
        if options.check:
            print(f"{path.relative_to(FIXTURES.parent)} is {'stale' if old else 'missing'}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(new, encoding="utf-8", newline="\n")
            print(f"wrote {path.relative_to(FIXTURES.parent)}, {len(new) / 1024:.1f} KB")
    if options.check and stale:
        print("Bring them up to date: python reference_tests/goldens/regenerate.py")
    elif not stale:
        print("the golden values are current")
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
