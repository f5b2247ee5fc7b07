"""The service against its own OpenAPI contract: schemathesis asks, uvicorn answers.

    pytest reference_tests/system/test_serving_fuzz.py -s

Skipped where schemathesis is not installed (`pip install schemathesis`). FUZZ_EXAMPLES sets how
many requests are generated for each endpoint besides the systematic ones.
"""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("schemathesis")
from harness.load import running

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
USERS, ITEMS = 40, 90
SECONDS = 300


def recommender():
    from recsys.inference.serving import Recommender, build_index

    rng = np.random.default_rng(0)
    users, items = (rng.standard_normal((n, 6)).astype(np.float32) for n in (USERS, ITEMS))
    seen = [rng.choice(ITEMS, n, replace=False) for n in range(USERS)]

    def ranker(rows, candidates, scores):
        return np.where(candidates % 7 == 0, np.nan, np.sin(candidates * 1.7 + rows[:, None]))

    return Recommender(
        user_ids=np.arange(USERS),
        user_vectors=users / np.linalg.norm(users, axis=1, keepdims=True),
        item_ids=np.arange(ITEMS) + 1000,
        titles=[f"film {row}" for row in range(ITEMS)],
        index=build_index(items / np.linalg.norm(items, axis=1, keepdims=True)),
        seen=(np.concatenate(seen), np.cumsum([0, *map(len, seen)])),
        ranker=ranker,
    )


@pytest.fixture(scope="module")
def address(reference):
    from recsys.inference.serving import create_app

    with running(create_app(recommender)) as address:
        yield address


def test_contract(address):
    """Documented statuses and bodies only; never a 5xx; nothing invalid is accepted."""
    import httpx

    command = [sys.executable, "-m", "schemathesis.cli", "run", address + "/openapi.json"]
    command += ["--phases", "examples,coverage,fuzzing", "--mode", "all", "--seed", "0"]
    # of JSON's integers, 7.0 is one to a schema; the contract refuses it
    command += ["--exclude-checks", "positive_data_acceptance"]
    command += ["--max-examples", str(EXAMPLES), "--generation-database", "none", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    told = httpx.get(address + "/metrics", trust_env=False).text
    statuses = re.findall(r'recommend_requests_total\{status="(\d+)"\} (\d+)', told)
    cases = re.findall(r"(\d+) generated", done.stdout)
    print(f"\nschemathesis: {cases or '?'} cases; POST /recommend by status: {dict(statuses)}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert {"200", "404", "422"} <= {status for status, _ in statuses}, "it did not reach much"


def test_torn_bodies(address):
    """Good bodies with bytes changed, cut, doubled: an answer with finite numbers, or a 4xx."""
    import httpx

    rng, counts = random.Random(0), Counter()
    seeds = [b'{"user_id": 7, "k": 10}', b'{"user_id":39}', b'{"k":1e2,"user_id":-0}', b"[1,null]"]
    alphabet = [*b'{}[]":,0123456789eE+-.truefalsnN\\\x00\xff \t', *"é𐀀".encode()]
    with httpx.Client(base_url=address, trust_env=False) as client:
        for _ in range(20 * EXAMPLES):
            body = bytearray(rng.choice(seeds))
            for _ in range(rng.randint(0, 3)):
                place = rng.randrange(len(body) + 1)
                how = rng.choice(("change", "insert", "cut", "double"))
                if how == "cut":
                    del body[place : place + rng.randint(1, 5)]
                elif how == "double":
                    body[place:place] = body[:place]
                else:
                    body[place : place + (how == "change")] = bytes([rng.choice(alphabet)])
            kind = {"content-type": "application/json"}
            response = client.post("/recommend", content=bytes(body), headers=kind)
            counts[response.status_code] += 1
            assert response.status_code in (200, 400, 404, 413, 422), (bytes(body), response.text)
            told = json.loads(response.text, parse_constant=lambda name: pytest.fail(name))
            if response.status_code == 200:
                assert all(type(item["score"]) is float for item in told["items"])
            else:
                assert isinstance(told["detail"], str) and told["detail"]
    print(f"\ntorn bodies: {counts.total()} requests by status: {dict(sorted(counts.items()))}")
