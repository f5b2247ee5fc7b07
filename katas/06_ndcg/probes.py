"""What the diagnosis asks the learner's metrics: small fixed inputs, one question a probe."""

import math

import torch

from harness.cost import count
from harness.probe import probe
from harness.spec import learner

metrics = learner("evaluation.metrics")

NAN, INF = math.nan, math.inf


def floats(values):
    return torch.tensor(values, dtype=torch.float64)


def whole(values):
    return torch.tensor(values, dtype=torch.int64)


SCORES = floats([[0.1, 0.9, 0.5, -2.0, 0.3, -0.7], [3.0, 1.0, 2.0, 7.0, -5.0, 6.0]])
GRADES = whole([[1, 0, 2, 3, 0, 1], [2, 3, 0, 0, 4, 1]])
EMPTY = whole([[0, 2, 0, 1], [0, 0, 0, 0]])  # the second user has nothing to find
EMPTY_SCORES = floats([[2.0, 1.0, 4.0, 3.0], [1.0, 2.0, 3.0, 4.0]])


def refused(function):
    try:
        return function()
    except ValueError:
        return "ValueError"


# --- the order ------------------------------------------------------------------------------------


@probe
def order():
    return [metrics.ranked_relevance(SCORES, GRADES), metrics.ranked_relevance(SCORES, GRADES, 3)]


@probe
def order_beyond_the_list():
    return metrics.ranked_relevance(SCORES, GRADES, 9)


@probe
def order_of_ties():
    scores = floats([[7, 7, 7, 9, 7, 8.0], [2, 2, 2, 2, 2, 2]])
    return metrics.ranked_relevance(scores, GRADES)


@probe
def order_of_ties_over_the_cut():
    scores = floats([[8, 7, 7, 9, 7, 1.0], [2, 2, 2, 2, 2, 2]])
    grades = whole([[1, 2, 3, 5, 0, 1], [4, 3, 2, 5, 1, 6]])
    return [metrics.ranked_relevance(scores, grades, k) for k in (3, 1)]


@probe
def order_of_ties_of_float32():
    scores = torch.arange(40.0).div(8, rounding_mode="floor").expand(2, 40)
    grades = torch.stack([torch.arange(40), torch.arange(40).flip(0)])
    return metrics.ranked_relevance(scores, grades, 5)


@probe
def order_of_nan():
    scores = floats([[NAN, 2.0, -3.0, NAN, -1.0, -5.0], [-1.0, -2.0, NAN, -4.0, -3.0, -6.0]])
    return metrics.ranked_relevance(scores, GRADES)


@probe
def order_of_lowest_scores():
    scores = floats([[NAN, -INF, -2e9, 5.0, -3e38, 0.0], [1.0, 2.0, -2e9, -4.0, NAN, -6.0]])
    return metrics.ranked_relevance(scores, GRADES)


@probe
def order_of_infinite_scores():
    scores = floats([[INF, 1.7976931348623157e308, 1.0, 2.0, -INF, -1.7976931348623157e308]])
    return metrics.ranked_relevance(scores, whole([[5, 1, 2, 3, 4, 6]]))


@probe
def order_of_close_scores():
    scores = 500 + floats([[3, 1, 2, 6, 5, 4.0]]) * 1e-9
    return metrics.ranked_relevance(scores, whole([[1, 2, 3, 4, 5, 6]]))


@probe
def order_of_another_layout():
    return metrics.ranked_relevance(SCORES.T.contiguous().T, GRADES.T.contiguous().T)


@probe
def order_keeps_the_dtype():
    kinds = (torch.int64, torch.float32, torch.bool)
    return [str(metrics.ranked_relevance(SCORES, GRADES.to(k), 3).dtype) for k in kinds]


@probe
def order_leaves_scores():
    scores = floats([[0.5, NAN, INF, -INF]])
    metrics.ranked_relevance(scores, whole([[1, 0, 0, 2]]))
    return scores


@probe
def order_refuses_shapes():
    return [
        refused(lambda: metrics.ranked_relevance(SCORES, GRADES[:1])),
        refused(lambda: metrics.ranked_relevance(SCORES[0], GRADES[0])),
        refused(lambda: metrics.ranked_relevance(SCORES, GRADES[:, :4])),
    ]


@probe
def order_refuses_k():
    return [refused(lambda k=k: metrics.ranked_relevance(SCORES, GRADES, k)) for k in (0, -1)]


# --- NDCG -----------------------------------------------------------------------------------------


@probe
def ndcg():
    return [metrics.ndcg_at_k(SCORES, GRADES, k) for k in (1, 2, 3, 5)]


@probe
def ndcg_beyond_the_list():
    return metrics.ndcg_at_k(SCORES, GRADES, 11)


@probe
def ndcg_exponential():
    return [metrics.ndcg_at_k(SCORES, GRADES, k, gain="exponential") for k in (1, 3, 5)]


@probe
def ndcg_binary():
    return [metrics.ndcg_at_k(SCORES, (GRADES > 0).long(), k) for k in (1, 3, 5)]


@probe
def ndcg_of_great_grades():
    grades = torch.tensor([[9, 0, 12, 1], [20, 7, 0, 8]], dtype=torch.uint8)
    scores = floats([[4, 3, 2, 1], [1, 2, 4, 3]])
    return [metrics.ndcg_at_k(scores, grades, k, gain="exponential") for k in (1, 3, 4)]


@probe
def ndcg_of_one():
    return metrics.ndcg_at_k(floats([[9, 7, 5, 3.0]] * 4), torch.eye(4), 3)


@probe
def ndcg_of_fractions():
    return metrics.ndcg_at_k(SCORES, GRADES / 4 + 0.1, 3)


@probe
def ndcg_of_half_precision_scores():
    return metrics.ndcg_at_k(SCORES.half(), GRADES, 5)


@probe
def ndcg_of_bool():
    return metrics.ndcg_at_k(SCORES, GRADES > 0, 3)


@probe
def ndcg_of_nobody():
    return metrics.ndcg_at_k(EMPTY_SCORES, EMPTY, 3)


@probe
def ndcg_refuses_gain():
    return refused(lambda: metrics.ndcg_at_k(SCORES, GRADES, 2, gain="squared"))


@probe
def ndcg_costs():
    return grows(lambda s, r: metrics.ndcg_at_k(s, r, 3))


# --- recall, hit rate, MRR ------------------------------------------------------------------------


@probe
def recall():
    return [metrics.recall_at_k(SCORES, GRADES, k) for k in (1, 2, 3, 5, 11)]


@probe
def recall_capped():
    return [metrics.recall_at_k(SCORES, GRADES, k, capped=True) for k in (1, 2, 3, 5, 11)]


@probe
def recall_of_fractions():
    return metrics.recall_at_k(SCORES, GRADES / 4, 3)


@probe
def recall_of_nobody():
    values = [metrics.recall_at_k(EMPTY_SCORES, EMPTY, 3, capped=c) for c in (False, True)]
    return values


@probe
def hit_rate():
    return [metrics.hit_rate_at_k(SCORES, GRADES, k) for k in (1, 2, 3, 5, 11)]


@probe
def hit_rate_of_fractions():
    return [metrics.hit_rate_at_k(SCORES, GRADES / 8, k) for k in (1, 3)]


@probe
def hit_rate_of_nobody():
    return metrics.hit_rate_at_k(EMPTY_SCORES, EMPTY, 3)


@probe
def mrr():
    grades = whole([[1, 0, 2, 3, 0, 1], [2, 3, 1, 0, 4, 0]])
    return [metrics.mrr_at_k(SCORES, grades, k) for k in (2, 3, 5, 11)]


@probe
def mrr_of_misses():
    return [metrics.mrr_at_k(SCORES, whole([[0, 0, 0, 1, 0, 2], [0, 1, 0, 0, 3, 0]]), k)
            for k in (1, 3, 4)]  # fmt: skip


@probe
def mrr_of_fractions():
    return metrics.mrr_at_k(SCORES, GRADES / 8, 4)


@probe
def mrr_of_nobody():
    return metrics.mrr_at_k(EMPTY_SCORES, EMPTY, 3)


# --- means and ranks ------------------------------------------------------------------------------


@probe
def mean():
    given = [0.25, NAN, 1, 0.5, NAN], [0, 1, 0]
    return [[float(x) for x in metrics.mean_over_users(floats(v))] for v in given]


@probe
def mean_in_half_precision():
    values = torch.arange(95).div(99).half()
    return [float(metrics.mean_over_users(v)[0]) for v in (values, values[:37])]


@probe
def mean_of_nobody():
    return [float(x) for x in metrics.mean_over_users(floats([NAN, NAN]))]


@probe
def mean_of_nothing():
    return [float(x) for x in metrics.mean_over_users(floats([]))]


TARGET = whole([0, 1, 3])


@probe
def rank():
    scores = floats([[0.1, 0.9, 0.5, -2.0], [1.0, 3.0, 2.0, 7.0], [1, 2, 3, 4]])
    return metrics.rank_of_target(scores, TARGET)


@probe
def rank_in_ties():
    scores = floats([[2, 2, 1, 2], [1, 1, 1, 1], [5, 6, 5, 5.0]])
    return metrics.rank_of_target(scores, TARGET)


@probe
def rank_of_nan():
    scores = floats([[NAN, -1, -2, 5], [NAN, -INF, 2, NAN], [-3, NAN, NAN, -1]])
    return metrics.rank_of_target(scores, TARGET)


@probe
def rank_costs():
    scores = torch.arange(2400.0).reshape(3, 800)
    largest = count(lambda: metrics.rank_of_target(scores, TARGET)).largest_bytes
    return "more than (U, N)" if largest > 40 * scores.numel() else "(U, N)"


# --- full ranking ---------------------------------------------------------------------------------

TABLE = torch.tensor(
    [[1, 5, 3, 4, 2.0], [-9, -8, -7, -6, -5], [10, 30, 20, 50, 40], [7, 6, 9, 8, 5],
     [0.5, 0.25, 1.0, 2.0, -1.0]]
)  # fmt: skip
SEEN = (whole([1, 4, 3, 0, 3, 2]), whole([0, 1, 2, 5, 5, 6]))


def ranking(table=TABLE, seen=SEEN, k=3, chunk_size=2):
    return list(
        metrics.full_ranking(lambda u: table[u], len(table), seen=seen, k=k, chunk_size=chunk_size)
    )


@probe
def full_ranking():
    return ranking(chunk_size=10)


@probe
def full_ranking_in_chunks():
    return ranking()


@probe
def full_ranking_asks():
    asked = []

    def score_fn(users):
        asked.append(users.clone())
        return TABLE[users]

    metrics.full_ranking(score_fn, 5, seen=SEEN, k=1, chunk_size=2)
    return asked


@probe
def full_ranking_runs_out():
    table = TABLE[:3].clone()
    table[0, 2:] = -INF
    return ranking(table, (whole([0, 1, 2, 3, 4, 1, 2, 4]), whole([0, 1, 5, 8])))


@probe
def full_ranking_of_nan():
    table = TABLE.clone()
    table[0, 3] = table[2, 4] = table[3, 0] = NAN
    return ranking(table)


@probe
def full_ranking_of_infinite_scores():
    table = TABLE.clone()
    table[0, 3] = table[2, 4] = table[3, 0] = INF
    return ranking(table, k=2)


@probe
def full_ranking_beyond_the_catalogue():
    return ranking(k=7)


@probe
def full_ranking_of_integers():
    return ranking(TABLE.long(), k=2)


@probe
def full_ranking_of_float64():
    return ranking(TABLE.double(), k=1)


@probe
def full_ranking_leaves_scores():
    table = TABLE.clone()
    table[1, 1] = NAN
    metrics.full_ranking(lambda u: table, 5, seen=SEEN, k=2)
    return table


@probe
def full_ranking_refuses_k():
    return [refused(lambda k=k: ranking(k=k)) for k in (0, -1)]


@probe
def full_ranking_of_many():
    table = torch.arange(150.0).mul(7).remainder(150).expand(2, 150)
    return ranking(table, (whole([]), whole([0, 0, 0])), k=5)


@probe
def full_ranking_costs():
    def operations(users):
        table, seen = torch.rand(users, 9), (whole([]), torch.zeros(users + 1).long())
        return count(lambda: ranking(table, seen, chunk_size=100)).operations

    return "a loop over users" if operations(90) > operations(30) + 30 else "a loop over chunks"


# --- lists ----------------------------------------------------------------------------------------

ITEMS = whole([[4, 2, 9, 7]])


def listed(scores, target, ks=(1, 2, 3, 4), items=ITEMS):
    scores, target = floats(scores), whole(target)
    found = metrics.list_metrics(items.expand(len(target), -1), scores, target, ks=ks)
    return {key: float(value) for key, value in sorted(found.items())}


@probe
def lists():
    return listed([[8, 6, 5, 3], [9, 8, 7, 1], [4, 3, 2, 1]], [2, 9, 4])


@probe
def lists_with_the_last_place():
    return listed([[8, 6, 5, 3], [9, 8, 7, 1]], [7, 4])


@probe
def lists_without_the_target():
    return listed([[8, 6, 5, 3], [9, 8, 7, 1], [4, 3, 2, 1]], [5, 4, 6])


@probe
def lists_with_ties():
    return listed([[8, 6, 6, 3], [9, 9, 9, 1]], [2, 2])


@probe
def lists_with_open_ties():
    return listed([[8, 6, 3, 3], [9, 9, 9, 9]], [9, 4])


@probe
def lists_with_nan():
    return listed([[8, 6, 3, NAN], [9, 8, 7, NAN]], [7, 9])


@probe
def lists_that_ran_out():
    return listed([[9, 7, -INF, -INF], [9, 7, 5, -INF]], [9, 2])


@probe
def lists_with_repeats():
    return listed([[3, 2, 1, 0]], [5], items=whole([[3, 5, 5, 1]]))


@probe
def lists_refuse_long_cuts():
    return [refused(lambda ks=ks: listed([[4, 3, 2, 1]], [2], ks)) for ks in ((5,), (2, 9), (9, 2))]


@probe
def lists_refuse_short_cuts():
    cuts = (0, 2), (2, 0), (-1,)
    return [refused(lambda ks=ks: listed([[4, 3, 2, 1]], [2], ks)) for ks in cuts]


# --- scores against labels ------------------------------------------------------------------------

LABELS = whole([1, 0, 0, 1, 0, 1, 0])


@probe
def auc():
    return [
        float(metrics.auc(floats([0.9, 0.3, 0.8, 0.7, 0.1, 0.2, -1]), LABELS)),
        float(metrics.auc(floats([-2, -0.3, 8, -0.7, -0.1, 9, 4]), LABELS)),
    ]


@probe
def auc_of_ties():
    return [
        float(metrics.auc(floats([1, 1, 2, 2, 0, 0, 0]), LABELS)),
        float(metrics.auc(floats([5] * 7), LABELS)),
        float(metrics.auc(floats([5, 5, 5, 7, 3, 5, 5]), LABELS)),
    ]


@probe
def auc_of_one_class():
    return [float(metrics.auc(floats([1, 3, 2.0]), whole([y] * 3))) for y in (0, 1)]


@probe
def auc_of_nan():
    return [
        float(metrics.auc(floats([NAN, 1, -3, NAN, NAN, 2, -INF]), LABELS)),
        float(metrics.auc(floats([0.5, NAN, 3, -2, NAN, NAN, 4]), LABELS)),
    ]


@probe
def auc_of_many():
    rows = torch.arange(3000)
    return float(metrics.auc((rows * 37 % 1009 + rows / 7).double(), (rows * 13 % 101 < 20).long()))


@probe(tolerance=1e-7)
def auc_of_rare_negatives():
    rows = torch.arange(60_001)
    return float(metrics.auc((rows * 12_347 % 60_001).double(), (rows % 20_000 != 7).long()))


@probe
def auc_costs():
    rows = torch.arange(2000)
    largest = count(lambda: metrics.auc(rows.double(), rows % 2)).largest_bytes
    return "a table of pairs" if largest > 400_000 else "rows"


@probe
def entropy():
    logits = floats([2, -1, 0.5, 0.25, -3, 1, -0.5])
    return [
        float(metrics.normalized_entropy(logits, LABELS)),
        float(metrics.normalized_entropy(-logits / 3, LABELS)),
    ]


@probe
def entropy_of_extreme_logits():
    logits = floats([200, -20, 30, -150, -25, 300, 18])
    return [
        float(metrics.normalized_entropy(logits, LABELS)),
        float(metrics.normalized_entropy(-logits, LABELS)),
    ]


@probe(tolerance=1e-7)
def entropy_of_rare_positives():
    labels = (torch.arange(20_000) == 77).long()
    logits = torch.arange(20_000).double() / 1e4 - 9
    return [
        float(metrics.normalized_entropy(logits, labels)),
        float(metrics.normalized_entropy(logits * 0 - 9, labels)),
    ]


@probe
def entropy_of_one_class():
    logits = floats([1, 3, -2.0])
    return [float(metrics.normalized_entropy(logits, whole([y] * 3))) for y in (0, 1)]


# --- cost -----------------------------------------------------------------------------------------


def grows(metric):
    """Whether the operations grow with the users."""

    def operations(users):
        scores = torch.arange(users * 7.0).reshape(users, 7)
        return count(lambda: metric(scores, torch.ones(users, 7))).operations

    return "a loop over users" if operations(60) > operations(20) + 20 else "all users at once"
