""".github/workflows/gate.yml, as far as it can be tried without GitHub."""

import os
import re
import shlex
import subprocess

import pytest
import yaml

from harness import cli
from harness.paths import ROOT

FILE = ROOT / ".github/workflows/gate.yml"
JOBS = ("cpu", "gpu")


def steps(job):
    return yaml.safe_load(FILE.read_text())["jobs"][job]["steps"]


@pytest.mark.parametrize("job", JOBS)
def test_actions_are_pinned_to_a_commit(job):
    used = [step["uses"] for step in steps(job) if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", each) for each in used)


@pytest.mark.parametrize("job", JOBS)
def test_the_gate_is_called_as_it_takes_it(job):
    (run,) = (step["run"] for step in steps(job) if step.get("name") == "Gate")
    words = shlex.split(run.replace("$REQUIRED", "movielens,gpu"))
    assert words[1] == "kata" and (ROOT / "kata").is_file()
    args = cli.parser().parse_args(words[2:])
    assert args.command == "gate" and args.impl == [["../fork"]] and args.against
    assert (args.require is not None) == (job == "gpu")


@pytest.mark.parametrize("job", JOBS)
def test_upstream_is_found(job, tmp_path):
    """The step's script, with `gh` standing in for GitHub's own."""
    (script,) = (step["run"] for step in steps(job) if step.get("id") == "upstream")
    (tmp_path / "fork").mkdir()
    (tmp_path / "fork/pyproject.toml").write_text('[project]\nversion = "1.20.3"\n')
    gh = tmp_path / "bin/gh"
    gh.parent.mkdir()
    gh.write_text("#!/bin/sh\necho parent/katas\n")
    gh.chmod(0o755)

    def run(**env):
        out = tmp_path / "out"
        out.write_text("")
        env |= {"PATH": f"{gh.parent}:{os.environ['PATH']}", "GITHUB_OUTPUT": str(out)}
        command = ["bash", "-eo", "pipefail", "-c", script]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.returncode, out.read_text()

    assert run(GITHUB_REPOSITORY="me/katas") == (0, "repository=parent/katas\nref=v1.20.3\n")
    assert run(KATA_UPSTREAM="a/b")[1].startswith("repository=a/b\n")
    (tmp_path / "fork/pyproject.toml").write_text('[project]\nversion = "$(rm -r .)"\n')
    assert run(KATA_UPSTREAM="a/b") == (2, "")


def test_a_gpu_is_asked_for_by_a_variable_and_never_for_strangers():
    workflow = yaml.safe_load(FILE.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    condition = workflow["jobs"]["gpu"]["if"]
    assert "vars.KATA_GPU_RUNNER != ''" in condition and "!= 'pull_request'" in condition
