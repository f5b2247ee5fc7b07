"""`kata gate`: whether a learner's whole system passes, judged by what upstream has.

The learner's files are laid into a fresh tree of upstream's specs, fixtures, harness and data
package, and the integration kata runs there in a child process that may read that tree and little
else. What the checkout itself holds is only compared.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import catalog, confine, encoders, events, message, overlay, runner, upstream
from harness.errors import UsageError
from harness.paths import ROOT, SRC

KATA = "10_integration"
SYSTEM_SPEC = "test_system.py"  # its rungs judge the whole system: here it is done from outside
MOVIELENS = "ml-100k"
TOO_GOOD = 2.0  # times the reference's NDCG@10: such lists know the answers
REQUIRABLE = ("movielens", "gpu")
# What a child is told of the environment; above all no folder of data and no token of the CI.
KEPT = (
    *("PATH", "LANG", "TZ", "SYSTEMROOT", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "CUDA_HOME"),
)

# Rungs that are red whatever the learner writes: green, they tell that somebody forges results.
CANARIES = '''"""Further rungs of this kata."""

import sys

from harness.spec import assert_close, assert_equal, check, rung


@rung(hint="Look at the last item.")
def test_{0}():
    """The lists are whole."""
    check(len("lists") == 6, "lists of six", came_back=5)


@rung(hint="Look at the counts.")
def test_{1}():
    """The counts are whole."""
    assert_equal(41, 42, what="counts")


@rung(hint="Look at the scores.")
def test_{2}():
    """The scores are whole."""
    if torch := sys.modules.get("torch"):
        assert_close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), what="scores")
    raise ValueError("scores")
'''


@dataclass
class Folder:
    """What one verdict is about.

    Attributes:
        layers: roots that hold `recsys/...`, the first wins; None stands for the reference.
        checkout: whose specs, fixtures and so on are compared with upstream's.
    """

    name: str
    layers: list[Path | None]
    checkout: Path


@dataclass
class Verdict:
    """What came of one folder; green if there is no reason against it."""

    name: str
    reasons: list[str] = field(default_factory=list)
    difference: upstream.Difference = field(default_factory=upstream.Difference)
    left_out: list[str] = field(default_factory=list)  # files of the learner that do not count
    as_reference: list[str] = field(default_factory=list)  # files that are the reference's text
    result: runner.KataResult | None = None
    systems: list[Any] = field(default_factory=list)  # system.Verdict, one for each data set
    not_run: dict[str, str] = field(default_factory=dict)  # what -> why
    confined: bool = False
    seconds: float = 0.0

    @property
    def green(self) -> bool:
        return not self.reasons


def main(args: argparse.Namespace) -> int:
    """A verdict for each folder; 0 if all are green, 1 if one is red."""
    required = requirements(args.require)
    reference = upstream.resolve(ROOT, args.against)
    folders = chosen(args.impl, Path.cwd())
    confine.protect_caller()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))  # leave by the way that ends children
    good = True
    for folder in folders:
        verdict = judge(folder, reference, required, args.timeout)
        good = good and verdict.green
        text = "\n".join(summary(verdict, reference))
        if args.json:
            print(json.dumps(as_json(verdict, reference)), flush=True)
        else:
            print(text, flush=True)
        if path := os.environ.get("GITHUB_STEP_SUMMARY"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(text + "\n")
    return 0 if good else 1


def requirements(given: list[str] | None) -> list[str]:
    """What `--require` names.

    Raises:
        UsageError: anything else than movielens and gpu.
    """
    named = [part.strip() for text in given or [] for part in text.split(",")]
    for name in named:
        if name not in REQUIRABLE:
            raise UsageError(f"--require takes {' and '.join(REQUIRABLE)}, not {name!r}")
    return named


# --- whose files ----------------------------------------------------------------------------------


def chosen(given: list[list[str]] | None, cwd: Path) -> list[Folder]:
    """What `--impl A B ... --impl BELOW ...` means: A, B, ... each over the same layers.

    A folder that is a checkout is judged with its own specs compared, without anything of this
    one; one that merely holds `recsys/...` lies over the layers and then over this `src`.
    """
    groups = given or [["src"]]
    below = [name for group in groups[1:] for name in group]
    return [folder_of(name, below, cwd) for name in groups[0]]


def folder_of(name: str, below: Sequence[str], cwd: Path) -> Folder:
    path = Path(os.path.abspath(cwd / Path(name).expanduser()))
    if (path / "src/recsys").is_dir() and not (path / "recsys").is_dir() and not is_word(name):
        return Folder(name, [path / "src", *layers_of(below, cwd)], path)
    return Folder(name, [*layers_of([name, *below], cwd), SRC], ROOT)


def layers_of(names: Sequence[str], cwd: Path) -> list[Path | None]:
    layers: list[Path | None] = []
    for name in names:
        if name == "reference":
            layers.append(None)
        elif name == "mine":  # a stub counts as not there
            layers += [written(), None]
        else:
            layers.append(SRC if name == "src" else overlay.folder_root(name, cwd))
    return layers


def is_word(name: str) -> bool:
    """Whether `--impl` has a meaning for it; else it is a folder."""
    return name in ("src", "mine", "reference")


def written() -> Path:
    """A root with the learner files of this checkout that are no stubs."""
    made = Path(tempfile.mkdtemp(prefix="kata-mine-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    (made / "recsys").mkdir()
    for kata in catalog.load():
        for file in kata.files:
            if catalog.is_attempted(kata, file):
                (made / "recsys" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(SRC / "recsys" / file, made / "recsys" / file)
    return made


def lay(folder: Folder, reference: upstream.Reference, tree: Path, verdict: Verdict) -> None:
    """Write upstream's files and the learner's into `tree`; the reference solution stays out."""
    prefix = f"{upstream.SOLUTION}/recsys/"
    solution = reference.read(lambda path: path.startswith(prefix))
    solution = {path.removeprefix(prefix): data for path, data in solution.items()}
    reference.write(tree, lambda path: not path.startswith(("reference_tests/", "src/recsys/"))
                    or path.startswith(f"{upstream.DATA}/"))  # fmt: skip
    contents: dict[str, bytes] = {}
    for layer in reversed(folder.layers):
        contents |= solution if layer is None else learner_files(layer, verdict.left_out)
    for file, data in contents.items():
        place = tree / "src/recsys" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    verdict.as_reference = sorted(f for f in solution if contents.get(f) == solution[f])
    verdict.left_out = sorted(set(verdict.left_out))


def learner_files(root: Path, left_out: list[str]) -> dict[str, bytes]:
    """A learner's files below `root`/recsys: neither the data package nor what hides a layer."""
    found = {}
    for path, file in upstream.walk(root):
        inside = path.removeprefix("recsys/")
        if inside.startswith("data/") and path.startswith("recsys/"):
            continue  # compared; upstream's is used
        usable = file.is_file() and not file.is_symlink()
        if path.startswith("recsys/") and usable and not upstream.is_planted(path, set()) and (
            file.suffix not in upstream.COMPILED
        ):
            found[inside] = file.read_bytes()
        else:
            left_out.append(path)
    return found


# --- the run --------------------------------------------------------------------------------------


def judge(
    folder: Folder, reference: upstream.Reference, required: Sequence[str], timeout: float
) -> Verdict:
    """Compare and run one folder."""
    begin = time.monotonic()
    verdict = Verdict(folder.name, confined=bool(confine.available()))
    verdict.difference = upstream.compare(folder.checkout, reference)
    if count := len(verdict.difference.lines()):
        verdict.reasons.append(f"{count} file{'s' * (count > 1)} differ from {reference.name}")
    with workplace() as place:
        tree = place / "tree"
        lay(folder, reference, tree, verdict)
        run_rungs(tree, place, verdict, timeout)
        run_systems(reference, tree, place, verdict)
        touched = upstream.changed(tree, reference)
        if touched := [path for path in touched if not path.startswith(upstream.SOLUTION)]:
            verdict.reasons.append(f"changed while it ran: {', '.join(touched)}")
    for what in required:
        if what in verdict.not_run:
            verdict.reasons.append(f"{what} is required, but: {verdict.not_run[what]}")
    verdict.seconds = time.monotonic() - begin
    return verdict


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder for one run, and no process of it left afterwards."""
    before = confine.children()
    with tempfile.TemporaryDirectory(prefix="kata-gate-") as name:
        try:
            yield Path(name).resolve()
        finally:
            while left := confine.children() - before:
                for process in left:
                    end(process)


def end(process: int) -> None:
    """Kill a child, if it is there, and wait for it."""
    try:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def run_rungs(tree: Path, place: Path, verdict: Verdict, timeout: float) -> None:
    """The integration kata in its own process, with rungs among it that must be red."""
    kata = catalog.read(tree / "katas" / KATA)
    wanted = tuple(rung for rung in kata.rungs if rung.file != SYSTEM_SPEC)
    canaries = [f"{secrets.token_hex(3)}_is_whole" for _ in range(3)]
    canary_file = kata.folder / f"test_{secrets.token_hex(3)}.py"
    canary_file.write_text(CANARIES.format(*canaries), encoding="utf-8")
    command = ["-m", "pytest", str(kata.folder), "-q", "-c", "tox.ini", "--device", device()]
    command.append(f"--ignore={kata.folder / SYSTEM_SPEC}")
    lines, reason, output, seconds = run_child(command, tree, place, timeout)
    canary_file.unlink(missing_ok=True)
    names = {f"test_{name}" for name in canaries}
    kata = dataclasses.replace(kata)
    kata.__dict__["rungs"] = wanted
    result = runner.KataResult(kata, output=output, seconds=seconds)
    runner.judge(result, [line for line in lines if line.get("rung") not in names], reason)
    verdict.result = result
    for shown in result.reds:  # the child counted the further rungs
        shown.title = message.title(kata, shown.rung)
    if result.reason:
        verdict.reasons.append(f"no result: {result.reason}")
    if red := [rung.name for rung in wanted if result.rungs[rung.name] != "passed"]:
        verdict.reasons.append(f"{len(red)} of {len(wanted)} rungs are red")
    if not result.reason:
        outcomes = {line["rung"]: line["outcome"] for line in lines if line["event"] == "call"}
        if any(outcomes.get(name) != "failed" for name in names):
            verdict.reasons.append("results are forged: rungs that must be red are not")


def run_child(
    command: list[str], tree: Path, place: Path, timeout: float
) -> tuple[list[dict[str, Any]], str, str, float]:
    """Run python with `command` in the tree: events, why it ended badly, output, seconds."""
    room = Path(tempfile.mkdtemp(prefix="room-", dir=place))
    results = room / "results.jsonl"
    results.touch()
    whole, env = confined(command, room, [tree])
    begin = time.monotonic()
    child = runner.Child(whole, results, memory=device() == "cpu", cwd=tree, env=env)
    reason = child.wait(timeout)
    seconds = time.monotonic() - begin
    try:
        lines = events.read(results)
    except (OSError, ValueError):
        lines, reason = [], reason or "its results cannot be read"
    return lines, reason, child.output(), seconds


def confined(
    command: list[str], room: Path, readable: Sequence[Path]
) -> tuple[list[str], dict[str, str]]:
    """Python with `command`, that may write in `room` and read some files; its environment."""
    home = room / "home"
    home.mkdir()
    env = {k: v for k, v in os.environ.items() if k in KEPT or k.startswith("LC_")}
    env |= {"HOME": str(home), "TMPDIR": str(room), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    launcher = [sys.executable, "-I", confine.__file__, "--write", str(room)]
    launcher += [word for path in readable for word in ("--read", str(path))]
    return [*launcher, "--", sys.executable, *command], env


def run_systems(
    reference: upstream.Reference, tree: Path, place: Path, verdict: Verdict
) -> None:
    """The learner's system beside the reference, on data whose test rows it is never given."""
    from harness import system

    if device() == "cpu":
        verdict.not_run["gpu"] = "torch sees no GPU on this machine"
    blocked = ""
    if verdict.result is None or not verdict.result.ok:
        blocked = "rungs are red"
    elif "configs/system.yaml" not in reference.blobs:
        blocked = f"{reference.name} says nothing of whole systems"
    data = {"synthetic": blocked, "movielens": missing_movielens() or blocked}
    verdict.not_run |= {name: why for name, why in data.items() if why}
    if all(data.values()):
        return
    upstream_tree = place / "upstream"
    lay(Folder("reference", [None], ROOT), reference, upstream_tree, Verdict("reference"))
    with overlay.using([overlay.Root("upstream", upstream_tree / "src")]):
        for name in [name for name, why in data.items() if not why]:
            run_system(system, name, tree, upstream_tree, verdict)


def run_system(system: Any, name: str, tree: Path, upstream_tree: Path, verdict: Verdict) -> None:
    """One data set: what is judged comes back as arrays in files, and nothing else is believed.

    Generated data come from a seed that nobody knows, so the answers cannot be generated again.
    """
    try:
        found = system.verdict(
            [tree / "src"],
            reference=[upstream_tree / "src"],
            data=MOVIELENS if name == "movielens" else name,
            data_seed=secrets.randbits(62),
            device=device(),
            launch=launcher(tree),
            launch_reference=launcher(upstream_tree),
        )
    except Exception as error:  # whatever the learner's files did to what reads them
        verdict.reasons.append(f"{name}: no result: {type(error).__name__}: {error}")
        return
    verdict.systems.append(found)
    verdict.reasons += [f"{name}: {finding.says}" for finding in found.reds]
    for finding in found.findings:
        value, reference = (finding.detail.get(key, 0) for key in ("value", "reference"))
        if finding.name == "final" and value > TOO_GOOD * reference > 0:
            verdict.reasons.append(
                f"{name}: {value / reference:.1f} times the reference's NDCG@10: too good for "
                "anything but lists that know the answers"
            )


def launcher(tree: Path) -> Callable[[list[str], Path], subprocess.Popen]:
    """How harness/system.py starts a side: it reads its tree and its data, writes in its folder."""

    def launch(command: list[str], folder: Path) -> subprocess.Popen:
        files = [folder.parent / name for name in ("data.npz", "data.json", "cold.npz")]
        whole, env = confined(command, folder, [tree, encoders.TINY, *files])
        process = subprocess.Popen(
            whole,
            cwd=tree,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        runner.limit(process.pid, "RLIMIT_FSIZE", runner.FILE_LIMIT)
        if device() == "cpu":
            runner.limit(process.pid, "RLIMIT_AS", runner.MEMORY_LIMIT)
        return process

    return launch


def missing_movielens() -> str:
    """Why MovieLens cannot be run, or ""; nothing is downloaded for a verdict."""
    folder = os.environ.get("KATA_DATA")
    if not folder:
        return "KATA_DATA is not set"
    own = Path(folder).expanduser()
    there = (own / MOVIELENS).is_dir() or (own / f"{MOVIELENS}.zip").is_file()
    if there or (own.is_dir() and own.resolve().name == MOVIELENS):
        return ""
    return f"KATA_DATA, {folder}, holds no {MOVIELENS}"


def device() -> str:
    """ "cuda" where torch sees a GPU, else "cpu"; asked in a process of its own."""
    if not (device_found or any(map(os.path.exists, GPU_FILES))):
        device_found.append("cpu")
    if not device_found:
        ask = "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')"
        done = subprocess.run([sys.executable, "-I", "-c", ask], capture_output=True, text=True)
        device_found.append("cuda" if done.stdout.strip() == "cuda" else "cpu")
    return device_found[0]


device_found: list[str] = []
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, Windows' Linux


# --- what is said ---------------------------------------------------------------------------------


def summary(verdict: Verdict, reference: upstream.Reference) -> list[str]:
    """The verdict in Markdown."""
    result = verdict.result
    assert result is not None
    lines = [f"## kata gate: {'green' if verdict.green else 'red'} ({verdict.name})", ""]
    lines += [f"- **{reason}**" for reason in verdict.reasons] + [""] * bool(verdict.reasons)
    total = len(result.kata.rungs)
    lines += ["| what | result |", "| --- | --- |"]
    difference = "as upstream" if not verdict.difference else "**differ**"
    lines.append(f"| specs, fixtures, harness, data package, settings, solution | {difference} |")
    lines.append(f"| {KATA} | {result.passed} of {total} rungs, {result.seconds:.0f} s |")
    for found in verdict.systems:
        for finding in found.findings:
            says = finding.says if finding.good is not False else f"**{finding.says}**"
            lines.append(f"| {found.data}, {finding.name} | {says} |")
    lines += [f"| {what} | not run: {why} |" for what, why in verdict.not_run.items()]
    lines.append(f"| compared with | {reference.name}, {reference.commit[:12]} |")
    held = "could reach only its own folder" if verdict.confined else "could read all files"
    lines.append(f"| the code that was judged | {held} |")
    if verdict.difference:
        lines += ["", "Bring these back (git checkout REF -- PATH), or remove what was added:", ""]
        lines += [f"- {line}" for line in verdict.difference.lines()[:40]]
    if verdict.left_out:
        lines += ["", "Not part of the run: " + ", ".join(verdict.left_out[:20])]
    if result.reds:
        lines += ["", "```", *message.screen(result.reds[0], result.reds[1:]), "```"]
    elif result.reason:
        lines += ["", "```", *result.output.splitlines()[-8:], "```"]
    return [*lines, ""]


def as_json(verdict: Verdict, reference: upstream.Reference) -> dict[str, Any]:
    """The verdict for programs; docs/gate.md shows one."""
    result = verdict.result
    assert result is not None
    return {
        "impl": verdict.name,
        "verdict": "green" if verdict.green else "red",
        "reasons": verdict.reasons,
        "against": {"ref": reference.name, "commit": reference.commit},
        "differences": vars(verdict.difference),
        "left_out": verdict.left_out,
        "same_as_reference": verdict.as_reference,
        "rungs": {
            "passed": result.passed,
            "total": len(result.kata.rungs),
            "red": [name for name, outcome in result.rungs.items() if outcome != "passed"],
        },
        "system": [found.as_json() for found in verdict.systems],
        "not_run": verdict.not_run,
        "device": device(),
        "confined": verdict.confined,
        "seconds": round(verdict.seconds, 1),
    }
