"""The whole recommender: from interactions to ranked lists (kata 10)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recsys.data.candidates import CandidateFeatures
from recsys.data.dataset import Dataset
from recsys.data.sequences import Sequences
from recsys.data.splits import Split
from recsys.inference.serving import Recommender
from recsys.models.ranking import RankingModel
from recsys.models.sequence import SequenceModel
from recsys.models.tower import TwoTower
from recsys.training.loop import FitResult

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
        raise NotImplementedError("kata 10: write RetrievalData.__init__ in src/recsys/pipeline.py")

    def example_batch(self, index: Tensor) -> dict[str, Tensor]:
        """Training examples: the user as they were before the target, and the target item.

        With the attention tower: a history, and at each of its places the next item's index + 1.
        """
        raise NotImplementedError(
            "kata 10: write RetrievalData.example_batch in src/recsys/pipeline.py"
        )

    def user_batch(self, user: Tensor, history: Tensor) -> dict[str, Tensor]:
        """Users by index, as they are with a history (B, L) of item index + 1.

        Of a longer history the first ``max_history`` places are read.
        """
        raise NotImplementedError(
            "kata 10: write RetrievalData.user_batch in src/recsys/pipeline.py"
        )

    def item_batch(self, item: Tensor) -> dict[str, Tensor]:
        """Items by index."""
        raise NotImplementedError(
            "kata 10: write RetrievalData.item_batch in src/recsys/pipeline.py"
        )


def build_retrieval(data: RetrievalData, config: Mapping[str, Any]) -> TwoTower | SequenceModel:
    """A model of two towers for the features of ``data``, the user's by ``user_tower``.

    With ``learn_temperature`` false the temperature stays what it is.
    """
    raise NotImplementedError("kata 10: write build_retrieval in src/recsys/pipeline.py")


def retrieval_loss(
    data: RetrievalData, config: Mapping[str, Any]
) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """The loss of a training batch: sampled over the batch, or over the whole catalogue.

    With the attention tower: ``next_item_loss`` of every place, over the catalogue or over
    ``sampled`` items, drawn by their probabilities as targets.
    """
    raise NotImplementedError("kata 10: write retrieval_loss in src/recsys/pipeline.py")


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
    raise NotImplementedError("kata 10: write requests_after_all in src/recsys/pipeline.py")


@torch.no_grad()
def retrieve(
    model: TwoTower, data: RetrievalData, requests: Requests, *, k: int, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The k best items of each request that its user has not seen: (R, k) items and scores.

    At most ``chunk_size`` requests are encoded and scored at a time.
    """
    raise NotImplementedError("kata 10: write retrieve in src/recsys/pipeline.py")


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
    raise NotImplementedError("kata 10: write train_retrieval in src/recsys/pipeline.py")


def text_vectors(
    dataset: Dataset, config: Mapping[str, Any], device: torch.device
) -> Tensor | None:
    """Frozen text vectors of all items, centred and of unit length, (num_items, W); or None.

    Centred, because the vectors of one kind of text share a large common part that says nothing.
    """
    raise NotImplementedError("kata 10: write text_vectors in src/recsys/pipeline.py")


def reduced(text: Tensor, dim: int) -> Tensor:
    """The ``dim`` principal components of text vectors, (n, W) to (n, dim).

    The vectors are centred already. All are scaled by one number: squared lengths are 1 on average.
    """
    raise NotImplementedError("kata 10: write reduced in src/recsys/pipeline.py")


def text_profile(text: Tensor, history: Tensor) -> Tensor:
    """Mean text vector of a history of item index + 1, padded with 0: (R, L) to (R, W)."""
    raise NotImplementedError("kata 10: write text_profile in src/recsys/pipeline.py")


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
        raise NotImplementedError("kata 10: write RankingData.__init__ in src/recsys/pipeline.py")


class Ranker:
    """A trained second stage: its model, and the scale of the numbers that it reads.

    Args:
        model: a :class:`RankingModel`. mean, std: (F,) of the dense features it was trained on.
    """

    def __init__(self, model: RankingModel, mean: Tensor, std: Tensor) -> None:
        raise NotImplementedError("kata 10: write Ranker.__init__ in src/recsys/pipeline.py")

    def columns(self, data: RankingData, index: Tensor) -> dict[str, Tensor]:
        """The model's batch for some requests, a row for each of their candidates.

        With text, the candidate's vector and the profile are columns that the model reads.
        """
        raise NotImplementedError("kata 10: write Ranker.columns in src/recsys/pipeline.py")

    @torch.no_grad()
    def __call__(self, data: RankingData) -> Tensor:
        """(R, C) logits; minus infinity where there is no candidate."""
        raise NotImplementedError("kata 10: write Ranker.__call__ in src/recsys/pipeline.py")


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
    raise NotImplementedError("kata 10: write train_ranker in src/recsys/pipeline.py")


MODEL_OPTIONS = (
    "embedding_dim", "num_cross_layers", "rank", "hidden_dims", "dropout", "structure",
)  # fmt: skip


def split_off_last(dataset: Dataset, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each user, the rows before their last `count` (at most a third of them), and which
    places of ``rows`` the others have."""
    raise NotImplementedError("kata 10: write split_off_last in src/recsys/pipeline.py")


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
    raise NotImplementedError("kata 10: write run in src/recsys/pipeline.py")


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
    raise NotImplementedError("kata 10: write build_recommender in src/recsys/pipeline.py")


def measure_compile(ranker: Ranker, data: RankingData) -> dict[str, Any]:
    """What compiling the ranking model takes and gives, on batches of a few users' candidates.

    Measured with kata 07's functions.

    Returns:
        ``{"graph_breaks", "graphs", "speedup", "compile_seconds"}``: graphs for three sizes;
        speedup of the median over eager, side by side; the speedup is None with a ``"reason"``
        where the compiler fails.
    """
    raise NotImplementedError("kata 10: write measure_compile in src/recsys/pipeline.py")


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
    raise NotImplementedError("kata 10: write run_cold_start in src/recsys/pipeline.py")


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
