"""Serving: two-stage recommendations from an index and a ranker, over HTTP (kata 09)."""

import asyncio
import contextlib
import functools
import logging
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
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Item = tuple[int, float, str]  # raw id, score, title
Ranker = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]

EXACT_UP_TO = 50_000  # items; below it, looking at all of them is as fast as an index

_COUNTED = ("POST", "/recommend")

_QUICK = 0.005  # seconds that the event loop may be held up

_log = logging.getLogger(__name__)  # what exceptions say is for operators: it may hold paths


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
        users = np.array([self._row_of_user[user] for user in user_ids], dtype=np.int64)
        k = np.array(ks, dtype=np.int64)
        if k.shape != users.shape or (k < 1).any():
            raise ValueError(f"ks must be {len(users)} numbers of at least 1, not {ks}")
        if len(users) == 0:
            return []
        scores, items = self._candidates(users, np.maximum(k, self.num_candidates))
        if self.ranker is not None:
            scores = np.asarray(self.ranker(users, items, scores), dtype=np.float64)
        answers = []
        for row, own, n in zip(scores, items, k.tolist(), strict=True):
            places = np.flatnonzero(np.isfinite(row) & (own >= 0))
            best = places[np.argsort(-row[places], kind="stable")[:n]]  # one order for all columns
            top = own[best]
            titles = [self.titles[item] for item in top.tolist()]
            ids, values = self.item_ids[top].tolist(), row[best].tolist()
            answers.append(list(zip(ids, values, titles, strict=True)))
        return answers

    def _candidates(self, users: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each user's `wanted` best unseen items: (B, C) scores and items, -1 at the ends."""
        seen, offsets = self.seen
        num_seen = offsets[users + 1] - offsets[users]
        most = int((wanted + num_seen).max())
        found = search(self.index, self.user_vectors[users], min(most, len(self.item_ids)))
        width = min(int(wanted.max()), len(self.item_ids))
        scores = np.full((len(users), width), -np.inf, dtype=np.float32)
        items = np.full(scores.shape, -1, dtype=np.int64)
        gone = np.zeros(len(self.item_ids) + 1, dtype=bool)
        gone[-1] = True  # where nothing was found
        for row, user in enumerate(users):
            own = seen[offsets[user] : offsets[user + 1]]
            gone[own] = True
            places = np.flatnonzero(~gone[found[1][row]])[: wanted[row]]  # whatever others want
            gone[own] = False
            scores[row, : len(places)] = found[0][row, places]
            items[row, : len(places)] = found[1][row, places]
        return scores, items

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
    load = source if not isinstance(source, Recommender) else lambda: source
    registry = CollectorRegistry()  # of its own: a process may hold several apps
    requests = Counter("recommend_requests", "Answers by status.", ["status"], registry=registry)
    seconds = Histogram("recommend_seconds", "Time to an answer.", registry=registry)
    sizes = Histogram("recommend_batch_size", "Requests answered together.", registry=registry,
                      buckets=[2**i for i in range(11)])  # fmt: skip
    waiting = Gauge("recommend_waiting", "Requests in the queue.", registry=registry)
    batcher: _Batcher | None = None  # there is one while the service is ready
    reloading = asyncio.Lock()

    class RecommendRequest(BaseModel):
        model_config = ConfigDict(strict=True, extra="forbid")
        user_id: int = Field(ge=0, lt=2**53)  # what every reader of JSON keeps exact
        k: int = Field(default=10, ge=1, le=max_k)

    @_no_way_out
    def load_warm() -> Recommender:
        recommender = load()
        for size in (1, max_batch) if len(recommender.user_ids) else ():
            users = np.resize(recommender.user_ids, size).tolist()
            recommender.recommend_batch(users, [max_k] * size)
        return recommender

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal batcher
        recommender = await asyncio.to_thread(load_warm)
        closing = batcher = _Batcher(recommender, max_batch, queue_size, sizes.observe)
        waiting.set_function(closing.queue.qsize)
        yield
        batcher = None  # takes no more
        await closing.close()

    app = FastAPI(title="Recommendations", lifespan=lifespan)
    app.add_middleware(
        _Edge, max_body=max_body, on_answer=lambda status: requests.labels(status).inc()
    )

    @app.post(
        "/recommend",
        response_model=RecommendResponse,
        responses=_problems(400, 404, 413, 422, 500, 503),
    )
    async def recommend(asked: RecommendRequest) -> Response:
        start = time.perf_counter()
        response = await answer(asked.user_id, asked.k)
        seconds.observe(time.perf_counter() - start)
        return response

    async def answer(user_id: int, k: int) -> Response:
        if batcher is None:
            return _problem(503, "the service is not ready", {"Retry-After": "1"})
        try:
            items, version = await batcher.ask(user_id, k)
        except asyncio.QueueFull:
            return _problem(503, "too many requests are waiting", {"Retry-After": "1"})
        except Exception as error:
            _log.error("the recommender failed for user %d", user_id, exc_info=error)
            return _problem(500, "the recommender failed")
        if items is None:
            return _problem(404, f"there is no user {user_id}")
        listed = [{"item_id": item, "score": score, "title": title} for item, score, title in items]
        return _json({"user_id": user_id, "items": listed, "model_version": version})

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", responses=_problems(503))
    async def ready() -> Response:
        if batcher is None:
            return _problem(503, "not warmed up yet, or shutting down", {"Retry-After": "1"})
        return _json({"status": "ready", "model_version": batcher.recommender.version})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/reload", responses=_problems(409, 503))
    async def reload() -> Response:
        if load is not source:
            return _problem(409, "there is no loader: the app was made from a recommender")
        if (current := batcher) is None:
            return _problem(503, "the service is not ready", {"Retry-After": "1"})
        async with reloading:
            try:
                recommender = await asyncio.to_thread(load_warm)
            except Exception as error:
                _log.error("the old model stays", exc_info=error)
                return _problem(503, "loading failed, the old model stays")
            current.recommender = recommender  # one assignment: nobody sees half of each
        return _json({"status": "reloaded", "model_version": recommender.version})

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Response:
        # says where and why but never echoes the input: it may hold NaN or broken text
        said = [f"{'.'.join(str(x) for x in e['loc'])}: {e['msg']}" for e in error.errors()]
        return _problem(422, "; ".join(said))

    return app


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


class _Edge:
    """ASGI middleware: bodies are read up to a limit, answers to POST /recommend are counted."""

    def __init__(self, app: ASGIApp, max_body: int, on_answer: Callable[[int], Any]) -> None:
        self.app, self.max_body, self.on_answer = app, max_body, on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body:  # whatever its headers said
                raise HTTPException(413, f"a body may have {self.max_body} bytes")
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.on_answer(message["status"])
            await send(message)

        asked = scope["type"] == "http" and (scope["method"], scope["path"]) == _COUNTED
        await self.app(scope, limited, counted if asked else send)


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
        recommend = _no_way_out(recommender.recommend_batch)
        answers = iter(recommend(*zip(*known, strict=True)) if known else [])
        return [next(answers) if recommender.knows(user) else None for user, _ in asked]
    except Exception as error:
        if len(asked) == 1:
            return [error]
        return [_answer(recommender, [each])[0] for each in asked]  # nobody pays for another


def _no_way_out(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with a failure where it would end the process or the task that called it.

    ``sys.exit`` in a model, or the panic of a library in another language, is no Exception.
    """

    def wrapped(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return wrapped


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, "application/json")


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    clean = detail.encode("utf-8", "replace").decode()[:500]
    return _json({"detail": clean}, status, headers)


def _problems(*statuses: int) -> dict[int | str, Any]:
    return {status: {"model": Problem} for status in statuses}
