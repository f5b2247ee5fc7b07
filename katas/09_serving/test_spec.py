"""What the index, the two-stage recommender and the web service must do (kata 09)."""

import asyncio
import json
import math
import threading
import time
import urllib.request
from unittest.mock import patch

import faiss
import httpx
import numpy as np
import torch

from harness.load import running
from harness.spec import (
    assert_close,
    assert_equal,
    check,
    expect_error,
    fail,
    golden,
    learner,
    rung,
)

serving = learner("inference.serving")

INF = math.inf
SECONDS = 5.0  # for a conversation with the service; it takes a tenth of one


def unit(rows, width, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def exact(queries, vectors, k):
    """Scores and items by sorting everything, in float64."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    items = np.argsort(-scores, axis=1)[:, :k]
    return np.take_along_axis(scores, items, 1), items


def assert_found(result, scores, items, **options):
    """What `search` returned, against lists best first."""
    check(isinstance(result, tuple) and len(result) == 2, "two arrays, scores and items",
          came_back=result, **options)  # fmt: skip
    for name, got, dtype in [("scores", result[0], "float32"), ("items", result[1], "int64")]:
        check(isinstance(got, np.ndarray) and str(got.dtype) == dtype,
              f"a NumPy array of {dtype}", came_back=got, what=name, **options)  # fmt: skip
    assert_close(torch.from_numpy(result[1]), torch.tensor(np.array(items)), what="items",
                 **options)  # fmt: skip
    assert_close(torch.from_numpy(result[0]), torch.tensor(np.array(scores)), dtype=torch.float32,
                 what="scores", **options)  # fmt: skip


def csr(lists):
    """(items, offsets) of each user's seen items."""
    flat = [item for items in lists for item in items]
    return np.array(flat, dtype=np.int64), np.cumsum([0, *map(len, lists)])


def small(ranker=None, **changes):
    """4 users and 13 items of the golden file; the raw ids are other numbers than the rows."""
    table = golden("golden.json")
    told = table["recommend"]
    parts = {
        "user_ids": np.array(told["user_ids"]),
        "user_vectors": np.array(table["users"], dtype=np.float32),
        "item_ids": np.array(told["item_ids"]),
        "titles": [f"film {row}" for row in range(len(told["item_ids"]))],
        "index": serving.build_index(np.array(table["items"], dtype=np.float32)),
        "seen": csr(told["seen"]),
        "ranker": ranker,
        "num_candidates": told["num_candidates"],
    }
    return serving.Recommender(**(parts | changes))


def golden_ranker(users, items, scores):
    """Looks up the golden logits; NaN where there is no candidate, as sloppy rankers do."""
    logits = np.array(golden("golden.json")["recommend"]["logits"])[users]
    return np.where(items < 0, np.nan, np.take_along_axis(logits, items.clip(min=0), 1))


def large(num_users=40, num_items=90, ranker=None, **changes):
    """Random users and items; user u has seen u of them."""
    rng = np.random.default_rng(5)
    seen = [rng.choice(num_items, min(u, num_items), replace=False) for u in range(num_users)]
    parts = {
        "user_ids": np.arange(num_users) * 3 + 50,
        "user_vectors": unit(num_users, 6, seed=1),
        "item_ids": rng.permutation(num_items) + 1000,
        "titles": [f"film {row}" for row in range(num_items)],
        "index": serving.build_index(unit(num_items, 6, seed=2)),
        "seen": csr(seen),
        "ranker": ranker,
        "num_candidates": 20,
    }
    return serving.Recommender(**(parts | changes))


def wave(users, items, scores):
    """A ranker that disagrees with stage one, row by row."""
    return np.sin(items * 1.7 + np.asarray(users)[:, None])


class Slow:
    """A ranker that takes its time, and more while it is held up; notes the users of each call."""

    def __init__(self):
        self.free, self.held_too_long, self.users = threading.Event(), False, []
        self.free.set()

    def __call__(self, users, items, scores):
        time.sleep(0.01)
        self.held_too_long |= not self.free.wait(1.0)
        self.users.append(np.array(users).tolist())
        return wave(users, items, scores)


class Watched:
    """A FAISS index that counts its searches."""

    def __init__(self, index):
        self.index, self.searches = index, 0

    def __getattr__(self, name):
        return getattr(self.index, name)

    def search(self, *args, **options):
        self.searches += 1
        return self.index.search(*args, **options)


# --- a client -------------------------------------------------------------------------------------


def talk(app, conversation, *, started=True, call="requests to the service"):
    """Start the app as a server does, talk to it, stop it; what `conversation(client)` returns."""

    async def main():
        async with client_of(app) as client:
            if not started:
                return await conversation(client)
            async with app.router.lifespan_context(app):
                await until_ready(client)
                return await conversation(client)

    return patiently(main(), call)


def client_of(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://kata", trust_env=False)


async def until_ready(client):
    for _ in range(100):
        ready = await client.get("/ready")
        if ready.status_code == 200:
            return
        await asyncio.sleep(0.01)
    fail(came_back=f"{ready.status_code}: {ready.text[:80]}", call="GET /ready, a second after "
         "startup", expected="status 200: the warm-up is done")  # fmt: skip


def patiently(coroutine, call):
    """Run it; a service that never answers is a failure, not a test that hangs."""
    loop = asyncio.new_event_loop()
    try:
        task = loop.create_task(coroutine)
        loop.run_until_complete(asyncio.wait([task], timeout=SECONDS))
        if task.done():
            return task.result()
        fail(came_back=f"nothing for {SECONDS:g} seconds", call=call,
             expected="an answer to each request, and an end at shutdown")  # fmt: skip
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def ask(client, user_id, k=5):
    return client.post("/recommend", json={"user_id": user_id, "k": k})


def ids_of(response):
    return [each["item_id"] for each in response.json()["items"]]


def assert_good(response, call):
    check(response.status_code == 200, "status 200", call=call,
          came_back=f"{response.status_code}: {response.text[:80]}")  # fmt: skip


def assert_problem(response, statuses, call):
    """A status among `statuses` with a JSON body that says why."""
    check(response.status_code in statuses, f"status {' or '.join(map(str, statuses))}",
          came_back=f"{response.status_code}: {response.text[:80]}", call=call)  # fmt: skip
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = None
    check(detail and isinstance(detail, str), 'a JSON body {"detail": "what was wrong"}',
          came_back=response.text[:80], call=call)  # fmt: skip
    if statuses == (503,) and "/reload" not in call:
        after = response.headers.get("retry-after", "")
        check(after.isdigit() and int(after) >= 1, "a header Retry-After in seconds with the 503",
              came_back=after, call=call)  # fmt: skip


async def metrics_of(client):
    """The lines of /metrics, name to number."""
    response = await client.get("/metrics")
    check(response.status_code == 200, "status 200", came_back=response.status_code,
          call="GET /metrics")  # fmt: skip
    lines = [x.rsplit(" ", 1) for x in response.text.splitlines() if x and x[0] != "#"]
    return {name: float(value) for name, value in lines}


# --- stage one ------------------------------------------------------------------------------------


@rung(
    hints=[
        "FAISS has indexes for distances and for inner products. What is best first in each? And "
        "its C++ side reads float32, row after row.",
        "np.ascontiguousarray(x, dtype=np.float32), and np.atleast_2d for a single vector.",
        "faiss.IndexFlatIP(dim), index.add(vectors), index.search(queries, k).",
    ]
)
def test_exact_search():
    """A search finds the largest inner products, best first, in vectors of any type and layout."""
    table = golden("golden.json")
    index = serving.build_index(np.array(table["items"], dtype=np.float32), kind="flat")
    queries = np.array(table["users"], dtype=np.float32)
    found = serving.search(index, queries, 4)
    assert_found(found, table["search"]["scores"], table["search"]["items"])
    vectors, queries = unit(17, 6), unit(4, 6, seed=3)
    scores, items = exact(queries, vectors, 5)
    for name, change in [
        ("float64", lambda x: x.astype(np.float64)),
        ("column by column in memory", np.asfortranarray),
        ("every second row of an array", lambda x: np.repeat(x, 2, axis=0)[::2]),
    ]:
        given, asked = change(vectors), change(queries)
        before = given.copy(), asked.copy()
        call = f"search(index, queries, 5), vectors are {name}"
        assert_found(serving.search(serving.build_index(given), asked, 5), scores, items, call=call)
        same = np.array_equal(given, before[0]) and np.array_equal(asked, before[1])
        check(same, "inputs as they were", call=call)
    rough = vectors * np.float32(1.001)  # of unit length but for what rounding leaves
    before = rough.copy()
    for kind in ("flat", "auto"):
        serving.build_index(rough, kind=kind)
    check(np.array_equal(rough, before), "vectors as they were", call="build_index(vectors), "
          "float32 and row after row, of length 1.001")  # fmt: skip
    for kind, query in [("auto", queries[2].astype(np.float64)), ("flat", queries[2])]:
        found = serving.search(serving.build_index(vectors, kind=kind), query, 5)
        assert_found(found, scores[2:3], items[2:3], call="search(index, one query (6,), 5)")
    many = unit(50_000, 4, seed=7)
    queries = unit(4, 4, seed=8)
    found = serving.search(serving.build_index(many), queries, 60)
    assert_found(found, *exact(queries, many, 60),
                 call="search(build_index(50,000 items), queries, 60)")  # fmt: skip


@rung(
    hints=[
        "FAISS answers -1 for nothing, and -1 is a fine index in Python: the last item. Nonsense "
        "it answers with an AssertionError without a word, or with more nonsense.",
        "Keep items at -1 there and set the scores to -inf. Check shapes, finiteness, kind and k "
        "yourself, and raise ValueError.",
        "scores[items < 0] = -np.inf",
    ]
)
def test_nothing_found():
    """Where fewer than k items are found the item is -1, the score -inf; nonsense is refused."""
    vectors, queries = unit(3, 6), unit(4, 6, seed=3)
    scores, items = exact(queries, vectors, 3)
    found = serving.search(serving.build_index(vectors), queries, 5)
    nothing = np.full((4, 2), -INF), np.full((4, 2), -1)
    assert_found(found, np.hstack([scores, nothing[0]]), np.hstack([items, nothing[1]]))
    index = serving.build_index(unit(400, 6), kind="ivf", num_lists=10, num_probes=1)
    scores, items = serving.search(index, queries, 400)
    check((items[:, -1] == -1).all(), "-1 at the end: one cell of ten does not hold 400 items",
          came_back=items[:, -1].tolist())  # fmt: skip
    check(((scores == -INF) == (items == -1)).all(), "minus infinity exactly where the item is -1")
    found = items >= 0
    inner = np.take_along_axis(queries @ unit(400, 6).T, items.clip(min=0), 1)
    assert_close(torch.from_numpy(scores[found]), torch.from_numpy(inner[found]), atol=1e-5,
                 what="scores of the items that an ivf index found")  # fmt: skip
    vectors = unit(17, 6)
    index = serving.build_index(vectors)
    for name, function in [
        ("build_index of a vector", lambda: serving.build_index(vectors[0])),
        ("build_index of no items", lambda: serving.build_index(vectors[:0])),
        ("build_index with NaN", lambda: serving.build_index(spoiled(vectors, np.nan))),
        ("build_index with infinity", lambda: serving.build_index(spoiled(vectors, INF))),
        ("build_index, kind='hnsw2'", lambda: serving.build_index(vectors, kind="hnsw2")),
        ("search, queries too narrow", lambda: serving.search(index, vectors[:, :5], 3)),
        ("search, k=0", lambda: serving.search(index, vectors, 0)),
    ]:
        expect_error(function, ValueError, call=name)


def spoiled(vectors, value):
    vectors = vectors.copy()
    vectors[3, 2] = value
    return vectors


@rung(
    hints=[
        "Who says how many of the true neighbours an index finds? A search through all of them.",
        "Recall is the share of the true k that are among the k found; items that tie with the "
        "k-th are as good. Divide by min(k, items).",
    ]
)
def test_recall_of_an_index():
    """Recall is measured against exact search: 1 for a flat index, less for one that looks less."""
    vectors, queries = unit(700, 8), unit(270, 8, seed=4)
    probed = serving.build_index(vectors, kind="ivf", num_lists=14, num_probes=2)
    for k in (1, 10, 300):  # two cells do not hold 300 items
        _, true = exact(queries, vectors, k)
        _, found = serving.search(probed, queries, k)
        hits = [len(set(a) & set(b)) for a, b in zip(true.tolist(), found.tolist(), strict=True)]
        recall = serving.recall_at(probed, vectors, queries, k)
        expected = sum(hits) / len(hits) / k
        check(abs(recall - expected) < 1e-6, f"{expected:.4f}", came_back=recall,
              what=f"recall at {k} of an index that probes 2 of 14 cells")  # fmt: skip
    check(recall < 0.95, "an inexact index: two cells do not hold all neighbours", came_back=recall)
    by_default = faiss.extract_index_ivf(serving.build_index(unit(400, 6), kind="ivf"))
    cells, probes = by_default.nlist, by_default.nprobe
    check(5 <= cells <= 10, "about 4 sqrt(400), but not above 10: each cell needs 39 items",
          came_back=cells, call='build_index(vectors[400, 6], kind="ivf")',
          what="cells by default")  # fmt: skip
    check(8 <= probes <= 10, "8 or more of 10", came_back=probes, what="probes by default",
          call='build_index(vectors[400, 6], kind="ivf")')  # fmt: skip
    queries = queries[:30]
    everywhere = serving.build_index(vectors, kind="ivf", num_lists=14, num_probes=14)
    flat = serving.build_index(vectors)
    twins = np.repeat(unit(20, 8, seed=6), 3, axis=0)
    for name, index, items, k in [
        ("an index that probes all cells", everywhere, vectors, 10),
        ("a flat index", flat, vectors, 100),
        ("a flat index, k above the number of items", flat, vectors, 900),
        ("a flat index of items that tie", serving.build_index(twins), twins, 7),
    ]:
        recall = serving.recall_at(index, items, queries, k)
        check(abs(recall - 1) < 1e-6, "1.0", came_back=recall, what=f"recall of {name}")


# --- both stages ----------------------------------------------------------------------------------


@rung(
    hints=[
        "Retrieve, drop what was seen, rank what is left, cut. In this order.",
        "The ranker takes rows and gives scores; one permutation sorts items and scores together.",
        "order = np.argsort(-scores, axis=1, kind='stable'), then np.take_along_axis for both.",
    ]
)
def test_two_stages():
    """The ranker orders stage one's candidates; answers carry raw ids, scores and titles."""
    told = golden("golden.json")["recommend"]
    recommender = small(golden_ranker)
    k = told["k"]
    answer = recommender.recommend_batch(told["user_ids"], [k] * 4)
    check(len(answer) == 4, "a list for each of 4 users", came_back=len(answer))
    rows = {item: row for row, item in enumerate(told["item_ids"])}
    for user, got, expected in zip(told["user_ids"], answer, told["lists"], strict=True):
        what = f"the list of user {user}"
        assert_equal([each[0] for each in got], [each[0] for each in expected], what=what)
        scores = [each[1] for each in got]
        check(scores == sorted(scores, reverse=True), "falling scores", came_back=scores,
              what=what)  # fmt: skip
        titles = [f"film {rows[each[0]]}" for each in expected]
        assert_equal([each[2] for each in got], titles, what=f"titles in {what}")
    types = sorted({", ".join(type(x).__name__ for x in each) for got in answer for each in got})
    assert_equal(types, ["int, float, str"], what="types of the entries")


@rung(
    hints=[
        "Somebody has seen the ten best. What is left of ten candidates?",
        "Search for as many more as the user has seen, then drop, then cut.",
    ]
)
def test_seen_items_cost_no_place():
    """Nobody is recommended what they have seen, and everybody gets k items while there are any."""
    for ranker in (None, wave):
        recommender = large(num_users=91, ranker=ranker)
        items, offsets = recommender.seen
        users = recommender.user_ids.tolist()
        for k in (1, 7, 60, 10**9):
            answers = recommender.recommend_batch(users, [k] * 91)
            for row, answer in enumerate(answers):
                seen = set(recommender.item_ids[items[offsets[row] : offsets[row + 1]]].tolist())
                got = [each[0] for each in answer]
                what = f"list of a user who has seen {row} of 90 items, k={k}"
                check(not seen & set(got), "no seen item", came_back=got, what=what)
                check(len(set(got)) == len(got) == min(k, 90 - row),
                      f"{min(k, 90 - row)} distinct items", came_back=got, what=what)  # fmt: skip


@rung(
    hints=[
        "A ranker that gets k items to choose k from can only change their order.",
        "Hand it max(num_candidates, k) unseen items of each user, -1 in the rows that have less, "
        "and all users in one call.",
    ]
)
def test_the_ranker_has_a_choice():
    """The ranker sees the `max(num_candidates, k)` best unseen items of all users, in one call."""
    calls, kept = [], []

    def last_first(users, items, scores):
        calls.append((np.array(users), np.array(items), np.array(scores)))
        kept.append(np.where(items < 0, 7.0, -np.array(scores, dtype=float)))  # 7: means nothing
        return kept[-1]

    vectors, wanted = unit(90, 6, seed=2), [(0, 1), (0, 30), (35, 3), (39, 70)]
    index = Watched(serving.build_index(vectors))
    recommender = large(ranker=last_first, index=index)
    items, offsets = recommender.seen
    inner, order = exact(unit(40, 6, seed=1), vectors, 90)
    for batch in [*([one] for one in wanted), wanted]:
        calls.clear(), kept.clear()
        asked, ks = [50 + 3 * user for user, _ in batch], [k for _, k in batch]
        answers = recommender.recommend_batch(asked, ks)
        check(len(calls) == 1, "one call of the ranker", came_back=f"{len(calls)} calls",
              what=f"a batch of {len(batch)}")  # fmt: skip
        users, got, scores = calls[0]
        assert_equal(users.tolist(), [user for user, _ in batch], what="users of the ranker's call")
        check(got.ndim == 2 and len(got) == len(batch), f"items of shape ({len(batch)}, C)",
              came_back=got, what="items of the ranker's call")  # fmt: skip
        for row, (user, k) in enumerate(batch):
            what = f"what the ranker gets for k={k}, num_candidates=20"
            seen = set(items[offsets[user] : offsets[user + 1]].tolist())
            unseen = [place for place in order[user].tolist() if place not in seen][: max(20, k)]
            real = got[row] >= 0
            assert_equal(got[row][real].tolist(), unseen, what=f"items in {what}")
            expected = [inner[user][order[user].tolist().index(place)] for place in unseen]
            assert_close(torch.from_numpy(scores[row][real].astype(np.float64)),
                         torch.tensor(np.array(expected)), atol=1e-5,
                         what=f"scores in {what}")  # fmt: skip
            best = [int(recommender.item_ids[place]) for place in unseen[::-1][:k]]
            what = f"the answer for k={k}, the ranker turns the order round"
            assert_equal([each[0] for each in answers[row]], best, what=what)
        mine = np.where(got < 0, 7.0, -scores)
        check(np.array_equal(kept[0], mine), "the ranker's own array as it was",
              what="what the ranker returned, afterwards")  # fmt: skip
    index.searches = 0
    recommender.recommend_batch(recommender.user_ids.tolist(), [10] * 40)
    check(index.searches <= 8, "a few searches for all users together",
          came_back=f"{index.searches} searches of the index",
          call="recommend_batch of 40 users")  # fmt: skip


@rung(
    hints=[
        "NaN sorts to an end by accident, and JSON does not know it.",
        "Set what is not finite to minus infinity, sort, and cut each list at its finite scores.",
    ]
)
def test_scores_are_finite():
    """Items whose score is NaN or infinite are dropped; a tensor of scores will do."""
    for name, bad in [("NaN", np.nan), ("infinity", INF), ("minus infinity", -INF)]:

        def ranker(users, items, scores, bad=bad):
            return torch.tensor(np.where(items % 2 == 0, bad, wave(users, items, scores)))

        recommender = large(ranker=ranker)
        answer = recommender.recommend_batch([50, 53, 56], [20, 20, 2])
        rows = {int(item): row for row, item in enumerate(recommender.item_ids)}
        for got, k in zip(answer, [20, 20, 2], strict=True):
            what = f"a list where every even item scores {name}"
            check(got and all(math.isfinite(each[1]) for each in got), "finite scores",
                  came_back=[each[1] for each in got], what=what)  # fmt: skip
            check(all(rows[each[0]] % 2 for each in got), "no item that scored so", what=what)
            check(k == 20 or len(got) == 2, "2 items: there are enough that score well",
                  came_back=f"{len(got)} items", what=f"{what}, k=2")  # fmt: skip


# --- over HTTP ------------------------------------------------------------------------------------


@rung(
    hints=[
        "An answer goes through JSON: NumPy numbers do not, and NaN is none.",
        "orjson.dumps of plain dicts in a Response; keys user_id, items, model_version.",
        "What an endpoint that returns a Response may answer, FastAPI learns from response_model "
        "and responses={404: {'model': ...}, ...}.",
    ]
)
def test_round_trip():
    """POST /recommend answers with what the recommender says, as JSON of plain numbers."""

    def ranker(users, items, scores):
        return np.where(items % 5 == 0, np.nan, wave(users, items, scores))

    titles = [f"L'été {row} — «映画»" for row in range(90)]
    item_ids = np.arange(90) + 2**53 - 100  # a float32 of these is another id
    recommender = large(ranker=ranker, version="2026-01", titles=titles, item_ids=item_ids)
    alone = {k: recommender.recommend_batch([62], [k])[0] for k in (3, 10, 100)}
    app = serving.create_app(recommender)

    async def conversation(client):
        answers = {k: await ask(client, 62, k) for k in (3, 100)}
        answers[10] = await client.post("/recommend", json={"user_id": 62})
        return answers, await client.get("/openapi.json")

    answers, described = talk(app, conversation)
    for k, response in answers.items():
        call = f'POST /recommend {{"user_id": 62, "k": {k}}}'
        if k == 10:
            call = 'POST /recommend {"user_id": 62}'
        assert_good(response, call)
        body = response.json()
        assert_equal(body.get("user_id"), 62, call=call, what="user_id")
        assert_equal(body.get("model_version"), "2026-01", call=call, what="model_version")
        assert_equal(ids_of(response), [each[0] for each in alone[k]], call=call, what="item ids")
        got = [x["title"] for x in body["items"]]
        assert_equal(got, [x[2] for x in alone[k]], call=call, what="titles")
        ids = [int(item_ids[int(title.split()[1])]) for title in got]
        assert_equal(ids_of(response), ids, call=call, what="item ids, beside those of the titles")
        scores = [x["score"] for x in body["items"]]
        check(all(type(x) is float for x in scores), "numbers", came_back=scores, call=call)
        wanted = torch.tensor([x[1] for x in alone[k]])
        assert_close(torch.tensor(scores), wanted, atol=1e-5, call=call, what="scores")
    with running(app) as address:
        request = urllib.request.Request(
            address + "/recommend",
            data=b'{"user_id": 62, "k": 3}',
            headers={"content-type": "application/json; charset=utf-8"},
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            got = [each["item_id"] for each in json.loads(response.read())["items"]]
    assert_equal(got, [each[0] for each in alone[3]], what="item ids",
                 call="POST /recommend over a socket, served by uvicorn")  # fmt: skip
    operation = described.json().get("paths", {}).get("/recommend", {}).get("post", {})
    statuses = sorted({"200", "404", "413", "422", "500", "503"} - set(operation["responses"]))
    check(not statuses, "every status that POST /recommend may answer",
          came_back=f"nothing about {', '.join(statuses)}", call="GET /openapi.json")  # fmt: skip
    for name, part in [("request", operation.get("requestBody")),
                       ("answer", operation["responses"]["200"])]:  # fmt: skip
        text = json.dumps(part)
        for reference in set(described.json().get("components", {}).get("schemas", {})):
            if f'"#/components/schemas/{reference}"' in text:
                text += json.dumps(described.json()["components"]["schemas"][reference])
        for key in {"request": ["user_id", "k"], "answer": ["items", "model_version"]}[name]:
            check(f'"{key}"' in text, f"a schema of the {name} with {key}", came_back=text[:80],
                  call="GET /openapi.json")  # fmt: skip


@rung(
    hints=[
        'Pydantic is kind: it turns "7", 7.0 and true into integers unless it is strict. And an id '
        "that nobody has is not the server's fault: 404.",
        "ConfigDict(strict=True, extra='forbid'), Field(ge=0, ...), Field(ge=1, le=max_k). Count "
        "the bytes of a body as they arrive: a header may be missing, or lie.",
        "FastAPI's own 422 repeats the input, and fails with a 500 if that is NaN: handle "
        "RequestValidationError and say where and why only, and count it there.",
    ]
)
def test_bad_requests():
    """What is not as described is a 4xx that says why; nothing is converted, each is counted."""
    bodies = [
        '{"user_id": "62"}', '{"user_id": 62.0}', '{"user_id": true}', '{"user_id": null}',
        '{"user_id": -1}', '{"user_id": [62]}', '{"user_id": NaN}', '{"user_id": 1e999}',
        '{"user_id": ' + "9" * 400 + "}", '{"user_id": "\\ud800"}', f'{{"user_id": {2**53}}}',
        '{"user_id": 62, "k": "5"}', '{"user_id": 62, "k": 5.0}', '{"user_id": 62, "k": true}',
        '{"user_id": 62, "k": null}', '{"user_id": 62, "k": 0}', '{"user_id": 62, "k": -3}',
        '{"user_id": 62, "k": 31}', '{"user_id": 62, "k": NaN}', '{"user_id": 62, "K": 5}',
        "{}", "[]", "62", "null", "", "{", '{"user_id": 62', "[" * 700, "\x00", '{"\\ud800": 1}',
    ]  # fmt: skip
    good = b'{"user_id": 62, "k": 30}'

    async def pieces(body):
        for start in range(0, len(body), 50):
            yield body[start : start + 50]

    async def conversation(client):
        seen = {}

        async def post(call, statuses, content, kind="application/json"):
            headers = {"content-type": kind} if kind else {}
            response = await client.post("/recommend", content=content, headers=headers)
            seen[response.status_code] = seen.get(response.status_code, 0) + 1
            if statuses == (200,):
                assert_good(response, call)
            else:
                assert_problem(response, statuses, call)

        refused = (400, 415, 422)
        for body in bodies:
            await post(f"POST /recommend {body[:40]}", refused, body)
        await post("POST /recommend, bytes that are no text", refused, b'{"user_id": "\xff"}')
        await post("POST /recommend as text/plain", refused, good, "text/plain")
        await post("POST /recommend without a content type", refused, good, None)
        for user in (51, 0, 2**53 - 1):
            call = f"POST /recommend, user {user} is unknown"
            await post(call, (404,), b'{"user_id": %d}' % user)
        for size in (801, 2000):
            call = f"POST /recommend with {size} bytes, max_body=800"
            await post(call, (413,), good.ljust(size))
            await post(f"{call}, length not declared", (413,), pieces(good.ljust(size)))
        await post("POST /recommend with 800 bytes, max_body=800", (200,), good.ljust(800))
        await post("POST /recommend with k=30, max_k=30", (200,), good)
        for status, count in seen.items():
            name = f'recommend_requests_total{{status="{status}"}}'
            check((await metrics_of(client)).get(name) == count, f"{name} {count}.0",
                  came_back=(await metrics_of(client)).get(name, "no such line"),
                  call=f"GET /metrics after {count} answers of status {status}")  # fmt: skip

    for _ in range(2):  # two apps do not count together
        try:
            app = serving.create_app(large(), max_k=30, max_body=800)
        except ValueError as error:
            fail(came_back=type(error).__name__, call="create_app, a second one in this process",
                 expected="apps that share nothing, their metrics neither")  # fmt: skip
        talk(app, conversation)


@rung(
    hints=[
        "Loading for each request is slow; loading when the first one comes makes that one slow.",
        "Load and answer one request yourself in the lifespan, before the `yield`. What the "
        "lifespan makes is missing before it ran: then /ready and /recommend say 503.",
        "After the `yield`: take no more, wait for the queue (queue.join()), then cancel the task.",
    ]
)
def test_start_and_stop():
    """Loaded once, warmed up, then ready; at shutdown no more is taken, what was is answered."""
    loads, ranker = [], Slow()

    def loader():
        loads.append(1)
        return large(ranker=ranker)

    async def look(client):
        return [await client.get("/health"), await client.get("/ready"), await ask(client, 62)]

    async def look_early(client):
        return [*await look(client), await client.post("/reload")]

    app = serving.create_app(loader, max_batch=2)
    health, ready, answer, reload = talk(app, look_early, started=False)
    check(health.status_code == 200, "status 200: it lives", came_back=health.status_code,
          call="GET /health before startup")  # fmt: skip
    assert_problem(ready, (503,), "GET /ready before startup")
    assert_problem(answer, (503,), "POST /recommend before startup")
    assert_problem(reload, (503,), "POST /reload before startup")

    async def conversation():
        async with client_of(app) as client:
            before = asyncio.all_tasks()
            context = app.router.lifespan_context(app)
            await context.__aenter__()
            await until_ready(client)
            warm = len(ranker.users)
            looks = [await look(client) for _ in range(3)]
            ranker.free.clear()
            taken = [asyncio.create_task(ask(client, 50 + 3 * n)) for n in range(5)]
            await asyncio.sleep(0.03)
            stopping = asyncio.create_task(context.__aexit__(None, None, None))
            await asyncio.sleep(0.03)
            late = [asyncio.create_task(each) for each in (client.get("/ready"), ask(client, 62))]
            await asyncio.wait(late, timeout=0.3)
            ranker.free.set()
            await stopping
            late, taken = await asyncio.gather(*late), await asyncio.gather(*taken)
            await asyncio.sleep(0.01)
            left = [each.get_coro().__qualname__ for each in asyncio.all_tasks() - before]
            return warm, looks, late, taken, left

    call = "5 requests, then the service is stopped"
    warm, looks, late, taken, left = patiently(conversation(), call)
    check(warm >= 1, "at least one: a warm-up", came_back=warm,
          what="calls of the ranker before the first request came")  # fmt: skip
    for each in looks:
        assert_equal([response.status_code for response in each], [200] * 3,
                     call="GET /health, GET /ready, POST /recommend after startup")  # fmt: skip
    check(len(loads) == 1, "1 call of the loader", came_back=f"{len(loads)} calls",
          call="startup and 3 requests")  # fmt: skip
    assert_problem(late[0], (503,), "GET /ready during shutdown")
    assert_problem(late[1], (503,), "POST /recommend during shutdown")
    assert_equal([each.status_code for each in taken], [200] * 5, call=call)
    check(not left, "no task that runs on", came_back=left, call=call)


@rung(
    hints=[
        "Twenty people ask at once: one matrix product instead of twenty. But how long does "
        "somebody wait who is alone?",
        "Put (user, k, future) in a queue; a task takes what is there now (get_nowait until it is "
        "empty), calls recommend_batch and sets each result on the future that came with it.",
        "Never keep the current user in a place that all requests share; zip over the list that "
        "you gave to recommend_batch.",
    ]
)
def test_requests_share_the_work():
    """Requests that wait together are answered together, each its own; no timer delays any."""
    ranker = Slow()
    recommender = large(ranker=ranker)
    asked = [(50 + 3 * (n * 17 % 40), 1 + n % 7) for n in range(40)]
    alone = [recommender.recommend_batch([user], [k])[0] for user, k in asked]

    async def conversation(client):
        ranker.users.clear(), ranker.free.clear()
        tasks = [asyncio.create_task(ask(client, user, k)) for user, k in asked]
        await asyncio.sleep(0.1)
        ranker.free.set()
        return await asyncio.gather(*tasks)

    answers = talk(serving.create_app(recommender, max_batch=16), conversation)
    for (user, _), response, expected in zip(asked, answers, alone, strict=True):
        call = f"40 requests at once, that of user {user}"
        assert_good(response, call)
        assert_equal(response.json()["user_id"], user, call=call, what="user_id")
        assert_equal(ids_of(response), [each[0] for each in expected], call=call, what="item ids")
    sizes = [len(users) for users in ranker.users]
    check(max(sizes) <= 16, "at most max_batch=16", came_back=sizes, what="sizes of the batches",
          call="40 requests at once")  # fmt: skip
    check(len(sizes) <= 6, "few batches for 40 requests at once", came_back=sizes,
          what="sizes of the batches", call="40 requests at once")  # fmt: skip
    check(sum(sizes) == 40, "each request ranked once", came_back=sizes,
          what="sizes of the batches", call="40 requests at once")  # fmt: skip

    fired = []

    async def one_by_one(client):
        await ask(client, 50)
        loop = asyncio.get_running_loop()
        call_at = loop.call_at

        def noted(when, callback, *arguments, **options):
            def run(*args):
                fired.append("a timer")
                callback(*args)

            return call_at(when, run, *arguments, **options)

        loop.call_at = noted
        with patch("time.sleep", lambda seconds: fired.append("time.sleep")):
            answers = [await ask(client, 50 + 3 * n) for n in range(5)]
        loop.call_at, steps, call_soon = call_at, [], loop.call_soon
        loop.call_soon = lambda *args, **options: (steps.append(1), call_soon(*args, **options))[1]
        await asyncio.sleep(0.02)
        loop.call_soon = call_soon
        return answers, len(steps)

    call = "5 requests, one after the other"
    answers, steps = talk(serving.create_app(large(ranker=wave)), one_by_one)
    for response in answers:
        assert_good(response, call)
    check(steps <= 20, "next to nothing while nobody asks", came_back=f"{steps} steps in 20 ms",
          call="no request", what="the event loop")  # fmt: skip
    check(not fired, "no timer that runs out: nobody else came", call=call,
          came_back=f"{len(fired)} waits, the first by {(fired or [0])[0]}")  # fmt: skip


@rung(
    hints=[
        "One exception in a batch of twenty: whose fault is it, and who should hear of it? And who "
        "is still there to hear it?",
        "If a batch fails, answer its requests one by one; only that which fails again is a 500.",
        "A future of a client who has gone is done already: look before you set it.",
    ]
)
def test_trouble_stays_with_its_request():
    """A request that fails is a 500, a client that goes away is none; the others are answered."""
    armed = []

    def ranker(users, items, scores):
        time.sleep(0.01)
        if armed and 4 in np.asarray(users):  # row 4 is user 62
            raise RuntimeError("no features for this user")
        return wave(users, items, scores)

    async def one_fails(client):
        armed.append(True)
        answers = await asyncio.gather(*[ask(client, 50 + 3 * n) for n in range(12)])
        return answers, await ask(client, 50)

    answers, later = talk(serving.create_app(large(ranker=ranker), max_batch=8), one_fails)
    statuses = [each.status_code for each in answers]
    assert_equal(statuses, [500 if n == 4 else 200 for n in range(12)],
                 call="12 requests at once, the ranker fails for the 5th")  # fmt: skip
    assert_problem(answers[4], (500,), "POST /recommend, the ranker fails")
    assert_good(later, "POST /recommend after a failure")

    slow = Slow()

    async def one_goes_away(client):
        slow.free.clear()
        tasks = [asyncio.create_task(ask(client, 50 + 3 * n)) for n in range(9)]
        await asyncio.sleep(0.05)
        for gone in (0, 5):
            tasks[gone].cancel()
        await asyncio.sleep(0.01)
        slow.free.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        return [each for n, each in enumerate(done) if n not in (0, 5)] + [await ask(client, 62)]

    call = "9 requests at once, the clients of 2 go away while waiting"
    app = serving.create_app(large(ranker=slow), max_batch=8)
    for response in talk(app, one_goes_away, call=call):
        assert_good(response, call)


@rung(
    hints=[
        "A queue without an end only makes everybody wait longer.",
        "asyncio.Queue(queue_size), put_nowait, and on asyncio.QueueFull a 503 with Retry-After.",
        "A slow call belongs in a thread (run_in_executor): the event loop must stay free.",
    ]
)
def test_overload():
    """With queue_size requests waiting the next gets 503 and Retry-After; /health still answers."""
    ranker = Slow()

    async def conversation(client):
        await ask(client, 62)  # however fast it was, the next may be slow
        ranker.free.clear()
        requests = [asyncio.create_task(ask(client, 62)) for _ in range(30)]
        for _ in range(30):
            await asyncio.sleep(0.01)
            if sum(task.done() for task in requests) >= 22:
                break
        refused = sum(task.done() for task in requests)
        health, told = await client.get("/health"), await metrics_of(client)
        held = ranker.held_too_long
        ranker.free.set()
        answers = await asyncio.gather(*requests)
        return refused, health, told, held, answers, await ask(client, 62), await metrics_of(client)

    app = serving.create_app(large(ranker=ranker), max_batch=1, queue_size=4)
    refused, health, told, held, answers, later, after = talk(app, conversation)
    call = "30 requests at once, queue_size=4, max_batch=1"
    check(not held, "an event loop that is free while the recommender works",
          came_back="everything waited until the ranker was done", call=call)  # fmt: skip
    check(health.status_code == 200, "status 200", came_back=health.status_code,
          call="GET /health under load")  # fmt: skip
    statuses = [each.status_code for each in answers]
    check(set(statuses) == {200, 503}, "some 200 and some 503", came_back=statuses, call=call)
    check(4 <= statuses.count(200) <= 8, "4 to 8 that are answered: those waiting, and those that "
          "the recommender has", came_back=f"{statuses.count(200)} of 30", call=call)  # fmt: skip
    check(refused == statuses.count(503), "503 at once, not after a wait", call=call,
          came_back=f"{refused} of {statuses.count(503)} refused while the others "
          "waited")  # fmt: skip
    for response in answers:
        if response.status_code == 503:
            assert_problem(response, (503,), "POST /recommend with a full queue")
    assert_good(later, "POST /recommend once the queue is empty")
    for told_, low, high, when in [(told, 1, 8, "while some wait"), (after, 0, 0, "afterwards")]:
        check(low <= told_.get("recommend_waiting", -1) <= high,
              f"recommend_waiting {low}" + (" or more" if high else ""),
              came_back=told_.get("recommend_waiting", "no such line"),
              call=f"GET /metrics {when}")  # fmt: skip
    good = statuses.count(200) + 2
    for name, least, most in [("recommend_seconds_count", good, 40),
                              ("recommend_seconds_sum", 0.01, 40 * SECONDS),
                              ("recommend_batch_size_sum", good, 200)]:  # fmt: skip
        check(least <= after.get(name, -1) <= most, f"{name} from {least:g} to {most:g}",
              came_back=after.get(name, "no such line"), call="GET /metrics")  # fmt: skip


@rung(
    hints=[
        "Load beside the old one, warm it up, then replace it by one assignment.",
        "A batch has to keep the recommender that it began with: one local variable.",
        "Loading takes minutes: asyncio.to_thread(...). If it fails the old one is still there: "
        "say so with a 503.",
    ]
)
def test_reload():
    """POST /reload swaps model and index in one step; a loader that fails leaves the old one."""
    loads, ranked, held = [], [], []
    proceed, warming, warmed = threading.Event(), threading.Event(), threading.Event()

    def loader():
        loads.append(1)
        version = len(loads)
        if version == 2:
            held.append(not proceed.wait(1.0))
        if version == 3:
            raise OSError("no such file")

        def ranker(users, items, scores):  # odd versions prefer early rows, even ones late rows
            ranked.append(version)
            time.sleep(0.005)
            if version == 2 and ranked.count(2) == 1:  # the warm-up takes long
                warming.set()
                held.append(not warmed.wait(3.0))
            if version == 4:
                raise RuntimeError("weights of another shape")
            return items * (-0.01 if version % 2 else 0.01)

        return large(ranker=ranker, version=f"v{version}")

    def assert_whole(response, call):
        """Whether the version and the order of an answer belong together."""
        assert_good(response, call)
        body = response.json()
        rows = [int(each["title"].split()[1]) for each in body["items"]]
        check(rows == sorted(rows, reverse=body["model_version"] == "v2"), call=call,
              expected="version and order of one recommender", came_back=body)  # fmt: skip

    async def conversation(client):
        reload = asyncio.create_task(client.post("/reload"))
        await asyncio.sleep(0.01)
        meanwhile = await ask(client, 62)
        requests = [asyncio.create_task(ask(client, 50 + 3 * n)) for n in range(40)]
        await asyncio.sleep(0.02)
        proceed.set()
        for _ in range(200):
            await asyncio.sleep(0.005 * (not warming.is_set()))
        early = await ask(client, 62)
        requests += [asyncio.create_task(ask(client, 50 + 3 * n)) for n in range(40)]
        await asyncio.sleep(0.02)
        warmed.set()
        reloaded = await reload
        warm = ranked.count(2)
        answers = await asyncio.gather(*requests)
        after = await ask(client, 62)
        failed = [await client.post("/reload"), await client.post("/reload")]
        still, ready = await ask(client, 62), await client.get("/ready")
        return meanwhile, early, reloaded, warm, answers, after, failed, still, ready

    app = serving.create_app(loader, max_batch=4)
    found = talk(app, conversation)
    meanwhile, early, reloaded, warm, answers, after, failed, still, ready = found
    check(held[:1] == [False], "the old recommender answers meanwhile", call="POST /reload, the "
          "loader takes long", came_back="the service waited until it was loaded")  # fmt: skip
    call = "POST /recommend during the warm-up of POST /reload, which takes long"
    check(held[1:] == [False], "the old recommender answers meanwhile", call=call,
          came_back="no answer until the warm-up was over")  # fmt: skip
    assert_good(early, call)
    assert_equal(early.json()["model_version"], "v1", call=call, what="model_version")
    assert_good(reloaded, "POST /reload")
    check(warm >= 1, "a warm-up of the new recommender before it takes over", call="POST /reload",
          came_back=f"{warm} calls of its ranker")  # fmt: skip
    for response in [meanwhile, *answers]:
        assert_whole(response, "POST /recommend during POST /reload")
    assert_equal(meanwhile.json()["model_version"], "v1", call="POST /recommend while loading")
    assert_whole(after, "POST /recommend after POST /reload")
    assert_equal(after.json()["model_version"], "v2", call="POST /recommend after POST /reload")
    assert_problem(failed[0], (503,), "POST /reload, the loader fails")
    assert_problem(failed[1], (503,), "POST /reload, the warm-up of the new one fails")
    assert_whole(still, "POST /recommend after a failed reload")
    assert_equal(still.json()["model_version"], "v2", call="POST /recommend after a failed reload")
    check(ready.status_code == 200, "status 200", call="GET /ready after a failed reload",
          came_back=ready.status_code)  # fmt: skip

    async def nothing_to_load(client):
        return await client.post("/reload")

    response = talk(serving.create_app(large()), nothing_to_load)
    assert_problem(response, (409,), "POST /reload of an app made from a recommender")
