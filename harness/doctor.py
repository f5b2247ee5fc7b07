"""`kata doctor`: what this machine and this checkout can do, and what to do about the rest.

Nothing is probed over the network, and torch is imported in a child only: one that hangs or
crashes is then a finding like any other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from harness.paths import ROOT, SRC

OK, WARN, FAIL = "ok", "warn", "fail"
COLOURS = {OK: "32", WARN: "33", FAIL: "31"}
NEEDED_PYTHON = (3, 10)
NEEDED_MEMORY_GB, NEEDED_DISK_GB = 4, 1


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: how it is, and what to do if it is not well."""

    level: str
    what: str
    advice: str = ""


def main(args: argparse.Namespace) -> int:
    """Print a line for each finding; 1 if something that is needed is missing, else 0."""
    worst = OK
    for check in (python, packages, accelerators, machine, compiler, checkout, katas, data):
        for finding in guarded(check):
            show(finding)
            if finding.level == FAIL:
                worst = FAIL
    return 1 if worst == FAIL else 0


def guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; that it failed itself is one too, so that the rest is still seen."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(FAIL, f"{check.__name__} cannot be checked: {error!r}", REINSTALL)


def show(finding: Finding) -> None:
    width = max(40, min(100, shutil.get_terminal_size().columns))
    label = f"{finding.level:<5} "
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        label = f"\033[{COLOURS[finding.level]}m{label}\033[0m"
    for n, text in enumerate((finding.what, finding.advice)):
        lines = textwrap.wrap(text, width - 8, break_on_hyphens=False, break_long_words=False)
        for m, line in enumerate(lines):
            print((label if n == m == 0 else " " * 6) + ("  " if n else "") + line, flush=True)


def python() -> Iterator[Finding]:
    """The interpreter and the environment it runs in."""
    version = platform.python_version()
    if sys.version_info < NEEDED_PYTHON:
        yield Finding(FAIL, f"Python {version}", "Python 3.10 or newer is needed")
    else:
        yield Finding(OK, f"Python {version} on {platform.system()} {platform.machine()}")
    if Path(sys.prefix).resolve() == (ROOT / ".venv").resolve():
        yield Finding(OK, f"environment {sys.prefix}")
    else:
        yield Finding(
            WARN,
            f"environment {sys.prefix}: not this checkout's .venv",
            "`./kata` makes and uses .venv; KATA_NO_VENV=1 or another Python was asked for",
        )


def packages() -> Iterator[Finding]:
    """What is installed against constraints.txt."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    needed = {Requirement(text).name for text in dependencies()}
    missing, drifted, count = [], [], 0
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        pin = Requirement(text)
        if pin.marker and not pin.marker.evaluate():
            continue
        try:
            version = metadata.version(pin.name)
        except metadata.PackageNotFoundError:
            if pin.name in needed:
                missing.append(pin.name)
            continue
        count += 1
        if not pin.specifier.contains(Version(version).public, prereleases=True):
            drifted.append(f"{pin.name} {version} (pinned: {pin.specifier})")
    if missing:
        yield Finding(FAIL, f"missing packages: {', '.join(missing)}", REINSTALL)
    if drifted:
        yield Finding(
            WARN,
            f"other versions than in constraints.txt: {', '.join(drifted)}",
            "results may differ in the last digits; " + REINSTALL,
        )
    if not missing and not drifted:
        yield Finding(OK, f"{count} packages as pinned in constraints.txt")


REINSTALL = "to install what is pinned: remove .venv/kata-stamp, then ./kata doctor"


def dependencies() -> list[str]:
    """The dependencies in pyproject.toml."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["dependencies"]


# Run in a child. A device counts when it multiplies, not when it is listed.
ASK_TORCH = """
import json, time
started = time.perf_counter()
import torch
seconds = time.perf_counter() - started
def works(device):
    try:
        a = torch.ones(8, 8, device=device)
        return None if (a @ a).sum().item() == 512 else "it multiplies wrongly"
    except Exception as error:
        return str(error).splitlines()[0]
cuda = []
if torch.cuda.is_available():
    for n in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(n)
        cuda.append([f"cuda:{n}", p.name, p.total_memory / 2**30, works(f"cuda:{n}")])
mps = torch.backends.mps.is_available()
print(json.dumps({
    "version": torch.__version__, "seconds": seconds, "threads": torch.get_num_threads(),
    "built": torch.version.cuda, "cuda": cuda, "mps": mps,
    "mps_error": works("mps") if mps else None,
}))
"""


def accelerators(timeout: float = 120) -> Iterator[Finding]:
    """torch, and the devices that it can compute on."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", ASK_TORCH],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        yield Finding(FAIL, f"import torch has not ended after {timeout:.0f} s", REINSTALL)
        return
    if child.returncode != 0:
        said = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        yield Finding(FAIL, f"torch cannot be imported: {said[0]}", REINSTALL)
        return
    found = json.loads(child.stdout.strip().splitlines()[-1])
    yield Finding(
        OK,
        f"torch {found['version']}, imported in {found['seconds']:.1f} s, "
        f"{found['threads']} threads",
    )
    for name, model, memory, error in found["cuda"]:
        what = f"{name}: {model}, {memory:.0f} GB"
        yield Finding(WARN, f"{what}: {error}", USE_CPU) if error else Finding(OK, what)
    if found["mps"]:
        error = found["mps_error"]
        yield Finding(WARN, f"mps: {error}", USE_CPU) if error else Finding(OK, "mps: Apple GPU")
    if not found["cuda"] and not found["mps"]:
        built = "this torch is built for CUDA" if found["built"] else "this torch is built for CPUs"
        yield Finding(OK, f"no GPU ({built}): everything runs on the CPU")


USE_CPU = "--device cpu does not need it"


def machine() -> Iterator[Finding]:
    """Cores, memory, disk."""
    affinity = getattr(os, "sched_getaffinity", None)
    yield Finding(OK, f"{len(affinity(0)) if affinity else os.cpu_count()} cores")
    memory = memory_gb()
    if memory is None:
        yield Finding(OK, "memory: this platform does not say how much")
    elif memory < NEEDED_MEMORY_GB:
        yield Finding(
            WARN,
            f"{memory:.1f} GB of memory",
            f"{NEEDED_MEMORY_GB} GB are enough for every kata; ml-1m and larger may not fit here",
        )
    else:
        yield Finding(OK, f"{memory:.0f} GB of memory")
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < NEEDED_DISK_GB:
        yield Finding(
            WARN, f"{free:.1f} GB of disk free", "runs write their reports and curves to runs/"
        )
    else:
        yield Finding(OK, f"{free:.0f} GB of disk free")


def memory_gb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):  # Windows
        return None


def compiler() -> Iterator[Finding]:
    """torch.compile on a CPU needs a C++ compiler."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++", "cl"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found:
        yield Finding(OK, f"C++ compiler {found}")
    else:
        yield Finding(
            WARN,
            "no C++ compiler",
            "only kata 07 (torch.compile) needs one: Debian and Ubuntu: sudo apt install g++; "
            "macOS: xcode-select --install",
        )


def checkout() -> Iterator[Finding]:
    """What lies in src that should not."""
    strays = sorted((SRC / "recsys").rglob("__init__.py"))
    if strays:
        names = ", ".join(path.relative_to(ROOT).as_posix() for path in strays)
        yield Finding(
            WARN,
            f"{names}: recsys is a namespace package",
            "remove it: it disables --impl for every program that does not run under the harness",
        )
    else:
        yield Finding(OK, "src/recsys is a namespace package")


def katas() -> Iterator[Finding]:
    """What changed in a kata since its last result, as after pulling a newer version."""
    from harness import catalog, record

    results = record.read()
    current = 0
    for kata in catalog.load():
        if kata.id not in results:
            continue
        parts = set(record.changed(kata, results[kata.id]))
        updated = [part for part in ("spec", "fixtures") if part in parts]
        if updated:
            what = f"kata {kata.number}: its {' and '.join(updated)} changed since your last run"
            yield Finding(WARN, what, f"your code is as it was: kata test {kata.number}")
        if "task" in parts:
            yield Finding(
                WARN,
                f"kata {kata.number}: its task reads differently since your last run",
                f"the present text: kata guide {kata.number}, and the docstrings that "
                f"`kata reset {kata.number}` writes (your file is kept, and where is said)",
            )
        current += not parts - {"code"}
    if current:
        yield Finding(OK, f"{current} katas as they were when you ran them")


def data() -> Iterator[Finding]:
    """Which data sets are here, and whether KATA_DATA is right."""
    from harness import overlay

    overlay.install([overlay.Root("src", SRC)])
    from recsys.data.known import KNOWN
    from recsys.data.locate import cache_folder

    own = os.environ.get("KATA_DATA")
    folders = [Path(own).expanduser()] if own else []
    if own and not folders[0].is_dir():
        yield Finding(WARN, f"KATA_DATA={own} is no folder", "correct it, or unset it")
    folders.append(cache_folder())
    for name in KNOWN:
        places = [place for folder in folders for place in (folder / name, folder / f"{name}.zip")]
        places += [folder for folder in folders[:-1] if folder.name == name]
        found = next((place for place in places if place.exists()), None)
        if found:
            yield Finding(OK, f"data set {name}: {found}")
    yield Finding(OK, "data set synthetic: generated; others are fetched by `kata data NAME`")
