"""kata.toml and the rungs: what is read, and what a malformed one says."""

import re

import pytest

from harness import catalog
from harness.catalog import CatalogError


@pytest.fixture
def katas(tmp_path):
    """A folder with two katas."""
    for name, file in (("01_one", "a.py"), ("02_two", "b.py")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "kata.toml").write_text(
            f'title = "T"\nphase = "1A"\nhours = 2\ntrack = "core"\nprerequisites = []\n'
            f'[files]\n"{file}" = ["f"]\n'
        )
    return tmp_path


def test_katas_by_number_and_name(katas):
    found = catalog.load(katas)
    assert [kata.id for kata in found] == ["01_one", "02_two"]
    for name in ("2", "02", "02_two", "katas/02_two/"):
        assert catalog.find(name, found).id == "02_two"
    with pytest.raises(CatalogError, match="the katas are: 01_one, 02_two"):
        catalog.find("two", found)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('title = "T"', "title = 3", "title should be a string, not 3"),
        ('title = "T"', "title = ", "not valid TOML"),
        ('phase = "1A"', 'phase = "9"', "phase should be one of 1A, 1B, sprint"),
        ("hours = 2", "hours = true", "hours should be a number of hours"),
        ('track = "core"', "", "track should be a string"),
        ("prerequisites = []", 'prerequisites = ["03_x"]', "no kata is called '03_x'"),
        ('"a.py" = ["f"]', '"a.py" = "f"', "'a.py' should be a list of names"),
        ('"a.py"', '"b.py"', "b.py belongs to both 01_one and 02_two"),
        ("hours = 2", "hours = 2\nours = 3", "unknown key ours"),
    ],
)
def test_malformed(katas, old, new, says):
    file = katas / "01_one/kata.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(CatalogError, match=says):
        catalog.load(katas)


def test_rungs_in_teaching_order(katas):
    folder = katas / "01_one"
    (folder / "test_cost.py").write_text('@rung(hint="c")\ndef test_c(): pass\n')
    (folder / "test_spec.py").write_text(
        "from harness.spec import rung\n\n"
        '@rung(hints=["b", "bb"])\n@other\ndef test_b():\n    """It holds."""\n\n'
        '@rung(hint="a")\ndef test_a(): pass\n\ndef test_none(): pass\ndef helper(): pass\n'
    )
    rungs = catalog.read(folder).rungs
    assert [rung.name for rung in rungs] == ["test_b", "test_a", "test_c"]
    assert rungs[0].hints == ("b", "bb") and rungs[1].hints == ("a",)
    assert rungs[0].says == "It holds." and rungs[0].file == "test_spec.py"
    (folder / "test_spec.py").write_text("def test_a(:\n")
    with pytest.raises(CatalogError, match="test_spec.py:1"):
        _ = catalog.read(folder).rungs


@pytest.mark.parametrize("kata", catalog.load(), ids=lambda kata: kata.id)
def test_rungs_are_those_of_the_whole_file(kata, monkeypatch):
    """Only the heads of rungs are parsed; parsing all of each file finds the same."""
    files = sorted(kata.folder.glob("test_*.py"))
    quick = [catalog.rungs_of(file) for file in files]
    monkeypatch.setattr(catalog, "HEAD", re.compile(r"(?!)"))
    assert quick == [catalog.rungs_of(file) for file in files]


def test_a_rung_written_in_another_way_is_found(tmp_path):
    file = tmp_path / "test_spec.py"
    first = '@rung(hint="a")\ndef test_a(x="1"):\n    """Says a."""\n    x = "@rung("\n'
    second = "\n\n@rung()\n@other\ndef test_b():\n    pass\n"
    for text in (first, second, first + second, second + first):
        file.write_text(text)
        rungs, lines = catalog.rungs_of(file), text.splitlines()
        found = [(rung.name, lines[rung.line - 1][:8]) for rung in rungs]
        wanted = [name for name in ("test_a", "test_b") if name in text]
        assert sorted(found) == [(name, f"def {name}"[:8]) for name in wanted], text
