"""`kata doctor`: each trouble is found, and says what to do."""

import argparse

import pytest

from harness import doctor
from harness.doctor import FAIL, OK, WARN, Finding


def levels(findings):
    return [finding.level for finding in findings]


def test_every_finding_that_is_not_well_says_what_to_do():
    for check in (doctor.python, doctor.packages, doctor.machine, doctor.compiler, doctor.checkout):
        for finding in check():
            assert finding.level in (OK, WARN, FAIL)
            assert finding.what
            assert finding.level == OK or finding.advice


@pytest.mark.parametrize(("level", "code"), [(OK, 0), (WARN, 0), (FAIL, 1)])
def test_the_exit_code_is_1_only_if_something_needed_is_missing(monkeypatch, capsys, level, code):
    for name in "python packages accelerators machine compiler checkout katas data".split():
        monkeypatch.setattr(doctor, name, lambda: iter([Finding(OK, "fine")]))
    monkeypatch.setattr(doctor, "machine", lambda: iter([Finding(level, "odd", "do this")]))
    assert doctor.main(argparse.Namespace()) == code
    lines = capsys.readouterr().out.splitlines()
    assert f"{level:<5} odd" in lines
    assert len(lines) == 9


def test_a_check_that_fails_itself_hides_no_other(monkeypatch, capsys):
    def broken():
        yield Finding(OK, "so far")
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "packages", broken)
    for name in ("accelerators", "data"):
        monkeypatch.setattr(doctor, name, lambda: iter([]))
    assert doctor.main(argparse.Namespace()) == 1
    out = capsys.readouterr().out
    assert "no such thing" in out
    assert "cores" in out


def test_an_old_python_fails(monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED_PYTHON", (99, 0))
    assert levels(doctor.python())[0] == FAIL


@pytest.mark.parametrize(
    ("pinned", "level", "word"),
    [
        ("packaging==0.1", WARN, "packaging"),
        ("nosuch-package==1", FAIL, "nosuch-package"),
        ("nobody-needs-this==1", OK, "0 packages"),
        ("nosuch-package==1; python_version < '3'", OK, "0 packages"),
    ],
)
def test_packages_are_held_against_their_pins(monkeypatch, tmp_path, pinned, level, word):
    (tmp_path / "pyproject.toml").write_text(
        "[project]\nname = 'x'\ndependencies = ['packaging', 'nosuch-package']\n"
    )
    (tmp_path / "constraints.txt").write_text(f"# pins\n{pinned}\n")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    (finding,) = doctor.packages()
    assert finding.level == level
    assert word in finding.what


def test_a_build_of_the_pinned_version_is_the_pinned_version(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\ndependencies = ['torch']\n")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.13.0+cpu")
    assert levels(doctor.packages()) == [OK]


def torch_that(monkeypatch, code):
    monkeypatch.setattr(doctor, "ASK_TORCH", code)
    return list(doctor.accelerators(timeout=5))


def answer(**found):
    basis = dict(version="2.13.0", seconds=1.0, threads=2, built=None, cuda=[], mps=False)
    return f"print('noise'); import json; print(json.dumps({basis | {'mps_error': None} | found}))"


def test_torch_that_cannot_be_imported_fails(monkeypatch):
    (finding,) = torch_that(monkeypatch, "import torch_of_nobody")
    assert finding.level == FAIL
    assert "torch_of_nobody" in finding.what


def test_torch_that_dies_fails(monkeypatch):
    (finding,) = torch_that(monkeypatch, "import os; os.abort()")
    assert finding.level == FAIL


def test_torch_that_hangs_fails(monkeypatch):
    monkeypatch.setattr(doctor, "ASK_TORCH", "import time; time.sleep(60)")
    (finding,) = doctor.accelerators(timeout=0.5)
    assert finding.level == FAIL


def test_a_gpu_that_works_and_one_that_does_not(monkeypatch):
    cuda = [["cuda:0", "Big", 80.0, None], ["cuda:1", "Old", 2.0, "no kernel image"]]
    findings = torch_that(monkeypatch, answer(cuda=cuda, built="13.0"))
    assert levels(findings) == [OK, OK, WARN]
    assert "no kernel image" in findings[2].what
    assert "--device cpu" in findings[2].advice


def test_no_gpu_is_well(monkeypatch):
    findings = torch_that(monkeypatch, answer())
    assert levels(findings) == [OK, OK]
    assert "no GPU" in findings[1].what


def test_torch_itself_is_asked():
    findings = list(doctor.accelerators())
    assert findings[0].level == OK
    assert findings[0].what.startswith("torch 2.")


@pytest.mark.parametrize(("memory", "level"), [(1.0, WARN), (16.0, OK), (None, OK)])
def test_memory(monkeypatch, memory, level):
    monkeypatch.setattr(doctor, "memory_gb", lambda: memory)
    assert levels(doctor.machine())[1] == level


def test_little_disk(monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED_DISK_GB", 2**40)
    assert levels(doctor.machine())[2] == WARN


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (finding,) = doctor.compiler()
    assert finding.level == WARN
    assert "g++" in finding.advice


def test_an_init_file_that_disables_overlays_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(doctor, "SRC", tmp_path / "src")
    (tmp_path / "src" / "recsys" / "models").mkdir(parents=True)
    assert levels(doctor.checkout()) == [OK]
    (tmp_path / "src" / "recsys" / "models" / "__init__.py").write_text("")
    (finding,) = doctor.checkout()
    assert finding.level == WARN
    assert "src/recsys/models/__init__.py" in finding.what


def test_data_sets_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("KATA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("KATA_CACHE", str(tmp_path / "cache"))
    assert levels(doctor.data()) == [WARN, OK]  # KATA_DATA is no folder
    (tmp_path / "data" / "ml-1m").mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ml-100k.zip").write_text("")
    whats = [finding.what for finding in doctor.data()]
    assert whats[0] == f"data set ml-100k: {tmp_path / 'cache' / 'ml-100k.zip'}"
    assert whats[1] == f"data set ml-1m: {tmp_path / 'data' / 'ml-1m'}"


@pytest.mark.parametrize("columns", ["20", "50", "200"])
def test_lines_fit_the_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    doctor.show(Finding(WARN, "a few words " * 20, "and what to do about it " * 10))
    out = capsys.readouterr().out
    assert "\033" not in out
    assert max(map(len, out.splitlines())) <= min(100, max(40, int(columns)))
