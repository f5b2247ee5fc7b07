"""The golden values: each is what its script makes of NumPy, and a touched one is found out."""

import importlib.util
import shutil

import pytest

from harness.paths import FIXTURES, REFERENCE_TESTS

spec = importlib.util.spec_from_file_location(
    "regenerate", REFERENCE_TESTS / "goldens" / "regenerate.py"
)
regenerate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(regenerate)


def test_the_golden_values_are_current(capsys):
    assert regenerate.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "touch",
    [
        lambda text: flipped(text),
        lambda text: text.replace('"script"', '"made by hand"'),
        lambda text: text[: len(text) // 2],
    ],
    ids=["a digit", "the provenance", "cut off"],
)
def test_a_touched_fixture_is_found_out(tmp_path, monkeypatch, capsys, touch):
    shutil.copytree(FIXTURES, tmp_path / "fixtures")
    monkeypatch.setattr(regenerate, "FIXTURES", tmp_path / "fixtures")
    path = tmp_path / "fixtures/01_embedding_table/golden.json"
    path.write_text(touch(path.read_text()))
    assert regenerate.main(["--check", "01_embedding_table"]) == 1
    said = capsys.readouterr().out
    assert "fixtures/01_embedding_table/golden.json is stale" in said


def flipped(text: str) -> str:
    """The last digit of the file is another."""
    at = max(i for i, letter in enumerate(text) if letter.isdigit())
    return text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
