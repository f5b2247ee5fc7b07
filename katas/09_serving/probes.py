"""What the diagnosis asks of kata 09: see harness/probe.py."""

import asyncio
import threading
import time
from unittest.mock import patch

import httpx
import numpy as np

from harness.probe import probe
from harness.spec import learner

serving = learner("inference.serving")

USERS = [31, 7, 12]


def unit(rows, width, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, width)).round(2)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


class Leaky:
    """An exact index that never finds the second best."""

    def __init__(self, vectors):
        self.vectors, (self.ntotal, self.d) = vectors.astype(np.float64), vectors.shape

    def search(self, queries, k):
        scores = np.asarray(queries, dtype=np.float64) @ self.vectors.T
        items = np.delete(np.argsort(-scores, axis=1, kind="stable"), 1, axis=1)[:, :k]
        items = np.pad(items, ((0, 0), (0, k - items.shape[1])), constant_values=-1)
        found = np.take_along_axis(scores, items.clip(min=0), 1)
        return np.where(items < 0, np.finfo(np.float32).min, found).astype(np.float32), items


def recommender(ranker=None, **changes):
    """3 users who have seen 2, 0 and 5 of 8 items."""
    seen = [[4, 1], [], [0, 2, 3, 6, 7]]
    parts = {
        "user_ids": np.array(USERS),
        "user_vectors": unit(3, 4, seed=1).astype(np.float32),
        "item_ids": np.array([107, 100, 205, 301, 114, 408, 99, 512]),
        "titles": [f"film {row}" for row in range(8)],
        "index": serving.build_index(unit(8, 4, seed=2).astype(np.float32)),
        "seen": (np.array([x for row in seen for x in row]), np.cumsum([0, *map(len, seen)])),
        "ranker": ranker,
        "num_candidates": 4,
    }
    return serving.Recommender(**(parts | changes))


TABLE = np.random.default_rng(3).permutation(24).reshape(3, 8) / 4 - 4  # logits below 0 mostly


def table(users, items, scores):
    return TABLE[np.asarray(users)[:, None], items]


class Slow:
    """A ranker that is slow, waits while it is held up, and notes its calls."""

    def __init__(self):
        self.free, self.late, self.sizes = threading.Event(), False, []
        self.free.set()

    def __call__(self, users, items, scores):
        time.sleep(0.008)
        self.late |= not self.free.wait(0.25)
        self.sizes.append(len(users))
        return table(users, items, scores)


def code(function, error):
    """0: accepted, 1: refused as it should be, 2: with another exception."""
    try:
        function()
    except error:
        return 1
    except Exception:
        return 2
    return 0


def ids(answers):
    return [[each[0] for each in answer] for answer in answers]


# --- stage one ------------------------------------------------------------------------------------


@probe
def vectors_as_they_were():
    """What building an index leaves of vectors that are not quite of length 1."""
    vectors = (unit(4, 3, seed=5) * 1.01).astype(np.float32)
    serving.build_index(vectors)
    return vectors


@probe(tolerance=1e-5)
def found():
    """Scores and items of two queries, k above the number of items."""
    vectors = unit(6, 4).astype(np.float32)
    scores, items = serving.search(serving.build_index(vectors), unit(2, 4, seed=5), 8)
    return {"scores": scores.astype(np.float64), "items": items}


@probe(tolerance=1e-5)
def found_for_one():
    """A single query."""
    index = serving.build_index(unit(6, 4).astype(np.float32))
    scores, items = serving.search(index, unit(2, 4, seed=5)[1].astype(np.float32), 3)
    return {"scores": scores.astype(np.float64), "items": items}


@probe(tolerance=1e-5)
def found_in_columns():
    """Vectors of another memory layout."""
    vectors = np.asfortranarray(unit(6, 4).astype(np.float32))
    scores, items = serving.search(serving.build_index(vectors), unit(2, 4, seed=5), 3)
    return {"scores": scores.astype(np.float64), "items": items}


@probe(tolerance=1e-5)
def found_in_cells():
    """An inverted file that looks into all its cells: as exact as any."""
    vectors = unit(160, 4).astype(np.float32)
    index = serving.build_index(vectors, kind="ivf", num_lists=4, num_probes=4)
    scores, items = serving.search(index, unit(2, 4, seed=5), 3)
    recall = serving.recall_at(index, vectors, unit(20, 4, seed=6).astype(np.float32), 20)
    return {"scores": scores.astype(np.float64), "items": items, "recall": round(recall, 3)}


@probe
def automatic():
    """3,000 items in an index of kind auto, which is exact."""
    vectors = unit(3000, 4).astype(np.float32)
    index = serving.build_index(vectors)
    recall = serving.recall_at(index, vectors, unit(10, 4, seed=6).astype(np.float32), 60)
    return {"recall": round(recall, 3)}


@probe
def recalls():
    """Recall of an index that never finds the second best; of 7 items with twins; of few items."""
    vectors, queries = unit(7, 4).astype(np.float32), unit(4, 4, seed=5).astype(np.float32)
    twins = np.repeat(unit(3, 4), 3, axis=0).astype(np.float32)
    leaky = Leaky(vectors)
    return {
        "leaky": [float(serving.recall_at(leaky, vectors, queries, k)) for k in (1, 4, 7, 20)],
        "twins": float(serving.recall_at(Leaky(twins), twins, queries, 2)),
    }


@probe
def many_queries():
    """The last 40 of 300 queries miss the second best."""

    class Partly(Leaky):
        def search(self, queries, k):
            scores, items = super().search(queries, k)
            all_scores = np.asarray(queries, dtype=np.float64) @ self.vectors.T
            good = np.argsort(-all_scores, axis=1)[:, :k]
            rows = np.asarray(queries)[:, :1] > 0
            best = np.take_along_axis(all_scores, good, 1).astype(np.float32)
            return np.where(rows, best, scores), np.where(rows, good, items)

    vectors, queries = unit(9, 4).astype(np.float32), unit(300, 4, seed=7).astype(np.float32)
    queries[:, 0] = np.where(np.arange(300) < 260, 1, -1) * np.abs(queries[:, 0] + 0.001)
    return {"recall": float(serving.recall_at(Partly(vectors), vectors, queries, 2))}


@probe
def nonsense():
    """What the index and the search refuse."""
    vectors = unit(6, 4).astype(np.float32)
    broken, endless = vectors.copy(), vectors.copy()
    broken[1, 1], endless[2, 0] = np.nan, np.inf
    index = serving.build_index(vectors)
    calls = [
        lambda: serving.build_index(vectors[0]),
        lambda: serving.build_index(vectors[:0]),
        lambda: serving.build_index(broken),
        lambda: serving.build_index(endless),
        lambda: serving.build_index(vectors, kind="hnsw2"),
        lambda: serving.search(index, vectors[:, :3], 2),
        lambda: serving.search(index, vectors, 0),
        lambda: serving.search(index, vectors, -2),
    ]
    return [code(call, ValueError) for call in calls]


# --- both stages ----------------------------------------------------------------------------------


@probe
def first_stage():
    """Without a ranker; heavy users, large k."""
    answers = recommender().recommend_batch([31, 12, 7], [3, 8, 8])
    return ids(answers)


@probe
def both_stages():
    """With a ranker, for each user alone."""
    two = recommender(table)
    alone = [two.recommend_batch([user], [k])[0] for user, k in zip(USERS, (2, 3, 8), strict=True)]
    titles = [[int(each[2].split()[1]) for each in answer] for answer in alone]
    return {"items": ids(alone), "titles": titles}


@probe
def score_belongs_to_item():
    """Whether scores fall, and what type the entries have."""
    answer = recommender(table).recommend_batch([7], [4])[0]
    scores = [each[1] for each in answer]
    kinds = [type(x).__name__ for x in answer[0]]
    return {"falling": scores == sorted(scores, reverse=True), "types": kinds}


@probe
def large_ids():
    """Ids that a float32 cannot hold, as differences."""
    base = 2**53 - 100
    answer = recommender(table, item_ids=np.arange(8) * 3 + base).recommend_batch([7], [4])[0]
    return [each[0] - base for each in answer]


@probe
def together():
    """In one batch with different k."""
    return ids(recommender(table).recommend_batch([12, 31, 7, 31], [1, 2, 7, 3]))


@probe
def ties():
    """A ranker that gives equal scores."""
    flat = recommender(lambda users, items, scores: np.floor(table(users, items, scores) / 3))
    return ids(flat.recommend_batch([7, 31], [8, 8]))


@probe
def broken_scores():
    """NaN, infinity and minus infinity among the scores."""

    def ranker(users, items, scores):
        given = table(users, items, scores)
        for row, bad in [(0, np.nan), (5, np.inf), (3, -np.inf)]:
            given = np.where(items == row, bad, given)
        return given

    answers = recommender(ranker).recommend_batch([7, 31, 12], [8, 8, 8])
    scores = [each[1] for answer in answers for each in answer]
    return {"items": ids(answers), "finite": bool(np.isfinite(scores).all())}


@probe
def nothing_left():
    """Somebody has seen all but two items, and the ranker likes what is not there."""
    seen = np.array([0, 1, 2, 4, 5, 6]), np.array([0, 6, 6, 6])
    loud = recommender(lambda users, items, scores: np.where(items < 0, 9.0, 1.0), seen=seen)
    return ids(loud.recommend_batch([31], [3]) + loud.recommend_batch([31], [8]))


@probe(tolerance=1e-5)
def what_the_ranker_gets():
    """Rows, items and scores of its calls, without the places where nothing is."""
    calls = []

    def ranker(users, items, scores):
        calls.append((np.array(users), np.array(items), np.array(scores)))
        return table(users, np.clip(items, -1, 7), scores) if np.max(users) < 3 else scores

    recommender(ranker).recommend_batch([12, 7, 31], [1, 2, 6])
    rows = [(i[i >= 0], s[i >= 0]) for call in calls for i, s in zip(*call[1:], strict=True)]
    return {
        "calls": len(calls),
        "users": [user for call in calls for user in call[0].tolist()],
        "items": [items.tolist() for items, _ in rows],
        "scores": [scores.astype(np.float64) for _, scores in rows],
    }


@probe
def what_the_ranker_keeps():
    """The array that the ranker returned, afterwards."""
    kept = []

    def ranker(users, items, scores):
        kept.append(np.where(items < 0, 7.0, table(users, items, scores)))
        return kept[-1]

    recommender(ranker).recommend_batch([7, 12], [2, 2])
    return {"largest": kept[0].max(), "finite": bool(np.isfinite(kept[0]).all())}


@probe
def strangers():
    """What a batch refuses."""
    two = recommender(table)
    calls = [([31, user], [2, 2], KeyError) for user in (-1, 0, 8, 30, 10**12)]
    calls += [([31, 7], ks, ValueError) for ks in ([2, 0], [2, -1], [2], [2, 2, 2])]
    return [code(lambda c=c: two.recommend_batch(c[0], c[1]), c[2]) for c in calls]


# --- over HTTP ------------------------------------------------------------------------------------

REFUSED = (400, 415, 422)


def talk(app, conversation, *, started=True):
    async def main():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://kata", trust_env=False
        ) as client:
            if not started:
                return await conversation(client)
            context = app.router.lifespan_context(app)
            await context.__aenter__()
            for _ in range(30):
                if (await client.get("/ready")).status_code == 200:
                    break
                await asyncio.sleep(0.01)
            result = await conversation(client)
            stopping = asyncio.create_task(context.__aexit__(None, None, None))
            await asyncio.wait([stopping], timeout=0.3)
            return result

    return patiently(main())


def patiently(coroutine):
    loop = asyncio.new_event_loop()
    try:
        task = loop.create_task(coroutine)
        loop.run_until_complete(asyncio.wait([task], timeout=1.5))
        return task.result() if task.done() else "it never answered"
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def service(source, **options):
    """The second of two apps in this process: what they share shows."""
    try:
        return [serving.create_app(source, **options) for _ in range(2)][1]
    except ValueError as error:
        raise ValueError("a second app was refused") from error


def ask(client, user, k=3):
    return client.post("/recommend", json={"user_id": user, "k": k})


async def soon(tasks):
    """What `told` says of each answer, -1 where there is none in time."""
    tasks = [asyncio.ensure_future(each) for each in tasks]
    await asyncio.wait(tasks, timeout=0.25)
    return [told(each.result()) if each.done() else -1 for each in tasks]


def told(response):
    """The status, one number for those that a client cannot tell apart; 0: no detail in words."""
    status = response.status_code
    if status < 400:
        return status
    try:
        good = isinstance(response.json()["detail"], str)
    except (ValueError, KeyError, TypeError):
        good = False
    return (422 if status in REFUSED else status) if good else -status


@probe
def statuses():
    """How bad requests are answered."""
    bodies = [
        '{"user_id": 7}', '{"user_id": "7"}', '{"user_id": 7.0}', '{"user_id": true}',
        '{"user_id": -1}', f'{{"user_id": {2**53}}}', '{"user_id": 7, "k": 0}',
        '{"user_id": 7, "k": 31}', '{"user_id": 7, "K": 3}', '{"user_id": NaN}', "{}", "[",
        '{"user_id": 8}', f'{{"user_id": {"9" * 400}}}',
    ]  # fmt: skip

    async def conversation(client):
        kind = {"content-type": "application/json"}
        got = [await client.post("/recommend", content=b, headers=kind) for b in bodies]
        for kind in ({"content-type": "text/plain"}, {}):
            got.append(await client.post("/recommend", content=bodies[0], headers=kind))
        return [told(each) for each in got]

    return talk(service(recommender(table), max_k=30), conversation)


@probe
def bodies():
    """How bodies around the limit are answered, with and without a declared length."""

    async def pieces(body):
        for start in range(0, len(body), 40):
            yield body[start : start + 40]

    async def conversation(client):
        got, kind = [], {"content-type": "application/json"}
        for size in (100, 101, 600):
            body = b'{"user_id": 7}'.ljust(size)
            got.append(await client.post("/recommend", content=body, headers=kind))
            got.append(await client.post("/recommend", content=pieces(body), headers=kind))
        return [told(each) for each in got]

    return talk(service(recommender(table), max_body=100), conversation)


@probe
def answers():
    """What comes back over HTTP; a score that is no number counts as -1."""

    def ranker(users, items, scores):
        return np.where(items == 5, np.nan, table(users, items, scores))

    async def conversation(client):
        got = [(await ask(client, user, k)).json() for user, k in ((7, 3), (12, 8))]
        got.append((await client.post("/recommend", json={"user_id": 31})).json())
        items = [each["items"] for each in got]
        return {
            "users": [each["user_id"] for each in got],
            "items": [[x["item_id"] for x in each] for each in items],
            "no numbers": sum(type(x["score"]) is not float for each in items for x in each),
            "version": [each["model_version"] for each in got],
        }

    return talk(service(recommender(ranker, version="v7")), conversation)


@probe
def documented():
    """Which statuses of POST /recommend /openapi.json describes."""

    async def conversation(client):
        paths = (await client.get("/openapi.json")).json()["paths"]
        known = paths["/recommend"]["post"]["responses"]
        return [int(status in known) for status in ("200", "404", "413", "422", "500", "503")]

    return talk(service(recommender(table)), conversation)


@probe
def crowd():
    """Seven requests while the ranker is busy with another one: sizes and answers."""
    ranker = Slow()

    async def conversation(client):
        ranker.sizes.clear(), ranker.free.clear()
        tasks = [asyncio.create_task(ask(client, 31, 2))]
        await asyncio.sleep(0.03)
        asked = [(12, 3), (7, 1), (31, 4), (7, 6), (12, 1), (31, 1), (7, 2)]
        tasks += [asyncio.create_task(ask(client, user, k)) for user, k in asked]
        await asyncio.sleep(0.03)
        ranker.free.set()
        got = await asyncio.gather(*tasks)
        calls, largest = len(ranker.sizes), max(ranker.sizes)
        served.recommend_batch(USERS, [1, 1, 1])
        return {
            "items": [[x["item_id"] for x in each.json()["items"]] for each in got],
            "largest": largest,
            "calls": calls,
            "calls for a batch": len(ranker.sizes) - calls,
        }

    served = recommender(ranker)
    return talk(service(served, max_batch=4), conversation)


@probe
def waits():
    """Timers that run out while two requests are answered, one after the other."""

    async def conversation(client):
        await ask(client, 7)
        fired, loop = [], asyncio.get_running_loop()
        call_at = loop.call_at

        def noted(when, callback, *arguments, **options):
            return call_at(when, lambda *a: (fired.append(1), callback(*a)), *arguments, **options)

        loop.call_at = noted
        with patch("time.sleep", lambda seconds: fired.append(2)):
            got = [told(await ask(client, user)) for user in (7, 31)]
        loop.call_at, steps, call_soon = call_at, [], loop.call_soon
        loop.call_soon = lambda *args, **options: (steps.append(1), call_soon(*args, **options))[1]
        await asyncio.sleep(0.01)
        loop.call_soon = call_soon
        return {"statuses": got, "timers": len(fired), "idle": len(steps) <= 10}

    return talk(service(recommender(table)), conversation)


@probe
def overload():
    """Ten requests at once, a queue of three, batches of one."""
    ranker = Slow()

    async def conversation(client):
        ranker.free.clear()
        tasks = [asyncio.create_task(ask(client, 7)) for _ in range(10)]
        await asyncio.sleep(0.05)
        early, (health,) = sum(task.done() for task in tasks), await soon([client.get("/health")])
        late = ranker.late
        metrics = (await client.get("/metrics")).text
        ranker.free.set()
        got = await asyncio.gather(*tasks)
        codes = [told(each) for each in got]
        lines = [x for x in metrics.splitlines() if x.startswith("recommend_waiting ")]
        retry = [each.headers.get("retry-after", "") for each in got if each.status_code == 503]
        return {
            "answered": 3 <= codes.count(200) <= 6,
            "codes": sorted(set(codes)),
            "at once": early == len(codes) - codes.count(200),
            "health": health,
            "held up": late,
            "retry": ["seconds" if each.isdigit() else each for each in retry][:1],
            "some wait": 1 <= float(lines[0].split()[1]) <= 6 if lines else -1,
        }

    return talk(service(recommender(ranker), max_batch=1, queue_size=3), conversation)


@probe
def failure():
    """Five requests at once; the ranker fails for one user."""

    def ranker(users, items, scores):
        time.sleep(0.008)
        if 2 in np.asarray(users) and np.max(users) >= 0 and armed:
            raise RuntimeError("no features")
        return table(users, items, scores)

    armed = []

    async def conversation(client):
        armed.append(True)
        got = await asyncio.gather(*[ask(client, user) for user in (31, 12, 7, 31, 7)])
        return [told(each) for each in got]

    return talk(service(recommender(ranker), max_batch=4), conversation)


@probe
def gone():
    """The second of three clients goes away while the ranker is busy with the first."""
    ranker = Slow()

    async def conversation(client):
        ranker.free.clear()
        tasks = [asyncio.create_task(ask(client, user)) for user in (31, 7, 12)]
        await asyncio.sleep(0.03)
        tasks[1].cancel()
        await asyncio.sleep(0.005)
        ranker.free.set()
        return await soon([tasks[0], tasks[2]]) + await soon([ask(client, 7)])

    return talk(service(recommender(ranker), max_batch=4), conversation)


@probe
def life():
    """Before startup, after it, and while it stops."""
    ranker, loads = Slow(), []

    def loader():
        loads.append(1)
        return recommender(ranker)

    app = service(loader, max_batch=2)

    async def look(client):
        return [await client.get("/health"), await client.get("/ready"), await ask(client, 7)]

    async def main():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://kata", trust_env=False
        ) as client:
            before = [told(each) for each in await look(client)]
            context = app.router.lifespan_context(app)
            await context.__aenter__()
            for _ in range(30):
                if (await client.get("/ready")).status_code == 200:
                    break
                await asyncio.sleep(0.01)
            warm = bool(ranker.sizes)
            after = [told(each) for _ in range(2) for each in await look(client)]
            ranker.free.clear()
            taken = [asyncio.create_task(ask(client, user)) for user in (31, 7, 12, 7)]
            await asyncio.sleep(0.02)
            stopping = asyncio.create_task(context.__aexit__(None, None, None))
            await asyncio.sleep(0.01)
            late = [asyncio.create_task(each) for each in (client.get("/ready"), ask(client, 31))]
            await asyncio.wait(late, timeout=0.1)
            ranker.free.set()
            await asyncio.wait([stopping], timeout=0.3)
            return {
                "before": before,
                "warm": warm,
                "after": after,
                "late": await soon(late),
                "taken": await soon(taken),
                "loads": len(loads),
                "stopped": stopping.done(),
            }

    return patiently(main())


@probe
def reloads():
    """A reload with a request in work, one that fails to load, one whose warm-up fails."""
    loads, calls, slow = [], [], Slow()
    proceed, held = threading.Event(), []

    def loader():
        loads.append(1)
        number = len(loads)
        if number == 2:
            held.append(not proceed.wait(0.25))
        if number == 3:
            raise OSError("no such file")

        def ranker(users, items, scores):
            calls.append(number)
            if number == 4:
                raise RuntimeError("another shape")
            given = slow(users, items, scores) if number == 1 else table(users, items, scores)
            return given * (1 if number % 2 else -1)

        return recommender(ranker, version=f"{number}")

    def version(response):
        if response.status_code != 200:
            return told(response)
        body = response.json()
        return [int(body["model_version"] or 0), *[x["item_id"] for x in body["items"]]]

    async def conversation(client):
        slow.free.clear()
        first = asyncio.create_task(ask(client, 7))
        await asyncio.sleep(0.02)
        reload = asyncio.create_task(client.post("/reload"))
        await asyncio.sleep(0.01)
        ready = (await client.get("/ready")).status_code
        proceed.set()
        await asyncio.wait([reload], timeout=0.2)
        slow.free.set()
        good, first = told(await reload), version(await first)
        warm = 2 in calls
        second = version(await ask(client, 7))
        bad = [told(await client.post("/reload")) for _ in range(2)]
        return {"ready": ready, "good": good, "first": first, "warm": warm, "second": second,
                "bad": bad, "after": version(await ask(client, 7)), "held": held}  # fmt: skip

    return talk(service(loader, max_batch=4), conversation)


@probe
def reload_of_nothing():
    """POST /reload of an app that was made from a recommender."""

    async def conversation(client):
        return told(await client.post("/reload"))

    return talk(service(recommender()), conversation)


@probe
def counts():
    """What two apps count, after five and after one request."""

    async def read(client):
        lines = [x.rsplit(" ", 1) for x in (await client.get("/metrics")).text.splitlines()]
        found = {line[0]: float(line[1]) for line in lines if line[0][0] != "#"}
        status = {name: value for name, value in found.items() if "requests_total{" in name}
        return {
            "200": status.get('recommend_requests_total{status="200"}', -1),
            "404": status.get('recommend_requests_total{status="404"}', -1),
            "refused": sum(v for name, v in status.items() if any(str(c) in name for c in REFUSED)),
            "waiting": found.get("recommend_waiting", -1),
        }

    async def some(client):
        for user in (7, 31, 12, 8, "7"):
            await ask(client, user)
        return await read(client)

    async def one(client):
        await ask(client, 7)
        return await read(client)

    first, second = (service(recommender(table)) for _ in range(2))
    return [talk(first, some), talk(second, one)]
