"""The whole recommender: from interactions to ranked lists (kata 10)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.data.candidates import CandidateFeatures
from recsys.data.dataset import Dataset
from recsys.data.features import (
    Feature,
    content_vectors,
    history_feature,
    item_features,
    item_texts,
    user_features,
)
from recsys.data.sequences import Sequences
from recsys.data.splits import Split, item_cold_start
from recsys.evaluation.metrics import full_ranking, list_metrics
from recsys.inference.compiled import benchmark, compile_model, count_graphs, warm_up
from recsys.inference.serving import Recommender, build_index, recall_at, search
from recsys.models.embedding import hash_ids
from recsys.models.ranking import RankingModel, binary_loss, listwise_loss
from recsys.models.sequence import SequenceModel, next_item_loss, training_pairs
from recsys.models.text import TextProjection, cached_embeddings, load_encoder
from recsys.models.tower import TwoTower
from recsys.training.loop import FitConfig, FitResult, fit
from recsys.training.losses import full_softmax_loss, in_batch_softmax_loss

Log = Callable[[str, float, int], None]  # tag, value, step


class RetrievalData:
    """Everything retrieval needs from a set of training rows, as columns on one device.

    Args:
        rows: interactions to learn from, sorted by user and time: nothing here, counts included,
            knows any other row.
        text: (num_items, W) text vectors, or None; an item's feature "text".
        config: names the ``user_features`` and ``item_features`` that the towers read.

    Attributes:
        users, items: columns of user and item features, one row per user or item index.
        log_q: (num_items,) log probability of an item as a training target, add-one smoothed.
        positions: places of the sequences that can be a target, (num_examples,); with the
            attention tower an example is a window of targets, and these are where windows end.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        config: Mapping[str, Any],
        device: torch.device,
        text: Tensor | None = None,
    ) -> None:
        self.rows = rows
        self.sequences = Sequences(dataset, rows, device=device)
        self.max_history = config["max_history"]
        self.num_users = dataset.num_users
        item_specs, items = item_features(dataset)
        user_specs, users = user_features(dataset)
        counts = np.bincount(dataset.item[rows], minlength=dataset.num_items)
        # an item without training rows has an id row that nobody trained: content alone is better
        items["item_id"] = items["item_id"] * torch.from_numpy(counts > 0)
        if text is not None:
            item_specs.append(Feature("text", "text", text.shape[1]))
            items["text"] = text
        if "user_id" in config["user_features"]:  # hashed: a new user needs no new row
            buckets = config["user_buckets"]
            users["user_id"] = 1 + hash_ids(dataset.user_ids.tolist(), buckets, salt="user")
            user_specs.append(Feature("user_id", "id", buckets + 1))
        history = history_feature(dataset)
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
        self.num_targets = len(self.positions)
        self.every_place = config.get("user_tower", "bag") == "attention"
        if self.every_place:
            self.positions = self.sequences.window_ends(self.max_history)

    def example_batch(self, index: Tensor) -> dict[str, Tensor]:
        """Training examples: the user as they were before the target, and the target item.

        With the attention tower: a history, and at each of its places the next item's index + 1.
        """
        position = self.positions[index]
        if self.every_place:
            windows = self.sequences.windows(position, self.max_history + 1)
            return dict(zip(("history", "target"), training_pairs(windows), strict=True))
        user = self.sequences.user[position]
        batch = {name: column[user] for name, column in self.users.items()}
        batch["history"] = self.sequences.history(position, self.max_history)
        batch["target"] = self.sequences.items[position] - 1
        return batch

    def user_batch(self, user: Tensor, history: Tensor) -> dict[str, Tensor]:
        """Users by index, as they are with a history (B, L) of item index + 1.

        Of a longer history the first ``max_history`` places are read.
        """
        batch = {name: column[user] for name, column in self.users.items()}
        batch["history"] = history[:, : self.max_history]
        return batch

    def item_batch(self, item: Tensor) -> dict[str, Tensor]:
        """Items by index."""
        return {name: column[item] for name, column in self.items.items()}


def build_retrieval(data: RetrievalData, config: Mapping[str, Any]) -> TwoTower | SequenceModel:
    """A model of two towers for the features of ``data``, the user's by ``user_tower``.

    With ``learn_temperature`` false the temperature stays what it is.
    """
    shared = ("hidden_dims", "dropout", "max_history", "temperature")
    options = {name: config[name] for name in shared}
    if data.every_place:
        options |= {name: config["attention"][name] for name in ("num_blocks", "num_heads")}
        model = SequenceModel(data.item_specs, len(data.log_q) + 1, config["dim"], **options)
    else:
        model = TwoTower(data.user_specs, data.item_specs, config["dim"], **options)
    if not config.get("learn_temperature", True):
        # an optimizer takes only what requires a gradient; how a tower's parts are called is free
        towers = {*model.user_tower.parameters(), *model.item_tower.parameters()}
        for parameter in set(model.parameters()) - towers:
            parameter.requires_grad_(False)
    return model


def retrieval_loss(
    data: RetrievalData, config: Mapping[str, Any]
) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """The loss of a training batch: sampled over the batch, or over the whole catalogue.

    With the attention tower: ``next_item_loss`` of every place, over the catalogue or over
    ``sampled`` items, drawn by their probabilities as targets.
    """

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

    def every_place(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        options = {}
        if config["attention"]["sampled"]:
            count = config["attention"]["sampled"]
            options["sample"] = torch.multinomial(data.log_q.exp(), count, replacement=True)
            options["log_q"] = data.log_q if config["log_q"] else None
        return next_item_loss(
            model.user_tower.states(batch["history"]),
            batch["target"],
            model.item_tower(data.items),
            temperature=model.temperature,
            **options,
        )

    losses = {"in_batch": in_batch, "full": full}
    return every_place if data.every_place else losses[config["loss"]]


@dataclass(frozen=True)
class Requests:
    """Moments at which users are to be recommended something.

    Attributes:
        sequences: the users' items. user: (R,) user indices.
        end: (R,) places in the sequences: what lies before is known, nothing else.
        time: (R,) int64 seconds.
    """

    sequences: Sequences
    user: Tensor
    end: Tensor
    time: Tensor

    def __len__(self) -> int:
        return len(self.user)

    def of(self, index: Tensor) -> Requests:
        """Some of the requests, (B,)."""
        return Requests(self.sequences, self.user[index], self.end[index], self.time[index])

    def history(self, index: Tensor, length: int) -> Tensor:
        """(B,) requests to (B, length) item index + 1, most recent first, padded with 0."""
        return self.sequences.until(self.user[index], self.end[index], length)


def requests_after_all(dataset: Dataset, data: RetrievalData) -> Requests:
    """One request for each user, in order, after all of their rows, at the time of the last."""
    user = torch.arange(dataset.num_users, device=data.sequences.items.device)
    # the moment is not known before it comes, so "now" is when the user was last here
    last = np.zeros(dataset.num_users, dtype=np.int64)
    np.maximum.at(last, dataset.user[data.rows], dataset.time[data.rows])
    time = torch.from_numpy(last).to(user.device)
    return Requests(data.sequences, user, data.sequences.start[1:], time)


@torch.no_grad()
def retrieve(
    model: TwoTower, data: RetrievalData, requests: Requests, *, k: int, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The k best items of each request that its user has not seen: (R, k) items and scores.

    At most ``chunk_size`` requests are encoded and scored at a time.
    """
    items = model.item_tower(data.items)

    def score(index: Tensor) -> Tensor:
        history = requests.history(index, data.max_history)
        return model.user_tower(data.user_batch(requests.user[index], history)) @ items.T

    seen = requests.sequences.seen_until(requests.user, requests.end)
    return full_ranking(score, len(requests), seen=seen, k=k, chunk_size=chunk_size)


def train_retrieval(
    data: RetrievalData,
    config: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device,
    epochs: int | None = None,
    validation: tuple[Requests, Tensor] | None = None,
    log: Log | None = None,
    checkpoint: Path | None = None,
) -> tuple[TwoTower, FitResult]:
    """Train the two-tower model, for ``epochs`` or until the validation NDCG@10 stops rising.

    With the attention tower ``batch_size`` counts targets, of which an example is a window.

    Args:
        validation: requests and what the users chose then; not among the rows of data.
        log: is told the "loss" of each epoch, from 1, and with validation "validation_ndcg@10".

    Returns:
        the model, in evaluation mode, and what training did.
    """
    torch.manual_seed(seed)
    model = build_retrieval(data, config).to(device)
    settings = FitConfig(**config["fit"], seed=seed)
    if epochs is not None:
        settings = dataclasses.replace(settings, epochs=epochs)
    if data.every_place:  # batch_size counts targets, of which an example is a window
        size = max(1, settings.batch_size // data.max_history)
        settings = dataclasses.replace(settings, batch_size=size)
    metric_fn = None
    if validation is not None:
        requests, targets = validation

        def metric_fn(model: nn.Module) -> float:
            items, scores = retrieve(model, data, requests, k=10, chunk_size=config["chunk_size"])
            return list_metrics(items, scores, targets)["ndcg@10"]

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


def text_vectors(
    dataset: Dataset, config: Mapping[str, Any], device: torch.device
) -> Tensor | None:
    """Frozen text vectors of all items, centred and of unit length, (num_items, W); or None.

    Centred, because the vectors of one kind of text share a large common part that says nothing.
    """
    if not config["encoder"]:
        return None
    encoder = load_encoder(config["encoder"], device=device)
    vectors = cached_embeddings(encoder, item_texts(dataset), config["cache"]).to(device)
    return F.normalize(vectors - vectors.mean(0), dim=1)


def reduced(text: Tensor, dim: int) -> Tensor:
    """The ``dim`` principal components of text vectors, (n, W) to (n, dim).

    The vectors are centred already. All are scaled by one number: squared lengths are 1 on average.
    """
    _, _, components = torch.linalg.svd(text, full_matrices=False)
    vectors = text @ components[:dim].T
    return vectors / vectors.square().sum(1).mean().sqrt()


def text_profile(text: Tensor, history: Tensor) -> Tensor:
    """Mean text vector of a history of item index + 1, padded with 0: (R, L) to (R, W)."""
    offsets = torch.arange(len(history), device=history.device) * history.shape[1]
    padded = torch.cat([text.new_zeros(1, text.shape[1]), text])
    return F.embedding_bag(history.flatten(), padded, offsets, mode="mean", padding_idx=0)


class RankingData:
    """Requests, their candidates and what is known of each pair, as columns on one device.

    Args:
        requests, items, scores: what was asked and what retrieval answered, (R, C).
        features: statistics of rows that hold no target of these requests.
        text: (num_items, W) text vectors, or None.
        positive: (R,) the item that was chosen, if known; requests whose candidates do not hold
            it are left out, as no ranker could have helped them.

    Attributes:
        dense: (R, C, F) features, stage-one score and place among them, with text the product of
            profile and candidate; not yet standardised.
        labels: (R, C), 1 for what was chosen.
        profile: (R, W) mean text vector of the recent history, or None.
    """

    def __init__(
        self,
        requests: Requests,
        items: Tensor,
        scores: Tensor,
        features: CandidateFeatures,
        *,
        text: Tensor | None = None,
        positive: Tensor | None = None,
        chunk_size: int = 256,
    ) -> None:
        self.text, self.profile = text, None
        index = torch.arange(len(requests), device=items.device)
        if positive is not None:
            index = index[(items == positive[:, None]).any(1)]
            self.labels = (items[index] == positive[index, None]).float()
        self.items = items[index]
        parts = []
        for part in index.split(chunk_size):
            history = requests.history(part, features.max_history)
            length = requests.end[part] - requests.sequences.start[requests.user[part]]
            parts.append(features(history, length, requests.time[part], items[part]))
        if text is not None:
            self.profile = text_profile(text, requests.history(index, features.max_history))
            match = torch.einsum("rw,rcw->rc", self.profile, text[self.items.clamp(min=0)])
            parts = [torch.cat([torch.cat(parts), match[:, :, None]], dim=2)]
        scores = scores[index].masked_fill(self.items < 0, -1.0)
        place = torch.arange(items.shape[1], device=items.device).add(1.0).log().expand_as(scores)
        self.dense = torch.cat([torch.cat(parts), scores[:, :, None], place[:, :, None]], dim=2)


class Ranker:
    """A trained second stage: its model, and the scale of the numbers that it reads.

    Args:
        model: a :class:`RankingModel`. mean, std: (F,) of the dense features it was trained on.
    """

    def __init__(self, model: RankingModel, mean: Tensor, std: Tensor) -> None:
        self.model, self.mean, self.std = model, mean, std

    def columns(self, data: RankingData, index: Tensor) -> dict[str, Tensor]:
        """The model's batch for some requests, a row for each of their candidates.

        With text, the candidate's vector and the profile are columns that the model reads.
        """
        batch = {"dense": ((data.dense[index] - self.mean) / self.std).flatten(0, 1)}
        if data.text is not None:
            candidates = data.items.shape[1]
            batch["item_text"] = data.text[data.items[index].clamp(min=0).flatten()]
            batch["profile_text"] = data.profile[index].repeat_interleave(candidates, dim=0)
        return batch

    @torch.no_grad()
    def __call__(self, data: RankingData) -> Tensor:
        """(R, C) logits; minus infinity where there is no candidate."""
        index = torch.arange(len(data.items), device=data.items.device)
        logits = [self.model(self.columns(data, part)) for part in index.split(512)]
        return torch.cat(logits).view(data.items.shape).masked_fill(data.items < 0, float("-inf"))


def train_ranker(
    data: RankingData, config: Mapping[str, Any], *, seed: int, log: Log | None = None
) -> tuple[Ranker, FitResult]:
    """Train the second stage to find the chosen item among the candidates.

    Args:
        config: its ``loss`` is "listwise" or "binary".
        log: is told the "loss" of each epoch, from 1.

    Returns:
        the ranker, and what training did.
    """
    torch.manual_seed(seed)
    specs = [Feature("dense", "dense", data.dense.shape[2])]
    if data.text is not None:
        width = data.text.shape[1]
        specs += [Feature("item_text", "text", width), Feature("profile_text", "text", width)]
    options = {name: config[name] for name in MODEL_OPTIONS}
    model = RankingModel(specs, **options).to(data.dense.device)
    ranker = Ranker(model, data.dense.mean((0, 1)), data.dense.std((0, 1)).clamp(min=1e-6))

    def make_batch(index: Tensor) -> dict[str, Tensor]:
        return {**ranker.columns(data, index), "label": data.labels[index].flatten()}

    def loss_fn(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model(batch)
        if config["loss"] == "binary":
            return binary_loss(logits, batch["label"])
        lists = (-1, data.items.shape[1])
        return listwise_loss(logits.view(lists), batch["label"].view(lists))

    def on_epoch(epoch: int, loss: float, metric: float | None) -> None:
        if log is not None:
            log("loss", loss, epoch)

    settings = FitConfig(**config["fit"], seed=seed)
    result = fit(model, loss_fn, len(data.items), make_batch, settings, on_epoch=on_epoch)
    model.eval()
    return ranker, result


MODEL_OPTIONS = (
    "embedding_dim", "num_cross_layers", "rank", "hidden_dims", "dropout", "structure",
)  # fmt: skip


def split_off_last(dataset: Dataset, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each user, the rows before their last `count` (at most a third of them), and which
    places of ``rows`` the others have."""
    user = dataset.user[rows]
    total = np.bincount(user, minlength=dataset.num_users)
    first = np.cumsum(total) - total
    place = np.arange(len(rows)) - first[user]
    held_out = place >= (total - np.minimum(count, total // 3))[user]
    return rows[~held_out], np.flatnonzero(held_out)


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

    The ranker learns from each user's last rows: a retrieval model and statistics that do not know
    these rows propose candidates, the ranker learns which was chosen. Then retrieval and statistics
    are fitted again on everything, and the ranker reorders what they propose.

    Returns:
        ``{"retrieval": {"items", "scores", "train_seconds", "train_examples", "epochs", "losses",
        "metrics"}, "ranking": {"logits", "train_seconds", "losses"}, "final": {"items",
        "scores"}, "index": figures of :func:`build_recommender`, "compile": figures of
        :func:`measure_compile` or None, "recommender": what the service serves}``.

        items, scores and logits are (num_users, list_length) arrays, lists best first, logits in
        the order of retrieval's lists. What is served ranks other lists too, of any length, as
        these were ranked.
    """
    settings, ranking = config["retrieval"], config["ranking"]
    length, chunk_size = settings["list_length"], settings["chunk_size"]
    text = text_vectors(dataset, config["text"], device)
    ranking_text = None if text is None else reduced(text, ranking["text_dim"])

    def train(stage: str, rows: np.ndarray, **options: Any) -> tuple[RetrievalData, TwoTower, Any]:
        data = RetrievalData(dataset, rows, settings, device, text)
        if "validation" in options:
            targets = torch.from_numpy(dataset.item[split.validation]).to(device)
            users = torch.from_numpy(dataset.user[split.validation]).to(device)
            asked = requests_after_all(dataset, data).of(users)
            options["validation"] = (asked, targets)
        model, result = train_retrieval(
            data,
            settings,
            seed=seed,
            device=device,
            log=lambda tag, value, step: log(stage, tag, value, step),
            **options,
        )
        return data, model, result

    epochs, metrics = settings["fit"]["epochs"], []
    if settings["select_epochs"]:
        _, _, selection = train("select epochs", split.train, validation=True)
        epochs, metrics = selection.best_epoch, selection.metrics
    rows = _merge(split.train, split.validation, dataset)

    # the ranker, on what happened before its own targets
    before, places = split_off_last(dataset, rows, ranking["targets_per_user"])
    fewer = ranking.get("retrieval_epochs") or epochs
    data, model, _ = train("train retrieval for the ranker", before, epochs=fewer)
    everything = Sequences(dataset, rows, device=device)
    end = torch.from_numpy(places).to(device)
    moment = torch.from_numpy(dataset.time[rows[places]]).to(device)
    asked = Requests(everything, everything.user[end], end, moment)
    items, scores = retrieve(model, data, asked, k=ranking["candidates"], chunk_size=chunk_size)
    statistics = CandidateFeatures(dataset, before, device=device, **ranking["features"])
    positive = everything.items[end] - 1
    ranker, training = train_ranker(
        RankingData(asked, items, scores, statistics, text=ranking_text, positive=positive),
        ranking,
        seed=seed,
        log=lambda tag, value, step: log("train ranker", tag, value, step),
    )

    # everything again on all rows
    data, model, result = train("train retrieval", rows, epochs=epochs)
    asked = requests_after_all(dataset, data)
    items, scores = retrieve(model, data, asked, k=length, chunk_size=chunk_size)
    statistics = CandidateFeatures(dataset, rows, device=device, **ranking["features"])
    proposed = RankingData(asked, items, scores, statistics, text=ranking_text)
    logits = ranker(proposed)
    final, order = logits.sort(dim=1, descending=True, stable=True)

    listed, ranked = items.cpu().numpy(), logits.cpu().numpy()

    def rank(users: np.ndarray, items: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Lists that were ranked above are looked up; only others are ranked while users wait."""
        if items.shape[1] != listed.shape[1]:
            return rank_now(users, items, scores)
        result, new = ranked[users], (items != listed[users]).any(1)
        if new.any():
            result[new] = rank_now(users[new], items[new], scores[new])
        return result

    def rank_now(users: np.ndarray, items: np.ndarray, scores: np.ndarray) -> np.ndarray:
        some = asked.of(torch.from_numpy(users).to(device))
        candidates = torch.from_numpy(items).to(device)
        similarity = torch.from_numpy(scores).float().to(device)  # a service may count in float64
        data = RankingData(some, candidates, similarity, statistics, text=ranking_text)
        return ranker(data).cpu().numpy()

    recommender, index = build_recommender(
        dataset, model, data, asked, rank, kind=config["index"]["kind"], num_candidates=length
    )
    return {
        "retrieval": {
            "items": items.cpu().numpy(),
            "scores": scores.cpu().numpy(),
            "train_seconds": result.seconds,
            "train_examples": round(result.examples * data.num_targets / len(data.positions)),
            "epochs": epochs,
            "losses": result.losses,
            "metrics": metrics,
        },
        "ranking": {
            "logits": logits.cpu().numpy(),
            "train_seconds": training.seconds,
            "losses": training.losses,
        },
        "final": {"items": items.gather(1, order).cpu().numpy(), "scores": final.cpu().numpy()},
        "index": index,
        "compile": measure_compile(ranker, proposed) if config["compile"]["measure"] else None,
        "recommender": recommender,
    }


@torch.no_grad()
def build_recommender(
    dataset: Dataset,
    model: TwoTower,
    data: RetrievalData,
    requests: Requests,
    ranker: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    *,
    kind: str,
    num_candidates: int,
) -> tuple[Recommender, dict[str, Any]]:
    """What the service needs, in one piece, and figures of its index.

    Args:
        requests: one for each user, in order. ranker: as for ``Recommender``.
        kind: of the index, as for ``build_index``.

    Returns:
        the recommender, and ``{"kind", "recall_vs_exact@10", "cpu_ms_per_query"}``.
    """
    everyone = torch.arange(len(requests), device=requests.user.device)
    history = requests.history(everyone, data.max_history)
    users = model.user_tower(data.user_batch(requests.user, history)).cpu().numpy()
    items = model.item_tower(data.items).cpu().numpy()
    index = build_index(items, kind=kind)
    started = time.process_time()
    search(index, users, 10)
    seconds = time.process_time() - started
    seen, offsets = requests.sequences.seen_until(requests.user, requests.end)
    recommender = Recommender(
        user_ids=dataset.user_ids,
        user_vectors=users,
        item_ids=dataset.item_ids,
        titles=dataset.titles,
        index=index,
        seen=(seen.cpu().numpy(), offsets.cpu().numpy()),
        ranker=ranker,
        num_candidates=num_candidates,
    )
    return recommender, {
        "kind": type(index).__name__,
        "recall_vs_exact@10": recall_at(index, items, users, 10),
        "cpu_ms_per_query": 1000 * seconds / len(users),
    }


def measure_compile(ranker: Ranker, data: RankingData) -> dict[str, Any]:
    """What compiling the ranking model takes and gives, on batches of a few users' candidates.

    Measured with kata 07's functions.

    Returns:
        ``{"graph_breaks", "graphs", "speedup", "compile_seconds"}``: graphs for three sizes;
        speedup of the median over eager, side by side; the speedup is None with a ``"reason"``
        where the compiler fails.
    """
    sizes = [min(size, len(data.items)) for size in (64, 48, 32)]
    device = data.items.device
    batches = [(ranker.columns(data, torch.arange(n, device=device)),) for n in sizes]
    with torch.no_grad():
        report = count_graphs(ranker.model, batches)
        result = {"graph_breaks": report.graph_breaks, "graphs": report.graphs}
        try:
            compiled = compile_model(ranker.model)
            seconds = warm_up(compiled, batches)
        except RuntimeError as error:
            reason = f"the compiler failed: {str(error).strip().splitlines()[0]}"
            return result | {"speedup": None, "compile_seconds": None, "reason": reason}
        timing = benchmark(
            {"eager": lambda: ranker.model(*batches[0]), "compiled": lambda: compiled(*batches[0])},
            synchronize=torch.cuda.synchronize if device.type == "cuda" else None,
        )
    speedup = timing["eager"].median / timing["compiled"].median
    return result | {"speedup": speedup, "compile_seconds": seconds}


def run_cold_start(
    dataset: Dataset,
    config: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device,
    log: Callable[[str, str, float, int], None],
) -> dict[str, Any] | None:
    """Recommend items that nobody has rated, from their content alone; the caller judges.

    A share of the items loses all its rows, and the others are what is learnt from. A cold item is
    scored by the weighted sum of four parts, each of unit deviation over all items of a user; one
    whose weight is 0 or is not given is left out. A user with no row left has finite scores, too:

    - text: likeness of its text to those of what the user chose;
    - tower: the same in the space of a tower that sees items by their content only;
    - projection: factors of who chose what, and a projection of content to the items' factors;
    - regression: a ridge regression for each user, of what they chose on content.

    Returns:
        None without a text encoder, else ``{"text": (num_items, W) vectors, "items", "scores":
        (num_users, 10) of cold items, best first, "all_items": (num_users, 10) of all items that
        the user has not chosen}``; the split is
        ``item_cold_start(dataset, fraction=config["fraction"], seed=seed)``.
    """
    text = text_vectors(dataset, config["text"], device)
    if text is None:
        return None
    cold_config = config["cold_start"]
    settings = config["retrieval"] | {
        "item_features": cold_config["item_features"],
        "max_history": cold_config["max_history"],
        "user_tower": "bag",
    }
    split = item_cold_start(dataset, fraction=cold_config["fraction"], seed=seed)
    data = RetrievalData(dataset, split.train, settings, device, text)
    cold = torch.from_numpy(split.cold_items).to(device)
    user, item = data.sequences.user, data.sequences.items - 1
    weights = {name: weight for name, weight in cold_config["weights"].items() if weight}
    parts: dict[str, tuple[Tensor, Tensor]] = {}  # vectors of users and items

    def chosen(vectors: Tensor) -> Tensor:
        """Sum of the vectors of what each user chose."""
        return vectors.new_zeros(dataset.num_users, vectors.shape[1]).index_add_(
            0, user, vectors[item]
        )

    if "text" in weights:
        parts["text"] = chosen(text), text
    if "tower" in weights:
        model, _ = train_retrieval(
            data,
            settings,
            seed=seed,
            device=device,
            epochs=cold_config["epochs"],
            log=lambda tag, value, step: log("train retrieval for cold start", tag, value, step),
        )
        with torch.no_grad():
            vectors = model.item_tower(data.items)
        parts["tower"] = chosen(vectors), vectors
    content = torch.from_numpy(content_vectors(dataset, text.cpu().numpy())).float().to(device)
    warm = torch.bincount(item, minlength=dataset.num_items) > 0
    if "regression" in weights:
        parts["regression"] = choice_regressions(content, warm, chosen, cold_config["ridge"])
    if "projection" in weights:
        torch.manual_seed(seed)  # the decomposition starts from random vectors
        users, factors = choice_factors(
            user, item, dataset.num_users, dataset.num_items, cold_config["factors"]
        )
        projection = TextProjection.fit(content[warm], factors[warm], ridge=cold_config["ridge"])
        parts["projection"] = users, projection(content)

    def score(index: Tensor) -> Tensor:
        """Users by index, (B,), to scores of all items, (B, num_items)."""
        total = torch.zeros(len(index), dataset.num_items, device=device)
        for name, (users, items) in parts.items():
            part = users[index] @ items.T
            total += weights[name] * part / part.std(1, keepdim=True).clamp(min=1e-9)
        return total

    def ranked(score: Callable[[Tensor], Tensor], seen: tuple[Tensor, Tensor]) -> Any:
        lists = full_ranking(
            score, dataset.num_users, seen=seen, k=10, chunk_size=settings["chunk_size"]
        )
        return [part.cpu().numpy() for part in lists]

    nothing = item[:0], torch.zeros_like(data.sequences.start)
    items, scores = ranked(lambda index: score(index)[:, cold], nothing)
    everything, _ = ranked(score, (item, data.sequences.start))
    return {
        "text": text.cpu().numpy(),
        "items": split.cold_items[items],
        "scores": scores,
        "all_items": everything,
    }


def choice_factors(
    user: Tensor, item: Tensor, num_users: int, num_items: int, dim: int
) -> tuple[Tensor, Tensor]:
    """Vectors whose products come closest to the table of who chose what (n pairs, each once).

    Returns:
        users (num_users, dim) and items (num_items, dim) of the truncated singular value
        decomposition, the singular values with the items; torch's random state is used.
    """
    ones = torch.ones(len(user), device=user.device)
    table = torch.sparse_coo_tensor(
        torch.stack([user, item]), ones, (num_users, num_items), check_invariants=False
    )
    left, values, right = torch.svd_lowrank(table, q=min(dim + 8, num_users, num_items), niter=6)
    return left[:, :dim], right[:, :dim] * values[:dim]


def choice_regressions(
    content: Tensor, warm: Tensor, chosen: Callable[[Tensor], Tensor], ridge: float
) -> tuple[Tensor, Tensor]:
    """Ridge regressions of what each user chose (1, or 0) on the items' content.

    Args:
        content: (num_items, W). warm: (num_items,) bool, the items that are learnt from.
        chosen: item vectors to their sum over what each user chose, (num_users, W).
        ridge: the penalty, above 0; none on the intercept, which changes no order.

    Returns:
        weights (num_users, W) and centred content (num_items, W): their products are the scores.
    """
    x = content - content[warm].mean(0)
    gram = x[warm].T @ x[warm] + ridge * torch.eye(x.shape[1], device=x.device)
    return torch.linalg.solve(gram, chosen(x).T).T, x


def _merge(train: np.ndarray, validation: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Rows of both, each user's validation rows after their training rows."""
    rows = np.concatenate([train, validation])
    return rows[np.argsort(dataset.user[rows], kind="stable")]
