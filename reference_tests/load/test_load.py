"""A bounded load: what it reports of a good service, and how it says that one is not."""

from __future__ import annotations

import time
import urllib.request

import pytest
from fastapi import FastAPI, Response

from harness.errors import LearnerError
from harness.load import measure, running, wrong


def service(score=0.5, work=0.0, lifespan=None):
    """Two items for everybody; burns `work` seconds of CPU for each request."""
    app = FastAPI(lifespan=lifespan)

    @app.post("/recommend")
    def recommend() -> Response:
        until = time.thread_time() + work
        while time.thread_time() < until:
            pass
        items = f'[{{"item_id": 3, "score": {score}}}, {{"item_id": 4, "score": 0.25}}]'
        return Response(f'{{"items": {items}}}', media_type="application/json")

    return app


def test_figures_of_a_good_service():
    result = measure(service(work=0.004), [1, 2, 3], requests=20, clients=(1, 4))
    assert (result["requests"], result["errors"], result["first_error"]) == (40, 0, None)
    assert set(result["by_clients"]) == {"1", "4"}
    assert result["cpu_ms_per_request"] > result["cpu_ms_per_empty_request"] + 3
    assert 4 <= result["p50_ms"] <= result["p99_ms"]


def test_wrong_answers_are_errors():
    result = measure(service(score=0.125), [1], requests=10, clients=(1,))
    assert result["errors"] == 10 and "falling" in result["first_error"]


@pytest.mark.parametrize(
    "status, body",
    [
        (404, b'{"detail": "no"}'),
        (200, b"{}"),
        (200, b"not json"),
        (200, b'{"items": [{"item_id": 1, "score": null}]}'),
        (200, b'{"items": [{"item_id": 1, "score": NaN}]}'),
        (200, b'{"items": [{"item_id": 1, "score": true}]}'),
        (200, b'{"items": [{"item_id": 1, "score": 2}, {"item_id": 1, "score": 1}]}'),
        (200, b'{"items": [{"item_id": 1, "score": 1}, {"item_id": 2, "score": 2}]}'),
        (200, b'{"items": [{"item_id": 1, "score": 3}, {"item_id": 2, "score": 2},'
              b' {"item_id": 3, "score": 1}]}'),
    ],
)  # fmt: skip
def test_what_is_wrong(status, body):
    assert wrong(status, body, 2)
    assert wrong(200, b'{"items": [{"item_id": 1, "score": 2}]}', 2) is None


def test_too_slow_and_not_starting():
    with pytest.raises(LearnerError) as slow:
        measure(service(work=0.05), [1], requests=200, clients=(1,), timeout=1.5)
    assert isinstance(slow.value.__cause__, TimeoutError)

    def broken(app):
        raise OSError("no model file")

    with pytest.raises(LearnerError) as dead, running(service(lifespan=broken)):
        pass
    assert "no model file" in str(dead.value.__cause__)


def test_running_serves_and_stops():
    with running(service()) as address:
        request = urllib.request.Request(address + "/recommend", data=b"{}")
        assert b"item_id" in urllib.request.urlopen(request, timeout=5).read()
    with pytest.raises(OSError):
        urllib.request.urlopen(address + "/recommend", timeout=1)
