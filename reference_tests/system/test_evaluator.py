"""The harness's own evaluator: hand-computed figures, and lists that must be refused."""

import math

import numpy as np
import pytest

from harness import evaluator


def lists(*rows):
    items = np.array([[item for item, _ in row] for row in rows])
    scores = np.array([[score for _, score in row] for row in rows], dtype=np.float32)
    return items, scores


def test_ranks_and_metrics_by_hand():
    items, scores = lists([(4, 0.9), (2, 0.5), (7, 0.1)], [(1, 3.0), (5, 2.0), (6, 1.0)])
    ranks = evaluator.target_ranks(items, scores, np.array([2, 8]))
    assert ranks.tolist() == [2, 0]
    assert evaluator.per_user(ranks, "hit_rate", 2).tolist() == [1, 0]
    assert evaluator.per_user(ranks, "hit_rate", 1).tolist() == [0, 0]
    assert evaluator.per_user(ranks, "ndcg", 10)[0] == pytest.approx(1 / math.log2(3))
    assert evaluator.per_user(ranks, "mrr", 10).tolist() == [0.5, 0]


def test_a_tie_counts_against_the_target_wherever_it_stands():
    items, scores = lists([(4, 0.5), (2, 0.5), (7, 0.1)])
    assert evaluator.target_ranks(items, scores, np.array([4])).tolist() == [2]


def test_a_constant_or_nan_scorer_is_never_found():
    items = np.array([[3, 1, 2]])
    for value in (0.0, np.nan, -np.inf):
        scores = np.full((1, 3), value)
        assert evaluator.target_ranks(items, scores, np.array([3])).tolist() == [0]


def test_a_target_with_score_minus_infinity_is_not_found():
    items, scores = lists([(4, 0.5), (2, 0.2), (7, -np.inf)])
    assert evaluator.target_ranks(items, scores, np.array([7])).tolist() == [0]


def judge(items, scores, **changes):
    seen = (np.array([9]), np.array([0, 1]))
    options = {"num_users": 1, "num_items": 10, "seen": seen, "length": 3} | changes
    evaluator.check_lists(items, scores, **options)


def test_good_lists_pass_and_each_fault_is_named():
    good = lists([(4, 0.9), (2, 0.5), (7, 0.1)])
    judge(*good)
    judge(*lists([(4, 0.9), (-1, -np.inf), (-1, -np.inf)]))
    faults = {
        "already seen": lists([(4, 0.9), (9, 0.5), (7, 0.1)]),
        "twice": lists([(4, 0.9), (4, 0.5), (7, 0.1)]),
        "outside": lists([(4, 0.9), (10, 0.5), (7, 0.1)]),
        "rise": lists([(4, 0.1), (2, 0.5), (7, 0.1)]),
        "needed": lists([(4, 0.9), (2, 0.5)]),
    }
    for word, bad in faults.items():
        with pytest.raises(evaluator.InvalidLists, match=word):
            judge(*bad)


def test_popularity_leaves_out_what_was_seen():
    item = np.array([0, 0, 0, 1, 1, 2])
    seen = evaluator.seen_offsets(np.array([0, 1]), np.array([0, 2]), 2)
    items, scores = evaluator.popularity_lists(item, 3, seen, 3)
    assert items.tolist() == [[1, 2, -1], [0, 1, -1]]
    assert scores[0].tolist() == [2, 1, -np.inf]


def test_ranking_figures_against_a_loop():
    rng = np.random.default_rng(0)
    items = np.stack([rng.permutation(20)[:7] for _ in range(30)])
    logits = rng.normal(size=items.shape).round(1)  # with ties
    target = items[np.arange(30), rng.integers(0, 7, 30)]
    target[:5] = 99  # not among the candidates: left out
    aucs, losses = [], []
    for row, z, wanted in zip(items[5:], logits[5:], target[5:], strict=True):
        own = z[row == wanted][0]
        rest = z[row != wanted]
        aucs.append(np.mean([1.0 if own > x else 0.5 if own == x else 0.0 for x in rest]))
        p = np.exp(z) / np.exp(z).sum()
        losses += [-np.log(q if i == wanted else 1 - q) for i, q in zip(row, p, strict=True)]
    figures = evaluator.ranking_figures(items, logits, target)
    assert figures["lists"] == 25
    assert figures["auc"] == pytest.approx(np.mean(aucs))
    assert figures["logloss"] == pytest.approx(np.mean(losses))
    base = 1 / 7
    entropy = -(base * np.log(base) + (1 - base) * np.log(1 - base))
    assert figures["normalized_entropy"] == pytest.approx(np.mean(losses) / entropy)


def test_recall_of_lists_counts_users_with_a_choice_only():
    ranked = np.array([[1, 2], [3, 4], [5, 6]])
    user, item = np.array([0, 0, 1]), np.array([2, 9, 8])
    assert evaluator.recall_of_lists(ranked, user, item, 2).tolist() == [0.5, 0.0]


def test_content_lists_rank_by_likeness_to_the_mean():
    text = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    user, item = np.array([0]), np.array([0])
    ranked = evaluator.content_lists(text, user, item, 1, np.array([3, 2, 1]), 3)
    assert ranked.tolist() == [[1, 2, 3]]


def test_an_interval_holds_the_mean_and_narrows_with_more_users():
    rng = np.random.default_rng(1)
    few, many = rng.random(50), rng.random(5000)
    for values in (few, many):
        low, high = evaluator.bootstrap_interval(values)
        assert low < values.mean() < high
    spread = [np.subtract(*reversed(evaluator.bootstrap_interval(v))) for v in (few, many)]
    assert spread[1] < spread[0] / 5
