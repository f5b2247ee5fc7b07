"""The command line: which commands there are, what they take, and how they end.

A command is a function `main(args) -> int` in a module that is imported only when it is called,
so that the board is instant. Exit codes: 0 good, 1 red, 2 usage, 3 the harness itself failed.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from harness.errors import LearnerError, UsageError
from harness.paths import STATE

GOOD, RED, USAGE, FAILED = 0, 1, 2, 3

_PERMISSION, _ROOM = "Expected a checkout that can be written", "Expected room on the disk"
UNUSABLE = {errno.EACCES: _PERMISSION, errno.EPERM: _PERMISSION, errno.EROFS: _PERMISSION}
UNUSABLE |= {errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM}


class Parser(argparse.ArgumentParser):
    """argparse that complains in one sentence."""

    def error(self, message: str) -> NoReturn:
        sys.stdout.flush()
        self.exit(USAGE, f"kata: {message}. What it takes: {self.prog} --help\n")


@dataclass(frozen=True)
class Command:
    """One command: `module.main` is called with what `arguments` declares."""

    name: str
    module: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    args = parser().parse_args(argv)
    try:
        code = importlib.import_module(args.module).main(args)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"kata: {error}", file=sys.stderr)
        return USAGE
    except LearnerError as error:
        print(f"kata: {error}", file=sys.stderr)
        return RED
    except KeyboardInterrupt:
        print("\nkata: interrupted", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # `kata ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if error.errno not in UNUSABLE:
            return crashed(error)
        print(f"kata: {error.filename}: {error.strerror}. {UNUSABLE[error.errno]}", file=sys.stderr)
        return FAILED
    except Exception as error:
        return crashed(error)


def crashed(error: Exception) -> int:
    """Say in a line that the harness failed, and keep the traceback."""
    what = " ".join(str(error).split())
    line = f"kata: the harness itself failed: {type(error).__name__}: {what}"
    report = STATE / "crash.txt"
    try:
        STATE.mkdir(exist_ok=True)
        report.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        line += f"\nThe traceback is in {report}"
    except OSError:
        traceback.print_exception(error)
    print(line, file=sys.stderr)
    return FAILED


def parser() -> Parser:
    """The parser of all commands; without one, the board."""
    top = Parser(prog="kata", add_help=False)
    top.set_defaults(command=None, module="harness.board", json=False)
    top.add_argument("-h", "--help", action=Help)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for group in GROUPS.values():
        for command in group:
            if command.name:
                sub = commands.add_parser(command.name, description=command.summary + ".")
                sub.set_defaults(module=command.module)
                command.arguments(sub)
    return top


class Help(argparse.Action):
    """`--help`: the commands of daily use first."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0)

    def __call__(self, parser: argparse.ArgumentParser, *ignored: object) -> NoReturn:
        lines = ["usage: kata [COMMAND ...]"]
        for title, group in GROUPS.items():
            lines += ["", title]
            lines += [f"  {'kata ' + c.name:<13}  {c.summary}" for c in group]
        lines += ["", "What a command takes: kata COMMAND --help"]
        print("\n".join(lines))
        parser.exit(GOOD)


def impl(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--impl",
        action="append",
        metavar="NAME|PATH",
        help="whose code: mine (yours where you wrote it, the reference elsewhere), reference, or "
        f"a folder holding recsys/...; may be repeated, the first wins (default: {default})",
    )


def kata_ids(parser: argparse.ArgumentParser, nargs: str | None = "*") -> None:
    parser.add_argument(
        "katas" if nargs else "kata",
        nargs=nargs,
        metavar="NN",
        help="a kata: its number or its name" + (" (default: all)" if nargs else ""),
    )


def one_kata(parser: argparse.ArgumentParser) -> None:
    kata_ids(parser, nargs=None)


def watch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kata", nargs="?", metavar="NN", help="a kata (default: the first that is not passing)"
    )
    parser.add_argument(
        "--poll", action="store_true", help="look for changes, where the system tells of none"
    )
    parser.add_argument("--cold", action="store_true", help="a fresh process for each verdict")


def review(parser: argparse.ArgumentParser) -> None:
    kata_ids(parser)
    parser.add_argument("--json", action="store_true", help="for programs")


def brief(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kata", nargs="?", metavar="NN", help="a kata (default: the next one)")
    parser.add_argument("--json", action="store_true", help="for programs")


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    kata_ids(parser)
    impl(parser, "mine")
    parser.add_argument(
        "--loop", action="store_true", help="from a save to the verdict, cold and warm"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="measurements of each thing (default: 7)"
    )
    parser.add_argument(
        "--speed",
        nargs="*",
        metavar="PART",
        help="training, step, evaluation (these are the default) or growth, beside peers and bound",
    )
    parser.add_argument(
        "--peers", action="store_true", help="the recommender beside what others would use"
    )
    parser.add_argument(
        "--tune", action="store_true", help="better settings of its retrieval, on training rows"
    )
    parser.add_argument("--ablate", action="store_true", help="what each part of it buys")
    parser.add_argument(
        "--ratings", action="store_true", help="will a user like it? beside means and a library"
    )
    parser.add_argument(
        "--cold", action="store_true", help="items without a rating, beside what others do"
    )
    group = parser.add_argument_group("with --peers, --tune, --ablate, --ratings, --cold, --speed")
    data(group)
    group.add_argument("--seeds", type=int, default=3, metavar="N", help="of each (default: 3)")
    group.add_argument(
        "--seconds",
        type=float,
        default=120,
        help="of CPU, to --tune or to tune each of --peers (default: 120)",
    )
    group.add_argument("--ties", choices=("row", "hash"), help="default: as the configuration says")
    group.add_argument("--only", action="append", metavar="NAME", help="this one; repeatable")
    group.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
    group.add_argument("--out", metavar="FILE", help="where the table is written (--loop, too)")


def solution_arguments(parser: argparse.ArgumentParser) -> None:
    one_kata(parser)
    parser.add_argument("--spoil", action="store_true", help="before the kata passes, too")


def data(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--data",
        default="synthetic",
        metavar="NAME|PATH",
        help="synthetic, ml-100k, ml-latest-small, ml-1m, ml-25m, ml-32m, or a folder or zip file",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file, or the name of one in configs/ (default: the one named like the data)",
    )
    parser.add_argument(
        "--set",
        action="append",
        type=assignment,
        metavar="KEY=VALUE",
        help="overrides a key of the configuration, as retrieval.fit.epochs=5; may be repeated",
    )


def run_arguments(parser: argparse.ArgumentParser) -> None:
    impl(parser, "mine")
    data(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--out", metavar="DIR", help="where the report goes (default: runs/...)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")


def assignment(text: str) -> str:
    """`text`, if it has the form KEY=VALUE."""
    key, equals, _ = text.partition("=")
    if not (key.strip() and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, not {text!r}")
    return text


def test_arguments(parser: argparse.ArgumentParser) -> None:
    kata_ids(parser)
    impl(parser, "what is in src")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")


def status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")


def stubs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 if one is not current"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace written files too (kept under .kata/kept)"
    )


def gate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--impl",
        action="append",
        nargs="+",
        metavar="NAME|PATH",
        help="whose code. Several folders after one --impl: a verdict for each, isolated; a "
        "further --impl is a layer below each of them (--impl A B --impl reference). A folder that "
        "is a checkout is compared with upstream itself and judged alone; one that holds "
        "recsys/... lies over this checkout's src (default: src)",
    )
    parser.add_argument(
        "--against",
        metavar="REF",
        help="the upstream tag or commit whose specs judge (default: the tag of this version)",
    )
    parser.add_argument(
        "--require",
        action="append",
        metavar="WHAT",
        help="movielens, gpu or both with a comma: red where that was not run",
    )
    parser.add_argument("--json", action="store_true", help="a JSON line for each folder")
    parser.add_argument(
        "--timeout",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="for each process of the run (default: 900)",
    )


def new_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="like sequence_tower; the number is given")
    parser.add_argument(
        "--file",
        required=True,
        metavar="FILE",
        help="the learner file, relative to src/recsys: models/sequence.py",
    )


def check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strength",
        nargs="*",
        metavar="NN",
        help="only this: try every mistake, alternate and mutant against the specs (default: all)",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="bring what is generated up to date: diagnosis, transcripts, the strength table",
    )
    parser.add_argument(
        "--faults",
        nargs="*",
        metavar="AREA",
        help="only this: every fault, at length; writes docs/faults.md (default: all areas: data, "
        "training, service, harness, determinism, supply, flakiness)",
    )
    parser.add_argument(
        "--repeat", type=int, default=3, help="with --faults: short runs under load (default: 3)"
    )
    parser.add_argument(
        "--whole", type=int, default=0, help="with --faults: runs of all tests under load"
    )


def data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="ml-100k, ml-1m, ... or a folder or zip file")


def culprit_arguments(parser: argparse.ArgumentParser) -> None:
    impl(parser, "mine")
    parser.add_argument("--data", default="synthetic", metavar="NAME|PATH", help="as for kata run")
    parser.add_argument("--seed", type=int, default=0, help="of training (default: 0)")
    parser.add_argument(
        "--cost",
        action="append",
        choices=["step", "evaluate", "encode", "service"],
        help="which part makes this slow; may be repeated",
    )
    parser.add_argument("--quick", action="store_true", help="swap only the parts that are red")
    parser.add_argument("--json", action="store_true", help="for programs")


GROUPS = {
    "Every day": [
        Command("", "harness.board", "The board: where you are and what comes next"),
        Command("watch", "harness.watch", "The verdict on each save", watch_arguments),
        Command("hint", "harness.hint", "The next hint for the first red rung", one_kata),
        Command("run", "harness.run", "Train and judge the whole pipeline", run_arguments),
    ],
    "Now and then": [
        Command("test", "harness.runner", "Run katas and record how they went", test_arguments),
        Command("review", "harness.review", "What a reviewer would say of your code", review),
        Command("guide", "harness.guide", "A kata's guide; 00 is the overview", one_kata),
        Command(
            "solution",
            "harness.solution",
            "The reference beside your file, once the kata passes",
            solution_arguments,
        ),
        Command("report", "harness.logbook", "How far you are, in progress/ for your mentor"),
        Command("brief", "harness.brief", "What a tutor needs, and nothing of the answer", brief),
        Command("status", "harness.board", "The board, for programs: --json", status_arguments),
        Command(
            "reset",
            "harness.reset",
            "A fresh stub of a kata; your file is kept beside it",
            one_kata,
        ),
        Command("gate", "harness.gate", "Whether the whole system passes, for CI", gate_arguments),
        Command(
            "culprit", "harness.culprit", "Which part costs the system what", culprit_arguments
        ),
        Command("bench", "harness.bench", "How fast and how good things are", bench_arguments),
        Command("data", "harness.data", "Fetch a data set and check it", data_arguments),
        Command("doctor", "harness.doctor", "What this machine can do, and what is missing"),
    ],
    "For authors": [
        Command("new", "harness.new", "A new kata to fill, with all that it needs", new_arguments),
        Command("check", "harness.check", "Run the tests of this repository", check_arguments),
        Command("stubs", "harness.stubs", "Bring the stubs up to date", stubs_arguments),
    ],
}
