"""The whole system judged: the learner's recommender and the reference side by side.

Both run in processes of their own (harness/candidate.py) with the same data, seeds and budget. The
test rows never reach them; what they rank comes back as files and is judged here by
harness/evaluator.py. CPU time is read from outside, round by round in turns.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import encoders, overlay
from harness.paths import FIXTURES, REFERENCE, ROOT, SRC

KATA = "10_integration"
MARGINS = FIXTURES / KATA / "margins.json"
SEEDS = (0, 1)
TIMEOUT = 900.0  # seconds for one request: ml-100k on a busy machine takes some
ROUNDS = 7
MORE = 3  # times as many before a cost is called too high, unless it is by far: machines are noisy
WORK = {"step": "training", "evaluate": "evaluation", "encode": "text encoding"}
SERVICE = "service"
RATIO = 1.5  # of the reference's CPU time (on a GPU: the device's time)
SPEEDUP = 0.8  # of the reference's, compiled over eager, on a GPU
OPERATIONS = 3.0  # of the reference's in a training step
SYNCS = 0.5  # more in a step of training/, which needs none: one in every step is 1
LOOKS = 8  # more in a step elsewhere: a right lookup may ask for a size
OTHERS = 0.01  # of the users: an index sums in another order, and may swap two near-equal items
REQUESTS = 80  # in a round of the service
FIGURES = {
    "final": "NDCG@10 of the final lists",
    "retrieval": "NDCG@10 of retrieval",
    "recall": "recall of retrieval",
    "logloss": "log loss of the ranker",
    "cold": "recall@10 of cold items",
}
LOWER = ("logloss",)  # figures of which less is better

Launch = Callable[[list[str], Path], subprocess.Popen]  # a command, a folder it may write in


# --- what is run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Data without its test rows, written for the candidates, and what they are judged by."""

    data: str
    path: Path  # of the data; beside it the configuration
    cold: Path  # the same without the rows of cold items
    dataset: Any  # whole
    split: Any
    cold_split: Any
    config: dict[str, Any]
    seen: tuple[Any, Any]


def make_job(folder: Path, data: str = "synthetic", seed: int = 0, **options: Any) -> Job:
    """Prepare a verdict on some data in `folder`.

    Args:
        data: as for `kata run`. seed: of generated data and of which items are cold.
        options: of the retrieval's configuration, as list_length=20; for tests.
    """
    if not overlay.is_installed():
        overlay.install([overlay.Root("reference", REFERENCE), overlay.Root("src", SRC)])
    import dataclasses

    import numpy as np

    from harness.candidate import save
    from harness.run import load_config
    from recsys.data.splits import item_cold_start, make_split

    _, config = load_config("system", "system", [])
    config["text"] = {"encoder": str(encoders.TINY), "cache": str(folder / "text")}
    config["retrieval"] |= options
    size, larger = config.pop("system"), config.pop("larger")
    if data != "synthetic":
        config["retrieval"]["select_epochs"] = larger.pop("select_epochs")
        config["retrieval"]["fit"] |= larger
    dataset = world(data, seed, size)
    split = make_split(dataset, config["split"], ties=config["ties"])
    cold = item_cold_start(dataset, fraction=config["cold_start"]["fraction"], seed=0)

    def without(rows: Any) -> tuple[Any, Any]:
        """The data set without some rows, and where the others went."""
        kept = np.ones(dataset.num_interactions, dtype=bool)
        kept[rows] = False
        columns = {n: getattr(dataset, n)[kept] for n in ("user", "item", "rating", "time")}
        return dataclasses.replace(dataset, **columns), np.cumsum(kept) - 1

    known, place = without(split.test)
    parts = {"train": place[split.train], "validation": place[split.validation]}
    path, cold_path = folder / "data.npz", folder / "cold.npz"
    save(path, known, parts)
    save(cold_path, without(cold.test)[0], {})
    path.with_suffix(".json").write_text(json.dumps(config), encoding="utf-8")
    from harness import evaluator

    rows = np.concatenate([split.train, split.validation])
    seen = evaluator.seen_offsets(dataset.user[rows], dataset.item[rows], dataset.num_users)
    return Job(data, path, cold_path, dataset, split, cold, config, seen)


def world(data: str, seed: int, size: dict[str, int]) -> Any:
    """The data set; of a generated one the first rows of each user."""
    import dataclasses

    import numpy as np

    from recsys.data.load import load
    from recsys.data.splits import chronological_order
    from recsys.data.synthetic import generate

    if data != "synthetic":
        return load(data)
    made = generate(seed=seed, users=size["users"], items=size["items"])
    order = chronological_order(made)
    place = np.arange(len(order)) - np.searchsorted(made.user[order], made.user[order])
    rows = np.sort(order[place < size["rows"]])
    columns = {name: getattr(made, name)[rows] for name in ("user", "item", "rating", "time")}
    return dataclasses.replace(made, **columns)


# --- the processes --------------------------------------------------------------------------------


class CandidateError(Exception):
    """A candidate failed; `kind` and `where` are of the learner's exception."""

    def __init__(self, said: str, kind: str = "", where: Sequence[str] = ()) -> None:
        super().__init__(said)
        self.kind, self.where = kind, list(where)


def plain_launch(command: list[str], folder: Path) -> subprocess.Popen:
    """Start a candidate in a session of its own, with nothing that leads to data."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("KATA_", "PYTEST_"))}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder)}
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


class Side:
    """A candidate's process."""

    def __init__(self, name: str, roots: Sequence[Path], folder: Path, launch: Launch) -> None:
        folder.mkdir()
        self.name, self.folder = name, folder
        self.process = launch(["-m", "harness.candidate", *map(str, roots)], folder)
        self.rest = b""

    def ask(self, do: str, timeout: float = TIMEOUT, **request: Any) -> Any:
        """The value of a request.

        Raises:
            CandidateError: the candidate raised, ended or took too long.
        """
        self.tell(do, **request)
        return self.hear(timeout)

    def tell(self, do: str, **request: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended: `hear` says so

    def hear(self, timeout: float = TIMEOUT) -> Any:
        assert self.process.stdout is not None
        end, pipe = time.monotonic() + timeout, self.process.stdout.fileno()
        while b"\n" not in self.rest:
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise CandidateError(f"it took longer than {timeout:g} s", "TimeoutError")
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                code = self.process.wait()
                raise CandidateError(f"its process ended with code {code}", "SystemExit")
            self.rest += chunk
            if len(self.rest) > 1 << 20:
                raise CandidateError("its process answered more than 1 MB", "OverflowError")
        line, _, self.rest = self.rest.partition(b"\n")
        try:
            found = json.loads(line)
            if "error" in found:
                raise CandidateError(str(found["said"]), str(found["error"]), found["where"])
            return found["value"]
        except (ValueError, KeyError, TypeError):
            raise CandidateError(f"its process answered {line[:80]!r}") from None

    def cpu(self) -> float:
        """CPU seconds of the process and of what it started so far, as the system counts them."""
        clock = (~self.process.pid << 3) | 2  # Linux: clock_getcpuclockid(3)
        return time.clock_gettime(clock) + of_others(self.process.pid)

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self.process.wait()


def of_others(leader: int) -> float:
    """CPU seconds of the processes of a session that are not its leader, ended ones included."""
    ticks = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = Path("/proc", name, "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it has ended
        fields = text.rpartition(")")[2].split()  # from the third on, see proc_pid_stat(5)
        if int(fields[3]) == leader:
            own, waited_for = fields[11:13], fields[13:15]
            ticks += sum(map(int, waited_for if int(name) == leader else own + waited_for))
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def side(name: str, roots: Sequence[Path], folder: Path, launch: Launch) -> Any:
    made = Side(name, roots, folder, launch)
    try:
        yield made
    finally:
        made.close()


# --- how good -------------------------------------------------------------------------------------


class Unfit(Exception):
    """Lists that cannot be judged: `rule` is the rung that they break."""

    def __init__(self, rule: str, said: str) -> None:
        super().__init__(said)
        self.rule = rule


def judge(job: Job, out: Path, cold: bool) -> dict[str, Any]:
    """Per-user figures of one run, from its raw lists.

    Returns:
        figure -> (users,) values; "logloss" with NaN where the candidates lack the target, "cold"
        for users who chose a cold item; "popularity": NDCG@10 of popular items; "served": the raw
        ids that go with the lists.

    Raises:
        Unfit: what came back is no lists, or holds seen items, or is not what is served.
    """
    import numpy as np

    from harness import evaluator

    try:
        with np.load(out, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise Unfit("lists", f"the lists cannot be read: {error}") from None
    dataset, split, seen = job.dataset, job.split, job.seen
    users, target = dataset.user[split.test], dataset.item[split.test]
    length = job.config["retrieval"]["list_length"]
    ranks = {}
    for stage in ("retrieval", "final"):
        items, scores = found[f"{stage}_items"], found[f"{stage}_scores"]
        try:
            sizes = {"num_users": dataset.num_users, "num_items": dataset.num_items}
            evaluator.check_lists(items, scores, seen=seen, length=length, **sizes)
        except evaluator.InvalidLists as error:
            rule = "seen" if "already seen" in str(error) else "lists"
            raise Unfit(rule, f"{stage}: {error}") from None
        ranks[stage] = evaluator.target_ranks(items[users], scores[users], target)
    if found["logits"].shape != found["retrieval_items"].shape:
        raise Unfit("lists", f"logits of shape {list(found['logits'].shape)}")
    same = np.sort(found["final_items"], 1) == np.sort(found["retrieval_items"], 1)
    if not same.all():
        raise Unfit("lists", "the final lists hold other items than retrieval's")
    shown = found["final_items"][:, : found["served"].shape[1]]
    wanted = np.where(shown < 0, -1, dataset.item_ids[shown])
    if found["served"].shape != wanted.shape:
        raise Unfit("served", f"answers of shape {list(found['served'].shape)}")
    off = int((found["served"] != wanted).any(1).sum())
    if off > max(1, OTHERS * len(wanted)):
        raise Unfit("served", f"{off} of {len(wanted)} users are served other items")
    figures = {
        "final": evaluator.per_user(ranks["final"], "ndcg", 10),
        "retrieval": evaluator.per_user(ranks["retrieval"], "ndcg", 10),
        "recall": evaluator.per_user(ranks["retrieval"], "recall", length),
        "logloss": log_loss(found["retrieval_items"][users], found["logits"][users], target),
        "popularity": evaluator.per_user(popular_ranks(job), "ndcg", 10),
        "served": found["served"],
    }
    if cold:
        items, choice = found["cold_items"], job.cold_split
        known = np.isin(items, choice.cold_items).all()
        if items.shape != (dataset.num_users, min(10, len(choice.cold_items))) or not known:
            raise Unfit("cold", "cold start lists hold other than ten cold items a user")
        user, item = dataset.user[choice.test], dataset.item[choice.test]
        figures["cold"] = evaluator.recall_of_lists(items, user, item, 10)
    return figures


def popular_ranks(job: Job) -> Any:
    """Ranks of the targets in the lists of popular items."""
    import numpy as np

    from harness import evaluator

    rows = np.concatenate([job.split.train, job.split.validation])
    length = job.config["retrieval"]["list_length"]
    users, target = job.dataset.user[job.split.test], job.dataset.item[job.split.test]
    items, scores = evaluator.popularity_lists(
        job.dataset.item[rows], job.dataset.num_items, job.seen, length
    )
    return evaluator.target_ranks(items[users], scores[users], target)


def log_loss(items: Any, logits: Any, target: Any) -> Any:
    """-log of the softmax's share of the target among a user's candidates, at most 12; or NaN."""
    import numpy as np

    z = np.where((items < 0) | np.isnan(logits), -np.inf, logits).astype(np.float64)
    z = np.clip(z, -1e6, 1e6)
    own = np.where(items == target[:, None], z, -np.inf).max(1)
    top = z.max(1)
    loss = np.log(np.exp(z - top[:, None]).sum(1)) + top - own
    return np.where((items == target[:, None]).any(1), loss.clip(max=12.0), np.nan)


@dataclass
class Finding:
    """One thing that the verdict looks at."""

    name: str
    says: str  # what was found, in a line
    good: bool | None  # None: not run, and `says` why
    detail: dict[str, Any] = field(default_factory=dict)


def compare(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[Finding]:
    """Hold figures of the same seeds against each other and against popularity.

    A figure is red where it is worse by more than what chance explains: `z` standard errors of the
    difference between two runs of the reference that differ in their seed alone (see
    `reference_tests/integration`), over as many users and runs as there are here.
    """
    import numpy as np

    margins = json.loads(MARGINS.read_text(encoding="utf-8"))
    findings = []
    for name, words in FIGURES.items():
        pairs = [(a[name], b[name]) for a, b in zip(mine, theirs, strict=True) if name in a]
        if not pairs:
            continue
        sign = -1 if name in LOWER else 1
        gaps = [sign * (a - b) for a, b in pairs]
        values = np.concatenate(gaps)
        count = int((~np.isnan(values)).sum())
        gap = float(np.nanmean(values)) if count else -math.inf
        own, reference = (float(np.nanmean([p[i] for p in pairs])) for i in (0, 1))
        margin = margins["z"] * margins["spread"][name] / math.sqrt(max(count, 1))
        change = (own - reference) / reference if reference else 0.0
        says = f"{words} {own:.4f}, the reference's {reference:.4f} ({change:+.1%})"
        says += f"; chance explains {margin / reference:.1%}"
        good = math.isfinite(own) and gap >= -margin
        detail = {"value": own, "reference": reference, "change": change, "gap": gap}
        findings.append(Finding(name, says, good, detail | {"margin": margin, "z": gap / margin}))
    gain = np.mean([a["final"] - a["popularity"] for a in mine], axis=0)
    low = float(gain.mean() - 1.96 * gain.std() / math.sqrt(len(gain)))
    popular = float(mine[0]["popularity"].mean())
    says = f"NDCG@10 {popular + gain.mean():.4f}, of popular items {popular:.4f}; gain at least "
    says += f"{low:+.4f} (95 %)"
    findings.append(Finding("popularity", says, low > 0, {"value": popular, "gain": low}))
    return findings


def failed(name: str, error: CandidateError | Unfit) -> Finding:
    """The finding that a side could not be judged."""
    if isinstance(error, Unfit):
        return Finding(error.rule, str(error), False, {"rule": error.rule})
    where = f" in {error.where[0]}" if error.where else ""
    said = " ".join(str(error).split())
    says = f"{error.kind + ': ' if error.kind else ''}{said}{where}"
    return Finding(name, says, False, {"error": error.kind, "said": str(error)})


def run_quality(
    sides: Sequence[Side], job: Job, seed: int, device: str, cold: bool
) -> list[dict[str, Any]]:
    """One run of each side at the same time, and its figures."""
    outs = [side.folder / f"lists-{seed}.npz" for side in sides]
    request = {"job": str(job.path), "seed": seed, "device": device}
    for side, out in zip(sides, outs, strict=True):
        side.tell("quality", **request, out=str(out), cold=str(job.cold) if cold else None)
    for side in sides:
        side.hear()
    return [judge(job, out, cold) for out in outs]


# --- how fast -------------------------------------------------------------------------------------


def speed(
    mine: Side,
    theirs: Side,
    job: Job,
    device: str,
    served: Sequence[Any],
    *,
    what: Sequence[str] = (*WORK, SERVICE),
    rounds: int = ROUNDS,
) -> list[Finding]:
    """Ratios of what both sides cost, in turns; counts of a training step.

    Args:
        served: of each side, what the service has to answer (see `judge`).

    Raises:
        CandidateError: a side failed. Unfit: its service answers other items.
    """
    sides = (mine, theirs)
    ports = [each.ask("prepare", job=str(job.path), device=device) for each in sides]
    users = job.dataset.user_ids[:64].tolist()
    wanted = [dict(zip(users, lists.tolist(), strict=False)) for lists in served]
    spent: dict[str, list[tuple[float, ...]]] = {name: [] for name in what}
    doubtful = list(spent)
    for turn in range(MORE * rounds):
        if turn % rounds == 0 and turn > 0:
            doubtful = [name for name in doubtful if RATIO < ratio_of(spent[name]) < 2 * RATIO]
        for name in doubtful:
            both = [0.0, 0.0]
            for i in (0, 1) if turn % 2 else (1, 0):
                both[i] = cost(sides[i], name, ports[i], wanted[i], device)
            spent[name].append(tuple(both))
    findings = []
    for name, taken in spent.items():
        own, reference = (statistics.median(r[i] for r in taken) for i in (0, 1))
        ratio = ratio_of(taken)
        unit = "device ms" if device != "cpu" and name != SERVICE else "CPU ms"
        says = f"{WORK.get(name, name)} costs {ratio:.2f} times the reference's "
        says += f"({own * 1e3:.3g} and {reference * 1e3:.3g} {unit} a round)"
        detail = {"ratio": ratio, "rounds": [list(r) for r in taken]}
        findings.append(Finding(f"speed_{name}", says, ratio <= RATIO, detail))
    if "step" not in what:
        return findings
    own, reference = (each.ask("count", device=device) for each in sides)
    place = f", most in {':'.join(map(str, own['most'][:2]))}" if own["most"] else ""
    says = f"a training step has {own['operations']:.0f} operations, the reference's "
    says += f"{reference['operations']:.0f}{place}"
    good = own["operations"] <= OPERATIONS * reference["operations"]
    findings.append(Finding("launches", says, good, {"mine": own, "reference": reference}))
    findings.append(waits(own, reference))
    if device == "cpu":
        says = "not run: a compiler's gain is decided on a GPU, and there is none"
        return [*findings, Finding("compiled", says, None)]
    own, reference = (each.ask("speedup", device=device) for each in sides)
    says = f"compiled the cross network is {own:.2f} times as fast, the reference's {reference:.2f}"
    return [*findings, Finding("compiled", says, own >= SPEEDUP * reference, {})]


def ratio_of(taken: Sequence[tuple[float, ...]]) -> float:
    """Ours to the reference's: of the medians or the median within a round, whichever is less."""
    own, reference = (statistics.median(each[i] for each in taken) for i in (0, 1))
    return min(own / reference, statistics.median(a / b for a, b in taken))


def waits(own: dict[str, Any], reference: dict[str, Any]) -> Finding:
    """How often a training step waits for the device, as `Candidate.count` has it."""
    if own["wrong"]:
        return Finding("syncs", f"on a GPU training would fail: {own['wrong']}", False)
    if own["unknown"]:
        return Finding("syncs", f"not run: waits of a training step: {own['unknown']}", None)
    says = f"a training step waits {own['syncs']:.2f} times for the device, "
    says += f"{own['loop_syncs']:.2f} of them in training/; "
    says += f"the reference's {reference['syncs']:.2f} and {reference['loop_syncs']:.2f}"
    good = own["loop_syncs"] <= reference["loop_syncs"] + SYNCS
    good = good and own["syncs"] <= reference["syncs"] + LOOKS
    return Finding("syncs", says, good, {})


def cost(side: Side, what: str, port: int, wanted: dict[int, list[int]], device: str) -> float:
    """What one round costs: CPU seconds, on a GPU seconds of the device (the service: CPU)."""
    measured = sys.platform.startswith("linux")
    before = side.cpu() if measured else 0.0
    if what != SERVICE:
        said = side.ask("time", what=what, device=device)
        return side.cpu() - before if measured and device == "cpu" else float(said)
    begin = time.process_time()
    try:
        asyncio.run(asked(port, wanted))
    except (OSError, EOFError, ValueError, asyncio.TimeoutError) as error:
        raise CandidateError(f"the service gave no answer: {error}", "ServiceError") from None
    # elsewhere than on Linux the clients' own time stands in: it grows with the answers' alone
    return (side.cpu() - before if measured else time.process_time() - begin) / REQUESTS


async def asked(port: int, wanted: dict[int, list[int]], clients: int = 4) -> None:
    """A round of requests to the service at `port`, for users who are to get `wanted` items."""
    from harness import load

    users, others = list(wanted), set()

    async def client(number: int) -> None:
        connection = await asyncio.open_connection("127.0.0.1", port)
        for i in range(number, REQUESTS, clients):
            user = users[i % len(users)]
            body = json.dumps({"user_id": user, "k": 10}).encode()
            status, answer = await load.ask(connection, load.message("POST", "/recommend", body))
            if problem := load.wrong(status, answer, 10):
                raise ValueError(problem)
            items = [item["item_id"] for item in json.loads(answer)["items"]]
            if items != [item for item in wanted[user] if item >= 0]:
                others.add(user)
        connection[1].close()

    await asyncio.wait_for(asyncio.gather(*map(client, range(clients))), 60)
    if len(others) > max(1, OTHERS * len(users)):
        raise Unfit("served", f"the service answers {len(others)} of {len(users)} users otherwise")


# --- the verdict ----------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What was found; green if nothing is bad. What was not run is neither."""

    data: str
    seeds: list[int]
    device: str
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def green(self) -> bool:
        return bool(self.findings) and all(f.good is not False for f in self.findings)

    @property
    def reds(self) -> list[Finding]:
        return [f for f in self.findings if f.good is False]

    def as_json(self) -> dict[str, Any]:
        """For programs: {"green", "data", "seeds", "device", "seconds", "findings": [{"name",
        "says", "good" (null: not run), "detail"}]}."""
        return {"green": self.green, **vars(self), "findings": [vars(f) for f in self.findings]}


def verdict(
    learner: Sequence[str | Path],
    *,
    reference: Sequence[str | Path] = (REFERENCE, SRC),
    data: str = "synthetic",
    data_seed: int = 0,
    seeds: Sequence[int] = SEEDS,
    device: str = "cpu",
    timings: bool = True,
    launch: Launch = plain_launch,
    launch_reference: Launch = plain_launch,
) -> Verdict:
    """Run and judge a learner's system beside the reference.

    Args:
        learner, reference: folders that hold `recsys/...`, the first wins, each set complete.
        data: as for `kata run`. data_seed: of generated data; seeds: of training.
        timings: whether costs are compared too.
        launch: starts the learner's process, given the arguments of python (`-m ...`) and a folder
            that it may write in; its standard streams must be pipes, and it must lead a session.
            It has to be able to read `ROOT/harness`, the roots, the text encoder in fixtures/,
            and the folder above the one it may write in.

    Raises:
        recsys.data.errors.DataError: no such data.
    """
    begin = time.monotonic()
    made = Verdict(data, list(seeds), device)
    with tempfile.TemporaryDirectory(prefix="kata-system-") as name, ExitStack() as stack:
        folder = Path(name).resolve()
        job = make_job(folder, data, data_seed)
        mine = stack.enter_context(side("mine", list(map(Path, learner)), folder / "a", launch))
        theirs = stack.enter_context(
            side("reference", list(map(Path, reference)), folder / "b", launch_reference)
        )
        try:
            runs = [run_quality((mine, theirs), job, s, device, s == seeds[0]) for s in seeds]
            made.findings += compare([own for own, _ in runs], [other for _, other in runs])
        except (CandidateError, Unfit) as error:
            made.findings.append(failed("runs", error))
        if timings and made.green:
            try:
                served = [figures["served"] for figures in runs[-1]]
                made.findings += speed(mine, theirs, job, device, served)
            except (CandidateError, Unfit) as error:
                made.findings.append(failed("timings", error))
    made.seconds = time.monotonic() - begin
    return made


def installed() -> list[Path]:
    """The folders of the implementation in force in this process."""
    return [root.path for root in overlay.installed()]


