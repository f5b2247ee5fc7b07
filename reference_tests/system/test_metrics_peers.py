"""Where kata 06's metrics agree with torchmetrics, scikit-learn and ranx, and where they do not.

The libraries are optional: `pip install -c constraints.txt '.[peers]'`. docs/benchmarks/06-ndcg.md
has the same as a table.
"""

import math
import warnings

import pytest
import torch

USERS, ITEMS = 40, 60
CUTS = (1, 5, 20, 60)
NAN = math.nan


@pytest.fixture(scope="module")
def metrics(reference):
    """Of the reference, under whatever --impl these tests run."""
    from recsys.evaluation import metrics

    return metrics


def tables(grades=4, relevant=0.1):
    """Distinct scores, so that no tie rule matters, and everybody has something to find."""
    g = torch.Generator().manual_seed(6)
    scores = (torch.rand(USERS, ITEMS, generator=g).argsort(1) + 1).double() / ITEMS
    relevance = torch.randint(1, grades, (USERS, ITEMS), generator=g)
    relevance[torch.rand(USERS, ITEMS, generator=g) > relevant] = 0
    relevance[torch.arange(USERS), torch.randint(0, ITEMS, (USERS,), generator=g)] = grades - 1
    return scores, relevance


def close(ours, theirs):
    torch.testing.assert_close(ours, torch.as_tensor(theirs).double(), rtol=1e-5, atol=1e-6)


# --- torchmetrics ---------------------------------------------------------------------------------


def test_torchmetrics_agrees_where_scores_are_distinct(metrics):
    theirs = pytest.importorskip("torchmetrics.functional.retrieval")
    scores, relevance = tables()
    binary = (relevance > 0).long()
    for k in CUTS:
        for ours, other, target in [
            (metrics.ndcg_at_k, theirs.retrieval_normalized_dcg, relevance),
            (metrics.recall_at_k, theirs.retrieval_recall, binary),
            (metrics.hit_rate_at_k, theirs.retrieval_hit_rate, binary),
            (metrics.mrr_at_k, theirs.retrieval_reciprocal_rank, binary),
        ]:
            values = [other(s, t, top_k=k) for s, t in zip(scores, target, strict=True)]
            close(ours(scores, target, k), torch.stack(values))


def test_torchmetrics_averages_ties_in_ndcg_and_breaks_them_by_position_elsewhere(metrics):
    theirs = pytest.importorskip("torchmetrics.functional.retrieval")
    scores, relevance = torch.tensor([[0.9, 0.9, 0.1]]), torch.tensor([[1, 0, 0]])
    close(metrics.ndcg_at_k(scores, relevance, 3)[0], 1 / math.log2(3))
    mean = (1 + 1 / math.log2(3)) / 2
    close(theirs.retrieval_normalized_dcg(scores[0], relevance[0], top_k=3).double(), mean)
    constant = torch.zeros(1, 3)
    hits = [theirs.retrieval_hit_rate(constant[0], row, top_k=2) for row in torch.eye(3).long()]
    assert sorted(float(hit) for hit in hits) == [0, 1, 1]  # by position: 2/3 for knowing nothing
    assert metrics.hit_rate_at_k(constant.expand(3, 3), torch.eye(3), 2).tolist() == [0, 0, 0]


def test_torchmetrics_sorts_nan_first_or_last_as_the_metric_does(metrics):
    theirs = pytest.importorskip("torchmetrics.functional.retrieval")
    scores, relevance = torch.tensor([[NAN, 0.5, 0.1, 0.2]]), torch.tensor([[1, 0, 0, 0]])
    close(theirs.retrieval_normalized_dcg(scores[0], relevance[0]).double(), 1 / math.log2(5))
    assert theirs.retrieval_hit_rate(scores[0], relevance[0], top_k=1) == 1
    close(metrics.ndcg_at_k(scores, relevance, 4)[0], 1 / math.log2(5))
    assert metrics.hit_rate_at_k(scores, relevance, 1).tolist() == [0]


def test_torchmetrics_recall_finds_no_item_with_a_score_of_zero_or_less(metrics):
    theirs = pytest.importorskip("torchmetrics.functional.retrieval")
    scores, relevance = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[1, 0, 0]])
    assert theirs.retrieval_recall(scores[0], relevance[0], top_k=1) == 0
    assert theirs.retrieval_hit_rate(scores[0], relevance[0], top_k=1) == 1
    assert metrics.recall_at_k(scores, relevance, 1).tolist() == [1]


def test_torchmetrics_counts_users_without_relevant_items_as_zero(metrics):
    theirs = pytest.importorskip("torchmetrics.functional.retrieval")
    scores, nothing = torch.tensor([[0.9, 0.5]]), torch.zeros(1, 2, dtype=torch.int64)
    assert metrics.ndcg_at_k(scores, nothing, 2).isnan().all()
    assert theirs.retrieval_normalized_dcg(scores[0], nothing[0], top_k=2) == 0


def test_torchmetrics_auc_passes_logits_through_a_sigmoid(metrics):
    theirs = pytest.importorskip("torchmetrics.functional.classification").binary_auroc
    scores, labels = torch.tensor([0.9, 0.8, 0.8, 0.1, 0.3]), torch.tensor([1, 0, 1, 0, 0])
    close(torch.tensor(metrics.auc(scores, labels)).double(), theirs(scores, labels))
    logits, labels = torch.tensor([30.0, 20.0]), torch.tensor([1, 0])
    assert metrics.auc(logits, labels) == 1
    assert theirs(logits, labels) == 0.5  # both are 1 after a float32 sigmoid
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert theirs(scores, torch.ones(5).long()) == 0
    assert math.isnan(metrics.auc(scores, torch.ones(5).long()))


# --- scikit-learn ---------------------------------------------------------------------------------


def test_scikit_learn_agrees_where_scores_are_distinct(metrics):
    theirs = pytest.importorskip("sklearn.metrics")
    scores, relevance = tables()
    for k in CUTS:
        ours = metrics.ndcg_at_k(scores, relevance, k)
        for ignore_ties in (False, True):
            value = theirs.ndcg_score(relevance, scores, k=k, ignore_ties=ignore_ties)
            close(ours.mean(), value)
        exponential = metrics.ndcg_at_k(scores, relevance, k, gain="exponential")
        close(exponential.mean(), theirs.ndcg_score(2**relevance - 1, scores, k=k))
    rows, labels = (scores.flatten() * 7).round(), relevance.flatten() > 0  # AUC: ties count half
    close(torch.tensor(metrics.auc(rows, labels)).double(), theirs.roc_auc_score(labels, rows))


def test_scikit_learn_agrees_on_normalized_entropy(metrics):
    theirs = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(500, generator=g, dtype=torch.float64)
    labels = (torch.rand(500, generator=g) < 0.1).long()
    base = labels.double().mean().expand(500)
    expected = theirs.log_loss(labels, logits.sigmoid()) / theirs.log_loss(labels, base)
    close(torch.tensor(metrics.normalized_entropy(logits, labels)).double(), expected)


def test_scikit_learn_averages_ties_refuses_nan_and_counts_empty_users_as_zero(metrics):
    theirs = pytest.importorskip("sklearn.metrics")
    scores, relevance = torch.tensor([[0.9, 0.9, 0.1]]), torch.tensor([[1, 0, 0]])
    mean = (1 + 1 / math.log2(3)) / 2
    assert theirs.ndcg_score(relevance, scores, k=3) == pytest.approx(mean)
    with pytest.raises(ValueError, match="NaN"):
        theirs.ndcg_score(relevance, torch.tensor([[NAN, 0.9, 0.1]]))
    assert theirs.ndcg_score(relevance * 0, scores) == 0
    assert metrics.ndcg_at_k(scores, relevance * 0, 3).isnan().all()


# --- ranx -----------------------------------------------------------------------------------------


def ranx_tables(ranx, scores, relevance):
    def table(rows, keep):
        return {
            str(u): {str(i): keep(x) for i, x in enumerate(row) if keep is float or x > 0}
            for u, row in enumerate(rows.tolist())
        }

    return ranx.Qrels(table(relevance, int)), ranx.Run(table(scores, float))


def test_ranx_agrees_where_scores_are_distinct(metrics):
    ranx = pytest.importorskip("ranx")
    scores, relevance = tables()
    qrels, run = ranx_tables(ranx, scores, relevance)
    for k in CUTS:
        for name, values in [
            ("ndcg", metrics.ndcg_at_k(scores, relevance, k)),
            ("ndcg_burges", metrics.ndcg_at_k(scores, relevance, k, gain="exponential")),
            ("recall", metrics.recall_at_k(scores, relevance, k)),
            ("hit_rate", metrics.hit_rate_at_k(scores, relevance, k)),
            ("mrr", metrics.mrr_at_k(scores, relevance, k)),
        ]:
            close(values.mean(), float(ranx.evaluate(qrels, run, f"{name}@{k}")))


def test_ranx_breaks_ties_by_the_order_in_which_items_were_given(metrics):
    ranx = pytest.importorskip("ranx")
    qrels = ranx.Qrels({"user": {"a": 1}})
    for first, value in [("ab", 1.0), ("ba", 0.5)]:
        run = ranx.Run({"user": {item: 0.9 for item in first}})
        assert float(ranx.evaluate(qrels, run, "mrr")) == value
    assert metrics.mrr_at_k(torch.ones(1, 2), torch.tensor([[1, 0]]), 2).tolist() == [0.5]
