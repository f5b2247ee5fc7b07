"""Serving: two-stage recommendations from an index and a ranker, over HTTP (kata 09)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel

Item = tuple[int, float, str]  # raw id, score, title
Ranker = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]

EXACT_UP_TO = 50_000  # items; below it, looking at all of them is as fast as an index


# --- stage one: which items are near --------------------------------------------------------------


def build_index(
    vectors: np.ndarray,
    *,
    kind: str = "auto",
    num_lists: int | None = None,
    num_probes: int | None = None,
) -> faiss.Index:
    """A FAISS index of item vectors in which :func:`search` finds the largest inner products.

    Args:
        vectors: (I, D) unit vectors, as towers make them, of any float type and memory layout; row
            i is item i. The array is not changed.
        kind: ``"flat"`` looks at every item, exactly. ``"ivf"`` (inverted file) looks at the
            items in the cells nearest to the query and may miss some. ``"auto"`` is flat up to
            50,000 items.
        num_lists: cells, default about 4 sqrt(I), but never so many that one has under 39 items to
            learn its centre from.
        num_probes: cells that a query looks at, default a sixteenth of them, at least 8.

    Raises:
        ValueError: vectors that are not 2-D, empty or not finite; an unknown kind.

    Source: Johnson et al. 2017, "Billion-scale similarity search with GPUs" (FAISS).
    """
    raise NotImplementedError("kata 09: write build_index in src/recsys/inference/serving.py")


def search(index: faiss.Index, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k items with the largest inner products with each query.

    Args:
        queries: (Q, D) unit vectors, or (D,) for a single one; any float type and memory layout.
        k: at least 1, of any size, above the number of items too.

    Returns:
        (scores, items): (Q, k) float32 and int64, best first; (1, k) for a single query. Where
        nothing was found (k above the number of items, or few in the cells looked at) the item is
        -1 and the score minus infinity; these places come last.

    Raises:
        ValueError: k below 1, queries of another width than the index.
    """
    raise NotImplementedError("kata 09: write search in src/recsys/inference/serving.py")


def recall_at(index: faiss.Index, vectors: np.ndarray, queries: np.ndarray, k: int) -> float:
    """The share of each query's true k nearest items that the index finds among its first k.

    True means by exact inner products. An item that ties with the k-th one (within 1e-6) is as good
    as that. Lists hold min(k, I) items.

    Args:
        vectors: (I, D), what the index was built from. queries: (Q, D), Q >= 1. Of any float type.
        k: at least 1.

    Returns:
        The mean over the queries, from 0 to 1.
    """
    raise NotImplementedError("kata 09: write recall_at in src/recsys/inference/serving.py")


# --- both stages ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recommender:
    """Everything that answers a request, in one piece: read by many, changed by none.

    A row is a user's or item's place in the arrays; ids are what the outside calls them. They are
    never mixed up here: the index, ``seen`` and the ranker know rows, callers know ids.

    Attributes:
        user_ids: (U,) distinct integers. user_vectors: (U, D) unit vectors.
        item_ids: (I,) distinct integers. titles: (I,). index: of the item vectors.
        seen: ``(items, offsets)`` as rows: user u has seen ``items[offsets[u] : offsets[u + 1]]``.
        ranker: ``ranker(users, items, scores)``, rows (B,), rows (B, C) with -1 where there is no
            candidate, stage-one scores (B, C), to a score for each candidate (B, C), an array or
            a tensor without a graph; what it says where there is no candidate means nothing. A row
            of its result depends on nothing but that row. None: stage one's order.
        num_candidates: how many candidates the ranker is to choose from, at least.
        version: of the model, said in answers.
    """

    user_ids: np.ndarray
    user_vectors: np.ndarray
    item_ids: np.ndarray
    titles: Sequence[str]
    index: faiss.Index
    seen: tuple[np.ndarray, np.ndarray]
    ranker: Ranker | None = None
    num_candidates: int = 100
    version: str = ""

    def __post_init__(self) -> None:
        users, items = len(self.user_ids), len(self.item_ids)
        lengths = (len(self.user_vectors), len(self.seen[1]) - 1, len(self.titles))
        if lengths != (users, users, items) or self.index.ntotal != items:
            raise ValueError(
                f"{users} users and {items} items need as many vectors, offsets - 1, titles and "
                f"indexed vectors, not {(*lengths, self.index.ntotal)}"
            )

    def knows(self, user_id: int) -> bool:
        """Whether there is a user with this id."""
        return user_id in self._row_of_user

    def recommend_batch(self, user_ids: Sequence[int], ks: Sequence[int]) -> list[list[Item]]:
        """Recommend something to several users at once.

        Stage one takes a user's ``max(num_candidates, k)`` best items of those they have not seen;
        stage two scores these, and the k best are the answer. So the ranker has a choice even
        where k is small, and seen items cost nobody a place. Both stages work on all users
        together: one call of the ranker for a batch, and not an index search for each user.

        Args:
            user_ids: known ids; the same one may be asked for twice. ks: as many, at least 1, of
                any size.

        Returns:
            For each user, in the order asked, at most k tuples (item id, score, title), best first
            (ties in the order of stage one): an int, a finite float and a str of Python, not of
            NumPy. The score is the ranker's, in float32 at least, or anything that rises with it.
            No item twice, none that was seen, none whose score is NaN or infinite; fewer than k
            where no more are left (or an inexact index finds none). An answer does not depend on
            what else is in the batch.

        Raises:
            KeyError: an unknown user. ValueError: a k below 1, or not as many as users.
        """
        raise NotImplementedError(
            "kata 09: write Recommender.recommend_batch in src/recsys/inference/serving.py"
        )

    @cached_property
    def _row_of_user(self) -> dict[int, int]:
        return {user: row for row, user in enumerate(np.asarray(self.user_ids).tolist())}


# --- over HTTP ------------------------------------------------------------------------------------


class RecommendedItem(BaseModel):
    """One recommendation; the score is finite."""

    item_id: int
    score: float
    title: str


class RecommendResponse(BaseModel):
    """What is answered, best first."""

    user_id: int
    items: list[RecommendedItem]
    model_version: str


class Problem(BaseModel):
    """Why a request was not answered, in words."""

    detail: str


def create_app(
    source: Recommender | Callable[[], Recommender],
    *,
    max_batch: int = 64,
    queue_size: int = 1024,
    max_k: int = 100,
    max_body: int = 4096,
) -> FastAPI:
    """The web service.

    ===================  ======================================================================
    ``POST /recommend``  JSON ``{"user_id": 7, "k": 10}`` to ``{"user_id", "items": [{"item_id",
                         "score", "title"}, ...], "model_version"}``, best first; k defaults to 10.
                         Both bodies and the statuses below are described in ``/openapi.json``
    ``GET /health``      200 while the process lives: restart it otherwise
    ``GET /ready``       200 from the end of the warm-up until shutdown begins, else 503: send
                         requests elsewhere meanwhile
    ``GET /metrics``     Prometheus, of this app alone: ``recommend_requests_total{status="200"}``
                         and so on counts each answer of ``POST /recommend`` once; histograms
                         ``recommend_seconds`` and ``recommend_batch_size`` (requests answered
                         together); gauge ``recommend_waiting``, requests in the queue now
    ``POST /reload``     calls the loader again; the new recommender takes over in one step, after
                         a warm-up of its own; the old one answers meanwhile, and stays if either
                         fails (503). 503 too before the service is ready; 409 if the app was not
                         made from a loader. For operators: keep it from the public
    ===================  ======================================================================

    - Errors are JSON with a ``detail`` in words: 404 unknown user; 413 a body over ``max_body``
      bytes; 400 or 422 anything else that is not as described here (nothing is converted to an
      integer: ``"7"``, ``7.0`` and ``true`` are refused; so are unknown fields, since a misspelt
      one would silently mean the default, ids outside 0 to 2^53 - 1, a k outside 1 to ``max_k``,
      another content type); 503 with ``Retry-After`` if ``queue_size`` requests are waiting
      already or the service is not ready; 500 only if the recommender itself fails, which does not
      take the other requests of its batch with it; nor does a client that goes away while waiting.
    - Every number in an answer is finite.
    - Requests that wait at the same time are answered together, at most ``max_batch`` by one call
      of ``recommend_batch``; none waits for others to come, and while nobody asks nothing runs. An
      answer is the same as if it had been asked alone. A slow recommender does not keep the service
      from telling its health and from taking or refusing requests.
    - The loader is called once, at startup, and a warm-up request is answered before the service
      is ready. At shutdown no more requests are taken (503), all that were are answered, and then
      no task is left running.

    Args:
        source: a recommender, or a function without arguments that loads one.
    """
    raise NotImplementedError("kata 09: write create_app in src/recsys/inference/serving.py")
