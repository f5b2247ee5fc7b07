"""A service to attack, in a process of its own; each reload gives a model with other answers.

    python -m reference_tests.faults.service PORT [QUEUE_SIZE [SECONDS_A_BATCH]]
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from harness import overlay
from harness.paths import ROOT

USERS, ITEMS, DIM, VERSIONS = 120, 400, 16, 4


def recommender(version: int, seconds: float = 0.0) -> Any:
    """Random vectors, tables of the ranker and seen items, all of `version`."""
    from recsys.inference.serving import Recommender, build_index

    rng = np.random.default_rng(version)

    def unit(rows: int) -> np.ndarray:
        x = rng.standard_normal((rows, DIM), dtype=np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    seen = [rng.choice(ITEMS, rng.integers(0, 30), replace=False) for _ in range(USERS)]
    own = rng.standard_normal((USERS, ITEMS))

    def ranker(users: np.ndarray, items: np.ndarray, scores: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        return own[users[:, None], items]

    return Recommender(
        user_ids=np.arange(USERS) + 1,
        user_vectors=unit(USERS),
        item_ids=np.arange(ITEMS) + 1,
        titles=[f"film {row}" for row in range(ITEMS)],
        index=build_index(unit(ITEMS)),
        seen=(np.concatenate(seen).astype(int), np.cumsum([0, *map(len, seen)])),
        ranker=ranker,
        version=str(version),
    )


def main(port: int, queue_size: int = 1024, seconds: float = 0.0) -> None:
    """Serve until SIGTERM, as `python -m harness.serve` does."""
    overlay.install(overlay.resolve(["reference"], ROOT))
    import uvicorn

    from recsys.inference.serving import create_app

    loads = iter(range(1_000_000))
    app = create_app(lambda: recommender(next(loads) % VERSIONS, seconds),
                     queue_size=queue_size, max_batch=8 if seconds else 64)  # fmt: skip
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="critical",
                timeout_graceful_shutdown=30)  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(int, sys.argv[2:3]), *map(float, sys.argv[3:4]))
