"""The command line: which commands there are, how they end, and which checkout they act on."""

import ast
import json
import os
import subprocess
import sys
import types

import pytest

from harness import cli
from harness.errors import LearnerError, UsageError
from harness.paths import ROOT

COMMANDS = [command for group in cli.GROUPS.values() for command in group]


def harness(*args, cwd=ROOT, **env):
    """`python -m harness` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "harness", *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Replaces what `kata doctor` does by a function; the state goes to a folder of the test."""
    monkeypatch.setattr(cli, "STATE", tmp_path / ".kata")

    def replace(function):
        monkeypatch.setitem(sys.modules, "harness.doctor", types.SimpleNamespace(main=function))

    return replace


# --- what is offered ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name or "board")
def test_every_command_that_is_offered_is_there(command):
    place = ROOT / command.module.replace(".", "/")
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    assert file.is_file()
    names = [n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)]
    assert "main" in names


def test_help_shows_daily_use_first(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["Every day", f"  {'kata':<13}  {COMMANDS[0].summary}"]
    assert max(map(len, lines)) <= 80
    shown = [line[2:15].split() for line in lines if line.startswith("  kata")]
    assert shown == [f"kata {command.name}".split() for command in COMMANDS]


@pytest.mark.parametrize("command", [c.name for c in COMMANDS if c.name])
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: kata {command}" in capsys.readouterr().out


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, harness.cli as c; c.parser(); print([m for m in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(ended.stdout))
    assert not loaded & {"torch", "numpy", "pandas", "rich", "recsys", "pytest", "yaml"}


# --- what a command is given --------------------------------------------------------------------


def test_run_takes_what_the_design_says():
    args = cli.parser().parse_args(
        "run --impl a --impl=reference --data ml-1m --config c --device cpu --out o --seed 3 "
        "--set a.b=1 --set c=".split()
    )
    assert (args.impl, args.data, args.config, args.device, args.out, args.seed, args.set) == (
        ["a", "reference"], "ml-1m", "c", "cpu", "o", 3, ["a.b=1", "c="],
    )  # fmt: skip


def test_run_without_options():
    args = cli.parser().parse_args(["run"])
    assert (args.impl, args.data, args.config, args.device, args.out, args.seed, args.set) == (
        None, "synthetic", None, "auto", None, 0, None,
    )  # fmt: skip


def test_without_a_command_it_is_the_board():
    args = cli.parser().parse_args([])
    assert (args.module, args.command, args.json) == ("harness.board", None, False)


def test_status_is_for_programs():
    args = cli.parser().parse_args(["status", "--json"])
    assert (args.module, args.command, args.json) == ("harness.board", "status", True)


def test_test_takes_katas_and_impls():
    args = cli.parser().parse_args(["test", "01", "03_contrastive_loss", "--impl", "reference"])
    assert (args.katas, args.impl) == (["01", "03_contrastive_loss"], ["reference"])
    assert cli.parser().parse_args(["reset", "05"]).kata == "05"


# --- how it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", ["nosuch", "run --nosuch", "run --seed x", "run --set x", "reset", "status --jsn"]
)
def test_a_wrong_call_is_2_and_one_sentence(args, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(args.split())
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kata: ")
    assert captured.err.count("\n") == 1
    assert "--help" in captured.err


@pytest.mark.parametrize("code", [0, 1])
def test_a_command_s_exit_code_is_passed_on(command, code):
    command(lambda args: code)
    assert cli.main(["doctor"]) == code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("there is no kata '99'"), 2),
        (LearnerError("there is no kata '99'"), 1),
        (KeyboardInterrupt(), 3),
    ],
)
def test_an_expected_error_is_a_sentence(command, capsys, tmp_path, error, code):
    def fails(args):
        raise error

    command(fails)
    assert cli.main(["doctor"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "kata: " + (str(error) or "interrupted") in captured.err
    assert not (tmp_path / ".kata").exists()


def test_a_crash_is_3_with_the_traceback_in_a_file(command, capsys, tmp_path):
    def fails(args):
        raise ValueError("two\nlines")

    command(fails)
    assert cli.main(["doctor"]) == 3
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "kata: the harness itself failed: ValueError: two lines",
        f"The traceback is in {tmp_path / '.kata' / 'crash.txt'}",
    ]
    assert "in fails" in (tmp_path / ".kata" / "crash.txt").read_text()


def test_a_crash_on_a_disk_that_takes_nothing_shows_the_traceback(
    command, capsys, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cli, "STATE", tmp_path / "file" / ".kata")

    def fails(args):
        raise ValueError("x")

    command(fails)
    assert cli.main(["doctor"]) == 3
    assert "in fails" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_traceback():
    code = (
        "import sys, types; from harness import cli\n"
        "def main(args):\n    for n in range(99999): print(n)\n    return 0\n"
        "sys.modules['harness.doctor'] = types.SimpleNamespace(main=main)\n"
        "sys.exit(cli.main(['doctor']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == cli.FAILED


# --- which checkout -----------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path):
    """Another checkout, whose harness only says its name."""
    folder = tmp_path / "other"
    (folder / "harness").mkdir(parents=True)
    (folder / "deep" / "down").mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        (folder / "harness" / name).write_text((ROOT / "harness" / name).read_text())
    (folder / "harness" / "cli.py").write_text("def main():\n    print('the other')\n")
    return folder


def test_the_checkout_is_the_one_it_is_called_in(other):
    assert harness("nosuch", cwd=other / "deep" / "down").stdout == "the other\n"
    assert harness("nosuch", cwd=other).stdout == "the other\n"


def test_outside_any_checkout_it_is_its_own(tmp_path):
    assert "usage: kata" in harness("--help", cwd=tmp_path).stdout


def test_kata_names_the_checkout(other):
    assert "usage: kata" in harness("--help", cwd=other, KATA_ROOT=str(ROOT)).stdout
    assert harness("--help", KATA_ROOT=str(other)).stdout == "the other\n"


def test_kata_itself_acts_on_the_checkout_that_it_lies_in(other):
    ended = subprocess.run(
        [sys.executable, str(ROOT / "kata"), "nosuch"],
        cwd=other,
        env=os.environ | {"KATA_NO_VENV": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert "invalid choice" in ended.stderr


def test_what_is_called_in_turn_is_not_told_the_checkout():
    code = "import os, json; os.environ['KATA_ROOT'] = os.getcwd(); import sys\n"
    code += "sys.argv = ['harness', '--help']\nimport harness.__main__ as m\n"
    code += "try: m.main()\nexcept SystemExit: pass\nprint(json.dumps('KATA_ROOT' in os.environ))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(ended.stdout.splitlines()[-1]) is False
