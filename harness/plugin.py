"""The pytest plugin that the root conftest registers (PYTEST_DONT_REWRITE).

It lays the --impl roots over `recsys`, puts the rungs into teaching order, and reports a red kata
in one screen. Tests outside katas/ are reported by pytest as ever.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from harness import catalog, diagnosis, guard, message, overlay, settings, spec
from harness.errors import UsageError
from harness.events import emit
from harness.paths import KATAS, ROOT

DEVICES = ("cpu", "cuda", "auto")
RUNG_SECONDS = 120  # for one rung; the environment variable KATA_RUNG_SECONDS says another

previous_roots = pytest.StashKey[Any]()


# --- options --------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("recsys-katas")
    group.addoption(
        "--impl",
        action="append",
        metavar="NAME|PATH",
        help="whose recsys is tested: `reference`, `mine` (yours where you wrote it, the reference "
        "elsewhere) or a folder holding recsys/...; may be repeated, the first wins; then src",
    )
    group.addoption("--device", metavar="NAME", help="cpu, cuda or auto, of the kata tests")


def impls_of(config: pytest.Config) -> list[str]:
    """--impl, or else the environment variable KATA_IMPL (several separated as on PATH)."""
    given = config.getoption("--impl")
    if given is None:
        given = os.environ.get("KATA_IMPL", "").split(os.pathsep)
    return [impl for impl in given if impl]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Start again with this checkout's settings if pytest took another's.

    In `--impl PATH katas/03_...` PATH looks to pytest like one more folder of tests, before any
    plugin can say otherwise; if it lies in another project, pytest takes that one's settings.
    """
    ini = ROOT / "tox.ini"
    if config.inipath == ini or config.option.inifilename or not ini.is_file():
        return None
    arguments = ["-c", str(ini), "--rootdir", str(ROOT), *config.invocation_params.args]
    return pytest.main([str(argument) for argument in arguments])


def pytest_configure(config: pytest.Config) -> None:
    impls = impls_of(config)
    try:
        roots = overlay.resolve(impls, config.invocation_params.dir)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    device = config.getoption("--device") or os.environ.get("KATA_DEVICE") or "cpu"
    if device not in DEVICES:
        raise pytest.UsageError(f"--device {device}: expected one of {', '.join(DEVICES)}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError(
                "--device cuda: torch sees no CUDA device on this machine; use --device cpu, or "
                "--device auto for a GPU where there is one"
            )
    settings.requested_device = device
    settings.red = None
    config.stash[previous_roots] = overlay.installed() if overlay.is_installed() else None
    overlay.install(roots)
    hide = Hide()
    diagnose = Diagnose()
    config.pluginmanager.register(diagnose)
    config.pluginmanager.register(hide)
    config.pluginmanager.register(Show(hide, diagnose))
    if only_katas(config):
        import_as_written()
        if config.option.verbose == 0:
            config.option.no_header = True  # the message needs the screen


def pytest_unconfigure(config: pytest.Config) -> None:
    if previous_roots not in config.stash:
        return
    overlay.uninstall()
    overlay.purge()
    before = config.stash[previous_roots]
    if before is not None:
        overlay.install(before)


def only_katas(config: pytest.Config) -> bool:
    """Whether every argument is a kata, or a test of one."""
    places = [config.invocation_params.dir / arg.partition("::")[0] for arg in config.args]
    return bool(places) and all(is_kata(place) for place in places)


def import_as_written() -> None:
    """No rewriting of assertions: katas have none, and it makes hypothesis import in 2 s.

    pytest rewrites every package that has a plugin for it, and since nothing here writes bytecode,
    it would do so in each run.
    """
    hooks = [hook for hook in sys.meta_path if type(hook).__name__ == "AssertionRewritingHook"]
    for hook in hooks:
        sys.meta_path.remove(hook)


def is_kata(path: Path) -> bool:
    return path.resolve().is_relative_to(KATAS)


# --- collection -----------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    settings.collecting = True
    try:
        return (yield)
    finally:
        settings.collecting = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Within a kata: the spec, then properties, then cost; in a file as it is written."""
    rank: dict[Path, int] = {}
    for item in items:
        rank.setdefault(folder_of(item), len(rank))

    def key(item: pytest.Item) -> tuple[int, tuple[int, str]]:
        return rank[folder_of(item)], catalog.file_order(item.path.name)

    items.sort(key=key)
    for order, item in enumerate(items):
        item.kata_order = order  # type: ignore[attr-defined]


def folder_of(item: pytest.Item) -> Path:
    return item.path.parent if is_kata(item.path) else item.path


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    impls = impls_of(config)
    return [f"recsys from: {', '.join(root.name for root in overlay.installed())}"] if impls else []


# --- runs -----------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """An alarm for each rung: an endless loop is red. `kata test` also ends what ignores it."""
    can = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    if not (can and is_kata(item.path)) or item.config.option.usepdb:
        return (yield)
    own = getattr(getattr(item, "function", None), "__kata_seconds__", None)
    seconds = float(os.environ.get("KATA_RUNG_SECONDS") or own or RUNG_SECONDS)

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"the rung took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Whatever else a rung did, what is everybody's is as it was."""
    if not is_kata(pyfuncitem.path):
        return (yield)
    broken = guard.Guard().broken  # now: the class may be another one afterwards
    try:
        result = yield
    except BaseException:
        broken()  # put back; the rung is red already
        raise
    for came_back, expected in broken():
        spec.fail(came_back=came_back, expected=expected)
    return result


# --- reports --------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if not is_kata(item.path):
        return (yield)
    own = call.excinfo is not None and not left_alone(item.config)
    if own:  # pytest's own words for it would take longer than the test
        item.repr_failure = lambda excinfo, style=None: ""  # type: ignore[method-assign]
    report = yield
    red = message.Red(
        kata=item.path.parent.name,
        rung=getattr(item, "originalname", None) or item.name,
        order=getattr(item, "kata_order", 0),
    )
    if report.failed and call.excinfo is not None:
        settings.red = settings.red or call.excinfo.value
    if report.failed and own and call.excinfo is not None:
        red = explained(item, call.excinfo.value, report, red)
        report.longrepr = "\n".join(message.screen(red))
    report.kata = red.as_dict()  # type: ignore[attr-defined]
    return report


def left_alone(config: pytest.Config) -> bool:
    """Whether the learner asked for pytest's own tracebacks."""
    option = config.option
    return option.usepdb or option.tbstyle in ("long", "native") or option.fulltrace


def explained(
    item: pytest.Item, error: BaseException, report: pytest.TestReport, red: message.Red
) -> message.Red:
    kata = kata_of(red.kata)
    why = message.explain(error, kata, item.path)
    why.kata, why.rung, why.order = red.kata, red.rung, red.order
    doc = getattr(getattr(item, "function", None), "__doc__", None) or ""
    why.says = doc.strip().partition("\n")[0]
    why.title = message.title(kata, red.rung) if kata else item.nodeid
    why.next = message.next_step(kata, why, impls_of(item.config)) if kata else ""
    if report.capstdout.strip():
        why.facts.append(("printed", "\n".join(report.capstdout.strip().splitlines()[-2:])))
    return why


@functools.cache  # its rungs are read from the tests' text
def kata_of(name: str) -> catalog.Kata | None:
    try:
        return catalog.read(KATAS / name)
    except (UsageError, OSError):
        return None


def red_of(report: Any) -> message.Red | None:
    """The explanation that a failed report of a kata carries."""
    facts = getattr(report, "kata", None)
    return message.Red(**facts) if facts and facts["facts"] else None


# --- the diagnosis --------------------------------------------------------------------------------


class Diagnose:
    """Asks, once the tests are through, which known mistakes explain what is red."""

    def __init__(self) -> None:
        self.reds: dict[str, list[message.Red]] = {}  # kata -> its red rungs
        self.found: dict[str, diagnosis.Diagnosis] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        red = red_of(report)
        if red:
            self.reds.setdefault(red.kata, []).append(red)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput") or left_alone(session.config):
            return
        for name, reds in self.reds.items():
            kata = kata_of(name)
            if kata is None or all(red.absent for red in reds):
                continue
            try:
                found = diagnosis.diagnose(kata, min(reds, key=lambda red: red.order).rung)
            except Exception:  # the spec has said that it is red; a guess less is no loss
                continue
            self.found[name] = found
            emit({"event": "diagnosis", "kata": name, **asdict(found)})


class Hide:
    """Takes the reports of red katas out of sight while pytest prints a section for each failure.

    pytest prints its sections, then calls `Show`, then lists what -r asks for, then counts.
    """

    def __init__(self) -> None:
        self.all: dict[str, list[Any]] = {}
        self.reds: list[message.Red] = []

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> Generator[None, None, None]:
        stats, config = terminalreporter.stats, terminalreporter.config
        if config.option.tbstyle in ("auto", "short", "line"):
            for kind in ("failed", "error"):
                explained = [red_of(report) for report in stats.get(kind, [])]
                self.reds += [red for red in explained if red]
                if any(explained):
                    self.all[kind] = stats[kind]
                    stats[kind] = [report for report in stats[kind] if not red_of(report)]
        if self.reds and "warnings" in stats and only_katas(config):
            self.all["warnings"] = stats.pop("warnings")
        try:
            return (yield)
        finally:
            stats.update(self.all)  # the last line counts them


class Show:
    """Shows the first red rung whole and the others in a line; what comes after a green kata."""

    def __init__(self, hidden: Hide, diagnose: Diagnose) -> None:
        self.hidden = hidden
        self.diagnose = diagnose
        self.green: dict[str, set[str]] = {}  # kata -> its rungs that passed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        rung = getattr(report, "kata", None)
        if rung and report.when == "call" and report.passed:
            self.green.setdefault(rung["kata"], set()).add(rung["rung"])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        config = terminalreporter.config
        reds = sorted(self.hidden.reds, key=lambda red: red.order)
        for red in reds[:1]:
            if red.kata in self.diagnose.found:
                red.facts += self.diagnose.found[red.kata].facts
        if reds and not terminalreporter.no_summary:
            lines = message.screen(reds[0], reds[1:], terminalreporter._tw.fullwidth)
            terminalreporter.write_line(lines[0], red=True, bold=True)
            for line in lines[1:]:
                terminalreporter.write_line(line)
        elif not ({"failed", "error"} & set(terminalreporter.stats) or impls_of(config)):
            for name, passed in self.green.items():
                kata = kata_of(name)
                if kata and passed >= {rung.name for rung in kata.rungs}:
                    terminalreporter.write_line(message.green(kata))
        if config.option.reportchars != "fE":  # -r: the list was asked for
            terminalreporter.stats.update(self.hidden.all)


# --- results for the runner -----------------------------------------------------------------------


def pytest_runtest_logstart(nodeid: str) -> None:
    emit({"event": "start", "nodeid": nodeid})


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if getattr(report, "kata", None):
        emit(
            {
                "event": report.when,
                "outcome": report.outcome,
                "nodeid": report.nodeid,
                "seconds": report.duration,
                **report.kata,
            }
        )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not hasattr(session.config, "workerinput"):
        emit({"event": "finish", "exit": int(exitstatus)})
