"""What is around the code: pre-commit, tox, CI and editors run what is pinned and what exists."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from harness import catalog
from harness.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_pre_commit_runs_the_pinned_versions():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert [hook["id"] for hook in hooks] == ["ruff", "mypy"]
    for hook in hooks:
        for pin in hook["additional_dependencies"]:
            assert pin.replace("'", '"') in pins


def test_ci_runs_every_python_that_is_supported():
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    listed = re.search(r"env_list = (.*)", (ROOT / "tox.ini").read_text())[1].split(", ")
    pythons = ci["jobs"]["check"]["strategy"]["matrix"]["python"]
    assert [*(f"py{version.replace('.', '')}" for version in pythons), "lint"] == listed


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_actions_are_pinned(path):
    used = re.findall(r"uses: (\S+)(.*)", path.read_text())
    assert used
    for action, comment in used:
        assert re.search(r"@[0-9a-f]{40}$", action) and re.match(r" # v\d", comment), action


def test_a_test_explorer_collects_every_rung_and_nothing_else():
    """As VS Code calls pytest, with the arguments in its settings."""
    settings = json.loads((ROOT / ".vscode/settings.json").read_text())
    arguments = settings["python.testing.pytestArgs"]
    hidden = {*settings["search.exclude"], *settings["python.analysis.exclude"]}
    assert "reference_tests" in hidden and not hidden & set(arguments)
    command = [sys.executable, "-m", "pytest", f"--rootdir={ROOT}", *arguments]
    done = subprocess.run(
        [*command, "--collect-only", "-q", "--color=no"], cwd=ROOT, capture_output=True, text=True
    )
    found = [line for line in done.stdout.splitlines() if "::" in line]
    rungs = [rung for kata in catalog.load() for rung in kata.rungs]
    assert done.returncode == 0 and len(found) == len(rungs), done.stdout[-500:]
