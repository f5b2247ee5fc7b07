"""Candidate features: each statistic against its definition, and nothing known of other rows."""

import dataclasses

import numpy as np
import pytest
import torch

from recsys.data import candidates
from recsys.data.candidates import NAMES, CandidateFeatures
from recsys.data.sequences import Sequences
from recsys.data.splits import leave_last_one_out
from recsys.data.synthetic import generate


@pytest.fixture(scope="module", params=[40, 90])  # fewer and more users than items
def world(request):
    dataset = generate(seed=5, users=request.param, items=60)
    return dataset, leave_last_one_out(dataset)


def features(world, rows, **options):
    dataset, split = world
    made = CandidateFeatures(dataset, rows, **options)
    user = torch.arange(5)
    history = Sequences(dataset, split.train).user_history(user, 6)
    time = torch.full((5,), int(dataset.time.max()))
    return made, history, made(history, torch.full((5,), 6), time, torch.arange(12).repeat(5, 1))


def column(values, name):
    return values[:, :, NAMES.index(name)]


def test_shape_names_and_finite(world):
    _, _, values = features(world, world[1].train)
    assert values.shape == (5, 12, len(NAMES))
    assert values.isfinite().all()


def test_rows_that_were_not_given_change_nothing(world):
    dataset, split = world
    _, _, values = features(world, split.train)
    shuffled = dataset.item.copy()
    shuffled[split.test] = np.random.default_rng(0).permutation(shuffled[split.test])
    other = (dataclasses.replace(dataset, item=shuffled), split)
    assert torch.equal(features(other, split.train)[2], values)


@pytest.mark.parametrize("users", [30, 90])  # fewer and more users than items: both inverses
def test_ease_is_the_published_formula(users):
    seen = (torch.rand(users, 50, generator=torch.Generator().manual_seed(1)) < 0.2).float()
    found = candidates._ease(seen, seen.T @ seen, 7.0)
    p = torch.linalg.inv((seen.T @ seen + 7.0 * torch.eye(50)).double())
    wanted = (p / -p.diagonal()).fill_diagonal_(0)
    assert torch.allclose(found.double(), wanted, atol=1e-5)


def test_the_ease_feature_weighs_the_history_by_recency(world):
    made, history, values = features(world, world[1].train, decay=0.5)
    by_hand = sum(
        0.5**place * made.ease[int(item) - 1, 3] for place, item in enumerate(history[2]) if item
    )
    assert column(values, "ease")[2, 3] / 5 == pytest.approx(float(by_hand), abs=1e-6)


def test_ease_with_other_decays_and_its_maximum(world):
    made, history, values = features(world, world[1].train)
    past = history[2][history[2] > 0] - 1
    weights = made.ease[past, 3]
    assert column(values, "ease_0")[2, 3] / 5 == pytest.approx(float(weights[0]), abs=1e-6)
    assert column(values, "ease_1")[2, 3] / 5 == pytest.approx(float(weights.sum()), abs=1e-6)
    assert column(values, "ease_max")[2, 3] / 5 == pytest.approx(float(weights.max()), abs=1e-6)


def test_near_is_the_lift_in_either_direction(world):
    made, history, values = features(world, world[1].train, decay=0.5)
    sequences = Sequences(world[0], world[1].train)
    steps = candidates._steps(sequences, world[0].num_items, 5)
    share = made.popularity.exp() / made.popularity.exp().sum()
    near = candidates._lift(steps + steps.T, share, 20.0)
    past = history[1][history[1] > 0] - 1
    weight = 0.5 ** torch.arange(len(past)).float()
    wanted = float((near[past, 5] * weight).sum() / weight.sum())
    assert column(values, "near_mean")[1, 5] == pytest.approx(wanted, abs=1e-5)
    assert column(values, "near_max")[1, 5] == pytest.approx(float(near[past, 5].max()), abs=1e-5)


def test_age_is_since_the_first_row(world):
    dataset, split = world
    made, _, _ = features(world, split.train)
    rows = split.train[dataset.item[split.train] == 7]
    moment = int(dataset.time[rows].min()) + 3 * 86400
    none = torch.zeros(1, 3, dtype=torch.int64)
    values = made(none, none[0, :1], torch.tensor([moment]), torch.tensor([[7]]))
    assert float(column(values, "age")) == pytest.approx(np.log(4) - 4, abs=1e-5)
    before = made(none, none[0, :1], torch.tensor([0]), torch.tensor([[7]]))
    assert float(column(before, "age")) == pytest.approx(-4)


def test_cosine_is_of_other_items_users(world):
    dataset, split = world
    made, history, values = features(world, split.train)
    seen = np.zeros((dataset.num_users, dataset.num_items))
    seen[dataset.user[split.train], dataset.item[split.train]] = 1
    unit = seen / np.maximum(np.linalg.norm(seen, axis=0), 1)
    cosine = unit.T @ unit
    np.fill_diagonal(cosine, 0)
    assert np.allclose(made.cosine.numpy(), cosine, atol=1e-6)
    past = history[4][history[4] > 0].numpy() - 1
    assert column(values, "cosine_max")[4, 7] / 5 == pytest.approx(cosine[past, 7].max(), abs=1e-6)


def test_next_item_is_a_smoothed_lift():
    class Log:
        items = torch.tensor([1, 2, 1, 2, 3])
        user = torch.tensor([0, 0, 0, 1, 1])

    share = torch.tensor([0.5, 0.3, 0.2])
    steps = candidates._steps(Log, 3, 2)
    assert steps.tolist() == [[0.5, 1, 0], [1, 0, 1], [0, 0, 0]]  # two steps apart: a half
    lift = candidates._lift(candidates._steps(Log, 3, 1), share, smoothing=4.0)
    # after item 0 came item 1 once; after item 1 came items 0 and 2
    assert lift[0, 1] == pytest.approx(np.log((1 + 4 * 0.3) / ((1 + 4) * 0.3)))
    assert lift[0, 2] == pytest.approx(np.log((0 + 4 * 0.2) / ((1 + 4) * 0.2)))
    assert lift[1, 2] == pytest.approx(np.log((1 + 4 * 0.2) / ((2 + 4) * 0.2)))


def test_recent_popularity_knows_only_the_past(world):
    dataset, split = world
    made = CandidateFeatures(dataset, split.train)
    history = torch.zeros(1, 3, dtype=torch.int64)
    everything = torch.arange(dataset.num_items)[None]
    at = int(np.quantile(dataset.time[split.train], 0.5))
    one = torch.ones(1, dtype=torch.int64)
    values = column(made(history, one, torch.tensor([at]), everything), "recent_popularity")
    past = split.train[dataset.time[split.train] < at]
    unseen = np.setdiff1d(np.arange(dataset.num_items), dataset.item[past])
    lowest = float(values.min())
    assert torch.allclose(values[0, unseen], torch.tensor(lowest))
    first = torch.tensor([int(dataset.time.min())])
    start = column(made(history, one, first, everything), "recent_popularity")
    assert float(start.abs().max()) == pytest.approx(0, abs=1e-6)


def test_no_history_and_no_candidate_are_finite(world):
    made, _, _ = features(world, world[1].train)
    none = torch.zeros(2, 4, dtype=torch.int64)
    values = made(none, torch.zeros(2).long(), torch.zeros(2).long(), torch.tensor([[-1, 3]] * 2))
    assert values.isfinite().all()
    assert float(column(values, "ease").abs().max()) == 0


def test_until_and_seen_until_are_what_lies_before(world):
    dataset, split = world
    sequences = Sequences(dataset, split.train)
    start = sequences.start.tolist()
    user, end = torch.tensor([3, 0, 3]), torch.tensor([start[3] + 2, start[1], start[3]])
    history = sequences.until(user, end, 4)
    items = sequences.items.tolist()
    assert history[0].tolist() == [items[start[3] + 1], items[start[3]], 0, 0]
    assert history[1].tolist() == items[start[1] - 4 : start[1]][::-1]
    assert history[2].tolist() == [0, 0, 0, 0]
    values, offsets = sequences.seen_until(user, end)
    assert offsets.tolist() == [0, 2, 2 + start[1] - start[0], 2 + start[1] - start[0]]
    assert (values + 1).tolist() == items[start[3] : start[3] + 2] + items[: start[1]]
