"""The whole recommender: from interactions to ranked lists (kata 10)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recsys.data.dataset import Dataset
from recsys.data.features import Feature, item_features, user_features
from recsys.data.sequences import Sequences
from recsys.data.splits import Split
from recsys.evaluation.metrics import full_ranking, list_metrics
from recsys.models.embedding import hash_ids
from recsys.models.tower import TwoTower
from recsys.training.loop import FitConfig, FitResult, fit
from recsys.training.losses import full_softmax_loss, in_batch_softmax_loss

Log = Callable[[str, float, int], None]  # tag, value, step


class RetrievalData:
    """Everything retrieval needs from a set of training rows, as columns on one device.

    Args:
        rows: interactions to learn from, sorted by user and time: nothing here, counts included,
            knows any other row.

    Attributes:
        users, items: columns of user and item features, one row per user or item index.
        log_q: (num_items,) log probability of an item as a training target, add-one smoothed.
        positions: places of the sequences that can be a target, (num_examples,).
    """

    def __init__(
        self, dataset: Dataset, rows: np.ndarray, config: Mapping[str, Any], device: torch.device
    ) -> None:
        self.sequences = Sequences(dataset, rows, device=device)
        self.max_history = config["max_history"]
        self.num_users = dataset.num_users
        item_specs, items = item_features(dataset)
        user_specs, users = user_features(dataset)
        counts = np.bincount(dataset.item[rows], minlength=dataset.num_items)
        # an item without training rows has an id row that nobody trained: content alone is better
        items["item_id"] = items["item_id"] * torch.from_numpy(counts > 0)
        if "user_id" in config["user_features"]:  # hashed: a new user needs no new row
            buckets = config["user_buckets"]
            users["user_id"] = 1 + hash_ids(dataset.user_ids.tolist(), buckets, salt="user")
            user_specs.append(Feature("user_id", "id", buckets + 1))
        history = Feature("history", "history", size=dataset.num_items + 1, table="item")
        self.user_specs = [
            spec for spec in [history, *user_specs] if spec.name in config["user_features"]
        ]
        self.item_specs = [spec for spec in item_specs if spec.name in config["item_features"]]
        self.users = {f.name: users[f.name].to(device) for f in self.user_specs if f != history}
        self.items = {f.name: items[f.name].to(device) for f in self.item_specs}
        smoothed = torch.from_numpy(counts + 1.0)
        self.log_q = (smoothed / smoothed.sum()).log().float().to(device)
        position = torch.arange(len(rows), device=device)
        first = self.sequences.start[self.sequences.user]
        self.positions = position[position > first]  # a target needs a history

    def example_batch(self, index: Tensor) -> dict[str, Tensor]:
        """Training examples: the user as they were before the target, and the target item."""
        position = self.positions[index]
        user = self.sequences.user[position]
        batch = {name: column[user] for name, column in self.users.items()}
        batch["history"] = self.sequences.history(position, self.max_history)
        batch["target"] = self.sequences.items[position] - 1
        return batch

    def user_batch(self, user: Tensor) -> dict[str, Tensor]:
        """Users as they are after all training rows."""
        batch = {name: column[user] for name, column in self.users.items()}
        batch["history"] = self.sequences.user_history(user, self.max_history)
        return batch

    def item_batch(self, item: Tensor) -> dict[str, Tensor]:
        """Items by index."""
        return {name: column[item] for name, column in self.items.items()}


def build_retrieval(data: RetrievalData, config: Mapping[str, Any]) -> TwoTower:
    """A two-tower model for the features of ``data``."""
    return TwoTower(
        data.user_specs,
        data.item_specs,
        config["dim"],
        hidden_dims=config["hidden_dims"],
        dropout=config["dropout"],
        max_history=config["max_history"],
        temperature=config["temperature"],
    )


def retrieval_loss(
    data: RetrievalData, config: Mapping[str, Any]
) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """The loss of a training batch: sampled over the batch, or over the whole catalogue."""

    def in_batch(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        target = batch["target"]
        user, item = model(batch, data.item_batch(target))
        return in_batch_softmax_loss(
            user,
            item,
            temperature=model.temperature,
            item_ids=target if config["mask_accidental_hits"] else None,
            log_q=data.log_q[target] if config["log_q"] else None,
        )

    def full(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        user, catalogue = model(batch, data.items)
        return full_softmax_loss(
            user, catalogue, batch["target"], temperature=model.temperature
        )

    return {"in_batch": in_batch, "full": full}[config["loss"]]


@torch.no_grad()
def retrieve(
    model: TwoTower, data: RetrievalData, *, k: int, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The k best unseen items of every user: (num_users, k) items and scores."""
    items = model.item_tower(data.items)

    def score(users: Tensor) -> Tensor:
        return model.user_tower(data.user_batch(users)) @ items.T

    return full_ranking(
        score, data.num_users, seen=data.sequences.seen(), k=k, chunk_size=chunk_size
    )


def train_retrieval(
    data: RetrievalData,
    config: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device,
    epochs: int | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    log: Log | None = None,
    checkpoint: Path | None = None,
) -> tuple[TwoTower, FitResult]:
    """Train the two-tower model, for ``epochs`` or until the validation NDCG@10 stops rising.

    Args:
        validation: (users, targets), items that the users chose next; not among the rows of data.
    """
    torch.manual_seed(seed)
    model = build_retrieval(data, config).to(device)
    settings = FitConfig(**config["fit"], seed=seed)
    if epochs is not None:
        settings = dataclasses.replace(settings, epochs=epochs)
    metric_fn = None
    if validation is not None:
        users, targets = validation

        def metric_fn(model: nn.Module) -> float:
            items, scores = retrieve(model, data, k=10, chunk_size=config["chunk_size"])
            return list_metrics(items[users], scores[users], targets)["ndcg@10"]

    def on_epoch(epoch: int, loss: float, metric: float | None) -> None:
        if log is not None:
            log("loss", loss, epoch)
            if metric is not None:
                log("validation_ndcg@10", metric, epoch)

    result = fit(
        model,
        retrieval_loss(data, config),
        len(data.positions),
        data.example_batch,
        settings,
        metric_fn=metric_fn,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )
    return model.eval(), result


def run(
    dataset: Dataset,
    split: Split,
    config: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device,
    log: Callable[[str, str, float, int], None],
) -> dict[str, Any]:
    """Train and apply the system; the caller judges what comes back.

    With ``select_epochs``, a first model is trained on the training rows and the epoch of its
    best validation NDCG@10 is taken; the final model is trained on training and validation rows
    together. The test rows are never read.

    Args:
        config: a parsed YAML file of ``configs/``.
        log: ``log(stage, tag, value, step)``, for curves and progress.

    Returns:
        ``{"retrieval": {"items", "scores": (num_users, list_length) arrays, best first,
        "train_seconds", "train_examples", "epochs", "losses", "metrics"}}``.
    """
    settings = config["retrieval"]
    epochs = settings["fit"]["epochs"]
    metrics: list[float] = []
    if settings["select_epochs"]:
        data = RetrievalData(dataset, split.train, settings, device)
        users = torch.from_numpy(dataset.user[split.validation]).to(device)
        targets = torch.from_numpy(dataset.item[split.validation]).to(device)
        _, selection = train_retrieval(
            data,
            settings,
            seed=seed,
            device=device,
            validation=(users, targets),
            log=lambda tag, value, step: log("select epochs", tag, value, step),
        )
        epochs, metrics = selection.best_epoch, selection.metrics
    rows = _merge(split.train, split.validation, dataset)
    data = RetrievalData(dataset, rows, settings, device)
    model, result = train_retrieval(
        data,
        settings,
        seed=seed,
        device=device,
        epochs=epochs,
        log=lambda tag, value, step: log("train retrieval", tag, value, step),
    )
    items, scores = retrieve(
        model, data, k=settings["list_length"], chunk_size=settings["chunk_size"]
    )
    return {
        "retrieval": {
            "items": items.cpu().numpy(),
            "scores": scores.cpu().numpy(),
            "train_seconds": result.seconds,
            "train_examples": result.examples,
            "epochs": epochs,
            "losses": result.losses,
            "metrics": metrics,
        }
    }


def _merge(train: np.ndarray, validation: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Rows of both, each user's validation rows after their training rows."""
    rows = np.concatenate([train, validation])
    return rows[np.argsort(dataset.user[rows], kind="stable")]
