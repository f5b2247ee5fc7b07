"""Many requests at many clients: no error, and memory that stays flat.

    python reference_tests/load/soak.py                       # 100,000 requests, 64 clients
    python reference_tests/load/soak.py --requests 5000 --reload 5 --impl mine

The service runs in a process of its own (uvicorn, one worker), so that its memory is its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from harness import overlay  # noqa: E402
from harness.load import ask, message, running, wrong  # noqa: E402

USERS, ITEMS, DIM, K = 6_040, 3_706, 64, 10
SAMPLES = 20  # of memory
MOST = 0.05  # growth of memory after the first fifth, as a share
MOST_RELOADED = 0.30  # old and new model are there at the same time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--reload", type=int, default=0, metavar="N", help="reload N times")
    parser.add_argument("--impl", default="reference")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.impl)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--serve", "--impl", args.impl]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as child:
        assert child.stdin and child.stdout
        line = child.stdout.readline()
        if not line.strip():
            return 1  # it said why
        try:
            return asyncio.run(soak(int(line), child.pid, args))
        finally:
            child.stdin.close()  # how it is told to stop


async def soak(port: int, pid: int, args: argparse.Namespace) -> int:
    """Print a line for each sample; 0 if all answers were good and memory was flat."""
    left, errors, memory = iter(range(args.requests)), [], []
    every = max(1, args.requests // SAMPLES)
    reload_every = args.requests // (args.reload + 1) + 1
    begin, done = time.monotonic(), 0

    async def client() -> None:
        nonlocal done
        connection = await asyncio.open_connection("127.0.0.1", port)
        for number in left:
            body = b'{"user_id": %d, "k": %d}' % (number * 7 % USERS + 1, K)
            answer = await ask(connection, message("POST", "/recommend", body))
            if problem := wrong(*answer, K):
                errors.append(problem)
            done += 1
            if args.reload and done % reload_every == 0:
                status, told = await ask(connection, message("POST", "/reload", b"{}"))
                if status != 200:
                    errors.append(f"reload: {told!r}")
            if done % every == 0:
                memory.append(megabytes(pid))
                rate = done / (time.monotonic() - begin)
                print(f"{done:>8} requests {rate:6.0f}/s {memory[-1]:8.1f} MB", flush=True)
        connection[1].close()

    await asyncio.gather(*(client() for _ in range(args.clients)))
    settled = memory[len(memory) // 5 :]
    growth, most = max(settled) / settled[0] - 1, MOST_RELOADED if args.reload else MOST
    print(
        f"{done} requests, {args.clients} clients, {len(errors)} errors, "
        f"memory {settled[0]:.1f} to {max(settled):.1f} MB ({growth:+.1%}; at most {most:.0%}), "
        f"{time.monotonic() - begin:.0f} s"
    )
    print("\n".join(errors[:3]))
    return 1 if errors or growth > most else 0


def megabytes(pid: int) -> float:
    """Resident memory of a process (Linux; elsewhere the peak of this one's children)."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3


def serve(impl: str) -> int:
    """Print the port, then serve until stdin ends."""
    overlay.install(overlay.resolve([impl], ROOT))
    import torch

    from recsys.inference.serving import create_app

    torch.set_num_threads(1)
    with running(create_app(recommender)) as address:
        print(address.rpartition(":")[2], flush=True)
        sys.stdin.read()
    return 0


def recommender():
    """Random vectors of the size of ml-1m, and a ranker that multiplies tables of its own."""
    import numpy as np

    from recsys.inference.serving import Recommender, build_index

    rng = np.random.default_rng(0)

    def unit(rows):
        x = rng.standard_normal((rows, DIM), dtype=np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    seen = [rng.choice(ITEMS, rng.integers(20, 300), replace=False) for _ in range(USERS)]
    own_users, own_items = unit(USERS), unit(ITEMS)
    return Recommender(
        user_ids=np.arange(USERS) + 1,
        user_vectors=unit(USERS),
        item_ids=np.arange(ITEMS) + 1,
        titles=[f"film {row}" for row in range(ITEMS)],
        index=build_index(unit(ITEMS)),
        seen=(np.concatenate(seen), np.cumsum([0, *map(len, seen)])),
        ranker=lambda u, i, s: (own_items[i] @ own_users[u][:, :, None])[:, :, 0] + s,
    )


if __name__ == "__main__":
    sys.exit(main())
