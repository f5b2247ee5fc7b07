"""Features of user-candidate pairs for the ranking stage, from statistics of a set of rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recsys.data.dataset import Dataset
from recsys.data.sequences import Sequences

NAMES = (
    "ease",
    "next_item",
    "next_items",
    "cosine_mean",
    "cosine_max",
    "popularity",
    "recent_popularity",
    "genre_match",
    "year",
    "year_distance",
    "history_length",
)


class CandidateFeatures:
    """What the past says of each candidate, as numbers of about unit size.

    Every statistic comes from the given rows alone. A ranker must be trained on features whose
    rows do not hold its own targets: otherwise it learns to trust counts that contain the answer.

    With h_0, h_1, ... the user's history, most recent first, w_p = decay ** p, and c a candidate:

    - ease: ``sum_p w_p B[h_p, c]``, B the item-item weights of EASE (Steck 2019, "Embarrassingly
      Shallow Autoencoders for Sparse Data", equation 8);
    - next_item, next_items: log lift of c after h_0, directly and within five steps, smoothed:
      ``log((T[h, c] + m q_c) / ((T[h] + m) q_c))``; next_items is the w-weighted mean over h_p;
    - cosine_mean, cosine_max: cosine of the user sets of h_p and c, w-weighted mean and maximum;
    - popularity: log count; recent_popularity: log of an exponentially decayed count before the
      time of the request;
    - genre_match: cosine of genres with the w-weighted profile; year and its distance to the
      profile's; history_length: log of the number of known items, the same for all candidates.

    Args:
        rows: sorted by (user, time), as for `Sequences`. l2: of EASE. decay: per place of history.
        max_history: places that are looked at. half_life_days: of the recent popularity.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        *,
        l2: float = 300.0,
        decay: float = 0.85,
        max_history: int = 30,
        half_life_days: float = 14.0,
        smoothing: float = 20.0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.max_history, self.device = max_history, torch.device(device)
        sequences = Sequences(dataset, rows, device=device)
        users, items = dataset.num_users, dataset.num_items
        seen = torch.zeros(users, items, device=device)
        seen[sequences.user, sequences.items - 1] = 1.0
        count = torch.bincount(sequences.items - 1, minlength=items).float()
        together = seen.T @ seen
        norm = count.clamp(min=1).sqrt()
        self.cosine = (together / norm[:, None] / norm).fill_diagonal_(0.0)
        self.ease = _ease(seen, together, l2)
        share = (count + 1) / (count + 1).sum()
        self.next_item = _lift(sequences, share, range(1, 2), smoothing)
        self.next_items = _lift(sequences, share, range(1, 6), smoothing)
        self.weights = decay ** torch.arange(max_history, dtype=torch.float32, device=device)
        self.popularity = (count + 1).log()
        self._fit_recency(dataset, rows, half_life_days)
        genres = torch.from_numpy(dataset.genres).float().to(device)
        self.genres = genres / genres.norm(dim=1, keepdim=True).clamp(min=1)
        known = dataset.years > 0
        years = np.where(known, dataset.years, dataset.years[known].mean() if known.any() else 0)
        self.years = torch.from_numpy((years - years.mean()) / 10).float().to(device)  # decades

    def __call__(
        self, history: Tensor, length: Tensor, time: Tensor, candidates: Tensor
    ) -> Tensor:
        """Features of B requests with C candidates each.

        Args:
            history: (B, L) item index + 1, most recent first, padded with 0, as from `Sequences`;
                max_history places are enough. length: (B,) how many items are known in all.
            time: (B,) int64 seconds; only what happened before counts as recent.
            candidates: (B, C) item indices; -1 for none (its features are those of item 0).

        Returns:
            (B, C, F) float32, F = len(NAMES), in that order.
        """
        candidates = candidates.clamp(min=0)
        history = history[:, : self.max_history]
        past, is_item = (history - 1).clamp(min=0), history > 0
        weight = self.weights[: history.shape[1]] * is_item  # (B, L)
        mean_weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-6)
        pair = past[:, :, None] * len(self.popularity) + candidates[:, None, :]  # (B, L, C)

        def weighted(table: Tensor, w: Tensor) -> Tensor:
            return torch.einsum("bl,blc->bc", w, table.view(-1)[pair])

        cosine = self.cosine.view(-1)[pair]
        last = self.next_item[past[:, 0]].gather(1, candidates) * is_item[:, :1]
        genres = torch.einsum("bl,blg->bg", mean_weight, self.genres[past])
        genres = genres / genres.norm(dim=1, keepdim=True).clamp(min=1e-6)
        year = self.years[candidates]
        profile_year = (mean_weight * self.years[past]).sum(1, keepdim=True)
        recent = self.recent[torch.bucketize(time, self.edges)]  # bins that ended before
        columns = [
            weighted(self.ease, weight) * 5,
            last,
            weighted(self.next_items, mean_weight),
            torch.einsum("bl,blc->bc", mean_weight, cosine) * 10,
            (cosine * is_item[:, :, None]).amax(1) * 5,
            self.popularity[candidates] - self.popularity.mean(),
            recent.gather(1, candidates),
            torch.einsum("bg,bcg->bc", genres, self.genres[candidates]),
            year,
            (year - profile_year).abs(),
            (length.float() + 1).log()[:, None].expand(candidates.shape) - 3,
        ]
        return torch.stack(columns, dim=2)

    def _fit_recency(self, dataset: Dataset, rows: np.ndarray, half_life_days: float) -> None:
        """Decayed counts at the edges of time bins a quarter of the half-life wide."""
        time = dataset.time[rows]
        width = max(1.0, half_life_days * 86400 / 4, (time.max() - time.min()) / 400)
        bins = ((time - time.min()) / width).astype(np.int64)
        num_bins = int(bins.max()) + 1
        counts = np.zeros((num_bins, dataset.num_items), dtype=np.float32)
        np.add.at(counts, (bins, dataset.item[rows]), 1.0)
        decay = 0.5 ** (width / (half_life_days * 86400))
        recent = np.zeros((num_bins + 1, dataset.num_items), dtype=np.float32)
        for b in range(num_bins):
            recent[b + 1] = decay * (recent[b] + counts[b])
        recent = np.log(recent + 0.1)
        self.recent = torch.from_numpy(recent - recent.mean(1, keepdims=True)).to(self.device)
        edges = time.min() + width * np.arange(1, num_bins + 1)
        self.edges = torch.from_numpy(np.ceil(edges).astype(np.int64)).to(self.device)


def _ease(seen: Tensor, together: Tensor, l2: float) -> Tensor:
    """Item-item weights of EASE; by the smaller of the two inverses (Woodbury identity)."""
    users, items = seen.shape
    if items <= users:
        inverse = torch.cholesky_inverse(
            torch.linalg.cholesky(together + l2 * torch.eye(items, device=seen.device))
        )
    else:
        kernel = seen @ seen.T + l2 * torch.eye(users, device=seen.device)
        solved = torch.cholesky_solve(seen, torch.linalg.cholesky(kernel))
        inverse = torch.eye(items, device=seen.device) - seen.T @ solved  # up to a factor 1 / l2
    return (inverse / -inverse.diagonal()).fill_diagonal_(0.0).contiguous()


def _lift(sequences: Sequences, share: Tensor, gaps: range, smoothing: float) -> Tensor:
    """Smoothed log lift of item j within the given numbers of steps after item i, (I, I)."""
    items = len(share)
    table = torch.zeros(items * items, device=share.device)
    item, user = sequences.items - 1, sequences.user
    for gap in gaps:
        same = user[gap:] == user[:-gap]
        pair = item[:-gap][same] * items + item[gap:][same]
        table.index_add_(0, pair, torch.full((len(pair),), 1.0 / gap, device=share.device))
    table = table.view(items, items)
    total = table.sum(1, keepdim=True)
    return ((table + smoothing * share) / ((total + smoothing) * share)).log()
