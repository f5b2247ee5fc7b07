"""What the system's verdict takes for honest lists, on a small world."""

import asyncio
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness import system
from harness.candidate import Candidate
from harness.paths import REFERENCE, SRC


@pytest.fixture(scope="module")
def job(tmp_path_factory, reference):
    """A verdict's job on few users, trained for a moment."""
    from recsys.data.synthetic import generate

    def world(data, seed, size):
        return generate(seed, users=150, items=100)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "world", world)
        folder = tmp_path_factory.mktemp("job")
        fit = {"epochs": 4, "batch_size": 256, "lr": 0.015, "warmup": 0.1}
        return system.make_job(folder, fit=fit, select_epochs=False, list_length=20)


@pytest.fixture(scope="module")
def lists(job, tmp_path_factory):
    """The raw lists of a run of the reference, and a way to judge them with some exchanged."""
    folder = tmp_path_factory.mktemp("lists")
    out = folder / "lists.npz"
    with system.side("one", [REFERENCE, SRC], folder / "side", system.plain_launch) as side:
        request = {"seed": 0, "device": "cpu", "cold": str(job.cold)}
        side.ask("quality", job=str(job.path), out=str(out), **request)
    with np.load(out) as file:
        found = {name: file[name] for name in file.files}

    def judged(**changed):
        np.savez(folder / "other.npz", **found | changed)
        return system.judge(job, folder / "other.npz", cold=True)

    return found, judged


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        ("seen", lambda job, found: first(found, job.seen[0][job.seen[1][:-1]])),
        ("served", lambda job, found: {"served": found["served"][:, ::-1]}),
        ("lists", lambda job, found: {"final_items": found["final_items"][:, :-1]}),
        ("lists", lambda job, found: {"logits": found["logits"][:, :-1]}),
        ("cold", lambda job, found: {"cold_items": found["final_items"][:, :10]}),
    ],
)
def test_lists_that_are_not_honest_are_unfit(job, lists, rule, spoil):
    """A seen item, other items served, lists too short, warm items among the cold."""
    found, judged = lists
    with pytest.raises(system.Unfit) as caught:
        judged(**spoil(job, found))
    assert caught.value.rule == rule


def test_near_equal_items_may_change_places(job, lists):
    """For a user in a hundred: the index sums in another order than the list was made in."""
    found, judged = lists
    served = found["served"].copy()
    served[0] = served[0][::-1]
    judged(served=served)
    served[1:4] = served[1:4, ::-1]
    with pytest.raises(system.Unfit, match="4 of 150 users are served other items"):
        judged(served=served)


def first(found, items):
    changed = found["retrieval_items"].copy()
    changed[:, 0] = items
    return {"retrieval_items": changed}


BURN = """
import os, time
def burn():
    while time.process_time() < 0.5:
        pass
WORK
print("done", flush=True)
input()
"""
WORKS = {
    "itself": "burn()",
    "in a process that it waits for": "if os.fork() == 0: burn(); os._exit(0)\nos.wait()",
    "in one that stays": "r, w = os.pipe()\n"
    "if os.fork() == 0: burn(); os.write(w, b'x'); time.sleep(60)\nos.read(r, 1)",
    "in a grandchild": "r, w = os.pipe()\n"
    "if os.fork() == 0:\n"
    "    if os.fork() == 0: burn(); os.write(w, b'x'); time.sleep(60)\n"
    "    os._exit(0)\n"
    "os.read(r, 1)",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it tells its own time")
@pytest.mark.parametrize("way", WORKS)
def test_work_counts_wherever_it_is_done(tmp_path, way):
    """A cost is not hidden in a process that the side starts."""

    def launch(command, folder):
        code = BURN.replace("WORK", WORKS[way])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)

    with system.side("one", [], tmp_path / "side", launch) as side:
        side.process.stdout.readline()
        assert 0.45 < side.cpu() < 1.5


def test_a_service_that_answers_other_items_is_found():
    """What it answers is held against the lists from outside, whatever the pipeline says."""
    items = [[9, 7, 4], [3, 8, 1], [5, -1, -1]]

    async def answer(reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            size = int(head.lower().partition(b"content-length:")[2].split()[0])
            user = json.loads(await reader.readexactly(size))["user_id"]
            listed = [{"item_id": i, "score": -place} for place, i in enumerate(items[user])]
            body = json.dumps({"items": [x for x in listed if x["item_id"] >= 0]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    async def asked(wanted):
        async with await asyncio.start_server(answer, "127.0.0.1") as server:
            port = server.sockets[0].getsockname()[1]
            await system.asked(port, wanted)

    asyncio.run(asked(dict(enumerate(items))))
    asyncio.run(asked({0: items[0], 1: [8, 3, 1]}))  # two near-equal items may change places
    with pytest.raises(system.Unfit, match="answers 2 of 3 users otherwise"):
        asyncio.run(asked({0: [7, 9, 4], 1: [8, 3, 1], 2: items[2]}))


# --- waits for the device -------------------------------------------------------------------------


def counted(step):
    """What `Candidate.count` makes of `step(device)`, four times an epoch."""
    side = Candidate()
    side.steps = 4

    def training(epochs, device):
        x = torch.ones(3, device=device)

        def train():
            for _ in range(4 * epochs):
                step(x)

        return train

    side.training = training
    return side.count("cpu")


def test_a_look_on_the_cpu_only_is_no_wait():
    """Where a value is on the CPU anyway, right code may look at it."""
    assert counted(lambda x: x.device.type == "cpu" and x.sum().item())["syncs"] == 0
    assert counted(lambda x: (x.sum().item(), x.tolist()))["syncs"] == 2


def test_what_would_fail_on_a_gpu_is_found():
    found = counted(lambda x: x + torch.arange(3))
    assert found["wrong"].startswith("add mixed a tensor on the device")
    assert found["operations"] == 2  # as on the CPU
    assert system.waits(found, counted(lambda x: x + 1)).good is False


def test_what_the_stand_in_cannot_do_is_not_run():
    def step(x):
        if x.device.type != "cpu":
            raise NotImplementedError("not there")

    found = system.waits(counted(step), counted(lambda x: x + 1))
    assert found.good is None and found.says.startswith("not run") and "not there" in found.says


def test_a_wait_in_each_step_of_the_loop_is_one_too_many():
    few = {"syncs": 0.1, "loop_syncs": 0.1, "wrong": "", "unknown": ""}
    assert system.waits(few, few).good
    assert system.waits(few | {"syncs": 4.1}, few).good  # lookups that ask for a size
    assert not system.waits(few | {"syncs": 1.1, "loop_syncs": 1.1}, few).good
    assert not system.waits(few | {"syncs": 30.1}, few).good


@pytest.mark.parametrize(
    ("ratios", "red", "rounds"),
    [
        ([1.1] * 21, False, 7),
        ([2.0] * 7 + [1.0] * 14, False, 14),  # something else ran at first
        ([1.0, 2.0, 2.0] * 7, True, 21),
        ([5.0] * 21, True, 7),
    ],
)
def test_a_cost_that_is_too_high_is_measured_again(monkeypatch, ratios, red, rounds):
    """What is far too high need not be, and what is as it should be need not either."""

    class Quiet:
        def ask(self, what, **request):
            return 0

    mine, theirs = Quiet(), Quiet()
    taken = iter(ratios)
    monkeypatch.setattr(system, "cost", lambda side, *_: next(taken) if side is mine else 1.0)
    world = SimpleNamespace(user_ids=np.arange(3))
    job = SimpleNamespace(path="job", dataset=world)
    (found,) = system.speed(mine, theirs, job, "cpu", [np.zeros((3, 1))] * 2, what=["encode"])
    assert (found.good is False) is red and len(found.detail["rounds"]) == rounds
