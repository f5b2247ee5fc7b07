"""Evaluation: NDCG@10 by kata 06 beside pytrec_eval, and what its time is made of.

One relevant item a user, as in leave-last-one-out. From scores means from the table of all scores
to the mean of the metric; from lists, from a finished top ten. pytrec_eval takes dictionaries:
making them is shown apart. torchmetrics, scikit-learn and ranx: `kata bench 06`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from harness.bench.speed import in_turns, ratios, spread, table

USERS, ITEMS, K = 6_040, 3_706, 10


def measure(args: argparse.Namespace, users: int = USERS, items: int = ITEMS) -> list[str]:
    """A line for each way from scores or lists to the figure, which has to be the same."""
    from recsys.evaluation import metrics

    g = torch.Generator().manual_seed(0)
    scores = torch.rand(users, items, generator=g, dtype=torch.float64).argsort(1).float() + 1
    target = torch.randint(0, items, (users,), generator=g)
    relevance = torch.zeros(users, items, dtype=torch.int64)
    relevance[torch.arange(users), target] = 1
    seen = target.new_zeros(0), target.new_zeros(users + 1)
    scores, target, relevance = (x.to(args.device) for x in (scores, target, relevance))
    seen = tuple(x.to(args.device) for x in seen)

    def lists() -> tuple[Any, Any]:
        return metrics.full_ranking(lambda u: scores[u], users, seen=seen, k=K)

    top = lists()
    contestants: dict[str, Callable[[], Any]] = {
        "`list_metrics`, from lists": lambda: metrics.list_metrics(*top, target)["ndcg@10"],
        "`full_ranking`, `list_metrics`, from scores": lambda: metrics.list_metrics(
            *lists(), target
        )["ndcg@10"],
        "`ndcg_at_k`, from scores": lambda: metrics.mean_over_users(
            metrics.ndcg_at_k(scores, relevance, K)
        )[0],
        "part: `topk` of the scores": lambda: scores.topk(K + 1),
        "part: `topk` of the relevance": lambda: relevance.topk(K),
        "part: a copy of the scores without NaN": lambda: scores.nan_to_num(),
        "one look at the scores": lambda: float(scores.amax()),
    }
    ours = list(contestants)[:3]
    absent = []
    for name, make in PEERS.items():
        if find_spec(name) is None:
            absent.append(f"{name} is not installed.")
        else:
            contestants |= make(scores, relevance, target, top)
    values = {name: run() for name, run in contestants.items()}
    expected = values[ours[0]]
    for name, value in values.items():
        if isinstance(value, float) and not name.startswith("one look"):
            if not abs(value - expected) < 1e-5:
                raise RuntimeError(f"NDCG@{K} is {expected} for ours, {value} for {name}")
    times = in_turns(contestants, args.rounds, args.device)
    rows = [
        [
            name,
            spread(each.wall, 1e3),
            spread(each.cpu, 1e3),
            *(
                spread(ratios(each.own(args.device), times[mine].own(args.device)), digits=2)
                for mine in ours
            ),
        ]
        for name, each in times.items()
    ]
    head = ["", "ms", "CPU ms", "x from lists", "x full ranking", "x `ndcg_at_k`"]
    about = f"NDCG@{K} of {users:,} users x {items:,} items, one relevant item each."
    return [about, "", *table(head, rows), *([""] if absent else []), *absent]


def pytrec_eval(scores: Any, relevance: Any, target: Any, top: Any) -> dict[str, Callable]:
    """Its contestants: the metric from dictionaries, and the dictionaries."""
    from pytrec_eval import RelevanceEvaluator

    judge = RelevanceEvaluator(
        {str(u): {str(i): 1} for u, i in enumerate(target.tolist())}, {f"ndcg_cut.{K}"}
    )

    def converted() -> dict[str, dict[str, float]]:
        both = zip(top[0].tolist(), top[1].tolist(), strict=True)
        return {
            str(u): {str(i): score for i, score in zip(*row, strict=True)}
            for u, row in enumerate(both)
        }

    lists = converted()

    def run() -> float:
        values = judge.evaluate(lists).values()
        return sum(each[f"ndcg_cut_{K}"] for each in values) / len(values)

    return {
        "pytrec_eval, `evaluate`, from lists": run,
        "pytrec_eval, its dictionaries of the lists": converted,
    }


PEERS = {"pytrec_eval": pytrec_eval}
