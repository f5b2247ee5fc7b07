"""`kata brief [NN]`: what a tutor needs to know about a kata, and nothing of the answer.

It is made for a person or an assistant that teaches: where the learner stands, what the contract
says, what is red and why, what was hinted at. The reference solution is not read.
"""

from __future__ import annotations

import argparse
import ast
import json
import textwrap
from typing import Any

from harness import board, catalog, decisions, guide, hint, message, record, runner
from harness.catalog import Kata
from harness.paths import ROOT, SRC


def main(args: argparse.Namespace) -> int:
    """Print the brief of one kata, by default of the one that is next."""
    katas = catalog.load()
    results = record.read()
    if args.kata:
        kata = catalog.find(args.kata, katas)
    else:
        open_ = [k for k in katas if board.standing(k, results.get(k.id)).state != "passing"]
        kata = (open_ or katas)[0]
    found = brief(kata)
    print(json.dumps(found, indent=1, ensure_ascii=False) if args.json else "\n".join(told(found)))
    return 0


def brief(kata: Kata) -> dict[str, Any]:
    """Where the learner stands with `kata`; it is run if it was begun and does not pass."""
    standing = board.standing(kata, record.read().get(kata.id))
    red: dict[str, Any] | None = None
    if standing.state in ("failing", "stale"):
        digest = record.digest_of(kata)
        result = runner.run_kata(kata)
        record.write(
            kata, result.rungs, digest=digest, reason=result.reason, seconds=result.seconds
        )
        standing = board.standing(kata, record.read().get(kata.id))
        red = red_of(result)
    rungs = [{"name": r.name, "says": r.says, "hints": len(r.hints)} for r in kata.rungs]
    return {
        "kata": kata.id,
        "title": kata.title,
        "state": standing.state,
        "passed": standing.passed,
        "total": standing.total,
        "prerequisites": list(kata.prerequisites),
        "files": {f"src/recsys/{file}": list(names) for file, names in kata.files.items()},
        "contract": {name: text for file in kata.files for name, text in contract(kata, file)},
        "rungs": rungs,
        "first_red": red,
        "hints_taken": hint.taken(kata),
        "questions": questions(kata),
        "decisions": [each.as_dict() for each in decisions.read(kata.id)],
        "guide": guide.file_of(kata).relative_to(ROOT).as_posix(),
        "how_to_teach": "CLAUDE.md",
    }


def red_of(result: runner.KataResult) -> dict[str, Any] | None:
    """The first red rung's facts and the diagnosis; why there is no result, if there is none."""
    if result.ok:
        return None
    first = result.reds[0] if result.reds else None
    return {
        "rung": first.rung if first else None,
        "message": message.screen(first, result.reds[1:]) if first else [],
        "reason": result.reason,
        "diagnosis": result.diagnosis.ids,
        "diagnosis_is_exact": result.diagnosis.exact,
    }


def contract(kata: Kata, file: str) -> list[tuple[str, str]]:
    """Qualified name -> docstring, from the learner's own file: the stub brought it."""
    try:
        tree = ast.parse((SRC / "recsys" / file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    found = []
    for name in dict.fromkeys(part for n in kata.files[file] for part in (n.partition(".")[0], n)):
        node: Any = tree
        for part in name.split("."):
            inside = getattr(node, "body", [])
            node = next((each for each in inside if getattr(each, "name", "") == part), None)
        docs = ast.get_docstring(node) if node is not None else None
        if docs:
            found.append((name, docs))
    return found


def questions(kata: Kata) -> list[str]:
    """The questions of the guide's checkpoint."""
    path = guide.file_of(kata)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found: list[str] = []
    for line in text.partition("## Checkpoint")[2].splitlines():
        if line[:2].rstrip(".").isdigit():
            found.append(line.partition(".")[2].strip())
        elif found and line.startswith("   "):
            found[-1] += " " + line.strip()
    return found


def told(found: dict[str, Any]) -> list[str]:
    """The brief for a person."""
    lines = [f"kata {found['kata']}: {found['state']}, {found['passed']} of {found['total']} rungs"]
    lines += [f"files: {', '.join(found['files'])}", f"guide: {found['guide']}"]
    if found["first_red"]:
        red = found["first_red"]
        lines += ["", *red["message"]]
        lines += [f"no result: {red['reason']}"] if red["reason"] else []
    if found["hints_taken"]:
        taken = ", ".join(f"{rung} ({n})" for rung, n in found["hints_taken"].items())
        lines += ["", *textwrap.wrap(f"hints taken: {taken}", 80)]
    for each in found["decisions"]:
        lacks = f"; empty: {', '.join(each['missing'])}" if each["missing"] else ""
        lines.append(f"decision: {each['title']} ({each['status'] or 'no status'}{lacks})")
    lines += ["", "questions to ask:"]
    lines += [line for q in found["questions"] for line in textwrap.wrap(f"- {q}", 80)]
    return lines
