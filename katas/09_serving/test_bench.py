"""Kata 09: what a request costs the server, as a multiple of an endpoint that does nothing.

    pytest katas/09_serving -m benchmark -s

6,040 users and 3,706 items, both stages, 100 candidates; CPU time of the whole server, the clients
in a process of their own, rounds of both endpoints one after the other in one run.
"""

import statistics

import numpy as np
import pytest
import torch

from harness.load import measure
from harness.spec import check, learner

serving = learner("inference.serving")

USERS, ITEMS, DIM = 6_040, 3_706, 64
ROUNDS = 7
MOST = {"1": 4.0, "16": 3.0}  # clients -> times the CPU time of an empty endpoint

pytestmark = pytest.mark.benchmark


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("KATA_RUNG_SECONDS", "600")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for work would be counted as CPU time
    yield
    torch.set_num_threads(before)


def recommender():
    """Random vectors; histories as long as in ml-1m; a ranker that multiplies its own tables."""
    rng = np.random.default_rng(0)

    def unit(rows):
        x = rng.standard_normal((rows, DIM), dtype=np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    lengths = np.minimum(rng.lognormal(4.6, 0.9, USERS).astype(int) + 20, 2_300)
    seen = [rng.choice(ITEMS, length, replace=False) for length in lengths]
    own_users, own_items = unit(USERS), unit(ITEMS)

    def ranker(users, items, scores):
        return (own_items[items] @ own_users[users][:, :, None])[:, :, 0] + scores

    return serving.Recommender(
        user_ids=np.arange(USERS) + 1,
        user_vectors=unit(USERS),
        item_ids=np.arange(ITEMS) + 1,
        titles=[f"A film of some length, number {row} (1999)" for row in range(ITEMS)],
        index=serving.build_index(unit(ITEMS)),
        seen=(np.concatenate(seen), np.cumsum([0, *lengths])),
        ranker=ranker,
        num_candidates=100,
    )


def test_cost_of_a_request():
    """At most 4 times the CPU of an empty endpoint at one client, 3 times at 16."""
    service, rounds = recommender(), []
    for _ in range(ROUNDS):
        users = service.user_ids[::13].tolist()
        rounds.append(measure(serving.create_app(service), users, requests=480, timeout=60))
    errors = [each["first_error"] for each in rounds if each["errors"]]
    check(not errors, "no error under load", came_back=errors[:1])
    print("\n| clients | a request, CPU ms | an empty one, CPU ms | ratio | p50 ms | p99 ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    ratios = {}
    for clients in MOST:
        told = [each["by_clients"][clients] for each in rounds]
        cost, idle = ([x[key] for x in told] for key in ("cpu_ms_per_request",
                                                         "cpu_ms_per_empty_request"))  # fmt: skip
        ratio = [a / b for a, b in zip(cost, idle, strict=True)]
        ratios[clients] = statistics.median(ratio)
        p50, p99 = (statistics.median(x[key] for x in told) for key in ("p50_ms", "p99_ms"))
        cells = [spread(cost), spread(idle), spread(ratio, 1), f"{p50:.2f}", f"{p99:.2f}"]
        print(f"| {clients} | {' | '.join(cells)} |")
    for clients, most in MOST.items():
        check(ratios[clients] <= most, f"at most {most:g} times an empty endpoint's CPU time",
              came_back=f"{ratios[clients]:.2f} times, median of {ROUNDS} rounds",
              call=f"POST /recommend, {clients} clients")  # fmt: skip


def spread(values, digits=3):
    middle, low, high = (f(values) for f in (statistics.median, min, max))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
