"""The monitor: its index by hand, planted drift found, chance left alone, the log of a service."""

import io
import json
import urllib.error
import urllib.request

import numpy as np
import pytest

from harness import monitor, serve
from harness.load import running
from harness.monitor import ALARM, GOOD, LOOK


def rows(seed=0, size=1000, **planted):
    """A log of answers as on a good day, with what is planted in it."""
    rng = np.random.default_rng(seed)
    columns = {
        "status": np.full(size, 200),
        "ms": rng.gamma(4.0, 0.5, size),
        "history": rng.geometric(0.02, size),
        "shown": np.full(size, 10),
        "top": rng.normal(2.0, 0.5, size),
        "spread": rng.gamma(3.0, 0.2, size),
    } | {name: make(rng, size) for name, make in planted.items() if name != "items"}
    made = [{name: column[i].item() for name, column in columns.items()} for i in range(size)]
    for row in made:
        row["items"] = planted.get("items", lambda rng: rng.integers(0, 500, 10))(rng)
    return made


def levels(found):
    return {each.what.partition(",")[0]: each.level for each in found if each.level != GOOD}


def test_the_index_by_hand():
    before, now = np.array([0.5, 0.5]), np.array([0.8, 0.2])
    # .3 ln 1.6 + .3 ln 2.5
    assert monitor.stability_index(before, now) == pytest.approx(0.4159, abs=5e-5)
    assert monitor.stability_index(now, before) == pytest.approx(0.4159, abs=5e-5)
    assert monitor.stability_index(now, now) == 0


def test_bins():
    few = monitor.counts([10, 10, 20], [10, 20, 20, 5, 50])
    assert [c.tolist() for c in few] == [[0, 2, 1, 0], [1, 1, 2, 1]]
    many = monitor.counts(list(range(1000)), [-5.0] * 3 + [2000.0] * 4)
    assert many[0].tolist() == [100] * 10
    assert many[1].tolist() == [3] + [0] * 8 + [4]


def test_what_chance_gives():
    """The 99.9 % quantile of chi-square with 9 degrees of freedom is 27.88, with 1 it is 10.83."""
    assert monitor.chance(10, 1000, 1000) == pytest.approx(27.88 * 0.002, rel=0.01)
    assert monitor.chance(2, 500, 2000) == pytest.approx(10.83 * 0.0025, rel=0.04)


def test_good_days_are_green():
    """Also where few requests make the index large: at most one look in 80 comparisons."""
    said = [
        levels(monitor.compare(rows(seed, size), rows(seed + 10_000, size)))
        for seed in range(40) for size in (200, 400)
    ]  # fmt: skip
    assert sum(map(bool, said)) <= 1 and not any(ALARM in each.values() for each in said)


@pytest.mark.parametrize(
    "name, planted",
    [
        ("top", {"top": lambda rng, n: rng.normal(2.7, 0.5, n)}),
        ("top", {"top": lambda rng, n: rng.normal(2.0, 0.05, n)}),  # same mean, collapsed
        ("top", {"top": lambda rng, n: np.full(n, 2.0)}),
        ("spread", {"spread": lambda rng, n: np.zeros(n)}),
        ("history", {"history": lambda rng, n: rng.geometric(0.06, n)}),
        ("shown", {"shown": lambda rng, n: np.where(rng.random(n) < 0.3, 4, 10)}),
        ("different items shown", {"items": lambda rng: list(range(10))}),
        ("ms", {"ms": lambda rng, n: rng.gamma(4.0, 2.5, n)}),
        ("share of failures (5xx)",
         {"status": lambda rng, n: np.where(rng.random(n) < 0.04, 500, 200)}),
        ("share of unknown users (404)",
         {"status": lambda rng, n: np.where(rng.random(n) < 0.15, 404, 200)}),
        ("share of refused (other 4xx)",
         {"status": lambda rng, n: np.where(rng.random(n) < 0.15, 422, 200)}),
    ],
)  # fmt: skip
def test_planted_drift_is_red_and_nothing_else_is(name, planted):
    assert levels(monitor.compare(rows(), rows(1, **planted))) == {name: ALARM}


def test_a_small_drift_asks_for_a_look():
    moved = rows(1, size=4000, top=lambda rng, n: rng.normal(2.2, 0.5, n))
    assert levels(monitor.compare(rows(size=4000), moved)) == {"top": LOOK}


def test_when_next_to_nothing_is_answered():
    down = rows(1, status=lambda rng, n: np.full(n, 503))
    assert levels(monitor.compare(rows(), down)) == {
        "share of failures (5xx)": ALARM,
        "answers": ALARM,
    }


def write(path, made):
    path.write_text("".join(json.dumps(row, default=list) + "\n" for row in made))
    return str(path)


def as_lists(made):
    return [row | {"items": [int(i) for i in row["items"]]} for row in made]


def test_the_command(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", as_lists(rows()))
    same = write(tmp_path / "same.jsonl", as_lists(rows(1)))
    moved = as_lists(rows(1, top=lambda rng, n: rng.normal(2.7, 0.5, n)))
    bad = write(tmp_path / "bad.jsonl", moved)
    assert monitor.main([good, same]) == 0
    assert "alarm" not in capsys.readouterr().out
    assert monitor.main([good, bad]) == 1
    out = capsys.readouterr().out
    assert "top, median" in out and "stability index" in out
    assert max(map(len, out.splitlines())) <= 80
    assert monitor.main([good, bad, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["alarm"] is True


def test_bad_input(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", as_lists(rows(size=300)))
    few = write(tmp_path / "few.jsonl", as_lists(rows(size=20)))
    cut = tmp_path / "cut.jsonl"
    cut.write_text((tmp_path / "good.jsonl").read_text()[:-30])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"status": 200, "ms": 1}\n')
    for now, said in [
        (few, "at least 200 answers on good days and 200 requests since, not 300 and 20"),
        (str(tmp_path / "none.jsonl"), "none.jsonl"),
        (str(broken), "broken.jsonl:1 is no line of a log: an answer without"),
    ]:
        assert monitor.main([good, now]) == 2
        assert said in capsys.readouterr().err
    assert monitor.main([good, str(cut)]) == 0  # a crash cut the last line off


# --- the log of a service -------------------------------------------------------------------------


@pytest.fixture
def recommender(reference):
    from recsys.inference.serving import Recommender, build_index

    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 8)).astype(np.float32)
    return Recommender(
        user_ids=np.arange(100, 105),
        user_vectors=rng.normal(size=(5, 8)).astype(np.float32),
        item_ids=np.arange(1000, 1050),
        titles=[f"film {i}" for i in range(50)],
        index=build_index(vectors),
        seen=(np.arange(9), np.array([0, 2, 2, 5, 6, 9])),
        version="v1",
    )


@pytest.fixture
def service(recommender):
    from recsys.inference.serving import create_app

    return create_app(recommender)


def post(address, body):
    request = urllib.request.Request(
        f"{address}/recommend", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_line_for_each_request(service):
    file = io.StringIO()
    with running(monitor.RequestLog(service, file, {100: 2, 102: 3}.get)) as address:
        answer = post(address, {"user_id": 102, "k": 3})
        post(address, {"user_id": 7})
        post(address, {"user_id": 100, "k": 0})
        urllib.request.urlopen(f"{address}/health", timeout=10).close()
    first, *others = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [row["status"] for row in others] == [404, 422]
    items = answer[1]["items"]
    assert answer[0] == first["status"] == 200 and first["version"] == "v1"
    assert (first["history"], first["shown"]) == (3, 3)
    assert first["items"] == [item["item_id"] for item in items]
    assert first["top"] == items[0]["score"]
    assert first["spread"] == pytest.approx(items[0]["score"] - items[2]["score"])
    assert first["ms"] > 0 and "102" not in {str(value) for value in first.values()}


def test_a_log_that_cannot_be_written_costs_no_answer(service, capsys):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError("no space left on device")

    with running(monitor.RequestLog(service, Full())) as address:
        assert [post(address, {"user_id": 100})[0] for _ in range(3)] == [200] * 3
    assert capsys.readouterr().err.count("the log stops: OSError: no space") == 1


def test_the_server_writes_it(recommender, monkeypatch, tmp_path):
    def run(app, **settings):
        with running(app) as address:
            for user in (100, 102):
                assert post(address, {"user_id": user})[0] == 200

    monkeypatch.setattr("uvicorn.run", run)
    monkeypatch.setattr(serve.overlay, "install", lambda roots: None)
    monkeypatch.setattr(serve, "recommender", lambda data, overrides: recommender)
    log = tmp_path / "served.jsonl"
    assert serve.main(["--log", str(log)]) == 0
    assert [row["history"] for row in monitor.read(log)] == [2, 3]
