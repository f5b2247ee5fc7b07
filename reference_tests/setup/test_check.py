"""`kata check` is good exactly when the tests and the style are."""

import argparse
import os

import pytest

from harness import check


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one test that passes, in good style."""
    tests = tmp_path / "reference_tests"
    tests.mkdir()
    (tests / "test_one.py").write_text("def test_one():\n    pass\n")
    (tests / "strength").mkdir()
    (tests / "strength" / "__main__.py").write_text("import sys\n\nprint(sys.argv[1:])\n")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "tox.ini").write_text("[pytest]\naddopts = -p no:hypothesispytest\n")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "REFERENCE_TESTS", tests)
    return tmp_path


def run(strength=None, write=False, faults=None):
    args = {"strength": strength, "write": write, "faults": faults, "repeat": 2, "whole": 0}
    return check.main(argparse.Namespace(**args))


def test_good(checkout, capfd):
    assert run() == 0
    out = capfd.readouterr().out
    assert " 1 passed in " in out and "['--touched']" in out
    assert "\033" not in out
    assert out.endswith("kata check: good\n")


@pytest.mark.parametrize("trouble", ["red", "none", "broken", "style", "weak"])
def test_red(checkout, capfd, trouble):
    file = checkout / "reference_tests" / "test_one.py"
    if trouble == "red":
        file.write_text("def test_one():\n    assert 0\n")
    elif trouble == "none":
        file.unlink()
    elif trouble == "broken":
        file.write_text("def test_one(:\n")
    elif trouble == "weak":
        weak = "import sys\n\nsys.exit(1)\n"
        (checkout / "reference_tests" / "strength" / "__main__.py").write_text(weak)
    else:
        file.write_text("import os\n\n\ndef test_one():\n    pass\n")
    assert run() == 1
    assert capfd.readouterr().out.endswith("kata check: red\n")


def test_strength_alone(checkout, capfd):
    assert run(["03"], write=True) == 0
    out = capfd.readouterr().out
    assert "['03', '--write']" in out and "passed" not in out
    (checkout / "reference_tests" / "strength" / "__main__.py").write_text("raise SystemExit(1)\n")
    assert run([]) == 1


def test_faults_alone(checkout, capfd):
    (checkout / "reference_tests" / "faults").mkdir()
    faults = checkout / "reference_tests" / "faults" / "__main__.py"
    faults.write_text("import sys\n\nprint(sys.argv[1:])\n")
    assert run(faults=["data"]) == 0
    out = capfd.readouterr().out
    assert "['data', '--repeat', '2', '--whole', '0']" in out and "passed" not in out
    faults.write_text("raise SystemExit(1)\n")
    assert run(faults=[]) == 1


def test_without_ruff_it_says_that_style_is_not_checked(checkout, capfd, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    assert run() == 0
    assert "style is not checked" in capfd.readouterr().out


def test_the_shell_s_settings_change_nothing(checkout, capfd, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing")
    monkeypatch.setenv("CI", "true")
    text = "import os\n\n\ndef test_one():\n    assert 'CI' not in os.environ\n"
    (checkout / "reference_tests" / "test_one.py").write_text(text)
    assert run() == 0


def test_one_thread(checkout):
    text = "import os\n\n\ndef test_one():\n    assert os.environ['OMP_NUM_THREADS'] == '1'\n"
    (checkout / "reference_tests" / "test_one.py").write_text(text)
    os.environ.pop("OMP_NUM_THREADS", None)
    assert run() == 0
