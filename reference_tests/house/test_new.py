"""`kata new`: what it makes works as it is, with all the machinery."""

import shutil

import pytest

from harness.paths import ROOT


@pytest.fixture
def author(checkout):
    """A miniature checkout with what authors have."""
    for folder in ("reference_tests/strength", "reference_tests/goldens"):
        ignored = shutil.ignore_patterns("__pycache__", "results", "0*", "1*")
        shutil.copytree(ROOT / folder, checkout.root / folder, ignore=ignored)
    for folder in ("docs/guides", "fixtures", "katas/01_embedding_table"):
        (checkout.root / folder).mkdir(parents=True)
    (checkout.root / "katas/01_scale").rename(checkout.root / "katas/03_scale")
    shutil.rmtree(checkout.root / "katas/02_shift")
    toml = checkout.root / "katas/01_embedding_table/kata.toml"
    toml.write_text('title="x"\nphase="1A"\nhours=1\ntrack="core"\nprerequisites=[]\n[files]\n')
    return checkout


def test_a_new_kata_works_as_it_is(author):
    made = author.kata("new", "row_means", "--file", "models/means.py")
    assert made.code == 0 and "made katas/04_row_means/test_spec.py" in made.out, made
    red = author.pytest("katas/04_row_means", "-q")
    assert red.code == 1 and "write centre in src/recsys/models/means.py:8" in red.out, red
    assert "+3 red, same cause" in red.out, red
    green = author.pytest("katas/04_row_means", "-q", "--impl", "reference")
    assert green.code == 0 and "4 passed" in green.out, green
    done = author.python("-m", "reference_tests.strength", "04", "-v", "--write", "--jobs", "1")
    assert "mean-of-each-row: rejected, named" in done.out, done
    assert "projection: accepted" in done.out and "SURVIVED" not in done.out, done
    guide = (author.root / "docs/guides/04-row-means.md").read_text()
    assert guide.startswith("# 04 Row means\n") and "pytest katas/04_row_means" in guide


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("Row-means", "--file", "models/means.py"), "expected a name like sequence_tower"),
        (("row_means", "--file", "../means.py"), "--file should be like models/sequence.py"),
        (("row_means", "--file", "models/scale.py"), "belongs to a kata already"),
        (("scale", "--file", "models/means.py"), "belongs to a kata already"),
        (("row_means", "--file", "models/shift.py"), "models/shift.py is there already"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(author, arguments, says):
    done = author.kata("new", *arguments)
    assert done.code == 2 and says in done.err, done
    assert not (author.root / "katas/04_row_means").exists()
