"""The machinery that proves a spec strong: each weakness is caught, in words."""

import json
import shutil

import pytest

from harness import catalog
from harness.paths import ROOT
from reference_tests.strength import catalogue
from reference_tests.strength.catalogue import CatalogueError

MISTAKE = '''misconception = "The factor is always 2."
tutor = "It is the caller's."
evidence = "common knowledge"
[[edit]]
find = "x * factor"
replace = "x * 2"
'''
PROBES = '''from harness.probe import probe
from harness.spec import learner

models = learner("models.scale")


@probe
def scales():
    return [models.scale(5), models.scale(5, factor=3), models.scale(7, factor=-4)]


@probe
def totals():
    return [models.total([1, 2, 3]), models.total([]), models.total([4, 7])]
'''
ALTERNATE = '''"""By adding up."""
import math


def scale(x, *, factor=2):
    if not math.isfinite(factor):
        raise ValueError("factor should be finite")
    return sum([x] * factor) if factor >= 0 else -sum([x] * -factor)


def total(values):
    found = 0
    for value in values:
        found += value
    return found
'''


# --- the catalogue --------------------------------------------------------------------------------


@pytest.fixture
def scale(checkout, monkeypatch):
    """A kata whose mistakes are read from a folder of its own."""
    tests = checkout.root / "reference_tests"
    monkeypatch.setattr(catalogue, "MISTAKES", tests / "mistakes")
    monkeypatch.setattr(catalogue, "ALTERNATES", tests / "alternates")
    monkeypatch.setattr(catalogue, "REFERENCE", tests / "solution")
    (tests / "mistakes/01_scale").mkdir(parents=True)
    return catalog.read(checkout.root / "katas/01_scale")


def mistake(text, name="wrong"):
    (catalogue.MISTAKES / "01_scale" / f"{name}.toml").write_text(text)


def test_an_edit(scale):
    mistake(MISTAKE)
    (found,) = catalogue.mistakes_of(scale)
    assert found.id == "wrong" and found.tutor == "It is the caller's."
    assert "return x * 2\n" in found.texts["models/scale.py"]


def test_a_whole_function(scale):
    code = "def total(values):\n    return max(values)\n"
    mistake(MISTAKE.partition("[[")[0] + f"[[function]]\nname = 'total'\ncode = '''{code}'''")
    (found,) = catalogue.mistakes_of(scale)
    text = found.texts["models/scale.py"]
    assert "return max(values)" in text and "sum(values)" not in text and "def _check" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("x * 2", "x * factor"), "is the reference itself"),
        (("x * factor", "x / factor"), "once in the reference, not 0 times: 'x / factor'"),
        (('"x * factor"', '"factor"'), "once in the reference, not"),
        (("x * 2", "x * * 2"), "invalid syntax"),
        (("evidence", "evidences"), "unknown key evidences"),
        (('"common knowledge"', '""'), "evidence should be a sentence"),
        (("It is the caller's.", "It is. " * 60), "tutor has 420 characters; at most 280 fit"),
        (("[[edit]]", "[[function]]"), "a [[function]] has `name` and `code`"),
        (("[[edit]]", "[[edit]]\nfile = 'models/shift.py'"), "file should be one of"),
        (("= ", "= = "), "is not valid TOML"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(scale, change, says):
    mistake(MISTAKE.replace(*change, 1) if change[0] != "= " else MISTAKE.replace(*change))
    with pytest.raises(CatalogueError, match="wrong.toml") as error:
        catalogue.mistakes_of(scale)
    assert says in str(error.value)


def test_the_same_mistake_twice(scale):
    mistake(MISTAKE)
    mistake(MISTAKE.replace("always", "ever"), "wrong-too")
    with pytest.raises(CatalogueError, match="is the same program as"):
        catalogue.mistakes_of(scale)


def test_an_alternate_that_is_the_reference(scale):
    root = catalogue.ALTERNATES / "01_scale/copy/recsys/models"
    root.mkdir(parents=True)
    shutil.copy(catalogue.REFERENCE / "recsys/models/scale.py", root)
    with pytest.raises(CatalogueError, match="is the reference itself"):
        catalogue.alternates_of(scale)


OTHER = """says = "Doubled by adding, where the factor is given."
[[edit]]
find = "x * factor"
replace = "factor * x"
"""


def alternate(text, name="other"):
    folder = catalogue.ALTERNATES / "01_scale"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.toml").write_text(text)
    return folder


def test_an_alternate_by_its_edits(scale):
    folder = alternate(OTHER)
    (folder / "sums/recsys/models").mkdir(parents=True)
    (folder / "sums/recsys/models/scale.py").write_text(ALTERNATE)
    edits, whole = catalogue.alternates_of(scale)
    assert edits.id == "other" and edits.says.startswith("Doubled by adding")
    assert "return factor * x\n" in edits.texts["models/scale.py"]
    assert whole.id == "sums" and whole.says == "By adding up."
    assert whole.texts == {"models/scale.py": ALTERNATE}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("factor * x", "x * factor"), "is the reference itself"),
        (("x * factor", "x / factor"), "once in the reference, not 0 times: 'x / factor'"),
        (("factor * x", "factor * * x"), "invalid syntax"),
        (("says", "tutor"), "unknown key tutor"),
        (('says = "Doubled by adding, where the factor is given."', ""), "says should be a"),
        ((OTHER.partition("\n")[2], ""), "expected at least one [[edit]] or [[function]]"),
        (("[[edit]]", "[[edit]]\nfile = 'models/shift.py'"), "file should be one of"),
        (("[[edit]]", "[[edit]"), "is not valid TOML"),
    ],
)
def test_what_is_wrong_with_an_alternate_is_said(scale, change, says):
    alternate(OTHER.replace(*change, 1))
    with pytest.raises(CatalogueError, match="other.toml") as error:
        catalogue.alternates_of(scale)
    assert says in str(error.value)


def test_the_same_alternate_twice(scale):
    alternate(OTHER)
    alternate(OTHER.replace("adding", "more"), "other-too")
    with pytest.raises(CatalogueError, match="is the same program as other"):
        catalogue.alternates_of(scale)


def test_two_alternates_of_one_name(scale):
    (alternate(OTHER) / "other/recsys/models").mkdir(parents=True)
    (catalogue.ALTERNATES / "01_scale/other/recsys/models/scale.py").write_text(ALTERNATE)
    with pytest.raises(CatalogueError, match="other is there twice"):
        catalogue.alternates_of(scale)


# --- the whole, on a kata of its own --------------------------------------------------------------


@pytest.fixture
def measured(checkout):
    """A miniature checkout with one mistake, one alternate and probes."""
    tests = checkout.root / "reference_tests"
    shutil.copytree(
        ROOT / "reference_tests/strength",
        tests / "strength",
        ignore=shutil.ignore_patterns("__pycache__", "results"),
    )
    for folder in ("mistakes/01_scale", "alternates/01_scale/sums/recsys/models"):
        (tests / folder).mkdir(parents=True)
    for folder in ("docs", "fixtures/01_scale"):
        (checkout.root / folder).mkdir(parents=True)
    (tests / "mistakes/01_scale/always-2.toml").write_text(MISTAKE)
    (tests / "alternates/01_scale/sums/recsys/models/scale.py").write_text(ALTERNATE)
    (checkout.root / "katas/01_scale/probes.py").write_text(PROBES)
    return checkout


def strength(checkout, *options):
    return checkout.python("-m", "reference_tests.strength", "01", "-v", "--jobs", "1", *options)


def test_written_then_current_then_touched(measured):
    done = strength(measured, "--write")
    assert "always-2: rejected, named" in done.out, done
    assert "sums: accepted" in done.out, done
    transcript = (measured.root / "reference_tests/transcripts/01_scale.txt").read_text()
    assert "you assumed  The factor is always 2." in transcript
    assert "next: pytest katas/01_scale" in transcript and str(measured.root) not in transcript
    table = (measured.root / "docs/spec-strength.md").read_text()
    assert "| 01_scale | 4 | 1 of 1 (100%) | 1 of 1 (100%) | 0 | 1 of 1 (100%) |" in table
    assert "no kata was touched" in strength(measured, "--touched").out
    path = measured.root / "fixtures/01_scale/diagnosis.json"
    stored = json.loads(path.read_text())
    stored["mistakes"][0]["gives"]["scales"][0][1][1] = 11
    path.write_text(json.dumps(stored))
    done = strength(measured, "--touched", "--mistakes")
    assert done.code == 1 and "diagnosis.json is not current" in done.out, done
    assert "rejected, not named" in done.out, done
    text = transcript.replace("The factor multiplies", "Another text")
    (measured.root / "reference_tests/transcripts/01_scale.txt").write_text(text)
    assert "messages are not those of" in strength(measured, "--mistakes").out


def test_a_spec_with_a_hole(measured):
    text = measured.spec.read_text().replace("assert_equal(found, 15)", "assert found")
    text = text.replace("assert_equal(models.total([1, 2, 3]), 6)", "assert models.total([1, 2])")
    measured.spec.write_text(text)
    done = strength(measured, "--write")
    assert done.code == 1 and "the spec accepts the mistake always-2" in done.out, done
    assert "SURVIVED models/scale.py" in done.out, done


def test_a_spec_that_knows_one_solution_only(measured):
    text = measured.spec.read_text().replace(
        "assert_equal(found, 15)", "assert_equal(found, 15)\n    assert hasattr(models, '_check')"
    )
    measured.spec.write_text(text)
    done = strength(measured, "--alternates")
    assert done.code == 1 and "the spec rejects the alternate sums" in done.out, done


def test_a_rung_that_cannot_fail(measured):
    text = measured.spec.read_text().replace("assert_equal(found, 15)", "pass")
    measured.spec.write_text(text.replace("found = models.scale(5, factor=factor)", "pass"))
    done = strength(measured)
    assert done.code == 1 and "the stub passes test_factor" in done.out, done


def test_a_reference_that_is_red(measured):
    file = measured.root / "reference_tests/solution/recsys/models/scale.py"
    file.write_text(file.read_text().replace("sum(values)", "max(values)"))
    done = strength(measured)
    assert done.code == 1 and "the reference is red" in done.out and "total" in done.out, done


def test_a_probe_that_takes_a_right_solution_for_wrong(measured):
    file = measured.root / "katas/01_scale/probes.py"
    private = "'_check' in models.scale.__globals__"
    file.write_text(f"{PROBES}\n\n@probe\ndef helper():\n    return {private}\n")
    done = strength(measured, "--mistakes", "--write")
    assert "probe helper takes the alternate sums for wrong" in done.out, done
