"""`kata bench --tune`: settings of the retrieval model, searched for on training rows alone.

A model learns from what comes before each user's last training rows and is judged on these. They
are as many as the ranker learns from, ten a user, so chance is a third of what it is on one
validation row. Validation and test rows are not read. The search begins with the configuration and
changes one to three of GRID in the best found so far; what is better with one seed gets another.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from harness import bench, evaluator, memory
from harness.bench import peers

Settings = dict[str, Any]  # key of GRID to its value; what is not there is as configured
GRID: Mapping[str, Sequence[Any]] = {
    "dim": [32, 64, 128, 256],
    "hidden_dims": [[], [128], [256], [128, 128]],
    "dropout": [0.3, 0.4, 0.5, 0.6],
    "max_history": [10, 15, 20, 30, 50],
    "temperature": [0.05, 0.07, 0.1, 0.14],
    "learn_temperature": [True, False],
    "loss": ["in_batch", "full"],
    "mask_accidental_hits": [True, False],
    "fit.epochs": [8, 12, 15, 20, 30, 40],
    "fit.batch_size": [256, 512, 1024, 2048],
    "fit.lr": [0.001, 0.002, 0.003, 0.005],
    "fit.weight_decay": [0.0, 0.01, 0.1, 0.3],
}
CONFIGURED = "{}"
SEEDS = (0, 1)
LENGTH = 100  # of the lists
SHOWN = 10  # settings in the table


@dataclass(frozen=True)
class Trial:
    """What a model with some settings does.

    ndcg: (users,) NDCG@10, the mean over the rows held out of each user. seconds: of CPU.
    """

    ndcg: np.ndarray
    recall: float
    seconds: float


class Judge:
    """Trains and judges one model after the other, in a process of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        torch.set_num_threads(1)
        memory.keep()
        self.dataset, self.config, split = peers.prepare(args)
        from recsys import pipeline
        from recsys.data.sequences import Sequences

        self.pipeline, self.device = pipeline, torch.device("cpu")
        count = self.config["ranking"]["targets_per_user"]
        self.before, places = pipeline.split_off_last(self.dataset, split.train, count)
        sequences = Sequences(self.dataset, split.train)
        end = torch.from_numpy(places)
        moment = torch.from_numpy(self.dataset.time[split.train[places]])
        self.asked = pipeline.Requests(sequences, sequences.user[end], end, moment)
        self.target = (sequences.items[end] - 1).numpy()

    def trial(self, settings: Settings, seed: int) -> Trial:
        """Train with these settings on the rows before, and rank the whole catalogue."""
        begin = time.process_time()
        config = changed(self.config["retrieval"], settings)
        data = self.pipeline.RetrievalData(self.dataset, self.before, config, self.device)
        model, _ = self.pipeline.train_retrieval(data, config, seed=seed, device=self.device)
        items, scores = self.pipeline.retrieve(
            model, data, self.asked, k=LENGTH, chunk_size=config["chunk_size"]
        )
        ranks = evaluator.target_ranks(items.numpy(), scores.numpy(), self.target)
        user = self.asked.user.numpy()
        held_out = np.maximum(np.bincount(user), 1)
        ndcg = np.bincount(user, evaluator.per_user(ranks, "ndcg", 10)) / held_out
        recall = float(evaluator.per_user(ranks, "recall", LENGTH).mean())
        return Trial(ndcg, recall, time.process_time() - begin)


def changed(config: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The configuration of retrieval with these settings; `fit.lr` is `lr` in `fit`."""
    made = copy.deepcopy(config)
    for name, value in settings.items():
        *parents, last = name.split(".")
        part = made
        for parent in parents:
            part = part[parent]
        part[last] = value
    return made


def neighbour(settings: Settings, draw: random.Random) -> Settings:
    """The settings with one to three of GRID drawn anew."""
    names = draw.sample(sorted(GRID), draw.choice([1, 1, 2, 2, 3]))
    return settings | {name: draw.choice(GRID[name]) for name in names}


class Search:
    """What was tried, and what to try next.

    Args:
        config: where it begins.

    Attributes:
        tried: settings, as JSON, to their trials by seed.
        asked: settings that `next` gave already.
    """

    def __init__(self, config: dict[str, Any], seed: int = 0) -> None:
        self.config, self.draw = config, random.Random(seed)
        self.tried: dict[str, dict[int, Trial]] = {}
        self.asked: set[str] = set()

    def value(self, key: str, seeds: Sequence[int] = SEEDS) -> float:
        """NDCG@10, the mean of these seeds."""
        return float(np.mean([self.tried[key][seed].ndcg.mean() for seed in seeds]))

    @property
    def whole(self) -> list[str]:
        """Settings that have all seeds, the best first."""
        done = [key for key, trials in self.tried.items() if len(trials) == len(SEEDS)]
        return sorted(done, key=self.value, reverse=True)

    def next(self) -> tuple[str, int]:
        """Settings that were not asked for before, beside the best so far, with the first seed."""
        best = json.loads(self.whole[0]) if self.whole else {}
        key = None if self.asked else CONFIGURED
        while key is None or key in self.asked:
            drawn = neighbour(best, self.draw)
            new = {n: v for n, v in drawn.items() if changed(self.config, {n: v}) != self.config}
            key = json.dumps(new, sort_keys=True)
        self.asked.add(key)
        return key, SEEDS[0]

    def told(self, key: str, seed: int, trial: Trial) -> tuple[str, int] | None:
        """Note a trial; what is to be tried because of it, if anything."""
        self.tried.setdefault(key, {})[seed] = trial
        if seed == SEEDS[-1]:
            return None
        first = key == CONFIGURED or not self.whole  # the others are compared with the first
        better = first or self.value(key, [seed]) > self.value(self.whole[0], [seed])
        return (key, SEEDS[SEEDS.index(seed) + 1]) if better else None


# --- the command ----------------------------------------------------------------------------------

_judge: Judge  # of a worker process


def begin(args: argparse.Namespace) -> None:
    """Load the data in a worker process."""
    global _judge
    _judge = Judge(args)


def work(key: str, seed: int) -> Trial:
    """One trial, in a worker process."""
    return _judge.trial(json.loads(key), seed)


def searched(args: argparse.Namespace, config: dict[str, Any]) -> tuple[Search, float]:
    """Search until the CPU seconds are spent, on two cores at most; how many were."""
    search, spent = Search(config), 0.0
    jobs = min(2, os.cpu_count() or 1)
    fresh = get_context("spawn")  # a fork of a process that has used torch can hang
    running: dict[Future[Trial], tuple[str, int]] = {}
    with ProcessPoolExecutor(jobs, fresh, initializer=begin, initargs=(args,)) as pool:
        while True:
            while len(running) < jobs and (spent < args.seconds or not search.asked):
                case = search.next()
                running[pool.submit(work, *case)] = case
            if not running:
                return search, spent
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                (key, seed), trial = running.pop(future), future.result()
                spent += trial.seconds
                bench.say(f"{trial.ndcg.mean():.4f} with seed {seed}, {words(key)}")
                if (case := search.told(key, seed, trial)) is not None:
                    running[pool.submit(work, *case)] = case


def words(key: str) -> str:
    """Settings for people."""
    settings = json.loads(key)
    told = ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items())
    return told or "as configured"


def line(search: Search, key: str) -> str:
    """A row of the table."""
    trials, configured = ([search.tried[k][seed] for seed in SEEDS] for k in (key, CONFIGURED))
    cells = [words(key), f"{search.value(key):.4f}"]
    change = np.mean([a.ndcg - b.ndcg for a, b in zip(trials, configured, strict=True)], axis=0)
    low, high = evaluator.bootstrap_interval(change)
    cells.append(f"{change.mean():+.4f} [{low:+.4f}, {high:+.4f}]" if key != CONFIGURED else "")
    cells.append(f"{np.mean([trial.recall for trial in trials]):.3f}")
    cells.append(f"{np.mean([trial.seconds for trial in trials]):.0f}")
    return f"| {' | '.join(cells)} |"


def main(args: argparse.Namespace) -> int:
    """Search, print the best settings, and write the table if `--out` names a file."""
    dataset, config, split = peers.prepare(args)
    search, spent = searched(args, config["retrieval"])
    shown = [key for key in search.whole[:SHOWN] if key != CONFIGURED]
    lines = [
        f"{dataset.name}, ties {split.ties}: retrieval's NDCG@10 on each user's last training "
        f"rows, mean over users and {len(SEEDS)} seeds; change with its 95 % interval over users, "
        f"paired, too narrow for what was chosen as the best of many. {len(search.tried)} settings "
        f"in {spent:.0f} CPU seconds. {datetime.now():%Y-%m-%d}, one thread of a CPU each, torch "
        f"{metadata.version('torch')}.",
        "",
        "| settings | NDCG@10 | change | recall@100 | CPU s a fit |",
        "| --- | --- | --- | --- | ---: |",
        *(line(search, key) for key in [CONFIGURED, *shown]),
    ]
    print("\n".join(lines))
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0
