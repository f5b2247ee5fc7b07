"""The record of results: crash-safe, set aside when unreadable, stale when something changed."""

import json
import subprocess
import sys
import textwrap
import time

import pytest

from harness import catalog, record
from harness.paths import ROOT


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A record of its own, and a kata with a spec, a fixture and a learner file."""
    monkeypatch.setattr(record, "STATE", tmp_path / ".kata")
    monkeypatch.setattr(record, "RECORD", tmp_path / ".kata/record.json")
    monkeypatch.setattr(record, "SRC", tmp_path / "src")
    monkeypatch.setattr(record, "FIXTURES", tmp_path / "fixtures")
    for file in ("katas/01_x/test_spec.py", "fixtures/01_x/golden.json", "src/recsys/x.py"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("1\n")
    (tmp_path / "katas/01_x/kata.toml").write_text(
        'title = "X"\nphase = "1A"\nhours = 1\ntrack = "core"\nprerequisites = []\n'
        '[files]\n"x.py" = ["f"]\n'
    )
    return tmp_path


def write(kata, **rungs):
    record.write(kata, rungs, digest=record.digest_of(kata), reason="", seconds=1.0)


def test_what_is_written_is_read(state):
    kata = catalog.read(state / "katas/01_x")
    assert record.read() == {}
    write(kata, test_a="passed", test_b="failed")
    result = record.read()["01_x"]
    assert (result.rungs, result.passed) == ({"test_a": "passed", "test_b": "failed"}, 1)
    assert not record.is_stale(kata, result)


@pytest.mark.parametrize(
    "file",
    ["katas/01_x/test_spec.py", "katas/01_x/kata.toml", "fixtures/01_x/golden.json"]
    + ["src/recsys/x.py", "katas/01_x/test_more.py", "fixtures/01_x/more.json"],
)
def test_a_change_makes_it_stale(state, file):
    kata = catalog.read(state / "katas/01_x")
    write(kata, test_a="passed")
    result = record.read()["01_x"]
    with open(state / file, "a") as changed:
        changed.write("# changed\n")
    assert record.is_stale(kata, result)


def test_what_does_not_matter_does_not_make_it_stale(state):
    kata = catalog.read(state / "katas/01_x")
    write(kata, test_a="passed")
    (state / "src/recsys/other.py").write_text("2\n")
    (state / "katas/01_x" / catalog.DIGESTS).write_text("\n")
    (state / "katas/01_x/__pycache__").mkdir()
    (state / "katas/01_x/__pycache__/test_spec.pyc").write_text("3\n")
    assert not record.is_stale(kata, record.read()["01_x"])


def test_a_missing_learner_file_makes_it_stale(state):
    kata = catalog.read(state / "katas/01_x")
    write(kata, test_a="passed")
    (state / "src/recsys/x.py").unlink()
    assert record.is_stale(kata, record.read()["01_x"])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"version": 1}', '{"version": 99, "katas": {}}']
    + ['{"version": 1, "katas": {"01_x": {"wrong": 1}}}', '{"version": 1, "katas": {"01_x": 3}}'],
)
def test_an_unreadable_record_is_set_aside_and_said(state, text, capsys):
    record.STATE.mkdir()
    record.RECORD.write_text(text)
    assert record.read() == {}
    assert "cannot be read" in capsys.readouterr().err
    (aside,) = record.STATE.glob("record-unreadable-*")
    assert aside.read_text() == text and not record.RECORD.exists()
    write(catalog.read(state / "katas/01_x"), test_a="passed")
    assert record.read()["01_x"].passed == 1


def test_killed_while_writing(state):
    """Whenever the writer dies, the record is whole: the old or the new one."""
    script = f"""
        import sys, types
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from harness import record
        record.STATE = Path({str(record.STATE)!r})
        record.RECORD = record.STATE / "record.json"
        kata = types.SimpleNamespace(id="01_x")
        rungs = {{f"test_{{i}}": "passed" for i in range(5000)}}
        print("go", flush=True)
        while True:
            record.write(kata, rungs, digest="", reason="", seconds=0.0)
    """
    for delay in (0.0, 0.01, 0.02, 0.03, 0.05, 0.08):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE
        )
        child.stdout.readline()
        time.sleep(delay)
        child.kill()
        child.wait()
        child.stdout.close()
        if record.RECORD.exists():
            assert len(json.loads(record.RECORD.read_text())["katas"]["01_x"]["rungs"]) == 5000
    assert not list(record.STATE.glob("record-unreadable*"))
    write(catalog.read(state / "katas/01_x"), test_a="passed")  # the dead writer's lock is free
    assert record.read()["01_x"].rungs == {"test_a": "passed"}


def test_the_file_is_replaced_and_never_rewritten(state):
    """Whoever reads while somebody writes reads one of the two."""
    kata = catalog.read(state / "katas/01_x")
    write(kata, test_a="passed")
    before = record.RECORD.read_text()
    with open(record.RECORD) as reader:
        write(kata, test_a="failed")
        assert reader.read() == before != record.RECORD.read_text()
    assert [path.name for path in record.STATE.glob("*.new")] == []


def test_a_disk_that_is_full_leaves_the_old_record(state):
    """The writer gets 1,000 bytes of its file written and then an error."""
    resource = pytest.importorskip("resource", reason="only where files can be limited")
    kata = catalog.read(state / "katas/01_x")
    write(kata, test_a="passed")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError):
            write(kata, **{f"test_{i}": "failed" for i in range(500)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert record.read()["01_x"].rungs == {"test_a": "passed"}


def test_two_writers_lose_nothing(state):
    script = f"""
        import sys, types
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from harness import record
        record.STATE = Path({str(record.STATE)!r})
        record.RECORD = record.STATE / "record.json"
        for i in range(20):
            kata = types.SimpleNamespace(id=f"{{sys.argv[1]}}_{{i}}")
            record.write(kata, {{}}, digest="", reason="", seconds=0.0)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    children = [subprocess.Popen([*command, name]) for name in ("a", "b")]
    assert [child.wait() for child in children] == [0, 0]
    assert len(record.read()) == 40
