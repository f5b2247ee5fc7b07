"""`kata bench --cold`: items without any rating, recommended from their content alone.

A fifth of the items loses all its ratings. Every method gets the ratings of the others, and ranks
for each user the cold items among themselves and among all items that the user has not rated.
"""

from __future__ import annotations

import argparse
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from harness import bench, evaluator, run
from harness.bench import ratings
from harness.errors import UsageError

CONFIG = "cold-start"
OURS, ALONE = "ours", "ours, projection alone"
K = 10


# --- what others do: scores of all items for all users, (users, items) ----------------------------


def likeness(table: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Cosine of an item's vector with the mean of those that the user chose, up to a factor.

    Args:
        table: (users, items), 1 where known. vectors: (items, W) of unit length.
    """
    return (table @ vectors) @ vectors.T


def genre_popularity(table: np.ndarray, genres: np.ndarray, warm: np.ndarray) -> np.ndarray:
    """Mean over an item's genres of how often a warm item of that genre was chosen."""
    count = table.sum(0)
    share = genres * warm[:, None]
    of_genre = (share.T @ count) / share.sum(0).clip(1)
    score = (genres @ of_genre) / genres.sum(1).clip(1)
    return np.tile(np.where(genres.any(1), score, count[warm].mean()), (len(table), 1))


def ridge(x: np.ndarray, target: np.ndarray, fitted: np.ndarray, penalty: float) -> np.ndarray:
    """(n, m) what a ridge regression with intercept, fitted on some rows, says of all.

    Args:
        x: (n, W). target: (n, m). fitted: (n,) bool.
    """
    middle, level = x[fitted].mean(0), target[fitted].mean(0)
    centred = x[fitted] - middle
    gram = centred.T @ centred + penalty * np.eye(x.shape[1])
    weight = np.linalg.solve(gram, centred.T @ (target[fitted] - level))
    return (x - middle) @ weight + level


def text_to_factors(
    table: np.ndarray, text: np.ndarray, warm: np.ndarray, factors: int, penalty: float
) -> np.ndarray:
    """Truncated SVD of who chose what; items' factors are guessed from text."""
    left, value, right = np.linalg.svd(table[:, warm], full_matrices=False)
    items = np.zeros((len(text), min(factors, len(value))))
    items[warm] = right[:factors].T * value[:factors]
    return left[:, :factors] @ ridge(text, items, warm, penalty).T


def baselines(
    table: np.ndarray, warm: np.ndarray, raw: np.ndarray, genres: np.ndarray,
    config: dict[str, Any], seed: int,
) -> dict[str, np.ndarray]:
    """Scores of every method by its name.

    Args:
        table: (users, items), 1 where known. warm: (items,) bool, those with a rating.
        raw: (items, W) text vectors as the encoder gives them. genres: (items, G) bool.
    """
    plain = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    centred = raw - raw.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    return {
        "random": np.random.default_rng(seed).random(table.shape),
        "genre popularity": genre_popularity(table, genres.astype(float), warm),
        "content cosine": likeness(table, plain),
        "content cosine, centred": likeness(table, centred),
        "ridge for each user": ridge(centred, table.T, warm, config["user_ridge"]).T,
        "text to item factors": text_to_factors(
            table, centred, warm, config["factors"], config["factor_ridge"]
        ),
    }


# --- the judge ------------------------------------------------------------------------------------


def best(scores: np.ndarray, table: np.ndarray, cold: np.ndarray) -> dict[str, np.ndarray]:
    """The K best of the cold items and of all that a user does not know, (users, K) each."""
    among = scores[:, cold]
    order = np.argsort(-among, axis=1, kind="stable")[:, :K]
    every = np.where(table > 0, -np.inf, scores)
    return {"cold": cold[order], "all": np.argsort(-every, axis=1, kind="stable")[:, :K]}


def interval(gains: np.ndarray, rounds: int = 1000) -> tuple[float, float]:
    """95 % interval of a mean gain over splits, users resampled with all that they have.

    Args:
        gains: (splits, users), NaN where a user has nothing to find.
    """
    users = gains.shape[1]
    weight = np.random.default_rng(0).multinomial(users, np.full(users, 1 / users), size=rounds)
    there = ~np.isnan(gains)
    means = (weight @ np.where(there, gains, 0.0).T) / (weight @ there.T)  # (rounds, splits)
    low, high = np.quantile(means.mean(1), [0.025, 0.975])
    return float(low), float(high)


def recalls(lists: np.ndarray, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """(users,) recall at K; NaN for who has nothing to find."""
    result = np.full(len(lists), np.nan)
    result[np.unique(user)] = evaluator.recall_of_lists(lists, user, item, K)
    return result


def measure(
    dataset: Any, own: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """Recalls of each method, "cold" and "all", (splits, users); and the text encoder."""
    import torch

    from recsys.data.features import item_texts
    from recsys.data.splits import item_cold_start
    from recsys.models.text import cached_embeddings, load_encoder
    from recsys.pipeline import run_cold_start

    encoder = run.use_encoder(own)
    if own["text"]["encoder"] is None:
        raise UsageError("kata bench --cold needs a text encoder, and the configuration has none")
    device = torch.device("cpu")
    model = load_encoder(own["text"]["encoder"], device=device)
    raw = cached_embeddings(model, item_texts(dataset), own["text"]["cache"]).numpy()
    raw = raw.astype(np.float64)
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for seed in config["splits"]:
        bench.say(f"item split {seed}")
        split = item_cold_start(dataset, fraction=own["cold_start"]["fraction"], seed=seed)
        table = np.zeros((dataset.num_users, dataset.num_items))
        table[dataset.user[split.train], dataset.item[split.train]] = 1.0
        warm = np.asarray(table.any(0))
        user, item = dataset.user[split.test], dataset.item[split.test]
        scores = baselines(table, warm, raw, dataset.genres, config, seed)
        lists = {name: best(score, table, split.cold_items) for name, score in scores.items()}
        del scores
        settings = own["cold_start"]["weights"]
        for name, weights in ((ALONE, {"projection": 1.0}), (OURS, settings)):
            part = own["cold_start"] | {"weights": weights}
            made = run_cold_start(
                dataset, own | {"cold_start": part}, seed=seed, device=device, log=lambda *_: None
            )
            if made is None:
                raise TypeError("run_cold_start gave None, expected lists of the cold items")
            lists[name] = {"cold": made["items"], "all": made["all_items"]}
        for name, kinds in lists.items():
            for kind, listed in kinds.items():
                values = found.setdefault(name, {"cold": [], "all": []})[kind]
                values.append(recalls(listed, user, item))
    return {n: {k: np.stack(v) for k, v in kinds.items()} for n, kinds in found.items()}, encoder


# --- the command ----------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> int:
    """Measure; print the record, and put it into the file that `--out` names."""
    impl = args.impl or ["mine"]
    dataset = bench.load(args)
    _, own = run.load_config(args.config, dataset.name, args.set or [])
    _, config = run.load_config(CONFIG, CONFIG, [])
    began = time.perf_counter()
    found, encoder = measure(dataset, own, config)
    text = record(args, impl, dataset, found, encoder, time.perf_counter() - began, own)
    print(text)
    if args.out:
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        before = out.read_text(encoding="utf-8") if out.is_file() else "# Cold start\n\n"
        out.write_text(merged(before, text), encoding="utf-8")
    return 0


def merged(before: str, section: str) -> str:
    """A record with the section of one data set replaced, or added at its end."""
    head, *sections = before.split("\n## ")
    title = section.splitlines()[0].removeprefix("## ")
    kept = [s for s in sections if s.splitlines()[0] != title]
    parts = [head.rstrip(), *(f"## {s.rstrip()}" for s in kept), section.rstrip()]
    return "\n\n".join(parts) + "\n"


def record(
    args: argparse.Namespace, impl: list[str], dataset: Any, found: dict[str, Any], encoder: str,
    seconds: float, own: dict[str, Any],
) -> str:
    """The record in Markdown."""
    import torch

    versions, splits = run.versions(), len(found[OURS]["cold"])
    weights = ", ".join(f"{k} {v:g}" for k, v in own["cold_start"]["weights"].items())
    lines = [
        f"## {dataset.name}",
        "",
        f"Written by `kata bench --cold --data {Path(args.data).name}` on "
        f"{datetime.now():%Y-%m-%d}: {torch.get_num_threads()} thread(s), Python "
        f"{versions['python']}, torch {versions['torch']}, commit {versions['commit']}, `--impl "
        f"{' '.join(impl)}`, {seconds:.0f} s. Text: {encoder}. Ours: {weights}. R@10, mean of "
        f"{splits} item splits (lowest to highest).",
        "",
        "| | among cold items | among all items | ours is better by, 95 %, among cold | all |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, kinds in found.items():
        cells = [name]
        cells += [ratings.spread(np.nanmean(kinds[k], axis=1).tolist()) for k in ("cold", "all")]
        for kind in ("cold", "all"):
            low, high = interval(found[OURS][kind] - kinds[kind])
            cells.append("" if name == OURS else f"{low:+.4f} to {high:+.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
