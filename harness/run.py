"""`kata run`: the whole pipeline on some data, judged and reported."""

from __future__ import annotations

import argparse
import copy
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from harness import encoders, evaluator, load, memory, message, overlay, report
from harness.errors import LearnerError, UsageError
from harness.paths import CONFIGS, ROOT, STATE
from harness.phases import Phases
from harness.progress import Reporter

LIST_LENGTH = 100  # recall@100 needs that many
STAGES = ("retrieval", "final")  # each gives ranked lists


def main(args: argparse.Namespace) -> int:
    """Run the pipeline; 0, or 1 if the learner's code failed."""
    memory.keep()
    impl = args.impl or ["mine"]
    overlay.install(overlay.resolve(impl, Path.cwd()))
    out = _out_folder(args)
    from recsys.data.errors import DataError  # provided by the checkout, after the overlay

    try:
        result = execute(
            data=args.data,
            impl=impl,
            config_name=args.config,
            overrides=args.set or [],
            seed=args.seed,
            device=args.device,
            out=out,
        )
    except DataError as error:
        raise UsageError(str(error)) from None
    except LearnerError as error:
        red = message.explain(error.__cause__ or error, None, Path(__file__))
        red.title = "The run stopped: the code of the recommender failed"
        print("\n" + "\n".join(message.screen(red)), file=sys.stderr)
        return 1
    report.show(result, out)
    return 0


def execute(
    *,
    data: str,
    impl: list[str],
    config_name: str | None,
    overrides: list[str],
    seed: int,
    device: str,
    out: Path,
) -> dict[str, Any]:
    """Load, train, judge, write `report.json`, `report.md` and plots to `out`; the report."""
    from recsys.data.load import load as load_data
    from recsys.data.splits import make_split

    started = time.perf_counter()
    phases = Phases()
    torch_device = resolve_device(device)
    one_thread(torch_device)
    out.mkdir(parents=True, exist_ok=True)
    with Reporter(out / "tensorboard") as reporter:
        reporter.stage(f"load {data}")
        with phases("load"):
            dataset = load_data(data, seed=seed, progress=reporter.download)
        config_path, config = load_config(config_name, dataset.name, overrides)
        if lacking := lacks(config):
            raise UsageError(
                f"{config_path} lacks {', '.join(lacking)}: a run needs the keys of default.yaml"
            )
        written = copy.deepcopy(config)  # as the file says, for the report
        reporter.track({**written, "data": dataset.name, "seed": seed}, out.name)
        encoder = use_encoder(config)
        split = make_split(dataset, config["split"], ties=config["ties"], seed=seed)
        pipeline = learner(_pipeline)
        with phases.of(pipeline):
            outcome = learner(
                lambda: pipeline.run(
                    dataset, split, config, seed=seed, device=torch_device, log=reporter.log
                )
            )
            with phases("cold start", whole=True):
                cold = learner(
                    lambda: pipeline.run_cold_start(
                        dataset, config, seed=seed, device=torch_device, log=reporter.log
                    )
                )
        reporter.stage("judge the ranked lists")
        with phases("judge"):
            judged = judge(dataset, split, outcome)
            judged["cold_start"] = judge_cold_start(dataset, config, cold, seed, encoder)
        with phases("serve"):
            judged["serving"] = serve(outcome["recommender"], config["serving"], reporter)
    seconds = time.perf_counter() - started
    result = {
        "impl": " ".join(impl),
        "parts": overlay.who(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seed": seed,
        "device": _device_name(torch_device),
        "config": {"file": _relative(config_path), **written},
        "versions": versions(),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time(), 2),
        "phases": phases.report(seconds),
        "data": {
            "name": dataset.name,
            "users": dataset.num_users,
            "items": dataset.num_items,
            "interactions": dataset.num_interactions,
            "split": split.name,
            "ties": split.ties,
            "notes": list(dataset.notes),
        },
        **judged,
    }
    result["retrieval"]["peak_memory_mb"] = peak_memory_mb(torch_device)
    examples = report.examples(dataset, split, outcome["final"]["items"])
    report.write(result, outcome, examples, out)
    return result | {"examples": examples}


def judge(dataset: Any, split: Any, outcome: dict[str, Any]) -> dict[str, Any]:
    """Every figure of the report that says how good the lists are."""
    known = np.concatenate([split.train, split.validation])
    seen = evaluator.seen_offsets(dataset.user[known], dataset.item[known], dataset.num_users)
    users, target = dataset.user[split.test], dataset.item[split.test]
    lists = {stage: (outcome[stage]["items"], outcome[stage]["scores"]) for stage in STAGES}
    try:
        for items, scores in lists.values():
            evaluator.check_lists(
                items,
                scores,
                num_users=dataset.num_users,
                num_items=dataset.num_items,
                seen=seen,
                length=LIST_LENGTH,
            )
    except evaluator.InvalidLists as error:
        raise LearnerError("recsys.pipeline.run") from error

    def ranks_of(items: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return evaluator.target_ranks(items[users], scores[users], target)

    popularity = ranks_of(
        *evaluator.popularity_lists(dataset.item[known], dataset.num_items, seen, LIST_LENGTH)
    )
    retrieval, final = (ranks_of(*lists[stage]) for stage in STAGES)
    candidates, logits = outcome["retrieval"]["items"], outcome["ranking"]["logits"]
    shuffled = np.random.default_rng(0).permuted(logits, axis=1)
    seconds = outcome["retrieval"]["train_seconds"]
    at_10 = [("hit_rate", 10), ("ndcg", 10), ("mrr", 10)]
    return {
        "baselines": {"popularity": figures(popularity, [("hit_rate", 10), ("ndcg", 10)])},
        "retrieval": {
            **figures(retrieval, [*at_10, ("recall", 100)]),
            "users": len(users),
            **intervals(retrieval, popularity, "popularity"),
            "epochs": outcome["retrieval"]["epochs"],
            "train_seconds": round(seconds, 3),
            "train_examples_per_second": round(outcome["retrieval"]["train_examples"] / seconds, 1),
        },
        "ranking": {
            **evaluator.ranking_figures(candidates[users], logits[users], target),
            "train_seconds": round(outcome["ranking"]["train_seconds"], 3),
            **{
                f"shuffled_{name}": value
                for name, value in figures(
                    ranks_of(*evaluator.reorder(candidates, shuffled)), [("ndcg", 10)]
                ).items()
            },
        },
        "final": {**figures(final, at_10), **intervals(final, retrieval, "retrieval")},
        "index": outcome["index"],
        "compile": outcome["compile"]
        or unmeasured(["graph_breaks", "graphs", "speedup"], "measure: false in the configuration"),
    }


def intervals(ranks: np.ndarray, below: np.ndarray, name: str) -> dict[str, Any]:
    """95 % intervals over users of NDCG@10 and of its paired gain over another stage."""
    ndcg, base = (evaluator.per_user(r, "ndcg", 10) for r in (ranks, below))
    return {
        "ndcg@10_interval": evaluator.bootstrap_interval(ndcg),
        f"gain_over_{name}_interval": evaluator.bootstrap_interval(ndcg - base),
    }


def judge_cold_start(
    dataset: Any,
    config: dict[str, Any],
    cold: dict[str, Any] | None,
    seed: int,
    encoder: str | None,
) -> dict[str, Any]:
    """Recall of items without any rating, beside what chance and plain text likeness give."""
    from recsys.data.splits import item_cold_start

    if cold is None:
        return {
            **unmeasured(["items", "recall@10"], "the configuration has no text encoder"),
            "encoder": None,
            "floors": {"random": None, "content": None},
        }
    split = item_cold_start(dataset, fraction=config["cold_start"]["fraction"], seed=seed)
    items = cold["items"]
    if not np.isin(items, split.cold_items).all() or len(items) != dataset.num_users:
        problem = evaluator.InvalidLists("cold start lists hold items that are not cold")
        raise LearnerError("recsys.pipeline.run_cold_start") from problem
    user, item = dataset.user[split.test], dataset.item[split.test]
    known = dataset.user[split.train], dataset.item[split.train]
    content = evaluator.content_lists(
        cold["text"], *known, dataset.num_users, split.cold_items, 10
    )
    recall = evaluator.recall_of_lists(items, user, item, 10)
    floor = evaluator.recall_of_lists(content, user, item, 10)
    return {
        "items": len(split.cold_items),
        "users": len(recall),
        "recall@10": float(recall.mean()),
        "encoder": encoder,
        "floors": {
            "random": min(1.0, 10 / len(split.cold_items)),
            "content": float(floor.mean()),
        },
        "gain_over_content_interval": evaluator.bootstrap_interval(recall - floor),
    }


def serve(recommender: Any, settings: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
    """Start the service on loopback and put a bounded load on it."""
    keys = ["requests", "errors", "p50_ms", "p99_ms"]
    keys += ["cpu_ms_per_request", "cpu_ms_per_empty_request"]
    if not settings["requests"]:
        return unmeasured(keys, "the configuration asks for no requests")
    reporter.stage("serve on loopback")
    import torch

    from recsys.inference.serving import create_app

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for work would be counted as CPU time
    try:
        return load.measure(
            learner(lambda: create_app(recommender)),
            recommender.user_ids[:200].tolist(),
            requests=settings["requests"],
            clients=settings["clients"],
            timeout=60.0,
        )
    finally:
        torch.set_num_threads(threads)


def use_encoder(config: dict[str, Any]) -> str:
    """Replace the encoder's name in the configuration by what can be loaded; its description."""
    path, description = encoders.resolve(str(config["text"]["encoder"] or "none"))
    config["text"] |= {"encoder": path, "cache": str(STATE / "text")}
    return description


def figures(ranks: np.ndarray, wanted: list[tuple[str, int]]) -> dict[str, float]:
    """`metric@k` to its mean over users."""
    return {f"{m}@{k}": float(evaluator.per_user(ranks, m, k).mean()) for m, k in wanted}


def unmeasured(keys: list[str], reason: str) -> dict[str, Any]:
    """A section without figures: each is null, and why."""
    return {**dict.fromkeys(keys), "reason": reason}


def learner(call: Callable[[], Any]) -> Any:
    """Call learner code; whatever it raises becomes a LearnerError with that as its cause."""
    try:
        return call()
    except Exception as error:
        raise LearnerError("recsys.pipeline.run") from error


def _pipeline() -> Any:
    import recsys.pipeline

    return recsys.pipeline


def load_config(
    name: str | None, dataset: str, overrides: list[str]
) -> tuple[Path, dict[str, Any]]:
    """The YAML file by path or by name in `configs/`, with `key.key=value` overrides applied.

    Without a name: the file named like the data set, else `default.yaml`.
    """
    import yaml

    if name is None:
        path = CONFIGS / f"{dataset}.yaml"
        path = path if path.exists() else CONFIGS / "default.yaml"
    else:
        path = Path(name)
        if not path.exists():
            path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise UsageError(f"--config takes a YAML file or one of {known}; {name!r} is neither")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    for override in overrides:
        key, equals, value = override.partition("=")
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not equals or not isinstance(node, dict) or last not in node:
            raise UsageError(f"--set takes a key of the configuration and a value, as "
                             f"retrieval.fit.epochs=5; not {override!r}")
        node[last] = yaml.safe_load(value)
    return path, config


def lacks(config: dict[str, Any]) -> list[str]:
    """The keys of `configs/default.yaml` that are not there: found before hours of training."""
    import yaml

    def below(whole: dict[str, Any], part: Any, path: str) -> Iterator[str]:
        for key, value in whole.items():
            if not isinstance(part, dict) or key not in part:
                yield path + key
            elif isinstance(value, dict) and key != "weights":  # whose parts are free
                yield from below(value, part[key], f"{path}{key}.")

    whole = yaml.safe_load((CONFIGS / "default.yaml").read_text(encoding="utf-8"))
    return list(below(whole, config, ""))


def resolve_device(name: str) -> Any:
    """`cpu`, `cuda`, ... or `auto` (a GPU if there is one) as a torch device that works."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--device {name} cannot be used here: {reason}") from None
    return torch.device(name)


def one_thread(device: Any) -> None:
    """One thread on a CPU, unless the environment says otherwise.

    At this size more of them gain nothing, and on a busy machine they wait for each other: with two
    a run took ten times the CPU time.
    """
    import torch

    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def versions() -> dict[str, str | None]:
    """What the figures depend on."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    names = ("torch", "numpy", "pandas")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
        "commit": commit,
    }


def peak_memory_mb(device: Any) -> float | None:
    """Largest memory so far: of this process, or of torch on the GPU."""
    if device.type == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _device_name(device: Any) -> str:
    if device.type != "cuda":
        return f"{device} ({os.cpu_count()} cores)"
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def _out_folder(args: argparse.Namespace) -> Path:
    if args.out:
        return Path(args.out)
    name = Path(args.data).name
    return ROOT / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"


def _relative(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
