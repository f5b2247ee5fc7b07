"""A small world of films and viewers in which everything that a recommender uses has been planted.

The generative model, all of it drawn from one seed:

- Films. Each belongs to one of 20 themes ("Haunted Harbor"), a theme to two genres, of which a
  film has one or both and sometimes a third. Some films are parts of a series ("... II"). Year,
  popularity (log-normal) and release date are independent of the id.
- Viewers. Age group, gender and occupation each have a leaning to genres; a viewer's taste is
  their sum and a part of their own.
- The next film. Viewer u, having seen ..., k, j, at time t picks film i (never seen before, already
  released) with probability proportional to the exponential of

      taste(u) . genres(i) + popularity(i) + NOVELTY * exp(-(t - release(i)) / AGEING)
      + FOLLOW[theme(j), theme(i)] + FOLLOW[theme(k), theme(i)] / 2 + SEQUEL * [i follows j]

  where FOLLOW favours the same theme and two others that go with it, in a direction: what comes
  next depends on what came last, and fresh films are watched more (the drift).
- Time. A viewer arrives somewhere in three years and watches in sessions. About a third of the
  consecutive ratings share a second, as in MovieLens; the order of the rows is the true one.
- Rating. 1 to 5 stars from how well taste and genres agree, the viewer's mildness, and noise.
"""

from __future__ import annotations

import numpy as np

from recsys.data.dataset import Dataset

GENRES = (
    "Action Adventure Animation Comedy Crime Documentary Drama Fantasy Horror Musical Romance "
    "Thriller"
).split()
FIRST = (
    "Haunted Golden Silent Burning Hidden Crooked Velvet Frozen Electric Broken Midnight Scarlet "
    "Paper Distant Iron Laughing Wandering Stolen Crystal Savage"
).split()
SECOND = (
    "Harbor Crown Orchard Frontier Letters Alibi Waltz Summit Circuit Promise Train Roses Lanterns "
    "Shores Verdict Neighbors Caravan Diamonds Palace Jungle"
).split()
THIRD = (
    "of Autumn,of Glass,at Dawn,in the Rain,of Echoes,by the Sea,at Noon,of Ashes,in Winter,"
    "of Shadows,Without Maps,for Two,of the North,on Fire,in Exile,of Salt"
).split(",")
ROMAN = ("", " II", " III", " IV")
USER_SIZES = {"age": 7, "gender": 2, "occupation": 21}
DAY = 86_400
BEGIN, SPAN = 946_684_800, 3 * 365 * DAY  # the years 2000 to 2002
NOVELTY, AGEING = 1.5, 90 * DAY
SEQUEL = 3.0
MEDIAN_LENGTH, SHORTEST, LONGEST = 55, 20, 250


def generate(seed: int = 0, *, users: int = 600, items: int = 800) -> Dataset:
    """Generate a data set; the same arguments give the same data. Default: about 40,000 rows."""
    rng = np.random.default_rng(seed)
    films = _films(rng, items)
    user_features, taste = _viewers(rng, users)
    length, time = _visits(rng, users, longest=min(LONGEST, items // 3))
    user, item, time = _watch(rng, films, taste, length, time)
    rating = _rate(rng, (taste[user] * films["style"][item]).sum(axis=1), user, users)

    order = np.argsort(time, kind="stable")  # a log: by time, ties in their true order
    kept, item = np.unique(item, return_inverse=True)  # an item is there if it was rated
    return Dataset(
        name="synthetic",
        user=user[order],
        item=item[order].astype(np.int64),
        rating=rating[order],
        time=time[order],
        user_ids=np.arange(1, users + 1),
        item_ids=kept + 1,
        titles=[films["titles"][film] for film in kept],
        years=films["year"][kept],
        genre_names=list(GENRES),
        genres=films["genres"][kept],
        user_features=user_features,
        user_feature_sizes=dict(USER_SIZES),
        notes=(f"generated from seed {seed}: no real films, no real people",),
    )


def _films(rng: np.random.Generator, items: int) -> dict:
    themes = len(FIRST)
    theme = rng.integers(themes, size=items)
    pair = np.stack([rng.permutation(len(GENRES))[:2] for _ in range(themes)])
    genres = np.zeros((items, len(GENRES)), dtype=bool)
    row = np.arange(items)
    genres[row, pair[theme, 0]] = True
    genres[row, pair[theme, 1]] = rng.random(items) < 0.7
    third = rng.random(items) < 0.25
    genres[row[third], rng.integers(len(GENRES), size=third.sum())] = True

    # Films of a theme in random order make series of 1 to 4 parts, told by a shared title.
    order = np.lexsort((rng.random(items), theme))
    starts = (rng.random(items) < 0.7) | np.r_[True, np.diff(theme[order]) != 0]
    first = np.maximum.accumulate(np.where(starts, np.arange(items), 0))
    part = (np.arange(items) - first) % len(ROMAN)
    before = np.full(items, -1)  # the film that this one follows
    before[order[part > 0]] = order[np.flatnonzero(part > 0) - 1]
    in_theme = np.arange(items) - np.searchsorted(theme[order], theme[order])
    stem = in_theme - part  # films of one series share it
    fresh = rng.random(items) < 0.3  # released while the viewers watch; the others long before
    release = BEGIN + np.where(fresh, SPAN * rng.random(items), 0)
    new_year = 2000 + (release - BEGIN) // (365 * DAY)
    year = np.where(fresh, new_year, rng.integers(1950, 2000, size=items)).astype(np.int64)
    titles = [""] * items
    for film, number, name in zip(order, part, stem, strict=True):
        k = theme[film]
        titles[film] = (
            f"{FIRST[k]} {SECOND[(k + name // len(THIRD)) % themes]} {THIRD[name % len(THIRD)]}"
            f"{ROMAN[number]} ({year[film]})"
        )
    follow = np.zeros((themes, themes))
    np.fill_diagonal(follow, 1.5)
    cycle = rng.permutation(themes)
    follow[cycle, np.roll(cycle, -1)] = 2.5
    follow[cycle, np.roll(cycle, -2)] = 1.0
    return {
        "theme": theme,
        "genres": genres,
        "style": genres / np.sqrt(genres.sum(axis=1, keepdims=True)),
        "before": before,
        "titles": titles,
        "year": year,
        "popularity": rng.normal(0.0, 0.8, items),
        "release": release,
        "follow": follow,
    }


def _viewers(rng: np.random.Generator, users: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    taste = rng.normal(0.0, 0.9, (users, len(GENRES)))
    features = {}
    for name, size in USER_SIZES.items():
        features[name] = rng.integers(size, size=users)
        taste += rng.normal(0.0, 0.5, (size, len(GENRES)))[features[name]]
    return features, taste


def _visits(rng: np.random.Generator, users: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """How many films each viewer watches (U,), and when (U, longest)."""
    length = rng.lognormal(np.log(MEDIAN_LENGTH), 0.6, users).clip(SHORTEST, longest).astype(int)
    kind = rng.random((users, length.max()))
    pause = np.where(kind < 0.35, 0.0, np.where(kind < 0.9, 30.0, 10.0 * DAY))  # mean seconds
    gap = np.rint(pause * rng.exponential(1.0, kind.shape)).astype(np.int64)
    gap[:, 0] = (rng.random(users) * 0.9 * SPAN).astype(np.int64)
    return length, BEGIN + np.cumsum(gap, axis=1)


def _watch(rng, films, taste, length, time) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The films in the order in which they are watched: all viewers at once, one step at a time."""
    users, items = len(taste), len(films["theme"])
    score = (taste @ films["style"].T + films["popularity"]).astype(np.float32)
    after = films["follow"][:, films["theme"]].astype(np.float32)  # (themes, items)
    theme, before = films["theme"], films["before"]
    sequel = np.full(items, -1)
    sequel[before[before >= 0]] = np.flatnonzero(before >= 0)
    picked = np.zeros((users, length.max()), dtype=np.int64)
    for step in range(length.max()):
        u = np.flatnonzero(length > step)
        age = (time[u, step, None] - films["release"]).astype(np.float32)
        logits = score[u] + np.where(age < 0, -np.inf, NOVELTY * np.exp(-age.clip(0) / AGEING))
        if step > 0:
            last = picked[u, step - 1]
            logits += after[theme[last]]
            has = sequel[last] >= 0
            logits[np.flatnonzero(has), sequel[last[has]]] += SEQUEL
        if step > 1:
            logits += after[theme[picked[u, step - 2]]] / 2
        # the largest of logit + Gumbel noise is a draw from the softmax
        noise = rng.standard_exponential(logits.shape, dtype=np.float32).clip(1e-30)
        picked[u, step] = (logits - np.log(noise)).argmax(axis=1)
        score[u, picked[u, step]] = -np.inf
    user, place = np.nonzero(np.arange(length.max()) < length[:, None])
    return user, picked[user, place], time[user, place]


def _rate(rng: np.random.Generator, fit: np.ndarray, user: np.ndarray, users: int) -> np.ndarray:
    mildness = rng.normal(3.4, 0.4, users)[user]
    stars = mildness + 0.5 * (fit - fit.mean()) / fit.std() + rng.normal(0.0, 0.7, len(user))
    return np.rint(stars).clip(1, 5).astype(np.float32)
