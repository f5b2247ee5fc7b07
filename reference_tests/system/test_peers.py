"""`kata bench --peers`, `--tune`, `--ablate`: one judge for all, and no look at the test rows."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from harness import evaluator, run
from harness.bench import ablate, peers, tune
from harness.errors import UsageError
from harness.paths import ROOT
from recsys.data.splits import leave_last_one_out
from recsys.data.synthetic import generate

FIRST = {peer.name: {name: values[0] for name, values in peer.grid.items()} for peer in peers.PEERS}
INSTALLED = [peer for peer in peers.PEERS if not peer.missing()]


@pytest.fixture(scope="module")
def world():
    dataset = generate(seed=3, users=50, items=140)
    return dataset, leave_last_one_out(dataset)


def pairs(dataset, rows):
    return set(zip(dataset.user[rows].tolist(), dataset.item[rows].tolist(), strict=True))


@pytest.mark.parametrize("peer", INSTALLED, ids=lambda peer: peer.name)
def test_lists_hold_nothing_that_is_known(world, peer):
    dataset, split = world
    known = peers.Known.of(dataset, split.train)
    settings = FIRST[peer.name] | ({"epochs": 1} if "epochs" in peer.grid else {})
    items, scores = peers.lists(peer.fit(known, 0, settings), known)
    assert items.shape == scores.shape == (dataset.num_users, min(100, dataset.num_items))
    listed = {(user, item) for user, row in enumerate(items.tolist()) for item in row}
    assert not listed & pairs(dataset, split.train)
    users, target = dataset.user[split.test], dataset.item[split.test]
    ndcg, hits = peers.judged((items, scores), known, users, target)
    assert ndcg.shape == hits.shape == (len(users),) and 0 < hits.mean() < 1


def test_the_judge_refuses_what_is_known(world):
    dataset, split = world
    known = peers.Known.of(dataset, split.train)
    scores = np.random.default_rng(0).random((dataset.num_users, dataset.num_items))
    order = np.argsort(-scores, axis=1)[:, :100]
    with pytest.raises(evaluator.InvalidLists, match="already seen"):
        found = order, np.take_along_axis(scores, order, 1)
        peers.judged(found, known, dataset.user[split.test], dataset.item[split.test])


def test_recency_weighs_a_users_items_from_the_last_one_back(world):
    dataset, split = world
    known = peers.Known.of(dataset, split.train)
    mine = split.train[dataset.user[split.train] == 7]  # in the order of time
    weights = known.matrix(0.5)[7]
    assert np.allclose(weights[dataset.item[mine[::-1][:4]]], [1, 0.5, 0.25, 0.125])
    assert (weights > 0).sum() == len(mine)


def test_ease_is_the_published_formula(world):
    dataset, split = world
    known = peers.Known.of(dataset, split.train)
    x = known.matrix().astype(np.float64)
    p = np.linalg.inv(x.T @ x + 40 * np.eye(dataset.num_items))
    wanted = x @ np.where(np.eye(dataset.num_items), 0, p / -np.diag(p)[None, :])
    assert np.allclose(peers.ease(known, 0, {"l2": 40}), wanted, atol=1e-6)
    decayed = peers.ease(known, 0, {"l2": 40, "decay": 0.5})
    assert not np.allclose(decayed, wanted, atol=1e-3)


def spy(seen, best=3):
    """A peer that remembers what it was given, and is good with one setting only."""

    def fit(known, seed, settings):
        seen.append((known, seed, settings["a"]))
        rng = np.random.default_rng(0)
        scores = rng.random((known.num_users, known.num_items)) * 0.1
        if settings["a"] == best:
            scores += np.bincount(known.item, minlength=known.num_items)
        return scores

    return peers.Peer("spy", fit, {"a": [1, 2, 3, 4]}, chance=True)


def test_tuning_sees_training_rows_and_is_judged_on_validation(world):
    dataset, split = world
    seen = []
    row = peers.measure_peer(spy(seen), dataset, split, seeds=2, seconds=60)
    tuned, final = seen[:4], seen[4:]
    for known, seed, _ in tuned:
        assert set(zip(known.user, known.item, strict=True)) == pairs(dataset, split.train)
        assert seed == 0
    assert [seed for _, seed, _ in final] == [0, 1]
    allowed = pairs(dataset, split.train) | pairs(dataset, split.validation)
    for known, _, setting in final:
        assert set(zip(known.user, known.item, strict=True)) == allowed
        assert setting == 3
    assert row.settings == {"a": 3} and row.tried == 4 and row.ndcg.shape == (2, len(split.test))


def test_what_is_right_on_the_test_rows_is_not_chosen(world):
    dataset, split = world

    def fit(known, seed, settings):
        rows = getattr(split, settings["right on"])
        scores = np.zeros((known.num_users, known.num_items))
        scores[dataset.user[rows], dataset.item[rows]] = 1
        return scores

    peer = peers.Peer("oracle", fit, {"right on": ["test", "validation"]})
    assert peers.tune(peer, dataset, split, 60) == ({"right on": "validation"}, 2)


def test_other_test_rows_choose_the_same_settings(world):
    dataset, split = world
    item = dataset.item.copy()
    item[split.test] = np.random.default_rng(0).permutation(item[split.test])
    other = dataclasses.replace(dataset, item=item)
    assert peers.tune(spy([]), dataset, split, 60) == peers.tune(spy([]), other, split, 60)


def test_the_search_is_the_same_each_time_and_goes_everywhere():
    grid = {"a": [1, 2, 3], "b": [4, 5]}
    order = list(peers.choices(grid, seed=0))
    assert order == list(peers.choices(grid, seed=0)) != list(peers.choices(grid, seed=1))
    everything = [{"a": a, "b": b} for a in (1, 2, 3) for b in (4, 5)]
    assert sorted(order, key=str) == sorted(everything, key=str)
    assert list(peers.choices({}, seed=0)) == [{}]


def test_no_time_to_tune_means_one_setting(world):
    assert peers.tune(spy(seen := []), *world, seconds=0)[1] == len(seen) == 1


def test_packages_that_are_not_there_are_named():
    peer = peers.Peer("dream", peers.popularity, packages=("no-such-package", "numpy"))
    assert peer.missing() == ["no-such-package"]
    assert peers.Peer("real", peers.popularity, packages=("numpy",)).missing() == []
    with pytest.raises(UsageError, match="iALS.*dream"):
        peers.chosen(["dream"])


QUICK = "retrieval.fit.epochs=1", "ranking.fit.epochs=1", "ranking.targets_per_user=2"


def bench(*arguments):
    command = [sys.executable, "-m", "harness", "bench", "--impl", "reference", *arguments]
    command += [part for setting in QUICK for part in ("--set", setting)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def cells(text):
    """Of a table, by the first cell."""
    lines = [part.strip("| ").split(" | ") for part in text.splitlines() if part.startswith("| ")]
    return {line[0]: line for line in lines}


def test_peers_from_the_outside(tmp_path):
    out = tmp_path / "table.md"
    options = ["--seeds", "2", "--seconds", "1", "--out", out, "--ties", "hash"]
    for name in ("popularity", "EASE, recency", "iALS"):
        options += ["--only", name]
    done = bench("--peers", "--set", "text.encoder=none", *map(str, options))
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert text in done.stdout
    assert "600 users" in text and "ties hash" in text
    found = cells(text)
    assert {"recsys-katas, final", "recsys-katas, retrieval", "popularity"} <= set(found)
    assert "decay" in found["EASE, recency"][-1]
    assert float(found["EASE, recency"][1]) > float(found["popularity"][1]) > 0
    if find_spec("implicit") is None:
        assert "Not installed, so not compared: iALS (implicit)." in text


# --- ablation -------------------------------------------------------------------------------------


def test_the_ablation_is_judged_on_validation_rows_and_reads_no_test_row(world):
    dataset, split = world
    held = ablate.before_validation(dataset, split)
    assert np.array_equal(held.test, split.validation)
    assert sorted([*held.train, *held.validation]) == sorted(split.train)
    last = {int(dataset.user[row]): int(row) for row in split.train}  # in the order of time
    assert sorted(held.validation) == sorted(last.values())


@pytest.mark.parametrize("file", ["synthetic", "ml-100k", "ml-1m"])
def test_every_variant_changes_the_configuration(file):
    _, whole = run.load_config(file, "", [])
    same = [
        name
        for name, settings in ablate.VARIANTS.items()
        if run.load_config(file, "", list(settings))[1] == whole
    ]
    own = [name.partition(":")[0] for name in same]  # what the configuration has itself
    assert own == [ablate.WHOLE, "retrieval", "ranker"]


def test_retrieval_is_trained_once_for_each_rows_settings_and_seed():
    calls = []
    train = ablate.once(lambda data, settings, **options: calls.append(options) or len(calls))
    some, other = (argparse.Namespace(rows=np.arange(n)) for n in (5, 6))
    given = [(some, {"a": 1}, 0), (other, {"a": 1}, 0), (some, {"a": 2}, 0), (some, {"a": 1}, 1)]
    first = [train(data, settings, seed=seed) for data, settings, seed in given]
    assert first == [1, 2, 3, 4]
    assert [train(data, settings, seed=seed) for data, settings, seed in given] == first


def test_ablate_from_the_outside():
    done = bench("--ablate", "--seeds", "1", "--only", "ranker: linear")
    assert done.returncode == 0, done.stderr
    found = cells(done.stdout)
    whole, linear = found[ablate.WHOLE], found["ranker: linear"]
    assert linear[1] == whole[1] and linear[2] == ""  # the same retrieval
    assert linear[4] != ""
    assert bench("--ablate", "--only", "nonsense").returncode == 2


# --- tuning ---------------------------------------------------------------------------------------

CONFIG = {"dim": 64, "fit": {"lr": 0.003, "epochs": 15}}


def found(value, seconds=1.0):
    return tune.Trial(np.full(4, value), 0.5, seconds)


def test_the_search_begins_with_the_configuration_and_asks_for_nothing_twice():
    search = tune.Search(CONFIG | dict.fromkeys(tune.GRID))
    asked = [search.next()[0] for _ in range(200)]
    assert asked[0] == "{}" and len(set(asked)) == 200
    assert all(1 <= len(json.loads(key)) <= 3 for key in asked[1:])
    assert not any("fit.lr" in key and json.loads(key)["fit.lr"] == 0.003 for key in asked)


def test_what_is_better_gets_a_second_seed_and_is_then_searched_around():
    search = tune.Search(CONFIG | dict.fromkeys(tune.GRID))
    first, seed = search.next()
    assert search.told(first, seed, found(0.10)) == (first, 1)
    assert search.told(first, 1, found(0.10)) is None
    worse, seed = search.next()
    assert search.told(worse, seed, found(0.09)) is None
    better, seed = search.next()
    assert search.told(better, seed, found(0.12)) == (better, 1)
    assert search.told(better, 1, found(0.07)) is None and search.whole == [first, better]
    best, seed = search.next()
    assert search.told(best, seed, found(0.12)) == (best, 1)
    assert search.told(best, 1, found(0.11)) is None and search.whole[0] == best
    around = [json.loads(search.next()[0]) for _ in range(50)]
    kept = [name for name, value in json.loads(best).items() if
            sum(settings.get(name) == value for settings in around) > 25]  # fmt: skip
    assert kept == list(json.loads(best))


def test_what_is_configured_gets_its_second_seed_though_another_was_faster_and_is_better():
    search = tune.Search(CONFIG | dict.fromkeys(tune.GRID))
    (first, _), (other, _) = search.next(), search.next()
    assert search.told(other, 0, found(0.3)) == (other, 1)
    assert search.told(other, 1, found(0.3)) is None
    assert search.told(first, 0, found(0.1)) == (first, 1)


def test_settings_are_put_into_the_configuration():
    assert tune.changed(CONFIG, {"dim": 8, "fit.lr": 1}) == {
        "dim": 8, "fit": {"lr": 1, "epochs": 15}
    }  # fmt: skip
    assert CONFIG["fit"]["lr"] == 0.003


@pytest.mark.parametrize("file", ["default", "ml-100k", "ml-1m"])
def test_every_setting_is_one_of_the_configuration(file):
    _, config = run.load_config(file, "", [])
    for name, values in tune.GRID.items():
        *parents, last = name.split(".")
        part = config["retrieval"]
        for parent in parents:
            part = part[parent]
        assert type(part[last]) is type(values[0]), name


def test_tune_learns_from_training_rows_before_those_that_it_is_judged_on(
    world, reference, monkeypatch
):
    import recsys.pipeline

    dataset, split = world
    config = run.load_config("synthetic", "", ["retrieval.fit.epochs=1"])[1]
    seen, real = [], recsys.pipeline.RetrievalData

    def spied(dataset, rows, *args):
        seen.append(rows)
        return real(dataset, rows, *args)

    monkeypatch.setattr(recsys.pipeline, "RetrievalData", spied)
    monkeypatch.setattr(tune.peers, "prepare", lambda args: (dataset, config, split))
    judge = tune.Judge(None)
    trial, again = (judge.trial({"dim": 32}, 0) for _ in range(2))
    held_out = sorted(set(split.train) - set(seen[0]))
    assert set(seen[0]) < set(split.train) and len(held_out) > len(split.test)
    assert sorted(dataset.item[held_out]) == sorted(judge.target)
    assert trial.ndcg.shape == (50,) and 0 < trial.ndcg.mean() < 1 and 0 < trial.recall <= 1
    assert np.array_equal(again.ndcg, trial.ndcg)


def test_tune_from_the_outside():
    done = bench("--tune", "--seconds", "1")
    assert done.returncode == 0, done.stderr
    assert "| as configured |" in done.stdout and "settings in" in done.stdout
