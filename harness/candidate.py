"""One side of the system's verdict: runs `recsys` on what it is given and answers in files.

    python -m harness.candidate ROOT...

reads requests from its standard input, one JSON object a line, and answers each with a line: each
method of `Candidate` is a request. The process that asks is `harness/system.py`. What may be judged
is written as arrays; nothing of it is trusted there, and no test row was ever here.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import message, overlay

STAGES = ("retrieval", "final")
SERVED = 10  # items asked of the recommender for each user
TRAINING = "/recsys/training/"  # the files whose contracts leave no wait in a step
COUNTING = 300.0  # seconds, of a wrapped run on a busy machine


def save(path: Path, dataset: Any, parts: dict[str, Any]) -> None:
    """Write a data set and arrays of rows (a split) without pickling anything."""
    import numpy as np

    columns = {name: getattr(dataset, name) for name in COLUMNS}
    columns |= {f"user_{name}": column for name, column in dataset.user_features.items()}
    columns |= {f"part_{name}": rows for name, rows in parts.items()}
    meta = {
        "name": dataset.name,
        "titles": dataset.titles,
        "genre_names": dataset.genre_names,
        "sizes": dataset.user_feature_sizes,
    }
    np.savez(path, meta=np.array(json.dumps(meta)), **columns)


COLUMNS = ("user", "item", "rating", "time", "user_ids", "item_ids", "years", "genres")


def load(path: Path) -> tuple[Any, dict[str, Any]]:
    """What `save` wrote: the data set and the parts."""
    import numpy as np

    from recsys.data.dataset import Dataset

    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    sizes = meta.pop("sizes")
    dataset = Dataset(
        **{name: arrays[name] for name in COLUMNS},
        **meta,
        user_features={name: arrays[f"user_{name}"] for name in sizes},
        user_feature_sizes=sizes,
    )
    parts = {n.removeprefix("part_"): a for n, a in arrays.items() if n.startswith("part_")}
    return dataset, parts


class Candidate:
    """The recommender under `recsys`, and what its timings need, made when first asked for."""

    def __init__(self) -> None:
        self.timed: dict[str, Any] = {}

    # --- how good -----------------------------------------------------------------------------

    def quality(self, job: str, seed: int, device: str, out: str, cold: str | None = None) -> None:
        """Run the pipeline, and the cold start on data without cold items; write the raw lists."""
        import numpy as np
        import torch

        settings = settings_of(job)
        dataset, split = split_of(job)
        settings["text"]["cache"] = str(Path(out).parent / "text")
        where = torch.device(device)
        found: dict[str, Any] = {}
        from recsys import pipeline

        result = pipeline.run(dataset, split, settings, seed=seed, device=where, log=silent)
        for stage in STAGES:
            found[f"{stage}_items"] = result[stage]["items"]
            found[f"{stage}_scores"] = result[stage]["scores"]
        found["logits"] = result["ranking"]["logits"]
        self.recommender = result["recommender"]
        found["served"] = served(self.recommender, dataset.user_ids)
        if cold is not None:
            without, _ = load(Path(cold))
            given = pipeline.run_cold_start(without, settings, seed=0, device=where, log=silent)
            if given is None:
                raise TypeError("run_cold_start gave None, expected lists of the cold items")
            found["cold_items"] = given["items"]
        plain: dict[str, Any] = {name: np.asarray(array) for name, array in found.items()}
        wrong = [name for name, array in plain.items() if array.dtype.kind not in "iuf"]
        if wrong:
            raise TypeError(f"{wrong[0]} is no array of numbers: {plain[wrong[0]].dtype}")
        np.savez(out, **plain)

    # --- how fast -----------------------------------------------------------------------------

    def prepare(self, job: str, device: str) -> int:
        """Make what is timed, once, after `quality`; the port of the service."""
        import contextlib

        import torch

        settings = settings_of(job)
        dataset, split = split_of(job)
        where = torch.device(device)
        from harness import load as clients
        from recsys import pipeline
        from recsys.data.features import item_texts
        from recsys.evaluation.metrics import full_ranking, list_metrics
        from recsys.inference.serving import create_app
        from recsys.models.text import load_encoder

        retrieval = settings["retrieval"]

        batch_size = retrieval["fit"]["batch_size"]
        few = split.train[: 5 * batch_size]  # are enough to count

        def training(epochs: int, device: torch.device, rows: Any = few) -> Callable[[], None]:
            data = pipeline.RetrievalData(dataset, rows, retrieval, device)

            def train() -> None:
                pipeline.train_retrieval(data, retrieval, seed=0, device=device, epochs=epochs)

            return train

        draw = torch.Generator().manual_seed(0)
        scores = torch.randn(256, 4000, generator=draw).to(where)
        seen = torch.randint(4000, (256 * 8,), generator=draw).to(where)
        offsets = torch.arange(0, 256 * 8 + 1, 8, device=where)
        target = torch.randint(4000, (256,), generator=draw).to(where)

        def evaluate() -> None:
            for _ in range(8):
                lists = full_ranking(
                    lambda i: scores[i], 256, seen=(seen, offsets), k=10, chunk_size=64
                )
                list_metrics(*lists, target)

        encoder = load_encoder(settings["text"]["encoder"], device=where)
        texts = item_texts(dataset)
        self.training = training
        positions = pipeline.RetrievalData(dataset, few, retrieval, where).positions
        self.steps = max(1, len(positions) // batch_size)  # of an epoch on few rows
        self.timed = {
            "step": training(1, where, split.train),
            "evaluate": evaluate,
            "encode": lambda: encoder.encode(texts),
        }
        self.service = contextlib.ExitStack()
        address = self.service.enter_context(clients.running(create_app(self.recommender)))
        for work in self.timed.values():
            work()
        return int(address.rpartition(":")[2])

    def time(self, what: str, device: str) -> float:
        """Do one round of it; its CPU seconds, or on a GPU the device's by events."""
        import torch

        if device == "cpu":
            begin = time.process_time()
            self.timed[what]()
            return time.process_time() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        self.timed[what]()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000

    def count(self, device: str) -> dict[str, Any]:
        """Dispatched operations and synchronisations of a training step, and where they are.

        Without a GPU a device that is not there stands in for one: what right code looks at only
        where it is on the CPU is no wait. `wrong` is what would fail there, `unknown` why nothing
        is known of it (the counts are the CPU's then).
        """
        import torch

        from harness import cost, devices

        wrong = unknown = ""
        if device == "cpu":
            ran = [devices.other_device_findings(partial(self.training, n), seconds=COUNTING)
                   for n in (1, 2)]  # fmt: skip
            wrong = next((found.text for run in ran for found in run.findings), "")
            unknown = next((run.inconclusive for run in ran if run.inconclusive), "")
            one, two = (run.cost for run in ran)
        if device != "cpu" or wrong or unknown:
            where = torch.device(device)
            one, two = (cost.count(self.training(n, where)) for n in (1, 2))
        more = two.by_place
        more.subtract(one.by_place)
        place = max(more, key=lambda each: (each is not None, more[each]), default=None)
        waits = Counter(two.sync_places)
        waits.subtract(Counter(one.sync_places))
        inside = sum(n for p, n in waits.items() if p is not None and TRAINING in p.file)
        return {
            "operations": (two.operations - one.operations) / self.steps,
            "syncs": sum(waits.values()) / self.steps,
            "loop_syncs": inside / self.steps,
            "most": [message.shown(place.file), place.line, place.function] if place else None,
            "wrong": wrong,
            "unknown": unknown,
        }

    def speedup(self, device: str) -> float:
        """Eager over compiled seconds of the ranking model's cross network on the device."""
        import statistics

        import torch

        from recsys.inference.compiled import compile_model
        from recsys.models.cross import CrossNetwork

        torch.manual_seed(0)
        model = CrossNetwork(96, 3).to(device).eval()
        rows = torch.randn(4096, 96, device=device)
        seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
        with torch.no_grad():
            ways = {"eager": model, "compiled": compile_model(model)}
            for _ in range(10):
                for name, way in ways.items():
                    self.timed[name] = lambda way=way: [way(rows) for _ in range(20)]
                    seconds[name].append(self.time(name, device))
        eager, compiled = (statistics.median(seconds[name][3:]) for name in ways)
        return eager / compiled


def settings_of(job: str) -> dict[str, Any]:
    """The configuration of a job; each side caches its text vectors for itself."""
    settings = json.loads(Path(job).with_suffix(".json").read_text(encoding="utf-8"))
    settings["text"]["cache"] = os.path.join(tempfile.gettempdir(), "text")
    return settings


def split_of(job: str) -> tuple[Any, Any]:
    """The data set of a job and its split, whose test part is empty."""
    import numpy as np

    from recsys.data.splits import Split

    dataset, parts = load(Path(job))
    nothing = np.zeros(0, dtype=np.int64)
    return dataset, Split("leave_last_one_out", "row", **parts, test=nothing)


def served(recommender: Any, user_ids: Any) -> Any:
    """Raw item ids that the service would answer with, (users, SERVED), -1 for none."""
    import numpy as np

    answers = recommender.recommend_batch(user_ids.tolist(), [SERVED] * len(user_ids))
    lists = np.full((len(user_ids), SERVED), -1, dtype=np.int64)
    for row, answer in enumerate(answers):
        found = [item for item, *_ in answer][:SERVED]
        lists[row, : len(found)] = found
    return lists


def silent(stage: str, tag: str, value: float, step: int) -> None:
    """A log that nobody reads."""


# --- the process ----------------------------------------------------------------------------------

def answered(call: Callable[[], Any]) -> dict[str, Any]:
    """What came of a call: its value, or the error in words and the learner's line."""
    try:
        return {"value": call()}
    except BaseException as error:
        cause = error.__cause__ if type(error).__name__ == "LearnerError" else error
        facts = message.place(message.frames((cause or error).__traceback__))
        where = [text for _, text in facts]
        said = str(cause or error).strip()
        return {"error": type(cause or error).__name__, "said": said[:2000], "where": where}


def once(roots: Sequence[str], request: dict[str, Any], answer: str) -> int:
    """One request in a process of its own (see harness/warm.py); the answer goes into a file."""
    install(roots)
    name = request.pop("do")
    found = answered(lambda: getattr(Candidate(), name)(**request))
    Path(answer).write_text(json.dumps(found), encoding="utf-8")
    return 0


def install(roots: Sequence[str]) -> None:
    """`recsys` from these roots, on one thread."""
    import torch

    torch.set_num_threads(1)  # more threads only wait for each other at this size
    overlay.install([overlay.Root(Path(root).name, Path(root)) for root in roots])


def main(roots: Sequence[str]) -> None:
    """Answer requests until there are no more."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)  # nobody who prints may spoil the answers
    install(roots)
    candidate = Candidate()
    for line in requests:
        request = json.loads(line)
        name = request.pop("do")
        found = answered(lambda: getattr(candidate, name)(**request))  # noqa: B023
        answers.write(json.dumps(found) + "\n")
        answers.flush()
    os._exit(0)  # a service may still have threads


if __name__ == "__main__":
    main(sys.argv[1:])
