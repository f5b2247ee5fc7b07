"""`kata check`: the tests of this repository, and its style."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys

from harness.paths import REFERENCE_TESTS, ROOT

# What a shell or a CI service may set and the result must not depend on. With CI, pytest prints
# longer summaries and hypothesis takes another profile.
FOREIGN = (
    *("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTHONSTARTUP"),
    *("CI", "BUILD_NUMBER"),
)


def main(args: argparse.Namespace) -> int:
    """The tests, the strength of the specs, the style; 0 if all are good, 1 if one is not.

    Without `--strength` only the specs that were touched since their strength was measured; without
    `--faults` the short form of reference_tests/faults.
    """
    if args.strength is not None:
        return 0 if strength(args.strength, args.write) else 1
    if args.faults is not None:
        again = ["--repeat", str(args.repeat), "--whole", str(args.whole)]
        command = [sys.executable, "-m", f"{REFERENCE_TESTS.name}.faults", *args.faults, *again]
        return 0 if step("faults and bad input", command) else 1
    tests = [sys.executable, "-m", "pytest", REFERENCE_TESTS.name, "--color=no", "--durations=5"]
    good = step("the tests of this repository", tests)
    good &= strength(["--touched"], args.write)
    if importlib.util.find_spec("ruff"):
        good &= step("style", [sys.executable, "-m", "ruff", "check", "--no-cache", "."])
    else:
        print("kata check: style is not checked, ruff is not installed", flush=True)
    print(f"kata check: {'good' if good else 'red'}", flush=True)
    return 0 if good else 1


def strength(chosen: list[str], write: bool) -> bool:
    """Try everything known against the katas' specs: see reference_tests/strength."""
    command = [sys.executable, "-m", "reference_tests.strength", *chosen]
    return step("the strength of the specs", command + (["--write"] if write else []))


def step(what: str, command: list[str]) -> bool:
    """Say what is run, run it from the root of the checkout; whether it went well."""
    print(f"kata check: {what}: {' '.join(['python', *command[1:]])}", flush=True)
    # One thread: the tests are small, and threads that wait for each other on a busy machine
    # take a hundred times as long.
    env = {k: v for k, v in os.environ.items() if k not in FOREIGN} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL).returncode == 0
