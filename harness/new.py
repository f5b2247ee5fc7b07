"""`kata new NAME`: a kata that works and uses all the machinery, to be filled with something real.

What is made from harness/template is a whole kata with a small example in it: reference, spec,
properties, probes, golden values, a mistake, an alternate and a guide.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from harness import catalog, stubs
from harness.errors import UsageError
from harness.paths import KATAS, REFERENCE, REFERENCE_TESTS, ROOT, SRC

TEMPLATE = Path(__file__).parent / "template"
GUIDES = ROOT / "docs" / "guides"


def main(args: argparse.Namespace) -> int:
    """Make the kata, its stub, and say what comes next."""
    files = make(args.name, args.file)
    kata = catalog.read(files[0].parent)
    stubs.write(kata)
    golden = [sys.executable, "reference_tests/goldens/regenerate.py", kata.id]
    subprocess.run(golden, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for file in files:
        print(f"made {file.relative_to(ROOT).as_posix()}")
    print(
        "\nIt works as it is. Replace the example by what the kata is about, then\n"
        f"  python {' '.join(golden[1:])}\n"
        "  kata stubs\n"
        f"  kata check --strength {kata.number} --write\n"
        "How a strong spec is written: docs/authoring.md"
    )
    return 0


def make(name: str, file: str) -> list[Path]:
    """Write the files of a new kata; nothing is written if one of them is there already.

    Args:
        name: of the kata, without its number: "sequence_tower".
        file: the learner file, relative to src/recsys: "models/sequence.py".

    Raises:
        UsageError: a name or a file that cannot be one, or that is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(f"kata new: expected a name like sequence_tower, not {name!r}")
    if not re.fullmatch(r"([a-z][a-z0-9_]*/)+[a-z][a-z0-9_]*\.py", file):
        raise UsageError(f"kata new: --file should be like models/sequence.py, not {file!r}")
    katas = catalog.load()
    taken = catalog.owner_of(file, katas)
    if taken or any(kata.id.partition("_")[2] == name for kata in katas):
        raise UsageError(f"kata new: {file if taken else name} belongs to a kata already")
    number = f"{max((int(kata.number) for kata in katas), default=0) + 1:02}"
    kata = f"{number}_{name}"
    words = {
        "NN_name": kata,
        "NN": number,
        "TITLE": name.replace("_", " ").capitalize(),
        "FILE": file,
        "MODULE": file.removesuffix(".py").replace("/", "."),
    }
    places = {
        "kata.toml": KATAS / kata / "kata.toml",
        "test_spec.py": KATAS / kata / "test_spec.py",
        "test_properties.py": KATAS / kata / "test_properties.py",
        "probes.py": KATAS / kata / "probes.py",
        "solution.py": REFERENCE / "recsys" / file,
        "golden.py": REFERENCE_TESTS / "goldens" / f"{kata}.py",
        "mistake.toml": REFERENCE_TESTS / "mistakes" / kata / "mean-of-each-row.toml",
        "alternate.py": REFERENCE_TESTS / "alternates" / kata / "projection" / "recsys" / file,
        "guide.md": GUIDES / f"{kata.replace('_', '-')}.md",
    }
    there = [path for path in (SRC / "recsys" / file, *places.values()) if path.exists()]
    if there:
        raise UsageError(f"kata new: {there[0].relative_to(ROOT).as_posix()} is there already")
    for template, path in places.items():
        text = (TEMPLATE / template).read_text(encoding="utf-8")
        for token, word in words.items():
            text = re.sub(rf"\b{token}\b", word, text)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(places.values())
