"""What earlier ratings say about whether a user will like an item.

Two protocols, never mixed:

- **online**: a row knows all rows of earlier seconds, of its own user too. It knows no row of its
  own second: MovieLens users rate a page at a time, and half of the rows share their second.
- **frozen**: a row knows the rows before the block that it lies in, as a system that was built
  then and has learnt nothing since.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recsys.data.dataset import Dataset

PROTOCOLS = ("frozen", "online")
DECAYS = (0.8, 0.9, 0.95, 0.98)  # weight of a rating for each that came after it


@dataclass(frozen=True, eq=False)
class RatingTable:
    """Ratings in the order of time, with features of each.

    Attributes:
        rows: (n,) rows of the data set, sorted by time. block: (n,) which block each lies in.
        user, item: (n,). like: (n,) 1.0 where the rating reaches the threshold.
        names, features: (n, F) float32 and what its columns are called; user_count and item_count
            are logarithms of one more than the number of ratings known.
    """

    rows: np.ndarray
    block: np.ndarray
    user: np.ndarray
    item: np.ndarray
    like: np.ndarray
    names: tuple[str, ...]
    features: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """(n,) one feature."""
        return self.features[:, self.names.index(name)]

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Places in this table of some rows of the data set, ascending."""
        place = np.empty(len(self.rows), dtype=np.int64)
        place[self.rows] = np.arange(len(self.rows))
        return np.sort(place[rows])


def time_blocks(time: np.ndarray, count: int) -> np.ndarray:
    """First places of ``count`` blocks of about equal size; rows of one second stay together.

    Args:
        time: (n,) not falling. The blocks may be fewer where many rows share one second.
    """
    wanted = time[np.arange(count) * len(time) // count]
    return np.unique(np.searchsorted(time, wanted))


class Known:
    """What each row knows, and sums over it.

    Args:
        second: (n,) int64 rank of each row's second, not falling. horizon: (n,) a row knows the
            rows whose second is below it.
    """

    def __init__(self, second: np.ndarray, horizon: np.ndarray) -> None:
        self.second, self.horizon = second, horizon
        self.span = int(second[-1]) + 1

    def sums(self, key: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
        """The number of known rows with the row's own key, and their sums of each of ``values``.

        Args:
            key: (n,) int64, at least 0. values: (n,) each.
        """
        place = key * self.span + self.second
        order = np.argsort(place, kind="stable")
        place = place[order]
        first = np.searchsorted(place, key * self.span)
        last = np.searchsorted(place, key * self.span + self.horizon)
        result = [(last - first).astype(np.float64)]
        for value in values:
            total = np.concatenate([[0.0], np.cumsum(value[order], dtype=np.float64)])
            result.append(total[last] - total[first])
        return result

    def mean(
        self, key: np.ndarray, value: np.ndarray, base: np.ndarray | float, weight: float
    ) -> np.ndarray:
        """Mean over the known rows of the same key, and of ``base`` counted ``weight`` times."""
        count, total = self.sums(key, value)
        return (total + weight * base) / (count + weight)


def rating_table(
    dataset: Dataset,
    *,
    protocol: str,
    blocks: int,
    threshold: float = 4.0,
    content: np.ndarray | None = None,
    shrink: float = 5.0,
    group_shrink: float = 50.0,
    factors: int = 24,
    pair_shrink: float = 10.0,
    noise: float = 0.25,
    content_noise: float = 1.0,
) -> RatingTable:
    """Features of every rating, from those that it knows under a protocol.

    A rating's *surprise* is its value less the shrunk mean of its item when it came; it is never
    revised, so nothing later can enter it. What is item-item, likeness and factors, is built from
    the rows before a block and used throughout the block under both protocols.

    Args:
        blocks: into how many the rows are cut, as by :func:`time_blocks`.
        threshold: a rating from here on is a like.
        content: (num_items, W) what items are apart from ratings, or None.
        shrink, group_shrink: ratings' worth of prior in means of a user, an item, or a group.
        factors: of the covariance of surprises between items. pair_shrink: the users' worth of
            prior in it. noise: variance of a surprise around what factors say, and content_noise
            around what content says.

    Raises:
        ValueError: an unknown protocol.
    """
    rows, block, starts, earlier, known = _timeline(dataset, protocol, blocks)
    user, item, time = dataset.user[rows], dataset.item[rows], dataset.time[rows]
    stars = dataset.rating[rows].astype(np.float64)
    like = (stars >= threshold).astype(np.float64)
    everyone = np.zeros(len(rows), dtype=np.int64)

    columns: dict[str, np.ndarray] = {}
    surprises, leftovers = {}, {}
    for name, value, start in (("like", like, 0.5), ("stars", stars, 3.5)):
        level = earlier.mean(everyone, value, start, shrink)
        surprise = value - earlier.mean(item, value, level, shrink)
        leaning = earlier.mean(user, surprise, 0.0, shrink)
        surprises[name], leftovers[name] = surprise, surprise - leaning
        level = known.mean(everyone, value, start, shrink)
        columns[f"level_{name}"] = level - start
        columns[f"item_{name}"] = known.mean(item, value, level, shrink) - start
        columns[f"item_fair_{name}"] = known.mean(item, value - leaning, level, shrink) - start
        columns[f"user_{name}"] = known.mean(user, surprise, 0.0, shrink)
        columns[f"user_plain_{name}"] = known.mean(user, value, level, shrink) - start
        columns[f"means_{name}"] = columns[f"item_{name}"] + columns[f"user_{name}"]
        for group, code in dataset.user_features.items():
            pair = item * dataset.user_feature_sizes[group] + code[user]
            columns[f"{group}_{name}"] = known.mean(code[user], surprise, 0.0, group_shrink)
            columns[f"{group}_item_{name}"] = known.mean(pair, leftovers[name], 0.0, shrink)
    columns["user_count"] = np.log1p(known.sums(user)[0])
    columns["item_count"] = np.log1p(known.sums(item)[0])
    columns["user_new"] = (columns["user_count"] == 0).astype(np.float64)
    year = dataset.years[item]
    columns["year"] = np.where(year > 0, (year - 1990) / 10, 0.0)

    past = _Past(user, item, time, known, surprises["like"], surprises["stars"], shrink)
    if content is not None:
        past.content, past.content_noise = content, content_noise
    stop = [*starts[1:], len(rows)]
    for first, last in zip(starts, stop, strict=True):
        before = slice(0, first)
        pairs = {
            name: ItemPairs.fit(
                user[before], item[before], left[before], dataset, factors, pair_shrink
            )
            for name, left in leftovers.items()
        }
        past.fill(slice(first, last), pairs, noise)
    columns |= past.columns
    features = np.stack(list(columns.values()), axis=1).astype(np.float32)
    return RatingTable(rows, block, user, item, like, tuple(columns), features)


def shrunk_means(
    dataset: Dataset,
    *,
    protocol: str,
    blocks: int,
    threshold: float = 4.0,
    item_prior: float = 5.0,
    user_prior: float = 5.0,
) -> np.ndarray:
    """(n,) share of likes of the item, shrunk to all items', plus what the user's exceed theirs.

    In the order of time, from the rows that each knows; the priors are in ratings.
    """
    rows, _, _, earlier, known = _timeline(dataset, protocol, blocks)
    user, item, everyone = dataset.user[rows], dataset.item[rows], np.zeros_like(rows)
    like = (dataset.rating[rows] >= threshold).astype(np.float64)
    level = earlier.mean(everyone, like, 0.5, 1.0)
    surprise = like - earlier.mean(item, like, level, item_prior)
    level = known.mean(everyone, like, 0.5, 1.0)
    means = known.mean(item, like, level, item_prior)
    return np.clip(means + known.mean(user, surprise, 0.0, user_prior), 0.02, 0.98)


def _timeline(
    dataset: Dataset, protocol: str, blocks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Known, Known]:
    """Rows by time, their blocks, where blocks start, what is earlier, and what is known."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {protocol!r}")
    rows = np.argsort(dataset.time, kind="stable")
    time = dataset.time[rows]
    starts = time_blocks(time, blocks)
    block = np.searchsorted(starts, np.arange(len(rows)), side="right") - 1
    second = np.unique(time, return_inverse=True)[1]
    earlier = Known(second, second)
    known = earlier if protocol == "online" else Known(second, second[starts[block]])
    return rows, block, starts, earlier, known


@dataclass(frozen=True, eq=False)
class ItemPairs:
    """How surprises about two items go together.

    Attributes:
        likeness: (I, I) correlation of surprises, negative ones and the diagonal 0.
        overlap: (I, I) cosine of who rated them, the diagonal 0.
        factors: (I, K) whose products approximate the covariance, largest factors first.
        scale: mean square of a surprise.
    """

    likeness: np.ndarray
    overlap: np.ndarray
    factors: np.ndarray
    scale: float

    @classmethod
    def fit(
        cls,
        user: np.ndarray,
        item: np.ndarray,
        surprise: np.ndarray,
        dataset: Dataset,
        factors: int,
        shrink: float,
    ) -> ItemPairs:
        """From rows; the covariance of a pair is shrunk as if ``shrink`` more users had given 0."""
        items = dataset.num_items
        table = np.zeros((dataset.num_users, items), dtype=np.float32)
        rated = np.zeros_like(table)
        table[user, item], rated[user, item] = surprise, 1.0
        both = rated.T @ rated
        covariance = (table.T @ table) / (both + np.float32(shrink))
        spread = np.sqrt(covariance.diagonal()).clip(1e-3)
        likeness = np.maximum(covariance / spread[:, None] / spread, 0.0)
        norm = np.sqrt(both.diagonal()).clip(1.0)
        overlap = both / norm[:, None] / norm
        np.fill_diagonal(likeness, 0.0)
        np.fill_diagonal(overlap, 0.0)
        scale = float((surprise**2).mean()) if len(surprise) else 1.0
        return cls(likeness, overlap, _principal(covariance, factors), scale)


def _principal(matrix: np.ndarray, count: int) -> np.ndarray:
    """(n, count) factors F with F F^T the best positive approximation, by subspace iteration."""
    size = min(count + 10, len(matrix))
    basis = np.random.default_rng(0).standard_normal((len(matrix), size)).astype(matrix.dtype)
    for _ in range(6):
        basis = np.linalg.qr(matrix @ basis)[0]
    value, vector = np.linalg.eigh(basis.T @ matrix @ basis)
    best = np.argsort(-value)[:count]
    return (basis @ vector[:, best]) * np.sqrt(np.maximum(value[best], 0.0))


class _Past:
    """Features of a row from the ratings of its user that it knows, filled block by block."""

    def __init__(
        self,
        user: np.ndarray,
        item: np.ndarray,
        time: np.ndarray,
        known: Known,
        like: np.ndarray,
        stars: np.ndarray,
        shrink: float,
    ) -> None:
        self.user, self.item, self.time, self.known = user, item, time, known
        self.surprise, self.shrink = {"like": like, "stars": stars}, shrink
        self.content, self.content_noise = np.zeros((0, 0)), 1.0
        order = np.argsort(user, kind="stable")
        bounds = np.flatnonzero(np.diff(user[order])) + 1
        self.rows = {int(user[part[0]]): part for part in np.split(order, bounds)}
        names = ["neighbours_weight", "overlap", "last_like", "gap", "content_like"]
        for name in self.surprise:
            names += [f"neighbours_{name}", f"factors_{name}", f"overlap_{name}"]
        names += [f"recent_{decay}" for decay in DECAYS]
        self.columns = {name: np.zeros(len(user)) for name in names}

    def fill(self, block: slice, pairs: dict[str, ItemPairs], noise: float) -> None:
        """The rows of a block, user by user."""
        for u in np.unique(self.user[block]):
            rows = self.rows[int(u)]
            asked = rows[(rows >= block.start) & (rows < block.stop)]
            length = np.searchsorted(self.known.second[rows], self.known.horizon[asked])
            asked, length = asked[length > 0], length[length > 0]  # nothing known: all 0
            if len(asked):
                self._fill_user(rows[: length.max()], asked, length, pairs, noise)

    def _fill_user(
        self,
        past: np.ndarray,
        asked: np.ndarray,
        length: np.ndarray,
        pairs: dict[str, ItemPairs],
        noise: float,
    ) -> None:
        """past: (P,) rows in time. asked: (A,) rows; each knows the first length (A,) of past."""
        out = self.columns
        age = length - 1 - np.arange(len(past))[:, None]  # (P, A): 0 for the last known
        is_known = age >= 0
        old, new = self.item[past], self.item[asked]
        for name, surprise in self.surprise.items():
            total = np.concatenate([[0.0], np.cumsum(surprise[past])])[length]
            own = np.where(is_known, surprise[past][:, None] - total / (length + self.shrink), 0.0)
            pair = pairs[name]
            weight = pair.likeness[np.ix_(old, new)] * is_known
            out[f"neighbours_{name}"][asked] = (weight * own).sum(0) / (weight.sum(0) + 0.5)
            overlap = pair.overlap[np.ix_(old, new)] * is_known
            out[f"overlap_{name}"][asked] = (overlap * own).sum(0)
            # the best linear guess, if surprises have the factors' covariance
            said = _ridge(pair.factors[old], own, length, noise * pair.scale / 0.2)
            out[f"factors_{name}"][asked] = (said * pair.factors[new]).sum(1)
            if name == "like":
                out["neighbours_weight"][asked] = np.log1p(weight.sum(0))
                out["overlap"][asked] = overlap.sum(0)
                if self.content.size:
                    said = _ridge(self.content[old], own, length, self.content_noise)
                    out["content_like"][asked] = (said * self.content[new]).sum(1)
        surprise = self.surprise["like"][past]
        out["last_like"][asked] = surprise[length - 1]
        out["gap"][asked] = np.log1p(self.time[asked] - self.time[past[length - 1]])
        for decay in DECAYS:
            weight = np.where(is_known, decay ** np.maximum(age, 0), 0.0)
            out[f"recent_{decay}"][asked] = (surprise @ weight) / (weight.sum(0) + 1)


def _ridge(x: np.ndarray, y: np.ndarray, length: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge regressions on growing prefixes.

    Args:
        x: (P, K). y: (P, A), column a is 0 beyond length[a]. ridge: added to the diagonal.

    Returns:
        (A, K) weights; a's from the first length[a] rows.
    """
    sizes, which = np.unique(length, return_inverse=True)
    gram = np.empty((len(sizes), x.shape[1], x.shape[1]))
    begin, total = 0, ridge * np.eye(x.shape[1])
    for place, size in enumerate(sizes):
        total = total + x[begin:size].T @ x[begin:size]
        gram[place], begin = total, size
    return np.einsum("akl,la->ak", np.linalg.inv(gram)[which], x.T @ y)
