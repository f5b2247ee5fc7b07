"""A fork that pulls: learner files and results are kept, and what changed is said."""

import subprocess
import sys

import pytest

from harness import bootstrap
from harness.paths import ROOT

SCALE = "src/recsys/models/scale.py"
STUB = """def scale(x):
    \"\"\"{task}\"\"\"
    raise NotImplementedError("kata 01: write scale")
"""
WRITTEN = """def scale(x):
    \"\"\"Twice the value.\"\"\"
    return 2 * x  # mine: äöü
"""


@pytest.fixture
def fork(tmp_path):
    """A learner's clone of a repository with one stub, and a function that runs git."""

    def git(folder, *args, fails=False):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", folder, *identity, *args]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done
        return done.stdout + done.stderr

    above, mine = tmp_path / "above", tmp_path / "my fork ä"
    (above / SCALE).parent.mkdir(parents=True)
    (above / SCALE).write_text(STUB.format(task="Twice the value."))
    (above / "harness").mkdir()
    for file in ("harness/merge.py", ".gitattributes"):
        (above / file).write_text((ROOT / file).read_text())
    git(tmp_path, "init", "-q", "-b", "main", above)
    git(above, "add", ".")
    git(above, "commit", "-qm", "one")
    git(tmp_path, "clone", "-q", above, mine)
    python = bootstrap.venv_python(str(mine))
    (mine / ".venv/bin").mkdir(parents=True)
    (mine / ".git/info/exclude").write_text(".venv\n")
    subprocess.run(["ln", "-s", sys.executable, python], check=True)
    bootstrap.register_merge_driver(str(mine))
    return above, mine, git


def update(above, git, text):
    (above / SCALE).write_text(text)
    git(above, "commit", "-qam", "two")


@pytest.mark.parametrize("how", [["--no-rebase"], ["--rebase"]])
def test_pulling_a_newer_task_keeps_what_was_written(fork, how):
    above, mine, git = fork
    (mine / SCALE).write_text(WRITTEN)
    git(mine, "commit", "-qam", "mine")
    update(above, git, STUB.format(task="Two times the value, whatever it is."))
    said = git(mine, "pull", "-q", *how)
    assert (mine / SCALE).read_text() == WRITTEN
    assert "kept your src/recsys/models/scale.py" in said
    assert git(mine, "status", "--short") == ""


def test_a_restored_stash_keeps_what_was_written(fork):
    above, mine, git = fork
    (mine / SCALE).write_text(WRITTEN)
    git(mine, "stash")
    update(above, git, STUB.format(task="Two times the value, whatever it is."))
    git(mine, "pull", "-q")
    git(mine, "stash", "pop")
    assert (mine / SCALE).read_text() == WRITTEN


def test_a_stub_that_nobody_wrote_in_is_brought_up_to_date(fork):
    above, mine, git = fork
    update(above, git, STUB.format(task="Two times."))
    git(mine, "pull", "-q")
    assert "Two times." in (mine / SCALE).read_text()


def test_where_it_is_not_clear_whose_side_is_whose_git_asks(fork):
    above, mine, git = fork
    (mine / SCALE).write_text(STUB.format(task="My notes."))
    git(mine, "commit", "-qam", "mine")
    update(above, git, STUB.format(task="Two times."))
    git(mine, "pull", "-q", "--no-rebase", fails=True)
    text = (mine / SCALE).read_text()
    assert "My notes." in text and "Two times." in text and "<<<<<<<" in text


def test_what_an_update_changed_is_said_and_nothing_is_lost(checkout):
    checkout.solve()
    checkout.kata("test", "01")
    assert "1 katas as they were" in checkout.kata("doctor").out
    with open(checkout.spec, "a") as spec:
        spec.write("\n# newer\n")
    board = checkout.kata().out
    assert "stale" in board and "4/4" in board and "the kata was updated" in board
    said = " ".join(checkout.kata("doctor").out.split())
    assert "kata 01: its spec changed since your last run" in said
    checkout.kata("test", "01")
    digests = checkout.root / "katas/01_scale/stub.sha256"
    digests.write_text("0" * 64 + " models/scale.py\n")
    said = " ".join(checkout.kata("doctor").out.split())
    assert "kata 01: its task reads differently" in said and "its spec" not in said
    assert "passing" in checkout.kata().out, "a task that only reads differently is no reason"


def test_your_own_change_is_called_that(checkout):
    checkout.solve()
    checkout.kata("test", "01")
    checkout.scale.write_text(checkout.scale.read_text() + "\n# more\n")
    assert "your code changed" in checkout.kata().out
