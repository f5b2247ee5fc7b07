"""`kata bench --peers`: the recommender beside what people would use instead, in one run.

Everybody gets the same rows and is judged by the same evaluator on the same lists. Each peer is
tuned on the validation rows, by random search over its grid for as many seconds of CPU time as
each other; then it is fitted on training and validation rows with several seeds and judged on the
test rows.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from harness import bench, evaluator, run
from harness.errors import UsageError

LENGTH = 100  # of the lists
Scores = np.ndarray  # (users, items), higher is better
Lists = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Known:
    """What a method may learn from: rows in the order of user and time."""

    user: np.ndarray
    item: np.ndarray
    num_users: int
    num_items: int

    @classmethod
    def of(cls, dataset: Any, rows: np.ndarray) -> Known:
        """Rows of a data set, given by their places, which are in order of time."""
        rows = rows[np.argsort(dataset.user[rows], kind="stable")]
        return cls(dataset.user[rows], dataset.item[rows], dataset.num_users, dataset.num_items)

    @property
    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Each user's items, as `evaluator.seen_offsets` gives them."""
        return evaluator.seen_offsets(self.user, self.item, self.num_users)

    def matrix(self, decay: float = 1.0) -> np.ndarray:
        """(users, items), 1 for a user's last item and ``decay`` less for each one before it."""
        last = np.zeros(self.num_users, dtype=np.int64)
        np.maximum.at(last, self.user, np.arange(len(self.user)))
        weight = decay ** (last[self.user] - np.arange(len(self.user)))
        table = np.zeros((self.num_users, self.num_items), dtype=np.float32)
        table[self.user, self.item] = weight
        return table

    def sparse(self) -> Any:
        """(users, items) of scipy, 1 where known."""
        from scipy.sparse import csr_matrix

        ones = np.ones(len(self.user), dtype=np.float32)
        return csr_matrix((ones, (self.user, self.item)), (self.num_users, self.num_items))


def lists(scores: Scores, known: Known) -> Lists:
    """The best unseen items of each user, (users, LENGTH)."""
    scores = np.array(scores, dtype=np.float32)
    scores[known.user, known.item] = -np.inf
    length = min(LENGTH, scores.shape[1])
    top = np.argpartition(-scores, length - 1, axis=1)[:, :length]
    order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable")
    top = np.take_along_axis(top, order, 1)
    found = np.take_along_axis(scores, top, 1)
    return np.where(np.isneginf(found), -1, top), found


# --- the peers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A method.

    fit: (known, seed, settings) to scores of all pairs. grid: setting to the values that are tried.
    packages: what has to be installed, the one it is named for first. chance: whether a seed makes
    a difference.
    """

    name: str
    fit: Callable[[Known, int, Mapping[str, Any]], Scores]
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    chance: bool = False

    def missing(self) -> list[str]:
        """Those of its packages that are not installed."""
        return [name for name in self.packages if not bench.installed(name)]

    def version(self) -> str:
        """Name and version of what it is named for; "" if it is ours."""
        return f"{self.packages[0]} {bench.installed(self.packages[0])}" if self.packages else ""


def popularity(known: Known, seed: int, settings: Mapping[str, Any]) -> Scores:
    """How often an item was chosen, the same for everybody."""
    counts = np.bincount(known.item, minlength=known.num_items).astype(np.float32)
    return np.tile(counts, (known.num_users, 1))


def item_knn(known: Known, seed: int, settings: Mapping[str, Any]) -> Scores:
    """Cosine with shrinkage over the nearest items (Deshpande and Karypis 2004)."""
    table = known.matrix()
    together = table.T @ table
    norm = np.sqrt(np.diag(together))
    likeness = together / (np.outer(norm, norm) + settings["shrink"] + 1e-9)
    np.fill_diagonal(likeness, 0.0)
    far = np.partition(-likeness, settings["neighbours"], axis=1)[:, settings["neighbours"]]
    likeness[likeness < -far[:, None]] = 0.0
    return known.matrix(settings["decay"]) @ likeness.T


def ease(known: Known, seed: int, settings: Mapping[str, Any]) -> Scores:
    """EASE (Steck 2019, equation 8), its history weighted by recency if decay is below 1."""
    table = known.matrix().astype(np.float64)
    gram = table.T @ table + settings["l2"] * np.eye(known.num_items)
    inverse = np.linalg.inv(gram)
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return known.matrix(settings.get("decay", 1.0)) @ weights


def products(model: Any, known: Known) -> Scores:
    """Fit a factor model of `implicit`; the inner products of its factors."""
    model.fit(known.sparse(), show_progress=False)
    return np.asarray(model.user_factors) @ np.asarray(model.item_factors).T


def implicit_als(known: Known, seed: int, settings: Mapping[str, Any]) -> Scores:
    """iALS (Hu, Koren and Volinsky 2008) of `implicit`."""
    from implicit.als import AlternatingLeastSquares

    model = AlternatingLeastSquares(
        factors=settings["factors"],
        regularization=settings["regularization"],
        alpha=settings["alpha"],
        iterations=settings["iterations"],
        num_threads=1,
        random_state=seed,
    )
    return products(model, known)


def implicit_bpr(known: Known, seed: int, settings: Mapping[str, Any]) -> Scores:
    """BPR (Rendle et al. 2009) of `implicit`."""
    from implicit.bpr import BayesianPersonalizedRanking

    model = BayesianPersonalizedRanking(
        factors=settings["factors"],
        learning_rate=settings["learning_rate"],
        regularization=settings["regularization"],
        iterations=settings["iterations"],
        num_threads=1,
        random_state=seed,
    )
    return products(model, known)


def lightfm_warp(known: Known, seed: int, settings: Mapping[str, Any]) -> Scores:
    """LightFM (Kula 2015) on ids alone, with the WARP loss (Weston et al. 2011)."""
    from lightfm import LightFM

    model = LightFM(
        no_components=settings["components"],
        loss="warp",
        learning_rate=settings["learning_rate"],
        item_alpha=settings["alpha"],
        user_alpha=settings["alpha"],
        random_state=seed,
    )
    model.fit(known.sparse().tocoo(), epochs=settings["epochs"], num_threads=1)
    item_bias, item = model.get_item_representations()
    _, user = model.get_user_representations()
    return user @ item.T + item_bias


def sasrec(known: Known, seed: int, settings: Mapping[str, Any]) -> Scores:
    """SASRec (Kang and McAuley 2018) of RecTools, trained with the full softmax."""
    import logging
    import warnings

    import pandas as pd
    import torch
    from pytorch_lightning import Trainer, seed_everything
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel
    from rectools.models.nn.transformers.sasrec import SASRecDataPreparator

    class Preparator(SASRecDataPreparator):
        item_extra_tokens = np.array(SASRecDataPreparator.item_extra_tokens, dtype=object)

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    seed_everything(seed, verbose=False)
    begin = pd.Timestamp("2000-01-01")
    place = np.arange(len(known.user))  # the order of the rows is the order in time
    table = pd.DataFrame({"user_id": known.user, "item_id": known.item, "weight": 1.0})
    table["datetime"] = begin + pd.to_timedelta(place, unit="s")

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=settings["epochs"],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    model = SASRecModel(
        n_factors=settings["factors"],
        n_blocks=settings["blocks"],
        n_heads=1,
        dropout_rate=settings["dropout"],
        session_max_len=settings["history"],
        lr=settings["lr"],
        batch_size=128,
        loss="softmax",
        get_trainer_func=trainer,
        data_preparator_type=Preparator,
        recommend_torch_device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = Dataset.construct(table)
        model.fit(data)
        users = np.unique(known.user)
        with torch.no_grad():
            found = model.recommend(users, data, k=LENGTH, filter_viewed=True)
    scores = np.full((known.num_users, known.num_items), -1e9, dtype=np.float32)
    scores[found["user_id"].to_numpy(), found["item_id"].to_numpy()] = -found["rank"].to_numpy()
    return scores


def core(known: Known, seed: int, settings: Mapping[str, Any]) -> Scores:
    """CORE of RecBole with the mean of a history (Hou et al. 2022), the full softmax."""
    import torch

    from harness.bench.recbole import build

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        built = build(
            "CORE",
            known.user,
            known.item,
            {
                "dnn_type": "ave",
                "embedding_size": settings["factors"],
                "sess_dropout": settings["dropout"],
                "item_dropout": settings["dropout"],
                "MAX_ITEM_LIST_LENGTH": settings["history"],
                "learning_rate": settings["lr"],
                "train_batch_size": 1024,
            },
            Path(folder),
        )
        for _ in range(settings["epochs"]):
            built.epoch()
    own = np.zeros(known.num_items, dtype=np.int64)  # RecBole's id of an item; 0 for none
    there = np.unique(known.item)
    own[there] = built.dataset.token2id("item_id", there.astype(str))
    last = np.zeros((known.num_users, settings["history"]), dtype=np.int64)
    for user, items in enumerate(np.split(own[known.item], known.seen[1][1:-1])):
        recent = items[-settings["history"] :]
        last[user, : len(recent)] = recent  # the oldest first, padded behind
    with torch.no_grad():
        given = {"item_id_list": torch.from_numpy(last)}
        scores = built.model.eval().full_sort_predict(given).numpy()
    return np.where(own > 0, scores[:, own], -1e9)


PEERS = (
    Peer("popularity", popularity),
    Peer(
        "item kNN, recency",
        item_knn,
        {"neighbours": [20, 50, 100, 200], "shrink": [0, 10, 50], "decay": [1.0, 0.95, 0.9, 0.8]},
    ),
    Peer("EASE", ease, {"l2": [30, 100, 300, 500, 1000]}),
    Peer(
        "EASE, recency",
        ease,
        {"l2": [30, 100, 300, 500, 1000], "decay": [0.97, 0.95, 0.9, 0.85, 0.8, 0.7]},
    ),
    Peer(
        "iALS",
        implicit_als,
        {
            "factors": [16, 32, 64, 128],
            "regularization": [0.01, 0.1, 1.0, 10.0],
            "alpha": [1.0, 4.0, 16.0, 40.0],
            "iterations": [10, 20],
        },
        ("implicit",),
        True,
    ),
    Peer(
        "BPR",
        implicit_bpr,
        {
            "factors": [16, 32, 64, 128],
            "learning_rate": [0.01, 0.03, 0.1],
            "regularization": [0.001, 0.01, 0.05],
            "iterations": [50, 100, 200],
        },
        ("implicit",),
        True,
    ),
    Peer(
        "LightFM, WARP",
        lightfm_warp,
        {
            "components": [16, 32, 64, 128],
            "learning_rate": [0.01, 0.03, 0.05],
            "alpha": [0.0, 1e-5, 1e-4],
            "epochs": [10, 20, 40],
        },
        ("lightfm-next",),
        True,
    ),
    Peer(
        "CORE, mean of the history",
        core,
        {
            "factors": [64, 128],
            "dropout": [0.2, 0.4, 0.6],
            "history": [10, 20, 50],
            "lr": [1e-3, 3e-3],
            "epochs": [10, 20, 40],
        },
        ("recbole",),
        True,
    ),
    Peer(
        "SASRec, full softmax",
        sasrec,
        {
            "factors": [32, 64],
            "blocks": [1, 2],
            "dropout": [0.2, 0.4, 0.6],
            "history": [50, 100],
            "lr": [1e-3, 3e-3],
            "epochs": [20, 40, 80],
        },
        ("rectools", "pytorch-lightning"),
        True,
    ),
)


# --- tuned and judged -----------------------------------------------------------------------------


@dataclass
class Row:
    """A method's line: NDCG@10 and hit of each test user, a row a seed."""

    name: str
    ndcg: np.ndarray  # (seeds, users)
    hits: np.ndarray
    seconds: float  # of a fit
    settings: Mapping[str, Any] = field(default_factory=dict)
    tried: int = 0
    version: str = ""


def judged(
    found: Lists, known: Known, users: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """NDCG@10 and hit of each of the users; everybody's lists pass through here.

    Raises:
        evaluator.InvalidLists: lists with what is known already, in the wrong order, ...
    """
    size: dict[str, Any] = {"num_users": known.num_users, "num_items": known.num_items}
    evaluator.check_lists(*found, **size, seen=known.seen, length=LENGTH)
    ranks = evaluator.target_ranks(found[0][users], found[1][users], target)
    return evaluator.per_user(ranks, "ndcg", 10), evaluator.per_user(ranks, "hit_rate", 10)


def choices(grid: Mapping[str, Sequence[Any]], seed: int) -> Iterator[dict[str, Any]]:
    """All settings of a grid in a seeded random order."""
    size = int(np.prod([len(values) for values in grid.values()])) if grid else 1
    for place in random.Random(seed).sample(range(size), size):
        chosen = {}
        for name, values in grid.items():
            place, which = divmod(place, len(values))
            chosen[name] = values[which]
        yield chosen


def tune(peer: Peer, dataset: Any, split: Any, seconds: float) -> tuple[dict[str, Any], int]:
    """The best settings on validation that the CPU seconds allow, and how many were tried.

    One is tried always. Nothing here reads the test rows.
    """
    known = Known.of(dataset, split.train)
    users, target = dataset.user[split.validation], dataset.item[split.validation]
    best, chosen, tried = -1.0, {}, 0
    begin = time.process_time()
    for settings in choices(peer.grid, seed=0):
        if tried and time.process_time() - begin > seconds:
            break
        found = lists(peer.fit(known, 0, settings), known)
        value = judged(found, known, users, target)[0].mean()
        tried += 1
        if value > best:
            best, chosen = value, settings
    return chosen, tried


def measure_peer(peer: Peer, dataset: Any, split: Any, seeds: int, seconds: float) -> Row:
    """Tune on validation, fit on all known rows, judge on test."""
    settings, tried = tune(peer, dataset, split, seconds)
    known = Known.of(dataset, np.concatenate([split.train, split.validation]))
    users, target = dataset.user[split.test], dataset.item[split.test]
    begin = time.process_time()
    all_lists = [
        lists(peer.fit(known, seed, settings), known)
        for seed in range(seeds if peer.chance else 1)
    ]
    took = (time.process_time() - begin) / len(all_lists)
    found = [judged(each, known, users, target) for each in all_lists]
    ndcg, hits = (np.stack(part) for part in zip(*found, strict=True))
    return Row(peer.name, ndcg, hits, took, settings, tried, peer.version())


def measure_ours(
    dataset: Any, split: Any, config: dict[str, Any], seeds: int, device: Any
) -> list[Row]:
    """Both stages of the pipeline, as its configuration says."""
    import recsys.pipeline

    config = {**config, "compile": {"measure": False}}
    known = Known.of(dataset, np.concatenate([split.train, split.validation]))
    users, target = dataset.user[split.test], dataset.item[split.test]
    stages: dict[str, list[Any]] = {stage: [] for stage in run.STAGES}
    begin = time.process_time()
    for seed in range(seeds):
        outcome = run.learner(
            partial(
                recsys.pipeline.run, dataset, split, config,
                seed=seed, device=device, log=lambda *_: None,
            )
        )
        for stage, found in stages.items():
            both = outcome[stage]["items"], outcome[stage]["scores"]
            found.append(judged(both, known, users, target))
    took = (time.process_time() - begin) / seeds
    rows = []
    for stage, found in stages.items():
        ndcg, hits = (np.stack(part) for part in zip(*found, strict=True))
        rows.append(Row(f"recsys-katas, {stage}", ndcg, hits, took))
    return rows


def line(row: Row, ours: Row) -> str:
    """NDCG@10, hit rate, and the paired difference to our final lists with its interval."""
    gain = ours.ndcg.mean(0) - row.ndcg.mean(0)
    low, high = evaluator.bootstrap_interval(gain)
    means = row.ndcg.mean(1)
    spread = f" ± {statistics.stdev(means):.4f}" if len(means) > 1 else ""
    paired = "" if row is ours else f"{gain.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
    settings = ", ".join(f"{name} {value:g}" for name, value in row.settings.items())
    told = f"{settings} ({row.tried} tried)" if settings else ""
    cells = [row.name, f"{means.mean():.4f}{spread}", f"{row.hits.mean():.4f}", paired]
    return f"| {' | '.join([*cells, f'{row.seconds:.1f}', told])} |"


def table(
    dataset: Any, split: Any, rows: list[Row], missing: list[str], seeds: int, seconds: float
) -> list[str]:
    """The record, in Markdown."""
    ours = next(row for row in rows if row.name.endswith("final"))
    versions = sorted({row.version for row in rows if row.version})
    return [
        f"{dataset.name}: {dataset.num_users} users, {dataset.num_items} items, "
        f"{dataset.num_interactions} ratings; {split.name}, ties {split.ties}; all items ranked, "
        f"{len(split.test)} test users. {datetime.now():%Y-%m-%d}, one thread of a CPU, "
        f"torch {metadata.version('torch')}{''.join(', ' + v for v in versions)}.",
        f"Mean of {seeds} seeds ± their standard deviation; each peer tuned on validation for "
        f"{seconds:g} CPU seconds; 95 % intervals over users, paired.",
        "",
        "| method | NDCG@10 | HR@10 | ours, final, is better by | CPU s a fit | settings |",
        "| --- | --- | --- | --- | ---: | --- |",
        *(line(row, ours) for row in sorted(rows, key=lambda row: -row.ndcg.mean())),
        *(["", f"Not installed, so not compared: {', '.join(missing)}."] if missing else []),
    ]


def chosen(names: list[str] | None) -> list[Peer]:
    """All peers, or those that `--only` names."""
    known = {peer.name: peer for peer in PEERS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise UsageError(f"--only takes {'; '.join(known)}; not {unknown[0]!r}")
    return [known[name] for name in names] if names else list(PEERS)


def main(args: argparse.Namespace) -> int:
    """Measure, print, and write the table if `--out` names a file."""
    import torch

    torch.set_num_threads(1)  # one is as fast at this size, and fair
    wanted = chosen(args.only)
    missing = [f"{peer.name} ({', '.join(peer.missing())})" for peer in wanted if peer.missing()]
    dataset, config, split = prepare(args)
    rows = measure_ours(dataset, split, config, args.seeds, torch.device("cpu"))
    told = [f"{row.name}: NDCG@10 {row.ndcg.mean():.4f}" for row in rows]
    print("\n".join(told), flush=True)
    for peer in wanted:
        if not peer.missing():
            rows.append(measure_peer(peer, dataset, split, args.seeds, args.seconds))
            row = rows[-1]
            print(f"{row.name}: NDCG@10 {row.ndcg.mean():.4f}, {row.tried} tried", flush=True)
    text = "\n".join(table(dataset, split, rows, missing, args.seeds, args.seconds))
    print(f"\n{text}")
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    return 0


def prepare(args: argparse.Namespace) -> tuple[Any, dict[str, Any], Any]:
    """Data set, configuration and split that the options ask for, with the code of `--impl`."""
    dataset = bench.load(args)
    from recsys.data.splits import make_split

    config = configuration(args, dataset)
    return dataset, config, make_split(dataset, config["split"], ties=args.ties or config["ties"])


def configuration(args: argparse.Namespace, dataset: Any) -> dict[str, Any]:
    """The one that the options ask for, with an encoder that can be loaded."""
    _, config = run.load_config(args.config, dataset.name, args.set or [])
    run.use_encoder(config)
    return config
