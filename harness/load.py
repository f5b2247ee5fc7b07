"""A bounded load on a web service: what a request costs, beside one that does nothing.

The service runs in this process, so that whatever it holds in memory needs no pickling; the clients
run in a child process (`python -m harness.load`), so that they do not compete for the interpreter.
Cost is the CPU time of this whole process between two requests of the child. An endpoint that does
nothing is measured in the same run: the ratio of both says more than either.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from harness.errors import LearnerError
from harness.paths import ROOT

WARM_UP = 20  # requests of each kind that do not count


# --- the side of the service ----------------------------------------------------------------------


def measure(
    app: Any,
    users: Sequence[int],
    *,
    k: int = 10,
    requests: int = 320,
    clients: Sequence[int] = (1, 16),
    timeout: float = 15.0,
) -> dict[str, Any]:
    """Serve `app` on loopback and ask it for recommendations, with a few clients at a time.

    Args:
        app: a FastAPI application, as `recsys.inference.serving.create_app` makes it.
        users: ids that it knows, asked for in turn.
        requests: for each number of clients. timeout: seconds for everything.

    Returns:
        requests, errors: of all clients; an answer that is not 200 with at most k distinct items
            and finite, falling scores is an error. first_error: what the first was, or None.
        p50_ms, p99_ms, cpu_ms_per_request, cpu_ms_per_empty_request: with the first of `clients`.
        by_clients: the last four for each number of clients.

    Raises:
        LearnerError: the app did not start, dropped a connection, or took too long; the cause
            says which.
    """
    from fastapi import Response

    async def nothing() -> Response:
        return Response()

    async def cpu() -> Response:
        return Response(str(time.process_time()))

    app.add_api_route("/_load/empty", nothing, include_in_schema=False)
    app.add_api_route("/_load/cpu", cpu, include_in_schema=False)
    plan = {"users": list(users), "k": k, "requests": requests, "clients": list(clients)}
    with running(app) as address:
        plan["port"] = int(address.rpartition(":")[2])
        command = [sys.executable, "-m", "harness.load"]
        try:
            child = subprocess.run(
                command,
                cwd=ROOT,
                input=json.dumps(plan),
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise LearnerError("the web service") from TimeoutError(
                f"its clients had no result within {error.timeout:g} seconds"
            )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise LearnerError("the web service") from RuntimeError(f"its clients gave up: {last}")
    return json.loads(child.stdout)


@contextlib.contextmanager
def running(app: Any, *, timeout: float = 30.0) -> Iterator[str]:
    """Serve `app` on loopback from another thread; gives its address, `http://127.0.0.1:PORT`.

    Raises:
        LearnerError: it is not ready for requests in time; the cause is what it raised.
    """
    import uvicorn

    failures: list[BaseException] = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except Exception as error:
            if scope["type"] == "lifespan":
                failures.append(error)
            raise

    config = uvicorn.Config(
        watched, host="127.0.0.1", port=0, lifespan="on", log_level="critical", access_log=False
    )
    server = uvicorn.Server(config)

    def serve() -> None:
        with contextlib.suppress(SystemExit):  # how uvicorn says that it could not start
            server.run()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + timeout
        while not server.started:
            if not thread.is_alive():
                cause = failures[0] if failures else RuntimeError("the web service did not start")
                raise LearnerError("the web service") from cause
            if time.monotonic() > deadline:
                raise LearnerError("the web service") from TimeoutError(
                    f"the web service did not start within {timeout:g} seconds"
                )
            time.sleep(0.005)
        # bound by the server itself: a socket from outside may lack TCP_NODELAY, 40 ms an answer
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        server.force_exit = True


# --- the side of the clients, in the child process ------------------------------------------------

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def message(method: str, path: str, body: bytes = b"") -> bytes:
    """An HTTP/1.1 request."""
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    if body:
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


async def ask(connection: Connection, request: bytes) -> tuple[int, bytes]:
    """Status and body of an answer whose length is declared."""
    reader, writer = connection
    writer.write(request)
    first, *headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = dict(line.lower().split(":", 1) for line in headers if line)
    return int(first.split()[1]), await reader.readexactly(int(fields.get("content-length", 0)))


def wrong(status: int, body: bytes, k: int) -> str | None:
    """What is wrong with an answer to `POST /recommend`, None if nothing."""
    if status != 200:
        return f"status {status}: {body[:200].decode('utf-8', 'replace')}"
    try:
        items = json.loads(body)["items"]
        ids, scores = [x["item_id"] for x in items], [x["score"] for x in items]
        good = all(type(x) in (int, float) and math.isfinite(x) for x in scores)
        good &= len(set(ids)) == len(ids) <= k and scores == sorted(scores, reverse=True)
    except (ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error} in {body[:200]!r}"
    return None if good else f"not {k} distinct items with finite, falling scores: {body[:200]!r}"


async def load(plan: dict[str, Any]) -> dict[str, Any]:
    """Run the plan that `measure` sends; what `measure` returns."""
    bodies = [json.dumps({"user_id": user, "k": plan["k"]}).encode() for user in plan["users"]]
    posts = [message("POST", "/recommend", body) for body in bodies]
    empty, errors = message("GET", "/_load/empty"), []

    async def phase(count: int, clients: int, requests: list[bytes]) -> tuple[float, list[float]]:
        """CPU milliseconds of the service for a request, and the sorted times of all."""
        connections = [
            await asyncio.open_connection("127.0.0.1", plan["port"]) for _ in range(clients)
        ]
        times = []

        async def client(number: int) -> None:
            for i in range(number, count, clients):
                start = time.perf_counter()
                answer = await ask(connections[number], requests[i % len(requests)])
                times.append((time.perf_counter() - start) * 1e3)
                if requests is posts and (problem := wrong(*answer, plan["k"])):
                    errors.append(problem)

        async def cpu() -> float:
            return float((await ask(connections[0], message("GET", "/_load/cpu")))[1])

        before = await cpu()
        await asyncio.gather(*map(client, range(clients)))
        spent = (await cpu() - before) * 1e3 / count
        for _, writer in connections:
            writer.close()
        return spent, sorted(times)

    by_clients = {}
    for requests in (empty, *posts[:1]):
        await phase(WARM_UP, 1, [requests])
    for clients in plan["clients"]:
        idle, _ = await phase(plan["requests"], clients, [empty])
        spent, times = await phase(plan["requests"], clients, posts)
        by_clients[str(clients)] = {
            "p50_ms": round(times[len(times) // 2], 3),
            "p99_ms": round(times[len(times) * 99 // 100], 3),
            "cpu_ms_per_request": round(spent, 4),
            "cpu_ms_per_empty_request": round(idle, 4),
        }
    return {
        "requests": plan["requests"] * len(plan["clients"]),
        "errors": len(errors),
        **by_clients[str(plan["clients"][0])],
        "by_clients": by_clients,
        "first_error": errors[0] if errors else None,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(json.load(sys.stdin)))))
