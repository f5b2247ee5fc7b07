"""`kata bench --ablate`: what each part of the recommender buys.

Each line is the same pipeline with one part taken out or changed by a setting. The judge is the
validation row of each user, which nobody trains on here: the row before it takes its place, and
the test rows stay unread. So a choice that is made from this table may be reported on the test.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from harness import evaluator
from harness.bench import peers
from harness.errors import UsageError

WHOLE = "the whole"
VARIANTS: dict[str, tuple[str, ...]] = {
    WHOLE: (),
    "no logQ correction": ("retrieval.log_q=false",),
    "accidental hits not masked": ("retrieval.mask_accidental_hits=false",),
    "temperature fixed at its start": ("retrieval.learn_temperature=false",),
    "full softmax instead of in-batch": ("retrieval.loss=full",),
    "history: the last item only": ("retrieval.max_history=1",),
    # of these two, and of the four rankers, one is what the configuration has and changes nothing
    "retrieval: ids and genres": ("retrieval.item_features=[item_id, genres]",),
    "retrieval: ids alone": ("retrieval.item_features=[item_id]",),
    "retrieval with text": ("retrieval.item_features=[item_id, text]",),
    "no text at all": ("text.encoder=none",),
    "ranker: cross layers and deep part": (
        "ranking.num_cross_layers=2",
        "ranking.hidden_dims=[64, 32]",
    ),
    "ranker: deep part alone": ("ranking.num_cross_layers=0", "ranking.hidden_dims=[64, 32]"),
    "ranker: cross layers alone": ("ranking.num_cross_layers=2", "ranking.hidden_dims=[]"),
    "ranker: linear": ("ranking.num_cross_layers=0", "ranking.hidden_dims=[]"),
    "ranker: binary loss": ("ranking.loss=binary",),
}


def before_validation(dataset: Any, split: Any) -> Any:
    """The split that has the validation rows for a test: each one's row before it is held out."""
    user = dataset.user[split.train]
    last = np.append(user[1:] != user[:-1], True)
    train, validation = split.train[~last], split.train[last]
    return dataclasses.replace(split, train=train, validation=validation, test=split.validation)


def once(train: Callable[..., Any]) -> Callable[..., Any]:
    """`train_retrieval` that trains once for the same rows, settings and seed.

    So a variant of the ranker costs the ranker only.
    """
    done: dict[str, Any] = {}

    def train_once(data: Any, settings: dict[str, Any], *, seed: int, **options: Any) -> Any:
        rows = data.rows
        key = json.dumps([settings, seed, options.get("epochs"), len(rows), int(rows.sum())])
        if key not in done:
            done[key] = train(data, settings, seed=seed, **options)
        return done[key]

    return train_once


def line(name: str, rows: list[peers.Row], whole: list[peers.Row]) -> str:
    """NDCG@10 of both stages, each with what taking this part out costs (paired, 95 %)."""
    cells = []
    for row, base in zip(rows, whole, strict=True):
        cells.append(f"{row.ndcg.mean():.4f}")
        change = row.ndcg.mean(0) - base.ndcg.mean(0)
        low, high = evaluator.bootstrap_interval(change)
        same = row is base or not change.any()
        cells.append("" if same else f"{change.mean():+.4f} [{low:+.4f}, {high:+.4f}]")
    return f"| {' | '.join([name, *cells])} |"


def main(args: argparse.Namespace) -> int:
    """Measure, print, and write the table if `--out` names a file."""
    import torch

    torch.set_num_threads(1)
    unknown = [name for name in args.only or () if name not in VARIANTS]
    if unknown:
        raise UsageError(f"--only takes {'; '.join(VARIANTS)}; not {unknown[0]!r}")
    wanted = [name for name in VARIANTS if name == WHOLE or not args.only or name in args.only]
    found: dict[str, list[peers.Row]] = {}
    given = args.set or []
    dataset, _, split = peers.prepare(args)
    held_out = before_validation(dataset, split)
    import recsys.pipeline

    recsys.pipeline.train_retrieval = once(recsys.pipeline.train_retrieval)
    lines = [
        f"{dataset.name}, ties {split.ties}: NDCG@10 on the validation rows of "
        f"{len(held_out.test)} users, which nothing here was trained on; all items ranked. "
        f"Mean of {args.seeds} seed{'s' * (args.seeds > 1)}; change with its 95 % interval over "
        f"users, paired. {datetime.now():%Y-%m-%d}, one thread of a CPU, "
        f"torch {metadata.version('torch')}.",
        "",
        "| | retrieval | change | final | change |",
        "| --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for name in wanted:
        args.set = [*given, *VARIANTS[name]]
        config = peers.configuration(args, dataset)
        found[name] = peers.measure_ours(
            dataset, held_out, config, args.seeds, torch.device("cpu")
        )
        lines.append(line(name, found[name], found[WHOLE]))
        print(lines[-1], flush=True)
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0
