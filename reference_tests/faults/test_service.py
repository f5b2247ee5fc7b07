"""The service under clients that are many, slow, gone, malformed or too large.

Every answer to an honest client is compared with what the model of that version gives when asked
directly. All traffic goes to 127.0.0.1; how many requests there are is fixed, and so is the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from harness import overlay
from harness.load import message
from harness.paths import REFERENCE, ROOT
from reference_tests.faults import service

CLIENTS, K = 64, 10
SECONDS = 240.0  # for any of the conversations here
LEAKS = re.compile(  # the last is an absolute path of two folders or more, on any machine
    rb"Traceback|File \"|\.py\b|site-packages|(uvicorn|python|starlette|fastapi|numpy)[/ ]?\d"
    rb"|(?<![\w.:/])/[\w.-]+/[\w.-]+", re.IGNORECASE,
)  # fmt: skip


def reference():
    """`recsys` is the reference in this process, too."""
    return overlay.using(overlay.resolve([str(REFERENCE)], ROOT))


@pytest.fixture(scope="module")
def right():
    """`right(version, user)`: what the model answers when asked directly."""
    with reference():
        models = [service.recommender(version) for version in range(service.VERSIONS)]
        lists = [m.recommend_batch(m.user_ids.tolist(), [K] * service.USERS) for m in models]
    return lambda version, user: lists[int(version)][user - 1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Served:
    """A service in a process of its own, ready; ended at the end of the `with` statement."""

    def __init__(self, port=None, queue_size=1024, seconds=0.0, files=None):
        self.port = port or free_port()
        command = [sys.executable, "-m", "reference_tests.faults.service", str(self.port)]
        self.stderr = tempfile.TemporaryFile()  # a pipe that nobody reads would stop it
        self.process = subprocess.Popen(
            [*command, str(queue_size), str(seconds)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=self.stderr,
            preexec_fn=files and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files,) * 2)),
        )
        until = time.monotonic() + 60
        while self.status("/ready") != 200:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < until, "it is not ready after 60 s"
            time.sleep(0.05)

    def status(self, path):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            return opener.open(f"http://127.0.0.1:{self.port}{path}", timeout=5).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def said(self):
        self.stderr.seek(0)
        return self.stderr.read(10_000).decode()

    def megabytes(self):
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def __enter__(self):
        return self

    def __exit__(self, *ignored):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.stderr.close()


async def connect(port):
    return await asyncio.open_connection("127.0.0.1", port)


async def answer(reader):
    """Status, headers and body of one answer; all of it must be harmless to show."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    assert not LEAKS.search(head + body), head + body
    return int(first.split()[1]), headers, body


def judge(status, headers, body, user, right):
    """What an answer to an honest request is: "right", or "503 with Retry-After"."""
    if status == 503:
        assert int(headers["retry-after"]) >= 1, headers
        return "503 with Retry-After"
    assert status == 200, (status, body)
    told = json.loads(body)
    items = [(item["item_id"], item["score"], item["title"]) for item in told["items"]]
    assert told["user_id"] == user and items == right(told["model_version"], user)
    return "right"


async def honest(port, users, right, count):
    """Ask for each of `users`, over one connection, until each is answered."""
    reader, writer = await connect(port)
    for user in users:
        while True:
            writer.write(message("POST", "/recommend", b'{"user_id": %d, "k": %d}' % (user, K)))
            happened = judge(*await answer(reader), user, right)
            count(happened)
            if happened == "right":
                break
            await asyncio.sleep(0.05)
    writer.close()


GOOD = message("POST", "/recommend", b'{"user_id": 7, "k": 10}')
MALFORMED = [
    b"", b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9,
    b"GET / HTTP/9.9\r\n\r\n", b"GET /../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n", b"GET /recommend HTTP/1.1\r\nhost: x\r\n\r\n",
    b"DELETE /recommend HTTP/1.1\r\nhost: x\r\n\r\n",
    b"PROPFIND /ready HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /docs/../recommend?x=" + b"a" * 9000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
    b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n12345",
    b"POST /recommend HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    b"POST /recommend HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n",
    message("POST", "/recommend", b"{"), message("POST", "/recommend", b"[]"),
    message("POST", "/recommend", b'{"user_id": 1e400}'), message("POST", "/recommend", b"NaN"),
    message("POST", "/recommend", b'{"user_id": NaN, "k": 1}'),
    message("POST", "/recommend", b'{"user_id": 7, "k": 1000000}'),
    message("POST", "/recommend", b'{"user_id": -1}'),
    message("POST", "/recommend", b'{"user_id": 99999999999999999999999}'),
    message("POST", "/recommend", b'{"user_id": 7, "k": 10, "__class__": 1}'),
    message("POST", "/recommend", b'{"user_id": "7"}'), message("POST", "/recommend", b"\xff\xfe{"),
    message("POST", "/recommend", b"[" * 4000), message("POST", "/recommend", b'{"a":' * 800),
    GOOD.replace(b"application/json", b"text/html"), GOOD.replace(b"application/json", b"a/b\x00c"),
]  # fmt: skip


async def malformed(port, rng, count):
    """Something that is no request, perhaps with bytes changed; an answer, or a closed line."""
    reader, writer = await connect(port)
    sent = bytearray(rng.choice(MALFORMED))
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(sent) + 1)
        sent[at : at + 1] = rng.randbytes(1)
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        writer.write(bytes(sent))
        writer.write_eof()
        status, headers, body = await asyncio.wait_for(answer(reader), 30)
        assert status < 500, (bytes(sent[:200]), status, headers, body)
        count(f"malformed: {status // 100}xx")
        writer.close()
        return
    count("malformed: the connection is closed")
    writer.close()


async def oversized(port, rng, count):
    """A body of megabytes: declared, in chunks, or in a declaration only."""
    reader, writer = await connect(port)
    kind = rng.choice(["declared", "chunked", "promised"])
    head = b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        if kind == "chunked":
            writer.write(head + b"transfer-encoding: chunked\r\n\r\n")
            for _ in range(40):
                writer.write(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
                await writer.drain()
        else:
            writer.write(head + b"content-length: 4000000000\r\n\r\n")
            for _ in range(40 if kind == "declared" else 1):
                writer.write(b" " * 0x8000)
                await writer.drain()
        status, _, body = await asyncio.wait_for(answer(reader), 30)
        assert status == 413, (status, body)
        count("oversized: 413")
        writer.close()
        return
    count("oversized: the connection is closed")
    writer.close()


async def vanishing(port, rng, count):
    """Goes away before, while or after it has asked, politely or with a reset."""
    _, writer = await connect(port)
    writer.write(GOOD[: rng.choice([0, 20, len(GOOD) - 5, len(GOOD)])])
    await asyncio.sleep(rng.choice([0, 0, 0.002]))
    if rng.random() < 0.5:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
    else:
        writer.close()
    count("vanishing: nothing is asked")


async def slow(port, rng, count, seconds):
    """A request in small pieces over `seconds`; whoever is slow is answered, too."""
    reader, writer = await connect(port)
    parts = [GOOD[i : i + 20] for i in range(0, len(GOOD), 20)]
    for part in parts:
        writer.write(part)
        await asyncio.sleep(seconds / len(parts))
    status, headers, _ = await answer(reader)
    assert status == 200 or (status == 503 and "retry-after" in headers)
    count(f"slow: {status}")
    writer.close()


def test_soak(right, tally, often):
    """64 clients, reloads, and everybody who is not honest, all at once."""
    each, bad = often(8, 150), often(25, 200)
    count = functools.partial(tally, "requests of 64 clients with reloads and all kinds below")
    other = functools.partial(tally, "clients that are no honest ones, meanwhile")
    memory = []

    async def everything(server):
        rng = random.Random(0)
        users = [[rng.randrange(service.USERS) + 1 for _ in range(each)] for _ in range(CLIENTS)]
        work = [honest(server.port, mine, right, count) for mine in users]
        kinds = (malformed, oversized, vanishing, functools.partial(slow, seconds=0.5))

        async def others(kind):
            for _ in range(bad):
                await kind(server.port, rng, other)

        async def reloads():
            reader, writer = await connect(server.port)
            for _ in range(often(4, 20)):
                writer.write(message("POST", "/reload", b"{}"))
                assert (await answer(reader))[0] == 200
                tally("reloads meanwhile", "200")
                memory.append(server.megabytes())
                await asyncio.sleep(0.1)
            writer.close()

        idle = [await connect(server.port) for _ in range(100)]  # these say nothing at all
        work += [*map(others, (malformed, oversized, vanishing)), reloads()]
        work += [kinds[3](server.port, rng, other) for _ in range(often(10, 50))]
        await asyncio.wait_for(asyncio.gather(*work), SECONDS)
        for _, writer in idle:
            writer.close()
        await honest(server.port, range(1, service.USERS + 1), right, count)
        memory.append(server.megabytes())

    with Served() as server:
        asyncio.run(everything(server))
        assert server.process.poll() is None
        settled = memory[len(memory) // 3 :]
        growth = max(settled) / settled[0] - 1
        assert growth < 0.1, memory
        tally("memory after a third of it, until the end", f"{growth:+.1%} (at most +10 %)")


def test_a_full_queue(right, tally, often):
    """Places for 6, 64 clients, a slow model: right, or a 503 that says when to come back."""
    count = functools.partial(tally, "requests of 64 clients to a queue of 6")

    async def everything(port):
        rng = random.Random(1)
        await asyncio.gather(*(
            honest(port, [rng.randrange(service.USERS) + 1 for _ in range(often(2, 10))], right,
                   count) for _ in range(CLIENTS)))  # fmt: skip

    with Served(queue_size=6, seconds=0.02) as server:
        asyncio.run(asyncio.wait_for(everything(server.port), SECONDS))
        assert server.process.poll() is None


def test_shutdown_answers_what_was_taken(right, tally, often):
    """SIGTERM while 64 requests are waiting for a slow model."""
    for _ in range(often(1, 5)):
        with Served(seconds=0.2) as server:
            happened = asyncio.run(asyncio.wait_for(stopped(server, right), SECONDS))
            ended = server.process.wait(40)  # uvicorn passes the signal on when it has finished
            assert ended in (0, -signal.SIGTERM), server.said()
            assert server.status("/health") is None
        for each in happened:
            tally("requests that were taken when SIGTERM came", each)


async def stopped(server, right):
    lines = [await connect(server.port) for _ in range(CLIENTS)]
    for user, (_, writer) in enumerate(lines, start=1):
        writer.write(message("POST", "/recommend", b'{"user_id": %d, "k": %d}' % (user, K)))
    reader, writer = await connect(server.port)
    taken = 0
    while taken < CLIENTS - 8:  # eight are with the model, which needs 0.2 s for them
        writer.write(message("GET", "/metrics"))
        told = (await answer(reader))[2].decode()
        taken = sum(float(x) for x in re.findall(
            r"^recommend_(?:waiting|requests_total{.*}) (\S+)$", told, re.MULTILINE))  # fmt: skip
    writer.close()
    server.process.send_signal(signal.SIGTERM)
    answers = [judge(*await answer(reader), user, right)
               for user, (reader, _) in enumerate(lines, start=1)]  # fmt: skip
    assert set(answers) == {"right"}
    return answers


def test_a_killed_worker(right, tally, often):
    """SIGKILL under load: nobody gets a wrong answer, and another one serves from the same port."""
    port = free_port()

    async def client(user, gone, count):
        for _ in range(400):
            try:
                await honest(port, [user], right, count)
            except (OSError, asyncio.IncompleteReadError):
                gone.set()
                count("the connection broke; asked again")
                return False
        return True

    async def killed(server, count):
        gone = asyncio.Event()
        clients = [asyncio.create_task(client(user, gone, count)) for user in range(1, 17)]
        await asyncio.sleep(0.3)
        server.process.kill()
        await asyncio.wait_for(asyncio.gather(*clients), SECONDS)
        assert gone.is_set()

    count = functools.partial(tally, "requests of 16 clients to a worker that is killed")
    for _ in range(often(1, 5)):
        with Served(port) as server:
            asyncio.run(killed(server, count))
        with Served(port) as server:
            asyncio.run(asyncio.wait_for(honest(port, range(1, 40), right, count), SECONDS))


def test_more_connections_than_it_may_open(right, tally, often):
    """Everybody keeps a connection and says nothing; when they go, honest clients are answered."""
    count = functools.partial(tally, "requests after 300 connections to a service that may open 99")

    async def everything(server):
        held = [await connect(server.port) for _ in range(300)]
        await asyncio.sleep(0.5)
        for _, writer in held:
            writer.close()
        await honest(server.port, range(1, 40), right, count)

    for _ in range(often(1, 5)):
        with Served(files=99) as server:
            asyncio.run(asyncio.wait_for(everything(server), SECONDS))
            assert server.process.poll() is None


def test_loopback_by_default(tally):
    """No other address of this machine leads to it, unless --host says so."""
    from harness import serve

    assert serve.parser().parse_args([]).host == "127.0.0.1"
    with Served() as server:
        for address in ("127.0.0.2", "127.255.255.254"):
            with pytest.raises(OSError):
                socket.create_connection((address, server.port), timeout=5).close()
            tally("other addresses of this machine than 127.0.0.1", "refused")


class Panic(BaseException):
    """What a library in another language raises when it gives up."""


FAILURES = [
    OSError(2, "No such file", f"{ROOT}/models/weights.pt"),
    ValueError('File "/opt/service/x.py", line 3'),
    MemoryError(),
    SystemExit(3),
    Panic("at /build/src/lib.rs:7"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
def test_a_model_that_fails(failure, right, tally):
    """A user whose ranking fails is a 500, the others are answered, now and later; nobody reads
    why, but the log says it."""
    import dataclasses

    with reference():
        from harness.load import running
        from recsys.inference.serving import create_app

        whole = service.recommender(0)

        def ranker(users, items, scores):
            if failing and 6 in users:  # the row of user 7
                raise failure
            return whole.ranker(users, items, scores)

        def load():
            if failing:
                raise failure
            return dataclasses.replace(whole, ranker=ranker)

        failing = []
        app = create_app(load)

        async def everything(port):
            reader, writer = await connect(port)
            for _ in range(3):
                writer.write(GOOD)
                status, _, body = await asyncio.wait_for(answer(reader), 20)
                assert status == 500 and json.loads(body)["detail"], body
                tally("answers about a model that fails", "500, without the reason")
            writer.write(message("POST", "/reload", b"{}"))
            status, _, body = await asyncio.wait_for(answer(reader), 20)
            assert status == 503 and "old model stays" in json.loads(body)["detail"], body
            tally("answers about a model that fails", "503 to a reload, without the reason")
            writer.close()
            await asyncio.wait_for(honest(port, [1, 2, 3] * 5, right, lambda what: None), 20)

        with running(app) as address:
            failing.append(True)
            asyncio.run(everything(int(address.rpartition(":")[2])))
