"""Loads in the background, checks bodies by hand, searches light and heavy users apart."""

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import orjson
from fastapi import FastAPI, Request, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel

Item = tuple[int, float, str]  # raw id, score, title
Ranker = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]

EXACT_UP_TO = 50_000  # items; below it, looking at all of them is as fast as an index

_QUICK = 0.005  # seconds that the event loop may be held up


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
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.size == 0:
        raise ValueError(f"vectors must be (I, D) and not empty, not {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise ValueError("vectors hold NaN or infinity, with which nothing can be compared")
    if kind not in ("flat", "ivf", "auto"):
        raise ValueError(f"kind must be flat, ivf or auto, not {kind!r}")
    count, dim = vectors.shape
    index = faiss.IndexFlatIP(dim)
    if kind == "ivf" or (kind == "auto" and count > EXACT_UP_TO):
        num_lists = num_lists or max(1, min(round(4 * math.sqrt(count)), count // 39))
        index = faiss.IndexIVFFlat(index, dim, num_lists, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.nprobe = min(num_lists, num_probes or max(8, num_lists // 16))
    index.add(vectors)
    return index


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
    queries = np.ascontiguousarray(np.atleast_2d(queries), dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != index.d:
        raise ValueError(f"queries must be (Q, {index.d}), not {queries.shape}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    scores, items = index.search(queries, k)
    scores[items < 0] = -np.inf  # FAISS has the smallest float there
    return scores, items


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
    k = min(k, len(vectors))
    vectors = np.asarray(vectors, dtype=np.float32)
    found = []
    for start in range(0, len(queries), 256):  # no (Q, I) array
        part = queries[start : start + 256]
        exact = part @ vectors.T
        worst = np.partition(exact, -k, axis=1)[:, -k, None]
        _, items = search(index, part, k)
        own = np.take_along_axis(exact, items.clip(min=0), axis=1)
        found.append(((items >= 0) & (own >= worst - 1e-6)).sum(1))
    return float(np.concatenate(found).mean() / k)


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
            a tensor; what it says where there is no candidate means nothing. A row of its result
            depends on nothing but that row. None: stage one's order.
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
        """Light and heavy users are searched for apart, so that nobody pays for a heavy one."""
        rows = np.fromiter((self._row_of_user[user] for user in user_ids), dtype=np.int64)
        if len(rows) != len(ks):
            raise ValueError("as many ks as users")
        if any(k < 1 for k in ks):
            raise ValueError("k must be at least 1")
        size = len(self.item_ids)
        wanted = np.array([min(max(k, self.num_candidates), size) for k in ks], dtype=np.int64)
        items = np.full((len(rows), wanted.max(initial=0)), -1, dtype=np.int64)
        scores = np.full(items.shape, -np.inf)
        heavy = np.diff(self.seen[1])[rows] > 20
        for group in (np.flatnonzero(heavy), np.flatnonzero(~heavy)):
            if len(group):
                self._fill(items, scores, rows, wanted, group)
        if self.ranker is not None and len(rows):
            scores = np.asarray(self.ranker(rows, items, scores)) + np.zeros_like(scores)
        answers = []
        for own, row, k in zip(items, scores, ks, strict=True):
            real = (own != -1) & (np.abs(row) < np.inf)  # NaN is below nothing
            own, row = own[real], row[real]
            best = sorted(range(len(own)), key=row.__getitem__, reverse=True)[:k]
            answers.append([self._item(own[i], row[i]) for i in best])
        return answers

    def _fill(self, items, scores, rows, wanted, group):
        seen, offsets = self.seen
        lengths = offsets[rows[group] + 1] - offsets[rows[group]]
        most = min(int((lengths + wanted[group]).max()), len(self.item_ids))
        found_scores, found = search(self.index, self.user_vectors[rows[group]], most)
        for place, near, near_items in zip(group, found_scores, found, strict=True):
            own = np.sort(seen[offsets[rows[place]] : offsets[rows[place] + 1]])
            at = np.searchsorted(own, near_items)
            hit = np.append(own, -2)[at] == near_items
            fresh = np.flatnonzero((near_items >= 0) & ~hit)[: wanted[place]]
            items[place, : len(fresh)] = near_items[fresh]
            scores[place, : len(fresh)] = near[fresh]

    def _item(self, row, score) -> Item:
        return self.item_ids[row].item(), score.item(), str(self.titles[row])

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
    """The web service, which reads and checks bodies itself and loads in the background."""
    load = source if not isinstance(source, Recommender) else lambda: source
    registry = CollectorRegistry()
    requests = Counter("recommend_requests", "Answers.", ["status"], registry=registry)
    seconds = Histogram("recommend_seconds", "Time.", registry=registry)
    sizes = Histogram("recommend_batch_size", "Batches.", registry=registry)
    waiting = Gauge("recommend_waiting", "Waiting.", registry=registry)
    state: dict[str, Any] = {"batcher": None}
    schema = {
        "type": "object",
        "properties": {"user_id": {"type": "integer"}, "k": {"type": "integer", "default": 10}},
        "required": ["user_id"],
        "additionalProperties": False,
    }

    def loaded() -> Recommender:
        recommender = load()
        for user in np.asarray(recommender.user_ids[:2]).tolist():
            recommender.recommend_batch([user], [10])
        return recommender

    async def begin() -> None:
        recommender = await asyncio.to_thread(loaded)
        state["batcher"] = _Batcher(recommender, max_batch, queue_size, sizes.observe)
        waiting.set_function(state["batcher"].queue.qsize)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(begin())  # /health answers meanwhile
        yield
        task.cancel()
        if (batcher := state["batcher"]) is not None:
            state["batcher"] = None
            await batcher.close()

    app = FastAPI(lifespan=lifespan)

    async def asked_for(request: Request) -> tuple[int, int]:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > max_body:
                raise _Refused(413, "the body is too large")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise _Refused(415, "application/json, please")
        try:
            asked = orjson.loads(body)
        except ValueError:
            raise _Refused(400, "the body is not JSON") from None
        if not isinstance(asked, dict) or not {"user_id"} <= set(asked) <= {"user_id", "k"}:
            raise _Refused(422, "an object with user_id and perhaps k, please")
        user_id, k = asked["user_id"], asked.get("k", 10)
        if type(user_id) is not int or not 0 <= user_id < 2**53:
            raise _Refused(422, "user_id must be an integer from 0 to 2^53 - 1")
        if type(k) is not int or not 1 <= k <= max_k:
            raise _Refused(422, f"k must be an integer from 1 to {max_k}")
        return user_id, k

    @app.post(
        "/recommend",
        response_model=RecommendResponse,
        responses=_problems(400, 404, 413, 415, 422, 500, 503),
        openapi_extra={"requestBody": {"content": {"application/json": {"schema": schema}}}},
    )
    async def recommend(request: Request) -> Response:
        begin = time.monotonic()
        try:
            response = await answer(*await asked_for(request))
        except _Refused as refused:
            response = _problem(*refused.args)
        seconds.observe(time.monotonic() - begin)
        requests.labels(status=str(response.status_code)).inc()
        return response

    async def answer(user_id: int, k: int) -> Response:
        batcher = state["batcher"]
        if batcher is None:
            return _problem(503, "not ready", {"Retry-After": "5"})
        if not batcher.recommender.knows(user_id):
            return _problem(404, "unknown user")
        try:
            items, version = await batcher.ask(user_id, k)
        except asyncio.QueueFull:
            return _problem(503, "busy", {"Retry-After": "1"})
        except Exception as error:
            return _problem(500, repr(error))
        if items is None:  # a reload came between
            return _problem(404, "unknown user")
        listed = [dict(zip(("item_id", "score", "title"), item, strict=True)) for item in items]
        return _json({"items": listed, "user_id": user_id, "model_version": version})

    @app.get("/health")
    async def health() -> str:
        return "alive"

    @app.get("/ready")
    async def ready() -> Response:
        if state["batcher"] is None:
            return _problem(503, "not ready", {"Retry-After": "5"})
        return _json({"ready": True})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/reload")
    async def reload() -> Response:
        if isinstance(source, Recommender):
            return _problem(409, "nothing to load from")
        if state["batcher"] is None:
            return _problem(503, "nothing to replace yet")
        try:
            recommender = await asyncio.get_running_loop().run_in_executor(None, loaded)
        except Exception as error:
            return _problem(503, f"not loaded: {error!r}")
        state["batcher"].recommender = recommender
        return _json({"model_version": recommender.version})

    return app


class _Refused(Exception):
    """A request that is answered with (status, words)."""


class _Batcher:
    """Answers requests together that arrive together, without ever waiting for more to come.

    One task takes whatever is in the queue, at most max_batch, has it answered, and then takes what
    has arrived meanwhile. One client alone thus waits for nobody, many share the work.
    `recommender` may be replaced at any time; a batch is answered by one recommender whole.
    """

    def __init__(
        self,
        recommender: Recommender,
        max_batch: int,
        queue_size: int,
        on_batch: Callable[[int], Any],
    ) -> None:
        self.recommender, self.max_batch, self.on_batch = recommender, max_batch, on_batch
        self.queue: asyncio.Queue[tuple[int, int, asyncio.Future]] = asyncio.Queue(queue_size)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="recommend")
        self.task = asyncio.create_task(self.run())

    async def ask(self, user_id: int, k: int) -> tuple[list[Item] | None, str]:
        """The answer, None for an unknown user, and the version; asyncio.QueueFull if it is."""
        future = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((user_id, k, future))
        return await future

    async def run(self) -> None:
        loop, quick = asyncio.get_running_loop(), False
        while True:
            batch = [await self.queue.get()]
            while len(batch) < self.max_batch and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            recommender, asked = self.recommender, [(user, k) for user, k, _ in batch]
            # a slow answer must not hold up the event loop; for a quick one a thread costs more
            work = functools.partial(_timed_answer, recommender, asked)
            seconds, answers = work() if quick else await loop.run_in_executor(self.thread, work)
            quick = seconds < _QUICK
            for (_, _, future), answer in zip(batch, answers, strict=True):
                if future.done():  # the client has gone away
                    pass
                elif isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result((answer, recommender.version))
                self.queue.task_done()
            self.on_batch(len(batch))

    async def close(self) -> None:
        """Answer what was taken, then stop."""
        await self.queue.join()
        self.task.cancel()
        self.thread.shutdown()


def _timed_answer(
    recommender: Recommender, asked: Sequence[tuple[int, int]]
) -> tuple[float, list[Any]]:
    """The seconds that `_answer` took, waiting for a thread apart, and what it gave."""
    start = time.perf_counter()
    answers = _answer(recommender, asked)
    return time.perf_counter() - start, answers


def _answer(recommender: Recommender, asked: Sequence[tuple[int, int]]) -> list[Any]:
    """An answer to each request; None for an unknown user, an exception where it fails."""
    try:
        known = [(user, k) for user, k in asked if recommender.knows(user)]
        answers = iter(recommender.recommend_batch(*zip(*known, strict=True)) if known else [])
        return [next(answers) if recommender.knows(user) else None for user, _ in asked]
    except Exception as error:
        if len(asked) == 1:
            return [error]
        return [_answer(recommender, [each])[0] for each in asked]  # nobody pays for another


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, "application/json")


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    clean = detail.encode("utf-8", "replace").decode()[:500]
    return _json({"detail": clean}, status, headers)


def _problems(*statuses: int) -> dict[int | str, Any]:
    return {status: {"model": Problem} for status in statuses}
