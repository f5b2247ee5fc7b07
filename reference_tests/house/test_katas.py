"""Every kata: its stub is red in its own words, its reference is green, its stub is current."""

import pytest

from harness import catalog, runner, stubs
from harness.paths import REFERENCE

KATAS = catalog.load()


@pytest.fixture(scope="module")
def run():
    with runner.runs() as run:
        yield run


def each_kata(test):
    return pytest.mark.parametrize("kata", KATAS, ids=[kata.id for kata in KATAS])(test)


def needed(kata):
    """The kata and all that it builds on."""
    found = {kata.id}
    for name in kata.prerequisites:
        found |= needed(catalog.find(name, KATAS))
    return found


def lay_stubs(root, katas):
    """A folder for --impl with the stubs of `katas`."""
    (root / "recsys").mkdir()
    for kata in katas:
        for file in kata.files:
            path = root / "recsys" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(stubs.generate(kata, file))
    return str(root)


@each_kata
def test_the_stub_is_current(kata):
    assert not stubs.out_of_date(kata), "bring it up to date: kata stubs"


@each_kata
def test_the_stub_gives_nothing_away(kata):
    """Every listed body is the exception alone, and the file can be imported."""
    for file, names in kata.files.items():
        text = stubs.generate(kata, file)
        assert text.count("raise NotImplementedError(") >= len(names)
        for name in names:
            assert f"kata {kata.number}: write {name} in src/recsys/{file}" in text
        compile(text, file, "exec")


@each_kata
def test_every_rung_of_the_stub_is_red_with_its_own_message(kata, tmp_path, run):
    root = lay_stubs(tmp_path, [kata])
    result = run(kata, [root, str(REFERENCE)])
    assert not result.reason, result.reason + "\n" + result.output
    assert set(result.rungs.values()) == {"failed"}, result.rungs
    for red in result.reds:
        assert red.facts[0][0] == "not written", f"{red.rung}: {red.facts}"
        assert red.says and red.title and red.next, red.rung
    assert {red.rung for red in result.reds} == set(result.rungs)


@each_kata
def test_the_reference_is_green_while_all_other_katas_are_stubs(kata, tmp_path, run):
    """A kata passes with what it builds on, and with nothing else."""
    others = [other for other in KATAS if other.id not in needed(kata)]
    root = lay_stubs(tmp_path, others)
    result = run(kata, [root, str(REFERENCE)])
    assert result.ok, result.reason + "\n" + result.output
