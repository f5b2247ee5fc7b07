"""`kata brief`, `kata report` and decision records: what a tutor and a mentor get to see."""

import json
import re

import pytest

from harness import catalog, decisions
from harness.paths import REFERENCE, ROOT

DECISION = """# Two towers do not share their tables

- Kata: 01_scale
- Date: 2026-01-02
- Status: accepted

## Context
Users and items differ.

## Choice

## Evidence
Measured: .12 and .11.

## Consequences
"""


def brief(checkout, *options):
    done = checkout.kata("brief", "01", "--json", *options)
    assert done.code == 0, done
    return json.loads(done.out)


def test_where_the_learner_stands(checkout):
    found = brief(checkout)
    assert (found["state"], found["passed"], found["total"]) == ("not_started", 0, 4)
    assert found["contract"]["scale"] == "The value times the factor."
    checkout.scale.write_text("def scale(x, *, factor=2):\n    return x + factor\n")
    found = brief(checkout)
    assert found["state"] == "failing" and found["first_red"]["rung"] == "test_doubles"
    assert any("came back    23 (int)" in line for line in found["first_red"]["message"])
    checkout.kata("hint", "01")
    assert brief(checkout)["hints_taken"] == {"test_doubles": 1}
    person = checkout.kata("brief", "01").out
    assert "came back    23 (int)" in person and "hints taken: test_doubles (1)" in person
    checkout.solve()
    checkout.scale.write_text(checkout.scale.read_text() + "\n# mine\n")
    assert brief(checkout)["state"] == "passing"


def test_questions_and_decisions(checkout):
    (checkout.root / "docs/guides").mkdir(parents=True)
    (checkout.root / "docs/guides/01-scale.md").write_text(
        "# 01\n\n## Checkpoint\nAnswer:\n\n1. Why does it\n   scale?\n2. And then?\n"
    )
    folder = checkout.root / "progress/decisions"
    folder.mkdir(parents=True)
    (folder / "TEMPLATE.md").write_text((ROOT / "progress/decisions/TEMPLATE.md").read_text())
    (folder / "towers.md").write_text(DECISION)
    found = brief(checkout)
    assert found["questions"] == ["Why does it scale?", "And then?"]
    (record,) = found["decisions"]
    assert record["title"] == "Two towers do not share their tables"
    assert record["missing"] == ["Choice", "Consequences"]


def test_the_template_alone_is_no_decision():
    text = decisions.template()
    assert decisions.parse("x.md", text).missing == decisions.SECTIONS
    assert decisions.read() == [] or all(d.file != "TEMPLATE.md" for d in decisions.read())


@pytest.mark.parametrize("kata", [kata.id for kata in catalog.load()])
def test_nothing_of_the_answer_is_in_it(kata):
    """No line of code that the stub lacks; the reference is not even opened."""
    from harness import brief as module

    kata = catalog.find(kata)
    found = json.dumps(
        {name: text for file in kata.files for name, text in module.contract(kata, file)}
        | {"questions": module.questions(kata)},
        ensure_ascii=False,
    )
    assert "contract" and found != "{}"
    words = " ".join(found.replace("\\n", " ").split())
    for file in kata.files:
        stub = (ROOT / "src/recsys" / file).read_text()
        for line in (REFERENCE / "recsys" / file).read_text().splitlines():
            code = line.strip()
            if len(code) > 20 and code not in stub and re.search(r"[=(]", code):
                assert code not in words, code


def test_the_report(checkout):
    empty = checkout.kata("report")
    assert empty.code == 0 and "wrote progress/report.md\n" in empty.out, empty
    checkout.scale.write_text("def scale(x, *, factor=2):\n    return x * factor\n")
    checkout.kata("test", "01")
    checkout.kata("hint", "01")
    checkout.solve()
    checkout.scale.write_text(checkout.scale.read_text() + "\n# mine\n")
    checkout.kata("test", "01")
    (checkout.root / ".kata/history.jsonl").open("a").write('{"when": "cut')
    run = checkout.root / "runs/one"
    run.mkdir(parents=True)
    figures = {"ndcg@10": 0.125}
    report = {"impl": "mine", "data": {"name": "synthetic"}, "baselines": {"popularity": figures}}
    (run / "report.json").write_text(json.dumps(report | {"retrieval": figures, "final": figures}))
    done = checkout.kata("report")
    assert "and progress/report.png" in done.out, done
    page = (checkout.root / "progress/report.md").read_text()
    assert "1 of 2 katas passing, 1 of 2 planned hours, begun on " in page
    assert re.search(r"\| 01 Scale \| passing \| 4/4 \| \S+ \| \S+ \| 2 \| 1 \|", page), page
    assert "- with the ranking stage: 0.1250" in page
    assert (checkout.root / "progress/report.png").read_bytes()[:4] == b"\x89PNG"
