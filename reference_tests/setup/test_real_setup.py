"""`./kata` from nothing, with a real venv and a real pip: a tiny project with wheels made here.

Only the loopback is used. What the set-up leads to is a stand-in for the harness that says with
which arguments it was called, and ends with the exit code that it is told.
"""

import base64
import hashlib
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from harness import bootstrap
from harness.paths import ROOT

fcntl = pytest.importorskip("fcntl", reason="locks, signals and links as on POSIX")

CLI = """
import os, sys, tinydep
def main():
    root = os.path.dirname(os.path.dirname(__file__))
    print("called in", os.getcwd(), "for", root, "with", sys.argv[1:])
    print("tinydep", tinydep.version)
    return int(sys.argv[1]) if sys.argv[1:] else 0
"""


def make_wheel(folder, name, version, requires=()):
    """A wheel with one module, `name.py`, that says its version."""
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {each}" for each in requires]
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for file, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
        record += f"{file},sha256={digest.rstrip('=')},{len(text)}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)


def make_checkout(root):
    (root / "harness").mkdir(parents=True)
    shutil.copy2(ROOT / "kata", root / "kata")
    for file in ("__init__.py", "__main__.py", "bootstrap.py"):
        shutil.copy2(ROOT / "harness" / file, root / "harness" / file)
    (root / "harness" / "cli.py").write_text(CLI)
    (root / "pyproject.toml").write_text('[project]\ndependencies = [\n    "tinydep",\n]\n')
    pin(root, "1.0")


def pin(root, version):
    (root / "constraints.txt").write_text(f"tinydep=={version}\ntinylib==2.0\n")


class Place:
    """A checkout that `./kata` runs in; what it wrote and how it ended."""

    def __init__(self, folder):
        self.root = folder / "a check-out [with spaces]"
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        for version in ("1.0", "1.1", "1.2"):
            make_wheel(self.wheels, "tinydep", version, ["tinylib"])
        make_wheel(self.wheels, "tinylib", "2.0")
        (self.wheels / "tinydep-9.9.tar.gz").write_text("")  # would have to be built
        make_checkout(self.root)

    def env(self, **more):
        foreign = ("PIP_", "PYTHON", "KATA_", "VIRTUAL_ENV", "TOX_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.wheels.as_uri()}
        return env | {"PIP_CONFIG_FILE": os.devnull, **offline, **more}

    def start(self, *args, **env):
        return subprocess.Popen(
            [sys.executable, str(self.root / "kata"), *args],
            env=self.env(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a job in the background of a shell inherits an ignored SIGINT; a terminal's does not
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def kata(self, *args, **env):
        """Exit code, stdout and stderr; never a traceback."""
        child = self.start(*args, **env)
        out, err = child.communicate(timeout=120)
        assert "Traceback" not in err
        return child.returncode, out, err

    def stamp(self):
        return (self.root / ".venv" / "kata-stamp").read_text()

    def site(self):
        return Path(bootstrap.site_packages(str(self.root))[0])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One checkout, set up: a test that changes it leaves it so that it can be set up again."""
    place = Place(tmp_path_factory.mktemp("setup"))
    place.first = place.kata("7", "--a b", PIP_TARGET="/nonexistent", PIP_USER="1")
    return place


@pytest.fixture
def index():
    """A package index on the loopback that answers nothing until it is released, then "no"."""
    asked, released = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.set()
            released.wait(60)
            self.send_error(404)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/simple"
    server.env = {"PIP_INDEX_URL": server.url, "PIP_NO_INDEX": "0", "PIP_FIND_LINKS": ""}
    server.asked, server.released = asked, released
    yield server
    released.set()
    server.shutdown()


def test_from_nothing(place):
    code, out, err = place.first
    assert code == 7, err  # the harness' own
    assert f"for {place.root} with ['7', '--a b']" in out
    assert "tinydep 1.0" in out
    for step in ("[1/3]", "[2/3]", "tinydep 1.0", "tinylib 2.0", "[3/3]", "Ready after"):
        assert step in err
    assert (place.site() / "tinylib.py").exists()  # not where PIP_TARGET says


def test_the_second_time_nothing_is_said(place):
    place.kata()
    code, out, err = place.kata()
    assert (code, err) == (0, "")
    assert "tinydep" in out


def test_the_environment_s_own_command_and_python_find_the_checkout(place, tmp_path):
    place.kata()
    for command in ([".venv/bin/kata"], [".venv/bin/python", "-m", "harness"]):
        program = str(place.root / command[0])
        ended = subprocess.run(
            [program, *command[1:], "5"],
            cwd=tmp_path,
            env=place.env(),
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 5, ended.stderr
        assert f"called in {tmp_path}" in ended.stdout


def test_changed_pins_are_followed(place):
    pin(place.root, "1.2")
    code, out, err = place.kata()
    assert (code, "not up to date" in err, "tinydep 1.2" in out) == (0, True, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_resumed(place, index, number):
    pin(place.root, "1.0")
    place.kata()
    pin(place.root, "1.1")
    child = place.start(**index.env)
    assert index.asked.wait(60)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 3
    assert "goes on from here" in err
    assert "Traceback" not in err
    assert out == ""
    assert place.stamp().startswith("unfinished")
    with open(place.root / ".kata" / "setup.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # pip, which held it too, has ended

    code, out, err = place.kata()
    assert (code, "did not finish" in err, "tinydep 1.1" in out) == (0, True, True)
    assert place.stamp().startswith("ready")


def test_what_pip_was_killed_in_the_middle_of_is_installed_again(place):
    place.kata()
    (place.site() / "tinylib.py").unlink()
    (place.site() / "tinylib-2.0.dist-info" / "INSTALLER").unlink()
    (place.root / ".venv" / "kata-stamp").write_text(f"unfinished\n{place.root}\n")
    assert place.kata()[0] == 0
    assert (place.site() / "tinylib.py").exists()


def test_two_at_once_do_it_once(place):
    place.kata()
    (place.root / ".venv" / "kata-stamp").unlink()
    children = [place.start(), place.start()]
    ended = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sum("Setting up" in err for _, err in ended) == 1
    assert all("tinydep" in out for out, _ in ended)


def test_who_comes_second_waits(place):
    place.kata()
    stamp = place.stamp()
    (place.root / ".venv" / "kata-stamp").unlink()
    with open(place.root / ".kata" / "setup.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = place.start()
        assert "waiting" in child.stderr.readline()
        time.sleep(0.3)
        assert child.poll() is None
        (place.root / ".venv" / "kata-stamp").write_text(stamp)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")


def test_pip_holds_the_lock_when_kata_is_killed(place, index):
    pin(place.root, "1.0")
    place.kata()
    pin(place.root, "1.1")
    first = place.start(**index.env)
    assert index.asked.wait(60)
    first.kill()
    first.communicate(timeout=60)
    second = place.start()
    assert "waiting" in second.stderr.readline()  # for the pip that lives on
    index.released.set()
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert "tinydep 1.1" in out


def test_no_network(place):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/simple"
        pin(place.root, "1.2")
        code, out, err = place.kata(
            PIP_INDEX_URL=url, PIP_NO_INDEX="0", PIP_FIND_LINKS="", PIP_RETRIES="1"
        )
    assert (code, out) == (3, "")
    assert "does not answer; trying again" in err
    assert "the package index cannot be reached" in err
    assert place.kata()[0] == 0


def test_no_build_for_this_python(place):
    pin(place.root, "9.9")
    code, out, err = place.kata()
    assert (code, out) == (3, "")
    assert "finds no build of tinydep" in err
    pin(place.root, "1.0")
    assert place.kata()[0] == 0


def test_an_environment_whose_python_is_gone_is_made_anew(place):
    place.kata()
    (place.root / ".venv" / "stray").write_text("")
    for name in ("python", "python3", f"python3.{sys.version_info[1]}"):
        path = place.root / ".venv" / "bin" / name
        path.unlink(missing_ok=True)
        path.symlink_to("/nonexistent/python")
    code, out, err = place.kata()
    assert (code, "made anew" in err) == (0, True)
    assert not (place.root / ".venv" / "stray").exists()


def test_another_python_that_has_everything_can_be_used(place, tmp_path):
    shutil.copytree(place.root / "harness", tmp_path / "harness")
    shutil.copy2(place.root / "kata", tmp_path)
    shutil.copy2(place.root / "pyproject.toml", tmp_path)
    place.kata()
    python = str(place.root / ".venv" / "bin" / "python")
    env = place.env(KATA_NO_VENV="1")
    ended = subprocess.run(
        [python, str(tmp_path / "kata"), "4"], cwd="/", env=env, capture_output=True, text=True
    )
    assert ended.returncode == 4, ended.stderr
    assert not (tmp_path / ".venv").exists()
