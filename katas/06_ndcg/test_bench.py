"""Kata 06: NDCG@10 of 6,040 users x 3,706 items against the libraries that people use, one thread.

    pytest katas/06_ndcg -m benchmark

Runs alternate within one process. A library that is not installed is skipped:
`pip install -c constraints.txt '.[peers]'`.
"""

import statistics
import time

import pytest
import torch

from harness.spec import check, learner

metrics = learner("evaluation.metrics")

USERS, ITEMS, K = 6_040, 3_706, 10
ROUNDS = 7
FACTOR = 10  # times as fast as torchmetrics, at least

pytestmark = pytest.mark.benchmark


@pytest.fixture(scope="module")
def data():
    """Scores without ties and, for each user, some twenty items of grades 1 to 4."""
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(USERS, ITEMS, generator=g, dtype=torch.float64).argsort(1).float() + 1
    relevance = torch.randint(1, 5, (USERS, ITEMS), generator=g)
    relevance[torch.rand(USERS, ITEMS, generator=g) > 0.005] = 0
    relevance[torch.arange(USERS), torch.randint(0, ITEMS, (USERS,), generator=g)] = 4
    return scores, relevance


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("KATA_RUNG_SECONDS", "1800")  # the libraries take their time
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def torchmetrics(scores, relevance):
    """The metric object, as its documentation uses it."""
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    users = torch.arange(USERS)[:, None].expand(USERS, ITEMS).flatten()
    flat = scores.flatten(), relevance.flatten()

    def run():
        metric = retrieval.RetrievalNormalizedDCG(top_k=K)
        metric.update(*flat, indexes=users)
        return float(metric.compute())

    return run


def torchmetrics_functional(scores, relevance):
    """Its function of one user, in a loop: less work than the object does."""
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")

    def run():
        rows = zip(scores, relevance, strict=True)
        values = [retrieval.retrieval_normalized_dcg(*row, top_k=K) for row in rows]
        return float(torch.stack(values).mean())

    return run


def scikit_learn(scores, relevance):
    sklearn = pytest.importorskip("sklearn.metrics")
    given = relevance.numpy(), scores.numpy()
    return lambda: sklearn.ndcg_score(*given, k=K, ignore_ties=True)


def ranx_evaluate(scores, relevance):
    """The evaluation step alone, of a top ten that is made and converted beforehand."""
    ranx = pytest.importorskip("ranx")
    top = scores.topk(K)
    names = [str(user) for user in range(USERS)]
    best = zip(names, top.indices.tolist(), top.values.tolist(), strict=True)
    run = ranx.Run({name: dict(zip(map(str, items), s, strict=True)) for name, items, s in best})
    grades = {}
    for user, item in relevance.nonzero().tolist():
        grades.setdefault(names[user], {})[str(item)] = int(relevance[user, item])
    qrels = ranx.Qrels(grades)
    return lambda: float(ranx.evaluate(qrels, run, f"ndcg@{K}"))


@pytest.mark.parametrize(
    "peer, factor",
    [
        pytest.param(torchmetrics, FACTOR, id="torchmetrics"),
        pytest.param(torchmetrics_functional, FACTOR, id="torchmetrics_functional"),
        pytest.param(scikit_learn, 1, id="scikit_learn"),
        pytest.param(ranx_evaluate, 0, id="ranx_evaluate"),
    ],
)
def test_speed(peer, factor, data, capsys):
    """NDCG@10 of everybody is right, and at least ten times as fast as torchmetrics."""
    scores, relevance = data
    contestants = {
        "yours": lambda: metrics.mean_over_users(metrics.ndcg_at_k(scores, relevance, K))[0],
        "one look at the scores": lambda: float(scores.amax()),  # what no metric can go below
        peer.__name__: peer(scores, relevance),
    }
    values = {name: float(run()) for name, run in contestants.items()}  # warms up, too
    gap = abs(values["yours"] - values[peer.__name__])
    check(gap < 1e-5, f"NDCG@{K} as of {peer.__name__}: {values[peer.__name__]:.6f}",
          came_back=values["yours"])  # fmt: skip
    wall = {name: [] for name in contestants}
    work = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            start, begin = time.perf_counter(), time.process_time()
            run()
            work[name].append(time.process_time() - begin)
            wall[name].append(time.perf_counter() - start)
    mine = statistics.median(wall["yours"])
    with capsys.disabled():
        title = f"NDCG@{K}, {USERS:,} x {ITEMS:,}, one thread"
        print(f"\n{title}, median (lowest to highest) of {ROUNDS}")
        for name, times in wall.items():
            low, middle, high = (1e3 * f(times) for f in (min, statistics.median, max))
            cpu = 1e3 * statistics.median(work[name])
            print(f"  {name:<24} {middle:9,.1f} ms ({low:,.1f} to {high:,.1f}), CPU {cpu:,.1f} ms, "
                  f"{middle / 1e3 / mine:,.2f} x yours")  # fmt: skip
    times = statistics.median(wall[peer.__name__]) / mine
    check(times >= factor, f"at least {factor} times as fast as {peer.__name__}",
          came_back=f"{times:.1f} times as fast")  # fmt: skip
