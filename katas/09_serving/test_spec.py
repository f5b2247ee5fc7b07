"""What the index, the two-stage recommender and the web service must do (kata 09)."""

import asyncio
import json
import math
import time
import urllib.request

import httpx
import numpy as np
import torch

from harness.load import running
from harness.spec import assert_close, assert_equal, check, expect_error, golden, learner, rung

serving = learner("inference.serving")

INF = math.inf


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
          came_back=result)  # fmt: skip
    for name, got, dtype in [("scores", result[0], "float32"), ("items", result[1], "int64")]:
        check(isinstance(got, np.ndarray) and str(got.dtype) == dtype,
              f"a NumPy array of {dtype}", came_back=got, what=name)  # fmt: skip
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


def talk(app, conversation, *, started=True):
    """Start the app as a server does, talk to it, stop it; what `conversation(client)` returns."""

    async def main():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://kata") as client:
            if not started:
                return await conversation(client)
            async with app.router.lifespan_context(app):
                return await conversation(client)

    return asyncio.run(asyncio.wait_for(main(), 20))


def ask(client, user_id, k=5):
    return client.post("/recommend", json={"user_id": user_id, "k": k})


def ids_of(response):
    return [each["item_id"] for each in response.json()["items"]]


def is_problem(response, statuses, call):
    """A status among `statuses` with a JSON body that says why."""
    check(response.status_code in statuses, f"status {' or '.join(map(str, statuses))}",
          came_back=f"{response.status_code}: {response.text[:80]}", call=call)  # fmt: skip
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = None
    check(detail and isinstance(detail, str), 'a JSON body {"detail": "what was wrong"}',
          came_back=response.text[:80], call=call)  # fmt: skip


# --- stage one ------------------------------------------------------------------------------------


@rung(
    hints=[
        "FAISS has indexes for distances and for inner products. What is best first in each?",
        "faiss.IndexFlatIP(dim), index.add(vectors), index.search(queries, k).",
    ]
)
def test_exact_search():
    """A search finds the items with the largest inner products, best first."""
    table = golden("golden.json")
    index = serving.build_index(np.array(table["items"], dtype=np.float32), kind="flat")
    queries = np.array(table["users"], dtype=np.float32)
    found = serving.search(index, queries, 4)
    assert_found(found, table["search"]["scores"], table["search"]["items"])
    vectors = unit(17, 6)
    for kind in ("flat", "auto"):
        found = serving.search(serving.build_index(vectors, kind=kind), vectors[:5], 3)
        assert_found(found, *exact(vectors[:5], vectors, 3))


@rung(
    hints=[
        "The C++ side reads float32, row after row.",
        "np.ascontiguousarray(x, dtype=np.float32), and np.atleast_2d for a single vector.",
    ]
)
def test_any_layout():
    """Vectors of any float type and layout, and a single query, are taken; none is changed."""
    vectors, queries = unit(17, 6), unit(4, 6, seed=3)
    scores, items = exact(queries, vectors, 5)
    for name, change in [
        ("float64", lambda x: x.astype(np.float64)),
        ("column by column in memory", np.asfortranarray),
        ("every second row of an array", lambda x: np.repeat(x, 2, axis=0)[::2]),
    ]:
        given, asked = change(vectors), change(queries)
        before = given.copy(), asked.copy()
        found = serving.search(serving.build_index(given), asked, 5)
        assert_found(found, scores, items, call=f"search, vectors are {name}")
        same = np.array_equal(given, before[0]) and np.array_equal(asked, before[1])
        check(same, "inputs as they were", call=f"search, vectors are {name}")
    found = serving.search(serving.build_index(vectors), queries[2].astype(np.float64), 5)
    assert_found(found, scores[2:3], items[2:3], call="search(index, one query (6,) float64, 5)")


@rung(
    hints=[
        "FAISS answers -1 for nothing, and -1 is a fine index in Python: the last item.",
        "Keep items at -1 there and set the scores to -inf.",
    ]
)
def test_nothing_found():
    """Where fewer than k items were found the item is -1 and the score minus infinity."""
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


@rung(
    hints=[
        "FAISS answers some of these with an AssertionError without a word, others with nonsense.",
        "Check shapes, finiteness, kind and k yourself, and raise ValueError.",
    ]
)
def test_index_refuses():
    """Vectors that are no matrix, empty or not finite, and a wrong width, kind or k are refused."""
    vectors = unit(17, 6)
    broken = vectors.copy()
    broken[3, 2] = np.nan
    index = serving.build_index(vectors)
    for name, function in [
        ("build_index of a vector", lambda: serving.build_index(vectors[0])),
        ("build_index of no items", lambda: serving.build_index(vectors[:0])),
        ("build_index with NaN", lambda: serving.build_index(broken)),
        ("build_index, kind='hnsw2'", lambda: serving.build_index(vectors, kind="hnsw2")),
        ("search, queries too narrow", lambda: serving.search(index, vectors[:, :5], 3)),
        ("search, k=0", lambda: serving.search(index, vectors, 0)),
    ]:
        expect_error(function, ValueError, call=name)


@rung(
    hints=[
        "Who says how many of the true neighbours an index finds? A search through all of them.",
        "Recall is the share of the true k that are among the k found; items that tie with the "
        "k-th are as good. Divide by min(k, items).",
    ]
)
def test_recall_of_an_index():
    """Recall is measured against exact search: 1 for a flat index, less for one that looks less."""
    vectors, queries = unit(700, 8), unit(30, 8, seed=4)
    probed = serving.build_index(vectors, kind="ivf", num_lists=14, num_probes=2)
    for k in (1, 10):
        _, true = exact(queries, vectors, k)
        _, found = serving.search(probed, queries, k)
        hits = [len(set(a) & set(b)) for a, b in zip(true.tolist(), found.tolist(), strict=True)]
        recall = serving.recall_at(probed, vectors, queries, k)
        expected = sum(hits) / len(hits) / k
        check(abs(recall - expected) < 1e-6, f"{expected:.4f}", came_back=recall,
              what=f"recall at {k} of an index that probes 2 of 14 cells")  # fmt: skip
    check(recall < 0.95, "an inexact index: two cells do not hold all neighbours", came_back=recall)
    everywhere = serving.build_index(vectors, kind="ivf", num_lists=14, num_probes=14)
    flat = serving.build_index(vectors)
    twins = np.repeat(unit(20, 8, seed=6), 3, axis=0)
    for name, index, items, k in [
        ("an index that probes all cells", everywhere, vectors, 10),
        ("a flat index", flat, vectors, 10),
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
    types = {tuple(type(x).__name__ for x in each) for each in answer[0]}
    assert_equal(types, {("int", "float", "str")}, what="types of the entries")


@rung(
    hints=[
        "Somebody has seen the ten best. What is left of ten candidates?",
        "Search for as many more as the user has seen, then drop, then cut.",
    ]
)
def test_seen_items_cost_no_place():
    """Nobody is recommended what they have seen, and everybody gets k items while there are any."""
    recommender = large(num_users=91)
    items, offsets = recommender.seen
    users = recommender.user_ids.tolist()
    for ranker in (None, wave):
        recommender = large(num_users=91, ranker=ranker)
        for k in (1, 7, 60):
            for row, answer in enumerate(recommender.recommend_batch(users, [k] * 91)):
                seen = set(recommender.item_ids[items[offsets[row] : offsets[row + 1]]].tolist())
                got = [each[0] for each in answer]
                what = f"list of a user who has seen {row} of 90 items, k={k}"
                check(not seen & set(got), "no seen item", came_back=got, what=what)
                check(len(set(got)) == len(got) == min(k, 90 - row),
                      f"{min(k, 90 - row)} distinct items", came_back=got, what=what)  # fmt: skip


@rung(
    hints=[
        "A ranker that gets k items to choose k from can only change their order.",
        "Hand it max(num_candidates, k) unseen items of each user, -1 in the rows that have less.",
    ]
)
def test_the_ranker_has_a_choice():
    """The ranker sees the `max(num_candidates, k)` best unseen items, and can lift any of them."""
    calls = []

    def last_first(users, items, scores):
        calls.append((np.array(users), np.array(items), np.array(scores)))
        return -np.array(scores)

    recommender = large(ranker=last_first)
    items, offsets = recommender.seen
    vectors = unit(90, 6, seed=2)
    for user, k in [(0, 1), (0, 30), (35, 3), (39, 70)]:
        calls.clear()
        answer = recommender.recommend_batch([50 + 3 * user], [k])[0]
        check(len(calls) == 1, "one call of the ranker", came_back=len(calls))
        _, order = exact(unit(40, 6, seed=1)[user : user + 1], vectors, 90)
        seen = set(items[offsets[user] : offsets[user + 1]].tolist())
        unseen = [row for row in order[0].tolist() if row not in seen][: max(20, k)]
        got = calls[0][1]
        what = f"what the ranker gets for k={k}, num_candidates=20"
        check(got.ndim == 2 and len(got) == 1, "items of shape (1, C)", came_back=got, what=what)
        assert_equal(calls[0][0].tolist(), [user], what=f"users in {what}")
        assert_equal([row for row in got[0].tolist() if row >= 0], unseen, what=f"items in {what}")
        best = [int(recommender.item_ids[row]) for row in unseen[::-1][:k]]
        assert_equal([each[0] for each in answer], best,
                     what=f"the answer for k={k}, the ranker turns the order round")  # fmt: skip


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
            check(len(got) <= k, f"at most {k} items", came_back=len(got), what=what)


@rung(
    hints=[
        "A batch is a convenience of yours, the user must not notice it.",
        "How many candidates a user gets depends on their own k and seen items, not on the largest "
        "of the batch; and answers come back in the order of the questions.",
    ]
)
def test_batched_equals_single():
    """An answer is the same alone and in any batch, in the order asked, whatever the others ask."""
    rng = np.random.default_rng(8)
    for ranker in (None, wave):
        recommender = large(ranker=ranker)
        users = rng.permutation(recommender.user_ids).tolist() + [53, 53]
        ks = rng.integers(1, 60, len(users)).tolist()
        together = recommender.recommend_batch(users, ks)
        for user, k, got in zip(users, ks, together, strict=True):
            alone = recommender.recommend_batch([user], [k])[0]
            what = f"items of user {user}, k={k}, in a batch of {len(users)}"
            assert_equal([each[0] for each in got], [each[0] for each in alone], what=what)
            scores = torch.tensor([each[1] for each in got])
            assert_close(scores, torch.tensor([each[1] for each in alone]), atol=1e-5, rtol=1e-4,
                         what=what)  # fmt: skip
    assert_equal(recommender.recommend_batch([], []), [], what="a batch of nobody")


@rung(
    hints=[
        "Row -1 is somebody, but no user has that id.",
        "Look ids up in a dictionary: KeyError by itself. A k below 1 is a ValueError.",
    ]
)
def test_recommend_refuses():
    """An unknown user is a KeyError; a k below 1 and lists of two lengths are ValueErrors."""
    recommender = large()
    for user in (-1, 0, 51, 10**12):
        expect_error(lambda user=user: recommender.recommend_batch([50, user], [3, 3]), KeyError,
                     call=f"recommend_batch([50, {user}], [3, 3])")  # fmt: skip
    for ks in ([3, 0], [3, -1], [3]):
        expect_error(lambda ks=ks: recommender.recommend_batch([50, 53], ks), ValueError,
                     call=f"recommend_batch([50, 53], {ks})")  # fmt: skip


# --- over HTTP ------------------------------------------------------------------------------------


@rung(
    hints=[
        "An answer goes through JSON: NumPy numbers do not.",
        "orjson.dumps of plain dicts in a Response; keys user_id, items, model_version.",
    ]
)
def test_round_trip():
    """POST /recommend answers with what the recommender says, as JSON of plain numbers."""
    recommender = large(ranker=wave, version="2026-01")
    alone = {k: recommender.recommend_batch([62], [k])[0] for k in (3, 10, 100)}

    async def conversation(client):
        answers = {k: await ask(client, 62, k) for k in (3, 100)}
        answers[10] = await client.post("/recommend", json={"user_id": 62})
        return answers

    for k, response in talk(serving.create_app(recommender), conversation).items():
        call = f'POST /recommend {{"user_id": 62, "k": {k}}}'
        check(response.status_code == 200, "status 200", call=call,
              came_back=f"{response.status_code}: {response.text[:80]}")  # fmt: skip
        body = response.json()
        assert_equal(body.get("user_id"), 62, call=call, what="user_id")
        assert_equal(body.get("model_version"), "2026-01", call=call, what="model_version")
        assert_equal(ids_of(response), [each[0] for each in alone[k]], call=call, what="item ids")
        assert_equal([x["title"] for x in body["items"]], [x[2] for x in alone[k]], call=call)
        scores = [x["score"] for x in body["items"]]
        check(all(type(x) is float for x in scores), "numbers", came_back=scores, call=call)
        wanted = torch.tensor([x[1] for x in alone[k]])
        assert_close(torch.tensor(scores), wanted, atol=1e-5, call=call, what="scores")


@rung(
    hints=[
        'Pydantic is kind: it turns "7", 7.0 and true into integers unless it is strict.',
        "ConfigDict(strict=True, extra='forbid'), Field(ge=0, ...), Field(ge=1, le=max_k).",
        "FastAPI's own 422 repeats the input, and fails with a 500 if that is NaN: handle "
        "RequestValidationError and say where and why only.",
    ]
)
def test_bad_requests():
    """What is not as described is a 400 or 422 that says why in JSON; nothing is converted."""
    bodies = [
        '{"user_id": "62"}', '{"user_id": 62.0}', '{"user_id": true}', '{"user_id": null}',
        '{"user_id": -1}', '{"user_id": [62]}', '{"user_id": NaN}', '{"user_id": 1e999}',
        '{"user_id": ' + "9" * 400 + "}", '{"user_id": "\\ud800"}',
        '{"user_id": 62, "k": "5"}', '{"user_id": 62, "k": 5.0}', '{"user_id": 62, "k": true}',
        '{"user_id": 62, "k": null}', '{"user_id": 62, "k": 0}', '{"user_id": 62, "k": -3}',
        '{"user_id": 62, "k": 31}', '{"user_id": 62, "k": NaN}', '{"user_id": 62, "K": 5}',
        "{}", "[]", "62", "null", "", "{", '{"user_id": 62', "[" * 3000, "\x00", '{"\\ud800": 1}',
    ]  # fmt: skip

    async def conversation(client):
        async def post(content, kind="application/json"):
            return await client.post(
                "/recommend", content=content, headers={"content-type": kind} if kind else {}
            )

        answers = {f"POST /recommend {body[:40]}": await post(body) for body in bodies}
        answers["POST /recommend, bytes that are no text"] = await post(b'{"user_id": "\xff"}')
        good = b'{"user_id": 62}'
        answers["POST /recommend as text/plain"] = await post(good, "text/plain")
        answers["POST /recommend without a content type"] = await post(good, None)
        accepted = await post(good)
        check(accepted.status_code == 200, "200 for a good request", came_back=accepted.text[:80])
        return answers

    for call, response in talk(serving.create_app(large(), max_k=30), conversation).items():
        is_problem(response, (400, 415, 422), call)


@rung(
    hints=[
        "Who is to blame for an id that nobody has? Not the server.",
        "recommender.knows(user_id), and 404 if not. Count bytes as they arrive for 413.",
    ]
)
def test_unknown_user_and_large_body():
    """An unknown user is a 404, a body over max_body bytes a 413, whether declared or not."""

    async def conversation(client):
        unknown = [await ask(client, user) for user in (51, 0, 2**53 - 1)]
        large_body = b'{"user_id": 62}' + b" " * 300
        json_type = {"content-type": "application/json"}

        async def pieces():
            for start in range(0, len(large_body), 50):
                yield large_body[start : start + 50]

        whole = await client.post("/recommend", content=large_body, headers=json_type)
        chunked = await client.post("/recommend", content=pieces(), headers=json_type)
        return unknown, [whole, chunked], await ask(client, 62)

    app = serving.create_app(large(), max_body=200)
    unknown, too_large, good = talk(app, conversation)
    for response in unknown:
        is_problem(response, (404,), "POST /recommend for an unknown user")
    for response in too_large:
        is_problem(response, (413,), "POST /recommend with 315 bytes, max_body=200")
    check(good.status_code == 200, "status 200 for a small body", came_back=good.status_code)


@rung(
    hints=[
        "Loading for each request is slow; loading when the first one comes makes that one slow.",
        "Load and answer one request yourself in the lifespan, before the `yield`.",
        "What the lifespan makes is missing before it ran: then /ready and /recommend say 503.",
    ]
)
def test_loaded_once_and_warm():
    """The loader runs once, at startup, and a request is answered before the service is ready."""
    loads, ranked = [], []

    def ranker(users, items, scores):
        ranked.append(len(users))
        return wave(users, items, scores)

    def loader():
        loads.append(1)
        return large(ranker=ranker)

    async def look(client):
        return [await client.get("/health"), await client.get("/ready"), await ask(client, 62)]

    app = serving.create_app(loader)
    health, ready, answer = talk(app, look, started=False)
    check(health.status_code == 200, "GET /health 200: it lives", came_back=health.status_code)
    is_problem(ready, (503,), "GET /ready before startup")
    is_problem(answer, (503,), "POST /recommend before startup")
    check("retry-after" in answer.headers, "a Retry-After header with the 503")

    async def conversation(client):
        warm = len(ranked)
        return warm, [await look(client) for _ in range(10)]

    warm, looks = talk(app, conversation)
    check(warm >= 1, "at least one: a warm-up", came_back=warm,
          what="requests that the ranker has answered before the first one came")  # fmt: skip
    for look_ in looks:
        assert_equal([each.status_code for each in look_], [200] * 3,
                     call="GET /health, GET /ready, POST /recommend after startup")  # fmt: skip
    check(len(loads) == 1, "1 call of the loader", came_back=len(loads))


@rung(
    hints=[
        "Twenty people ask at once: one matrix product instead of twenty.",
        "Put (user, k, future) in a queue; a task takes what is there, calls recommend_batch and "
        "sets each result on the future that came with the question.",
        "Never keep the current user in a place that all requests share.",
    ]
)
def test_requests_share_the_work():
    """Requests that wait together are answered together, and each gets its own answer."""
    sizes = []

    def ranker(users, items, scores):
        sizes.append(len(users))
        time.sleep(0.02)
        return wave(users, items, scores)

    recommender = large(ranker=ranker)
    asked = [(50 + 3 * n, 1 + n % 7) for n in range(40)]
    alone = [recommender.recommend_batch([user], [k])[0] for user, k in asked]

    async def conversation(client):
        sizes.clear()
        return await asyncio.gather(*[ask(client, user, k) for user, k in asked])

    answers = talk(serving.create_app(recommender, max_batch=16), conversation)
    for (user, _), response, expected in zip(asked, answers, alone, strict=True):
        call = f"40 requests at once, that of user {user}"
        check(response.status_code == 200, "status 200", came_back=response.text[:80], call=call)
        assert_equal(ids_of(response), [each[0] for each in expected], call=call, what="item ids")
    check(max(sizes) <= 16, "at most max_batch=16", came_back=sizes, what="sizes of the batches")
    check(len(sizes) <= 10, "few batches for 40 requests at once", came_back=sizes,
          what="sizes of the batches")  # fmt: skip


@rung(
    hints=[
        "How long does somebody wait who is alone?",
        "Take what is in the queue now (get_nowait until it is empty), not what may come within "
        "two milliseconds.",
    ]
)
def test_nobody_waits_for_others():
    """A lone request is answered at once: no timer runs out while it waits for company."""
    fired = []

    async def conversation(client):
        await ask(client, 50)
        loop = asyncio.get_running_loop()
        call_at = loop.call_at

        def noted(when, callback, *arguments, **options):
            def run(*args):
                fired.append(when)
                callback(*args)

            return call_at(when, run, *arguments, **options)

        loop.call_at = noted
        try:
            return [await ask(client, 50 + 3 * n) for n in range(5)]
        finally:
            loop.call_at = call_at

    answers = talk(serving.create_app(large(ranker=wave)), conversation)
    assert_equal([each.status_code for each in answers], [200] * 5,
                 call="5 requests, one after the other")  # fmt: skip
    check(not fired, "no timer that runs out", came_back=f"{len(fired)} timers",
          call="5 requests, one after the other")  # fmt: skip


@rung(
    hints=[
        "A queue without an end only makes everybody wait longer.",
        "asyncio.Queue(queue_size), put_nowait, and on asyncio.QueueFull a 503 with Retry-After.",
        "A slow call belongs in a thread (run_in_executor): the event loop must stay free.",
    ]
)
def test_overload():
    """With queue_size requests waiting the next gets 503 and Retry-After; /health still answers."""

    def ranker(users, items, scores):
        time.sleep(0.05)
        return wave(users, items, scores)

    async def conversation(client):
        requests = [asyncio.create_task(ask(client, 62)) for _ in range(30)]
        await asyncio.sleep(0)
        health = await client.get("/health")
        return health, await asyncio.gather(*requests), await ask(client, 62)

    app = serving.create_app(large(ranker=ranker), max_batch=1, queue_size=4)
    health, answers, later = talk(app, conversation)
    check(health.status_code == 200, "GET /health 200 under load", came_back=health.status_code)
    statuses = [each.status_code for each in answers]
    check(set(statuses) == {200, 503}, "some 200 and some 503", came_back=statuses,
          call="30 requests at once, queue_size=4, max_batch=1")  # fmt: skip
    check(4 <= statuses.count(200) <= 8, "4 to 8 that are answered", came_back=statuses)
    for response in answers:
        if response.status_code == 503:
            is_problem(response, (503,), "POST /recommend with a full queue")
            after = response.headers.get("retry-after", "")
            check(after.isdigit() and int(after) >= 1, "Retry-After in seconds", came_back=after)
    check(later.status_code == 200, "200 once the queue is empty", came_back=later.status_code)


@rung(
    hints=[
        "One exception in a batch of twenty: whose fault is it, and who should hear of it?",
        "If a batch fails, answer its requests one by one; only that which fails again is a 500.",
    ]
)
def test_one_failure_is_one_failure():
    """A request on which the ranker fails is a 500 with a reason; the others are answered."""
    armed = []

    def ranker(users, items, scores):
        time.sleep(0.01)
        if armed and 4 in np.asarray(users):  # row 4 is user 62
            raise RuntimeError("no features for this user")
        return wave(users, items, scores)

    async def conversation(client):
        armed.append(True)
        answers = await asyncio.gather(*[ask(client, 50 + 3 * n) for n in range(12)])
        return answers, await ask(client, 50)

    answers, later = talk(serving.create_app(large(ranker=ranker), max_batch=8), conversation)
    statuses = [each.status_code for each in answers]
    assert_equal(statuses, [500 if n == 4 else 200 for n in range(12)],
                 call="12 requests at once, the 5th fails")  # fmt: skip
    is_problem(answers[4], (500,), "POST /recommend, the ranker fails")
    check(later.status_code == 200, "the service goes on", came_back=later.status_code)


@rung(
    hints=[
        "Load beside the old one, warm it up, then replace it by one assignment.",
        "A batch has to keep the recommender that it began with: one local variable.",
        "If loading fails the old one is still there: say so with a 503.",
    ]
)
def test_reload():
    """POST /reload swaps model and index in one step; a loader that fails leaves the old one."""
    loads = []

    def ranker_of(version):  # the first prefers early rows, the second late ones
        def ranker(users, items, scores):
            time.sleep(0.005)
            return items * (0.01 if version == 2 else -0.01)

        return ranker

    def loader():
        loads.append(1)
        if len(loads) == 3:
            raise OSError("no such file")
        return large(ranker=ranker_of(len(loads)), version=f"v{len(loads)}")

    def whole(response):
        """Whether the version and the order of an answer belong together."""
        body = response.json()
        rows = [int(each["title"].split()[1]) for each in body["items"]]
        return rows == sorted(rows, reverse=body["model_version"] == "v2")

    async def conversation(client):
        requests = [asyncio.create_task(ask(client, 50 + 3 * n)) for n in range(40)]
        await asyncio.sleep(0.02)
        reloaded = await client.post("/reload")
        answers = await asyncio.gather(*requests)
        after = await ask(client, 62)
        failed = await client.post("/reload")
        return reloaded, answers, after, failed, await ask(client, 62), await client.get("/ready")

    app = serving.create_app(loader, max_batch=4)
    reloaded, answers, after, failed, still, ready = talk(app, conversation)
    check(reloaded.status_code == 200, "POST /reload 200", came_back=reloaded.text[:80])
    for response in answers:
        check(response.status_code == 200, "200 while reloading", came_back=response.text[:80])
        check(whole(response), "version and order of one recommender", came_back=response.json())
    assert_equal(after.json()["model_version"], "v2", call="POST /recommend after POST /reload")
    check(whole(after), "the new ranker's order", came_back=after.json())
    is_problem(failed, (503,), "POST /reload, the loader fails")
    assert_equal(still.json()["model_version"], "v2", call="POST /recommend after a failed reload")
    check(ready.status_code == 200, "GET /ready 200 after a failed reload")

    async def nothing_to_load(client):
        return await client.post("/reload")

    response = talk(serving.create_app(large()), nothing_to_load)
    is_problem(response, (409,), "POST /reload of an app made from a recommender")


@rung(
    hints=[
        "Several apps in one process must not count together: each needs a CollectorRegistry.",
        "Counter('recommend_requests', ..., ['status'], registry=registry), and "
        "prometheus_client.generate_latest(registry).",
    ]
)
def test_metrics():
    """GET /metrics tells Prometheus how many requests had which status, of this app alone."""

    async def conversation(client):
        for user in (50, 53, 51, 56):
            await ask(client, user)
        await client.post("/recommend", json={"user_id": "50"})
        return await client.get("/metrics")

    for _ in range(2):
        response = talk(serving.create_app(large()), conversation)
        check(response.status_code == 200, "GET /metrics 200", came_back=response.status_code)
        lines = dict(
            line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#")
        )
        for status, count in [("200", 3), ("404", 1), ("422", 1)]:
            name = f'recommend_requests_total{{status="{status}"}}'
            check(float(lines.get(name, "nan")) == count, f"{name} {count}.0",
                  came_back=lines.get(name, "no such line"), call="GET /metrics")  # fmt: skip
        for name in ("recommend_seconds_count", "recommend_batch_size_count", "recommend_waiting"):
            check(name in lines, f"a line for {name}", call="GET /metrics",
                  came_back=sorted(lines)[:3])  # fmt: skip


@rung(
    hints=[
        "What happens to a request that was taken when the server is told to stop?",
        "After the `yield` of the lifespan: take no more, wait for the queue (queue.join()), then "
        "cancel the task.",
    ]
)
def test_a_real_server():
    """Served by uvicorn, it answers over a socket, and stops only after it answered."""
    slow = []

    def ranker(users, items, scores):
        time.sleep(0.3 if slow else 0.0)
        return wave(users, items, scores)

    recommender = large(ranker=ranker)
    expected = [each[0] for each in recommender.recommend_batch([62], [4])[0]]

    def post(address):
        request = urllib.request.Request(
            address + "/recommend",
            data=b'{"user_id": 62, "k": 4}',
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            return [each["item_id"] for each in json.loads(response.read())["items"]]

    async def while_stopping(client, app):
        async with app.router.lifespan_context(app):
            slow.append(True)
            taken = [asyncio.create_task(ask(client, 50 + 3 * n)) for n in range(5)]
            await asyncio.sleep(0.1)
        return await asyncio.gather(*taken)

    with running(serving.create_app(recommender)) as address:
        assert_equal(post(address), expected, call="POST /recommend to uvicorn", what="item ids")
    app = serving.create_app(recommender, max_batch=2)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://kata")
    answers = asyncio.run(asyncio.wait_for(while_stopping(client, app), 20))
    assert_equal([each.status_code for each in answers], [200] * 5,
                 call="5 requests, then the service is stopped")  # fmt: skip
