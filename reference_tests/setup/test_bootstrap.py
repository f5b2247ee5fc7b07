"""harness/bootstrap.py, function by function: what it says when the set-up cannot go on."""

import ast
import errno
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from harness import bootstrap
from harness.paths import ROOT


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = [\n    "one",\n]\n')
    (tmp_path / "constraints.txt").write_text("one==1\n")
    return str(tmp_path)


def fake_environment(checkout, stamp=None):
    """A .venv with a file for its Python, not one that runs."""
    python = Path(bootstrap.venv_python(checkout))
    python.parent.mkdir(parents=True)
    python.write_text("")
    if stamp is not None:
        Path(bootstrap.stamp_path(checkout)).write_text(stamp)


def said(capsys):
    """What went to stderr; nothing may have gone to stdout, and no traceback."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


# --- any Python 3 can read it -------------------------------------------------------------------


@pytest.mark.parametrize("file", ["kata", "harness/__init__.py", "harness/bootstrap.py"])
def test_an_old_python_can_read_it(file):
    text = (ROOT / file).read_text(encoding="ascii")
    tree = ast.parse(text, feature_version=(3, 7))  # the oldest that every ast module takes
    too_new = (ast.JoinedStr, ast.NamedExpr, ast.AnnAssign, ast.Nonlocal, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        assert not isinstance(node, too_new), f"line {node.lineno}"
        if isinstance(node, ast.arguments):
            assert not node.posonlyargs
            assert all(arg.annotation is None for arg in node.args + node.kwonlyargs)
        if isinstance(node, ast.ImportFrom):
            assert node.module != "__future__"


def test_only_the_standard_library_is_imported():
    for file in ("kata", "harness/bootstrap.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                assert top in sys.stdlib_module_names or name == "harness.bootstrap"


def test_an_old_python_is_told_what_is_needed(checkout, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "NEEDED", (99, 1))
    monkeypatch.setattr(bootstrap, "newer_python", lambda: None)
    assert bootstrap.main(["run"], checkout) == 3
    err = said(capsys)
    assert "Python 99.1 or newer is needed" in err
    assert sys.executable in err
    assert not os.path.exists(os.path.join(checkout, ".venv"))


def test_a_newer_python_on_the_path_is_named(checkout, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "NEEDED", (99, 1))
    monkeypatch.setattr(bootstrap, "newer_python", lambda: "python99.2")
    assert bootstrap.main(["run"], checkout) == 3
    assert "python99.2 kata" in said(capsys)


def test_a_python_on_the_path_counts_only_if_it_answers(tmp_path, monkeypatch):
    for name, code in (("python3.12", 1), ("python3.11", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.newer_python() == "python3.11"


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_a_python_without_venv_is_told_the_package(checkout, monkeypatch, capsys, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    assert bootstrap.main(["run"], checkout) == 3
    err = said(capsys)
    assert missing in err
    assert f"python3.{sys.version_info[1]}-venv" in err


# --- the stamp ----------------------------------------------------------------------------------


def test_the_dependencies_are_read_as_toml_reads_them():
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert bootstrap.requirements(str(ROOT)) == wanted


def test_a_current_stamp_means_that_nothing_is_done(checkout, monkeypatch):
    fake_environment(checkout)
    bootstrap.write_stamp(checkout, bootstrap.wanted_stamp(checkout))
    calls = []
    monkeypatch.setattr(bootstrap, "run", lambda *args, **more: calls.append(args) or 0)
    monkeypatch.setattr(bootstrap, "prepare", lambda root: pytest.fail("prepared"))
    assert bootstrap.main(["run", "--seed", "1"], checkout) == 0
    assert calls == [(bootstrap.venv_python(checkout), ["run", "--seed", "1"], checkout)]


@pytest.mark.parametrize(
    "change", ["constraints.txt", "pyproject.toml", "python", "upgraded", "moved"]
)
def test_the_stamp_is_of_pins_dependencies_python_and_place(checkout, change):
    fake_environment(checkout)
    bootstrap.write_stamp(checkout, bootstrap.wanted_stamp(checkout))
    assert bootstrap.is_current(checkout)
    if change == "python":
        os.remove(bootstrap.venv_python(checkout))
    elif change == "upgraded":
        os.rename(bootstrap.venv_python(checkout), os.path.join(checkout, "python3.99"))
        os.symlink(os.path.join(checkout, "python3.99"), bootstrap.venv_python(checkout))
    elif change == "moved":
        os.rename(checkout, checkout + "-moved")
        checkout += "-moved"
    else:
        path = Path(checkout) / change
        path.write_text(path.read_text().replace("one", "two"))
    assert not bootstrap.is_current(checkout)


def test_other_changes_of_pyproject_leave_the_environment_alone(checkout):
    fake_environment(checkout)
    bootstrap.write_stamp(checkout, bootstrap.wanted_stamp(checkout))
    with open(os.path.join(checkout, "pyproject.toml"), "a") as file:
        file.write("[tool.ruff]\nline-length = 100\n")
    assert bootstrap.is_current(checkout)


def test_a_checkout_without_its_pins_is_not_whole(checkout, capsys):
    fake_environment(checkout)
    os.remove(os.path.join(checkout, "constraints.txt"))
    assert bootstrap.main(["run"], checkout) == 3
    assert "not whole" in said(capsys)


# --- an environment that is there ---------------------------------------------------------------


def answer(monkeypatch, code, output):
    monkeypatch.setattr(bootstrap, "capture", lambda command: (code, output))


@pytest.mark.parametrize(
    ("code", "output", "reason"),
    [
        (-1, "No such file or directory", "its Python does not run"),
        (1, "ModuleNotFoundError: No module named 'pip'", "it has no pip"),
        (0, "3.8\n", "its Python is 3.8"),
    ],
)
def test_an_environment_that_cannot_be_completed(checkout, monkeypatch, code, output, reason):
    fake_environment(checkout)
    answer(monkeypatch, code, output)
    assert reason in bootstrap.what_is_wrong(checkout)


def test_an_environment_of_another_folder_is_not_used(checkout, monkeypatch):
    fake_environment(checkout, "ready\n/elsewhere\n")
    answer(monkeypatch, 0, "3.12\n")
    assert "/elsewhere" in bootstrap.what_is_wrong(checkout)


@pytest.mark.parametrize(
    ("stamp", "word"),
    [
        (None, "did not make"),
        ("unfinished\n{}\n", "did not finish"),
        ("ready\n{}\n", "not up to date"),
    ],
)
def test_an_environment_that_is_completed_says_why(checkout, monkeypatch, capsys, stamp, word):
    fake_environment(checkout, stamp and stamp.format(checkout))
    answer(monkeypatch, 0, "3.12\n")
    assert bootstrap.what_is_wrong(checkout) is None
    assert word in said(capsys)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_venv_that_is_not_a_folder_of_its_own_is_left_alone(checkout, tmp_path, capsys, kind):
    venv = Path(checkout) / ".venv"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "keep").write_text("")
    if kind == "file":
        venv.write_text("")
    else:
        venv.symlink_to(elsewhere)
    assert bootstrap.main(["run"], checkout) == 3
    assert "left alone" in said(capsys)
    assert venv.is_file() or (elsewhere / "keep").exists()


# --- trouble ------------------------------------------------------------------------------------

REFUSED = (
    "WARNING: Retrying (Retry(total=0, ...)) after connection broken by 'NewConnectionError(...: "
    "Failed to establish a new connection: [Errno 111] Connection refused')': /simple/torch/\n"
    "ERROR: Could not find a version that satisfies the requirement torch (from versions: none)\n"
    "ERROR: No matching distribution found for torch"
)

IMPOSSIBLE = (
    "ERROR: Cannot install torch because these package versions have conflicting dependencies.\n"
    "The conflict is caused by:\n"
    "    The user requested torch>=2.10\n"
    "    The user requested (constraint) torch==2.13.0\n"
)


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("ERROR: ... [Errno 28] No space left on device", "the disk is full"),
        ("OSError: [Errno 122] Disk quota exceeded", "the disk is full"),
        (REFUSED, "the package index cannot be reached"),
        ("NameResolutionError: Temporary failure in name resolution", "cannot be reached"),
        ("SSLError(SSLCertVerificationError: CERTIFICATE_VERIFY_FAILED", "PIP_CERT"),
        ("PermissionError: [Errno 13] Permission denied: '/x'", "may not be written"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no build of torch==2.13.0"),
        (IMPOSSIBLE, "no build of torch==2.13.0"),
        (IMPOSSIBLE + "    one 1.0 depends on torch<2", None),
        ("The virtual environment was not created because ensurepip is not available", "apt"),
        ("something that nobody has seen before", None),
    ],
)
def test_what_pip_says_is_put_in_a_sentence(output, sentence):
    explained = bootstrap.explain(output)
    assert explained is None if sentence is None else sentence in explained


@pytest.mark.parametrize(
    ("number", "sentence"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "may not be"), (errno.EROFS, "may not be")],
)
def test_an_os_error_is_put_in_a_sentence(checkout, monkeypatch, capsys, number, sentence):
    def fails(path):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(bootstrap, "take_lock", fails)
    assert bootstrap.main(["run"], checkout) == 3
    assert sentence in said(capsys)


def test_a_disk_that_is_nearly_full_is_refused_before_anything_is_made(
    checkout, monkeypatch, capsys
):
    monkeypatch.setattr(bootstrap, "FREE_MB", 2**50)
    assert bootstrap.main(["run"], checkout) == 3
    assert "the disk is full" in said(capsys)
    assert not os.path.exists(os.path.join(checkout, ".venv"))


def test_an_interruption_says_that_it_goes_on(checkout, monkeypatch, capsys):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(bootstrap, "take_lock", interrupted)
    assert bootstrap.main(["run"], checkout) == 3
    assert "goes on from here" in said(capsys)


def test_without_venv_what_lacks_is_named(checkout, monkeypatch, capsys):
    monkeypatch.setenv("KATA_NO_VENV", "1")
    assert bootstrap.main(["run"], checkout) == 3
    assert "lacks one" in said(capsys)


# --- progress -----------------------------------------------------------------------------------


def test_a_line_for_each_package(tmp_path, capsys):
    progress = bootstrap.Progress(str(tmp_path))
    for line in (
        "Looking in links: /wheels",
        "Collecting torch==2.13.0 (from -c constraints.txt (line 7))",
        "  Downloading torch-2.13.0-cp312-none-any.whl.metadata (31 kB)",
        "  Downloading torch-2.13.0-cp312-none-any.whl (812.3 MB)",
        "  Using cached numpy-2.4.6-cp312-cp312-any.whl (16.8 MB)",
        "Processing /wheels/six-1.17.0-py2.py3-none-any.whl (from python-dateutil)",
        "Installing collected packages: six, numpy, torch",
    ):
        progress.take(line)
    lines = [" ".join(line.split()) for line in said(capsys).splitlines()]
    assert lines == [
        "torch 2.13.0 812.3 MB",
        "numpy 2.4.6 (on disk) 16.8 MB",
        "six 1.17.0 (on disk)",
        "installing 3 packages",
    ]


def test_a_long_step_shows_that_it_lives(tmp_path, capsys):
    progress = bootstrap.Progress(str(tmp_path))
    start = progress.now()
    progress.now = lambda: start + 16
    progress.alive()
    progress.alive()  # once every 15 s
    assert said(capsys).splitlines() == ["      asking the package index ... 16 s"]


def test_installing_counts_what_is_new(tmp_path, monkeypatch, capsys):
    progress = bootstrap.Progress(str(tmp_path))
    progress.now = lambda: 100
    monkeypatch.setattr(progress, "installed", lambda: 30)
    progress.take("Installing collected packages: six, numpy, torch")
    monkeypatch.setattr(progress, "installed", lambda: 32)
    progress.now = lambda: 140
    progress.alive()
    assert "installed 2 of 3 packages ... 40 s" in said(capsys)
