"""Features of user-candidate pairs for the ranking stage, from statistics of a set of rows."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.data.dataset import Dataset
from recsys.data.sequences import Sequences

EASE_DECAYS = (0.0, 0.5, 0.93, 1.0)  # beside the configured one; 0: the last item alone
NAMES = (
    "ease",
    *(f"ease_{decay:g}" for decay in EASE_DECAYS),
    "ease_max",
    "next_item",
    "next_items",
    "near_mean",
    "near_max",
    "cosine_mean",
    "cosine_max",
    "popularity",
    "recent_popularity",
    "season_popularity",
    "age",
    "genre_match",
    "year",
    "year_distance",
    "history_length",
)
SEASON = 4  # half-lives of the recent popularity


class CandidateFeatures:
    """What the past says of each candidate, as numbers of about unit size.

    Every statistic comes from the given rows alone. A ranker must be trained on features whose
    rows do not hold its own targets: otherwise it learns to trust counts that contain the answer.

    With h_0, h_1, ... the user's history, most recent first, w_p = decay ** p, and c a candidate:

    - ease: ``sum_p w_p B[h_p, c]``, B the item-item weights of EASE (Steck 2019, "Embarrassingly
      Shallow Autoencoders for Sparse Data", equation 8); ease_0.5 and so on: the same with another
      decay; ease_max: the largest ``B[h_p, c]``;
    - next_item, next_items: log lift of c after h_0, directly and within five steps, smoothed:
      ``log((T[h, c] + m q_c) / ((T[h] + m) q_c))``; next_items is the w-weighted mean over h_p;
    - near_mean, near_max: log lift of c within five steps before or after h_p, w-weighted mean and
      maximum;
    - cosine_mean, cosine_max: cosine of the user sets of h_p and c, w-weighted mean and maximum;
    - popularity: log count; recent_popularity, season_popularity: log of an exponentially decayed
      count before the time of the request, the second with SEASON times the half-life; age: log of
      the days since the item's first row;
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
        self.ease = _ease(seen, together, l2)
        self.cosine = together.div_(norm[:, None]).div_(norm).fill_diagonal_(0.0)
        share = (count + 1) / (count + 1).sum()
        self.next_item = _lift(_steps(sequences, items, 1), share, smoothing)
        steps = _steps(sequences, items, 5)
        self.next_items = _lift(steps, share, smoothing)
        self.near = _lift(steps + steps.T, share, smoothing)
        place = torch.arange(max_history, dtype=torch.float32, device=device)
        self.weights = torch.stack([d**place for d in (decay, *EASE_DECAYS)], dim=1)  # 0 ** 0 is 1
        self.popularity = (count + 1).log()
        self.recent = _Recency(dataset, rows, half_life_days, self.device)
        self.season = _Recency(dataset, rows, half_life_days * SEASON, self.device)
        first = np.full(items, dataset.time[rows].max())
        np.minimum.at(first, dataset.item[rows], dataset.time[rows])
        self.first = torch.from_numpy(first).to(device)
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
        weights = self.weights[: history.shape[1]] * is_item[:, :, None]  # (B, L, decays)
        mean_weight = weights[:, :, 0] / weights[:, :, 0].sum(1, keepdim=True).clamp(min=1e-6)
        pair = past[:, :, None] * len(self.popularity) + candidates[:, None, :]  # (B, L, C)

        def of_pairs(table: Tensor) -> Tensor:
            return table.view(-1)[pair] * is_item[:, :, None]

        def mean(values: Tensor) -> Tensor:
            return torch.bmm(mean_weight[:, None], values)[:, 0]

        ease, near, cosine = of_pairs(self.ease), of_pairs(self.near), of_pairs(self.cosine)
        last = self.next_item[past[:, 0]].gather(1, candidates) * is_item[:, :1]
        genres = F.normalize(torch.einsum("bl,blg->bg", mean_weight, self.genres[past]), dim=1)
        year = self.years[candidates]
        profile_year = (mean_weight * self.years[past]).sum(1, keepdim=True)
        days = (time[:, None] - self.first[candidates]).clamp(min=0) / 86400
        columns = [
            *(torch.bmm(weights.transpose(1, 2), ease) * 5).unbind(1),
            ease.amax(1) * 5,
            last,
            mean(of_pairs(self.next_items)),
            mean(near),
            near.amax(1),
            mean(cosine) * 10,
            cosine.amax(1) * 5,
            self.popularity[candidates] - self.popularity.mean(),
            self.recent(time).gather(1, candidates),
            self.season(time).gather(1, candidates),
            (days + 1).log() - 4,
            torch.einsum("bg,bcg->bc", genres, self.genres[candidates]),
            year,
            (year - profile_year).abs(),
            (length.float() + 1).log()[:, None].expand(candidates.shape) - 3,
        ]
        return torch.stack(columns, dim=2)


class _Recency:
    """Log of exponentially decayed counts, centred, at the edges of time bins."""

    def __init__(
        self, dataset: Dataset, rows: np.ndarray, half_life_days: float, device: torch.device
    ) -> None:
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
        self.table = torch.from_numpy(recent - recent.mean(1, keepdims=True)).to(device)
        edges = time.min() + width * np.arange(1, num_bins + 1)
        self.edges = torch.from_numpy(np.ceil(edges).astype(np.int64)).to(device)

    def __call__(self, time: Tensor) -> Tensor:
        """(B,) seconds to (B, items); only bins that ended before count."""
        return self.table[torch.bucketize(time, self.edges)]


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


def _steps(sequences: Sequences, items: int, most: int) -> Tensor:
    """How often item j came 1 to `most` steps after item i, a step of g counted 1 / g: (I, I)."""
    table = torch.zeros(items * items, device=sequences.items.device)
    item, user = sequences.items - 1, sequences.user
    for gap in range(1, most + 1):
        same = user[gap:] == user[:-gap]
        pair = item[:-gap][same] * items + item[gap:][same]
        table.index_add_(0, pair, torch.full((len(pair),), 1.0 / gap, device=table.device))
    return table.view(items, items)


def _lift(table: Tensor, share: Tensor, smoothing: float) -> Tensor:
    """Smoothed log lift of item j after item i, from counts (I, I) and shares of all (I,)."""
    total = table.sum(1, keepdim=True)
    return ((table + smoothing * share) / ((total + smoothing) * share)).log()
