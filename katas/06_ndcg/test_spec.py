"""What ranking metrics and the full-ranking evaluation must do (kata 06)."""

import math
import sys

import torch

from harness.spec import (
    assert_close,
    assert_equal,
    assert_scalar,
    check,
    device,
    expect_error,
    generator,
    golden,
    learner,
    rung,
)

metrics = learner("evaluation.metrics")

NAN, INF = math.nan, math.inf


def tensor(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=device())


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def optional(values):
    """A golden list, null meaning not defined."""
    return torch.tensor([NAN if value is None else value for value in values], dtype=torch.float64)


def ranked_by_sorting(scores, relevance):
    """The oracle: one user after the other, by Python's sort."""
    rows = []
    for s, r in zip(scores.tolist(), relevance.tolist(), strict=True):
        value = [-INF if math.isnan(x) else x for x in s]
        rows.append([r[i] for i in sorted(range(len(s)), key=lambda i: (-value[i], r[i]))])
    return rows


def dcg(grades, gain):
    gains = [2.0**grade - 1 if gain == "exponential" else grade for grade in grades]
    return sum(value / math.log2(rank + 1) for rank, value in enumerate(gains, start=1))


def by_hand(name, rows, k):
    """One metric of every user in float64, from the rows that `ranked_by_sorting` gives."""
    values = []
    for ranked in rows:
        relevant = sum(grade > 0 for grade in ranked)
        hits = [rank for rank, grade in enumerate(ranked[:k], start=1) if grade > 0]
        if not relevant:
            value = NAN
        elif name.startswith("ndcg"):
            gain = "exponential" if name == "ndcg exponential" else "linear"
            value = dcg(ranked[:k], gain) / dcg(sorted(ranked, reverse=True)[:k], gain)
        else:
            value = {
                "recall": len(hits) / relevant,
                "recall capped": len(hits) / min(relevant, k),
                "hit_rate": float(bool(hits)),
                "mrr": 1 / hits[0] if hits else 0.0,
            }[name]
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


def measured(name, scores, relevance, k):
    """The learner's value of the metric that a golden table calls `name`."""
    if name == "ndcg":
        return metrics.ndcg_at_k(scores, relevance, k)
    if name == "ndcg exponential":
        return metrics.ndcg_at_k(scores, relevance, k, gain="exponential")
    if name == "recall":
        return metrics.recall_at_k(scores, relevance, k)
    if name == "recall capped":
        return metrics.recall_at_k(scores, relevance, k, capped=True)
    return {"hit_rate": metrics.hit_rate_at_k, "mrr": metrics.mrr_at_k}[name](scores, relevance, k)


NAMES = ("ndcg", "ndcg exponential", "recall", "recall capped", "hit_rate", "mrr")


def call(name, scores, k):
    """How a message shows a call of `measured`."""
    option = {"ndcg exponential": ', gain="exponential"', "recall capped": ", capped=True"}
    function = name.split()[0] + "_at_k"
    shape = list(scores.shape)
    return f"{function}(scores{shape}, relevance{shape}, k={k}{option.get(name, '')})"


def seen_lists(lists):
    """(items, offsets) as `full_ranking` takes them."""
    flat = [item for items in lists for item in items]
    offsets = [0]
    for items in lists:
        offsets.append(offsets[-1] + len(items))
    return tensor(flat, torch.int64), tensor(offsets, torch.int64)


class unchanged:  # noqa: N801
    """`with unchanged(scores): ...` holds that the inputs stay as they are."""

    def __init__(self, *inputs):
        names = {id(value): name for name, value in sys._getframe(1).f_locals.items()}
        self.inputs = [(names.get(id(each), "an input"), each, each.clone()) for each in inputs]

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        for name, now, before in self.inputs if kind is None else ():
            assert_close(now, before, rtol=0, atol=0, what=f"{name}, as it is after the call")


# --- the order that a user sees -------------------------------------------------------------------


@rung(
    hints=[
        "The best item has the HIGHEST score. Which way does your sort go?",
        "torch.topk or argsort(descending=True) gives item indices, best first; gather looks up "
        "the relevance at those indices, row by row.",
        "scores.topk(k, dim=1).indices, then relevance.gather(1, indices), with k at most N; "
        "ValueError for shapes that are not two equal 2-D ones, and for k below 1.",
    ]
)
def test_order():
    """Relevance is returned in the order of falling scores, at most k places of it."""
    scores = tensor([[0.1, 0.9, 0.5, -2.0], [3.0, 1.0, 2.0, 7.0]])
    relevance = tensor([[5, 6, 7, 8], [1, 2, 3, 4]], torch.int64)
    whole = tensor([[6, 7, 5, 8], [4, 1, 3, 2]], torch.int64)
    ranked = metrics.ranked_relevance(scores, relevance)
    assert_close(ranked, whole)
    for k in (1, 2, 3):
        ranked = metrics.ranked_relevance(scores, relevance, k)
        assert_close(ranked, whole[:, :k], what=f"the first {k} of 4 places")
    ranked = metrics.ranked_relevance(scores, relevance, 9)
    assert_close(ranked, whole, what="k = 9 of 4 items: all 4 places")
    for dtype in (torch.float64, torch.uint8, torch.float16, torch.bool):
        ranked = metrics.ranked_relevance(scores, relevance.to(dtype), 2)
        assert_close(ranked, whole[:, :2].to(dtype), what=f"relevance given as {dtype}")
    matrix = "scores[2, 4]"
    bad = [
        (f"ranked_relevance({matrix}, relevance[2, 3])",
         lambda: metrics.ranked_relevance(scores, relevance[:, :3])),
        (f"ranked_relevance({matrix}, relevance[1, 4])",
         lambda: metrics.ranked_relevance(scores, relevance[:1])),
        ("ndcg_at_k(scores[1, 4], relevance[2, 4], 2)",
         lambda: metrics.ndcg_at_k(scores[:1], relevance, 2)),
        ("ranked_relevance(scores[4], relevance[4])",
         lambda: metrics.ranked_relevance(scores[0], relevance[0])),
        ("recall_at_k(scores[1, 2, 4], relevance[1, 2, 4], 2)",
         lambda: metrics.recall_at_k(scores[None], relevance[None], 2)),
    ]  # fmt: skip
    for name in ("ranked_relevance", "ndcg_at_k", "recall_at_k", "hit_rate_at_k", "mrr_at_k"):
        for k in (0, -1):

            def cut(name=name, k=k):
                return getattr(metrics, name)(scores, relevance, k)

            bad.append((f"{name}({matrix}, relevance[2, 4], {k})", cut))
    for text, function in bad:
        expect_error(function, ValueError, call=text)


@rung(
    hints=[
        "Which of two items with the same score does your sort put first, and who decided that?",
        "The text fixes it: the less relevant item first, also where the tie reaches over the cut "
        "at k. Replace NaN by minus infinity before anything else.",
        "Sort by the second key first: a stable argsort of the relevance, rising, then a stable "
        "argsort of the scores in that order, falling.",
    ]
)
def test_ties_and_nan():
    """Among equal scores the less relevant item comes first; NaN counts as minus infinity."""
    relevance = tensor([[3, 0, 2, 1, 0]], torch.int64)
    for scores, expected in [
        ([[7.0, 7.0, 7.0, 7.0, 7.0]], [[0, 0, 1, 2, 3]]),
        ([[7.0, 7.0, 7.0, 9.0, 8.0]], [[1, 0, 0, 2, 3]]),
        ([[NAN, 1.0, 2.0, NAN, -5.0]], [[2, 0, 0, 1, 3]]),
        ([[NAN, -INF, -INF, 4.0, INF]], [[0, 1, 0, 2, 3]]),
        ([[-3e38, NAN, -2e9, -INF, INF]], [[0, 2, 3, 0, 1]]),
        ([[INF, 3.4028234663852886e38, 1.0, 2.0, -3.4028234663852886e38]], [[3, 0, 1, 2, 0]]),
        ([[NAN, NAN, NAN, NAN, NAN]], [[0, 0, 1, 2, 3]]),
    ]:
        for k in (5, 3, 1):
            ranked = metrics.ranked_relevance(tensor(scores), relevance, k)
            wanted = tensor(expected, torch.int64)[:, :k]
            assert_close(ranked, wanted, what=f"scores {scores[0]}, relevance [3, 0, 2, 1, 0]")
    for dtype in (torch.float16, torch.float64):
        scores = tensor([[0.5, 2.0, 0.5, NAN, 0.5]], dtype)
        with unchanged(scores, relevance):
            ranked = metrics.ranked_relevance(scores, relevance.bool(), 3)
        assert_close(ranked, tensor([[0, 0, 1]], torch.bool), what=f"{dtype} scores")
    g = generator(2)
    scores = torch.randint(0, 4, (6, 300), generator=g).double().to(device())  # long ties
    relevance = torch.randint(0, 9, (6, 300), generator=g).to(device())
    for k in (20, 299, 300):
        ranked = metrics.ranked_relevance(scores, relevance, k)
        wanted = torch.tensor(ranked_by_sorting(scores, relevance))[:, :k]
        assert_close(ranked, wanted, what=f"300 items with four different scores, k = {k}")


# --- metrics of one user --------------------------------------------------------------------------


@rung(
    hints=[
        "Whom does a user without any relevant item say something about? Their value is NaN.",
        "Hit rate: is any of the first k relevant; MRR: 1 / rank of the first, ranks from 1; "
        "recall: how MANY of all relevant items, capped of at most k. A grade of 3 or 0.5 is as "
        "relevant as a grade of 1.",
        "First relevant item: (ranked > 0).double().argmax(1), which is 0 also where nothing is "
        "relevant: mask that. relevant.clamp(max=k) is the capped denominator; 0 / 0 is NaN.",
    ]
)
def test_hit_rate_mrr_and_recall():
    """Hit rate, MRR and recall count relevant items among the first k; NaN with none to find."""
    falling = [4, 3, 2, 1.0]
    scores = tensor([falling, [0.6, 0.7, 0.8, 0.9], falling, falling])
    relevance = tensor([[0, 0, 3, 0.5], [0, 0, 0, 2], [0, 0, 0, 0], [0, 1, 1, 0]])
    for k, hit, reciprocal in [
        (1, [0, 1, NAN, 0], [0, 1, NAN, 0]),
        (2, [0, 1, NAN, 1], [0, 1, NAN, 1 / 2]),
        (3, [1, 1, NAN, 1], [1 / 3, 1, NAN, 1 / 2]),
        (9, [1, 1, NAN, 1], [1 / 3, 1, NAN, 1 / 2]),
    ]:
        value = metrics.hit_rate_at_k(scores, relevance, k)
        assert_close(value, exact(hit), what="hit rate of 4 users, the 3rd without")
        value = metrics.mrr_at_k(scores, relevance, k)
        assert_close(value, exact(reciprocal), rtol=1e-6, what="MRR of 4 users, the 3rd without")
    scores = tensor([[5, 4, 3, 2, 1.0], [5, 4, 3, 2, 1.0], [5, 4, 3, 2, 1.0]])
    relevance = tensor([[0, 2, 0, 0, 0.5], [1, 1, 3, 0, 1], [0, 0, 0, 0, 0]])
    for k, plain, capped in [
        (1, [0, 1 / 4, NAN], [0, 1, NAN]),
        (2, [1 / 2, 1 / 2, NAN], [1 / 2, 1, NAN]),
        (4, [1 / 2, 3 / 4, NAN], [1 / 2, 3 / 4, NAN]),
        (8, [1, 1, NAN], [1, 1, NAN]),
    ]:
        value = metrics.recall_at_k(scores, relevance, k)
        assert_close(value, exact(plain), rtol=1e-6, what="2, 4 and 0 relevant items")
        value = metrics.recall_at_k(scores, relevance, k, capped=True)
        assert_close(value, exact(capped), rtol=1e-6, what="2, 4, 0 relevant items")
    late = tensor([[0, 0, 0, 0.5, 0, 0]]), tensor([[6, 5, 4, 3, 2, 1.0]])
    for name, found in (("hit_rate", 1), ("mrr", 1 / 4), ("recall", 1), ("recall capped", 1)):
        value = measured(name, late[1], late[0], 3)
        assert_close(value, exact([0.0]), call=call(name, late[1], 3),
                     what="the relevant item is on place 4: a miss is 0, not NaN")  # fmt: skip
        value = measured(name, late[1], late[0], 4)
        assert_close(value, exact([found]), call=call(name, late[1], 4), rtol=1e-6,
                     what="the one relevant item, grade 0.5, is on place 4")  # fmt: skip


@rung(
    hints=[
        "What is the discount of the first place? It must be 1.",
        "Rank r, counted from 1, is divided by log2(r + 1). The ideal list is cut at the same k.",
        "places = arange(min(k, N)); discount = 1 / log2(places + 2); the ideal is "
        "relevance.topk(min(k, N)), discounted in the same way.",
    ]
)
def test_ndcg_of_one_relevant_item():
    """One relevant item at rank r gives 1 / log2(r + 1), and a perfect list gives 1 at every k."""
    scores = tensor([[9, 7, 5, 3.0]] * 4)
    relevance = torch.eye(4, device=device())  # user u's item is at rank u + 1
    value = metrics.ndcg_at_k(scores, relevance, 4)
    expected = [1, 0.6309297535714574, 0.5, 0.43067655807339306]
    assert_close(value, exact(expected), rtol=1e-6, what="relevant at rank 1, 2, 3, 4")
    value = metrics.ndcg_at_k(scores, relevance, 2)
    assert_close(value, exact([1, 0.6309297535714574, 0, 0]), rtol=1e-6)
    perfect = tensor([[1, 1, 1, 1, 1, 0]])
    falling = tensor([[6, 5, 4, 3, 2, 1.0]])
    for k in (1, 3, 5, 6, 50):
        value = metrics.ndcg_at_k(falling, perfect, k)
        assert_close(value, exact([1.0]), rtol=1e-6, what="5 relevant items on top")
    value = metrics.ndcg_at_k(falling, perfect * 0, 3)
    assert_close(value, exact([NAN]), what="a user without any relevant item")


@rung(
    hints=[
        "A grade of 3 is worth more than a grade of 1.",
        "The linear gain is the grade itself, the exponential 2 ** grade - 1, in the list AND in "
        "the ideal.",
        "The ideal order takes the user's best grades of ALL items, not only of those in the list.",
    ]
)
def test_ndcg_of_grades():
    """Grades count by their gain, and the ideal takes the best of all of a user's items."""
    scores = tensor([[9, 8, 7, 6, 5, 4, 3, 2.0]])
    relevance = tensor([[3, 2, 3, 0, 1, 2, 3, 2]])
    what = "grades 3 2 3 0 1 2 shown, 3 2 beyond the cut"
    shown, best = [3, 2, 3, 0, 1, 2], [3, 3, 3, 2, 2, 2]
    value = metrics.ndcg_at_k(scores, relevance, 6)
    wanted = exact([dcg(shown, "linear") / dcg(best, "linear")])  # 0.785
    assert_close(value, wanted, rtol=1e-6, what=what + "; linear by default")
    for gain in ("linear", "exponential"):
        value = metrics.ndcg_at_k(scores, relevance.long(), 6, gain=gain)
        wanted = exact([dcg(shown, gain) / dcg(best, gain)])
        assert_close(value, wanted, rtol=1e-6, what=what)
        value = metrics.ndcg_at_k(scores, relevance / 4, 3, gain=gain)
        wanted = dcg([0.75, 0.5, 0.75], gain) / dcg([0.75, 0.75, 0.75], gain)
        assert_close(value, exact([wanted]), rtol=1e-6, what="grades .75 .5 .75 shown, .75 missed")

    great = tensor([[9, 0, 12, 1]], torch.uint8)
    for gain in ("linear", "exponential"):
        value = metrics.ndcg_at_k(tensor([[4, 3, 2, 1.0]]), great, 3, gain=gain)
        wanted = dcg([9, 0, 12], gain) / dcg([12, 9, 1], gain)
        assert_close(value, exact([wanted]), rtol=1e-6, what="grades 9, 0, 12, 1 as uint8")

    huge = tensor([[130, 1, 129, 0.0]])  # 2 ** 130 is beyond float32
    value = metrics.ndcg_at_k(tensor([[1, 3, 2, 4.0]]), huge, 3, gain="exponential")
    wanted = dcg([0, 1, 129], "exponential") / dcg([130, 129, 1], "exponential")
    assert_close(value, exact([wanted]), rtol=1e-6, what="grades 130, 1, 129, 0")

    def misspelt():
        return metrics.ndcg_at_k(scores, relevance, 2, gain="squared")

    expect_error(misspelt, ValueError, call="ndcg_at_k(..., gain='squared')")


@rung(
    hints=[
        "A metric that passed its own rung fails here: look at the users with ties, or with more "
        "relevant items than k; then at layout, dtype and magnitude.",
        "Build every metric on ranked_relevance, then the tie rule holds for all of them. Is "
        "something changed in place, cut to float32, or assumed to be contiguous?",
        "Sums and quotients: .double() on the relevance before anything is added.",
    ]
)
def test_every_metric_on_any_scores():
    """All metrics agree with the golden tables and a plain sort, for any layout and dtype."""
    tables = golden("golden.json")
    for kind in ("distinct", "tied"):
        table = tables[kind]
        scores, relevance = tensor(table["scores"]), tensor(table["relevance"], torch.int64)
        for name in NAMES:
            for k, expected in table["expected"][name].items():
                value = measured(name, scores, relevance, int(k))
                assert_close(value, optional(expected), rtol=1e-6, atol=1e-8,
                             call=call(name, scores, k), what=f"{kind} scores")  # fmt: skip
    for seed, (users, items, scale, *others) in enumerate([
        (7, 11, 1.0, torch.float32, torch.bool),
        (4, 23, 1e4, torch.uint8),
        (13, 5, 1e-4, torch.float16),
    ]):  # fmt: skip
        g = generator(seed)
        scores = (torch.randn(items, users, generator=g) * 3).round() * scale + 500 * scale
        scores[::4, ::3] = NAN
        relevance = torch.randint(0, 4, (items, users), generator=g)
        relevance[torch.rand(items, users, generator=g) < 0.6] = 0
        scores, relevance = scores.double().to(device()).T, relevance.to(device()).T
        if seed == 1:
            scores = scores + torch.arange(items, device=device()) * 1e-9  # float64 tells these
        if seed == 2:
            scores = scores.half()
        with unchanged(scores, relevance):
            ranked = metrics.ranked_relevance(scores, relevance)
        assert_close(ranked, torch.tensor(ranked_by_sorting(scores, relevance)))
        for dtype in (torch.int64, *others):
            grades = relevance.to(dtype)
            rows = ranked_by_sorting(scores, grades.double())
            for name in NAMES:
                for k in (1, 3, items + 9) if dtype == torch.int64 else (3,):
                    with unchanged(scores, grades):
                        value = measured(name, scores, grades, k)
                    assert_close(value, by_hand(name, rows, k), rtol=1e-6,
                                 call=call(name, scores, k),
                                 what=f"{scores.dtype} scores, {dtype} grades")  # fmt: skip


# --- over users -----------------------------------------------------------------------------------


@rung(
    hints=[
        "A user with nothing to find is neither good nor bad: not 0, not 1, not part of the mean.",
        "Drop the NaN before the mean, and return how many are left.",
    ]
)
def test_mean_over_users():
    """The mean leaves out users whose value is not defined, and says how many it is over."""
    for values, mean, count in [
        ([0.0, NAN], 0.0, 1),
        ([0.25, NAN, 1.0, 0.5, NAN], 1.75 / 3, 3),
        ([1.0, 0.0, 0.0], 1 / 3, 3),
        ([NAN, NAN], NAN, 0),
        ([], NAN, 0),
    ]:
        values = tensor(values, torch.float64)
        with unchanged(values):
            result = metrics.mean_over_users(values)
        check(isinstance(result, tuple) and len(result) == 2, "a pair (mean, count)",
              came_back=result)  # fmt: skip
        assert_scalar(result[0], mean, what=f"the mean of {values.tolist()}")
        assert_scalar(result[1], count, what=f"the count of {values.tolist()}")
    values = (torch.arange(2500) * 37 % 2503 / 2503).half().to(device())
    mean, count = metrics.mean_over_users(values)
    assert_scalar(mean, float(values.double().mean()), what="the mean of 2,500 float16 values")
    assert_scalar(count, 2500, what="the count of 2,500 float16 values")


@rung(
    hints=[
        "argsort answers 'which item is at this rank', not 'which rank has this item'.",
        "Count: how many items have a score that is not below that of the target?",
        "scores.gather(1, target[:, None]) is each user's target score, as a column.",
    ]
)
def test_rank_of_target():
    """The rank counts the items whose score is not below the target's, NaN as minus infinity."""
    scores = [[0.1, 0.9, 0.5], [2, 2, 1], [NAN, 5, 3], [5, NAN, 3], [0, NAN, -INF], [1, 1, 1.0]]
    scores = tensor(scores)
    target = tensor([0, 1, 0, 2, 1, 2], torch.int64)
    with unchanged(scores, target):
        rank = metrics.rank_of_target(scores, target)
    what = "distinct, tie of two, NaN target, NaN elsewhere, tie of NaN and -inf, all equal"
    assert_close(rank, tensor([3, 2, 3, 2, 3, 3], torch.int64), what=what)
    g = generator(3)
    scores = torch.randint(0, 9, (17, 31), generator=g).float().to(device())
    target = torch.randint(0, 31, (17,), generator=g).to(device())
    rows = zip(scores.tolist(), target.tolist(), strict=True)
    wanted = [sum(x >= row[t] for x in row) for row, t in rows]
    rank = metrics.rank_of_target(scores, target)
    assert_close(rank, tensor(wanted, torch.int64), what="random scores with ties")
    scores = 500 + torch.rand(31, 17, generator=g, dtype=torch.float64).to(device()).T * 1e-6
    rows = zip(scores.tolist(), target.tolist(), strict=True)
    wanted = [sum(x >= row[t] for x in row) for row, t in rows]
    rank = metrics.rank_of_target(scores, target)
    assert_close(rank, tensor(wanted, torch.int64), what="float64 scores that differ by 1e-6")


# --- the whole catalogue --------------------------------------------------------------------------


@rung(
    hints=[
        "What must the score of a seen item be, so that no top-k ever takes it?",
        "offsets[u] and offsets[u + 1] bound the seen items of user u; a user may have none.",
        "Rows by repeat_interleave of the users' counts, columns the seen items; minus infinity "
        "there, in a copy (the scores are not yours); topk. Row = user - first user of the chunk.",
    ]
)
def test_full_ranking():
    """Each user gets their best unseen items, whatever chunk_size, and no chunk is larger."""
    table = tensor([[1, 5, 3, 4, 2.0], [9, 8, 7, 6, 5], [10, 30, 20, 50, 40], [-1, -2, -3, -4, -5]])
    before = table.clone()
    seen = seen_lists([[1], [], [3, 0, 3], [2, 0]])
    with unchanged(*seen):
        items, scores = metrics.full_ranking(lambda users: table[users], 4, seen=seen, k=2)
    assert_close(items, tensor([[3, 2], [0, 1], [4, 1], [1, 3]], torch.int64), what="the items")
    assert_close(scores, tensor([[4, 3], [9, 8], [40, 30], [-2, -4]]), what="the scores")
    items, scores = metrics.full_ranking(lambda users: table[users].double(), 4, seen=seen, k=1)
    assert_close(items, tensor([[3], [0], [4], [1]], torch.int64), what="items of float64 scores")
    assert_close(scores, tensor([[4], [9], [40], [-2]]), what="scores, float32 from float64")
    unseen = seen_lists([[], [], [], []])
    kept = table.clone()
    kept[1, 4] = NAN
    metrics.full_ranking(lambda users: kept, 4, seen=seen, k=3)
    check(kept[1, 4].isnan() and torch.equal(kept.nan_to_num(5.0), before),
          "the tensor that score_fn returned is left unchanged", came_back=kept)  # fmt: skip
    items, scores = metrics.full_ranking(lambda users: table[users], 4, seen=unseen, k=1)
    assert_close(items, tensor([[1], [0], [3], [0]], torch.int64), what="nobody has seen anything")
    items, scores = metrics.full_ranking(lambda users: table[users].long(), 4, seen=seen, k=2)
    assert_close(items, tensor([[3, 2], [0, 1], [4, 1], [1, 3]], torch.int64), what="int64 scores")
    assert_close(scores, tensor([[4, 3], [9, 8], [40, 30], [-2, -4]]), what="float32 from int64")
    users, catalogue, k = 23, 137, 6
    g = generator(5)
    order = torch.rand(users, catalogue, generator=g).argsort(1)  # all scores of a user differ
    table = (order.float() - 11).to(device())
    lists = [torch.randperm(catalogue, generator=g)[: u % 5 * 32].tolist() for u in range(users)]
    seen = seen_lists(lists)
    wanted, values = [], []
    for row, known in zip(table.tolist(), lists, strict=True):
        left = sorted(set(range(catalogue)) - set(known), key=lambda i: -row[i])[:k]
        wanted.append(left + [-1] * (k - len(left)))
        values.append([row[i] for i in left] + [-INF] * (k - len(left)))
    asked = []

    def score_fn(batch):
        asked.append(batch.clone())
        return table[batch]

    for chunk_size in (1, 4, 22, 23, 100):
        asked.clear()
        items, scores = metrics.full_ranking(
            score_fn, users, seen=seen, k=k, chunk_size=chunk_size
        )
        assert_close(items, tensor(wanted, torch.int64), what=f"items, chunk_size={chunk_size}")
        assert_close(scores, tensor(values), what=f"scores, chunk_size={chunk_size}")
        sizes = [len(batch) for batch in asked]
        check(max(sizes) <= chunk_size and len(sizes) == -(-users // chunk_size),
              f"one call of score_fn for every {chunk_size} users", came_back=sizes,
              call=f"full_ranking(score_fn, {users}, ..., chunk_size={chunk_size})")  # fmt: skip
        batch = torch.cat(asked)
        assert_close(batch, tensor(list(range(users)), torch.int64), call="score_fn(users)",
                     what=f"the users asked for, all chunks, chunk_size={chunk_size}")  # fmt: skip
    items, scores = metrics.full_ranking(lambda batch: table[batch], users, seen=seen, k=k)
    assert_close(items, tensor(wanted, torch.int64), what="items, default chunk_size")


@rung(
    hints=[
        "What stands in the list when a user has seen nearly everything?",
        "Item -1 with score minus infinity, wherever no item with a real score is left; k is cut "
        "at N.",
        "After topk, items where the value is minus infinity become -1. topk takes NaN for the "
        "largest number: replace it first.",
    ]
)
def test_full_ranking_runs_out_of_items():
    """Where no item is left the list holds -1 and minus infinity; NaN is never recommended."""
    table = tensor([[1, 5, 3, 4.0], [NAN, 8, NAN, 6], [7, -INF, 9, 8], [NAN, NAN, NAN, NAN],
                    [-3e9, -2e9, -1e10, INF]])  # fmt: skip
    seen = seen_lists([[0, 1, 2, 3], [3], [0], [], [0]])
    for k in (4, 3, 9):
        items, scores = metrics.full_ranking(lambda users: table[users], 5, seen=seen, k=k)
        wanted = tensor([[-1] * 4, [1, -1, -1, -1], [2, 3, -1, -1], [-1] * 4,
                         [3, 1, 2, -1]], torch.int64)  # fmt: skip
        assert_close(items, wanted[:, :k], what=f"the items for k = {k}, N = 4")
        wanted = tensor([[-INF] * 4, [8, -INF, -INF, -INF], [9, 8, -INF, -INF], [-INF] * 4,
                         [INF, -2e9, -1e10, -INF]])  # fmt: skip
        assert_close(scores, wanted[:, :k], what=f"the scores for k = {k}, N = 4")
    for k in (0, -1):

        def ranking(k=k):
            return metrics.full_ranking(lambda users: table[users], 5, seen=seen, k=k)

        expect_error(ranking, ValueError, call=f"full_ranking(..., k={k})")


@rung(
    hints=[
        "Where is the target in the list, and how many places have a score not below its own?",
        "Three targets are not found: one that the list does not hold, one whose tie reaches the "
        "last place, one with score minus infinity. They count 0 in the means.",
        "own = the target's best score in the list; rank = (scores >= own).sum(1). A tie is open "
        "when the rank is K and several places have the score own. Cuts: all of 1 .. K, else "
        "ValueError.",
    ]
)
def test_list_metrics():
    """Metrics of lists: the worst rank in a tie; an open tie, or a NaN score, is not found."""
    items = tensor([[4, 2, 9, 7]] * 4 + [[4, 2, -1, -1], [4, 2, 9, 7]], torch.int64)
    scores = tensor([[8, 6, 5, 3], [8, 6, 6, 3], [8, 6, 3, 3], [8, 6, 5, 3], [8, 6, -INF, -INF],
                     [8, 6, 3, NAN]])  # fmt: skip
    cases = [  # row, target, rank (0: not found), why
        (0, 4, 1, "in the first place"),
        (0, 7, 4, "alone in the last place"),
        (1, 2, 3, "in a tie of places 2 and 3"),
        (1, 9, 3, "in a tie of places 2 and 3"),
        (2, 9, 0, "in a tie that reaches the end of the list"),
        (2, 2, 2, "before that tie"),
        (3, 5, 0, "not in the list"),
        (4, 2, 2, "is the last item of a list that ran out"),
        (5, 7, 0, "with score NaN"),
    ]
    called = "list_metrics(items[1, 4], scores[1, 4], target[1], ks=(1, 2, 3, 4))"
    for row, target, rank, why in cases:
        what = f"the target {why}: "
        one = slice(row, row + 1)
        target = tensor([target], torch.int64)
        with unchanged(items, scores, target):
            result = metrics.list_metrics(items[one], scores[one], target, ks=(1, 2, 3, 4))
        for k in (1, 2, 3, 4):
            hit = float(0 < rank <= k)
            wanted = {"hit_rate": hit, "recall": hit, "mrr": hit / max(rank, 1)}
            wanted["ndcg"] = hit / math.log2(max(rank, 1) + 1)
            for name, value in wanted.items():
                key = f"{name}@{k}"
                check(key in result, f"a dict with {key}", came_back=sorted(result), call=called)
                assert_scalar(result[key], value, what=what + key, call=called)
    rows, targets = [0, 1, 2, 3, 5], tensor([4, 9, 9, 5, 2], torch.int64)
    result = metrics.list_metrics(items[rows], scores[rows], targets, ks=(3,))
    assert_scalar(result["mrr@3"], (1 + 1 / 3 + 1 / 2) / 5, what="mrr@3, ranks 1, 3, -, -, 2")
    assert_scalar(result["hit_rate@3"], 3 / 5, what="hit_rate@3, ranks 1, 3, -, -, 2")
    for name, value in [("ndcg", 2.1309297535714573 / 5), ("recall", 3 / 5)]:
        assert_scalar(result[f"{name}@3"], value, what=f"{name}@3, ranks 1, 3, -, -, 2")
    items = tensor([[5, 5, 3], [3, 5, 5]], torch.int64)
    scores = tensor([[3, 2, 1.0], [3, 2, 1]])
    target = tensor([5, 5], torch.int64)
    result = metrics.list_metrics(items, scores, target, ks=(2, 3))
    for key in ("hit_rate@2", "recall@2", "recall@3"):
        assert_scalar(result[key], 1.0, what=f"{key}: every list holds its target, twice")
    assert_scalar(result["mrr@3"], 0.75, what="mrr@3: the better places of 5 are 1 and 2")
    for ks in ((4,), (2, 10), (10, 2), (0, 2), (2, 0), (-1,)):
        expect_error(lambda ks=ks: metrics.list_metrics(items, scores, target, ks=ks), ValueError,
                     call=f"list_metrics(items[2, 3], ..., ks={ks})")  # fmt: skip
    wide = tensor([list(range(12))], torch.int64), tensor([list(range(12, 0, -1))])
    result = metrics.list_metrics(*wide, tensor([4], torch.int64))
    assert_equal(sorted(result), ["hit_rate@10", "mrr@10", "ndcg@10", "recall@10"], what="the keys")
    assert_scalar(result["mrr@10"], 1 / 5, what="mrr@10, the target on place 5 of 12")


# --- scores against labels ------------------------------------------------------------------------


@rung(
    hints=[
        "AUC: of all pairs of a positive and a negative, how many does the score get right?",
        "A tie is half a pair. All rows go into one computation: batches have different pairs.",
        "Rank all scores (ties share the middle rank), sum the ranks of the positives, subtract "
        "P (P + 1) / 2, divide by P N, all in float64. With one class only: NaN.",
    ]
)
def test_auc():
    """AUC is the share of positive-negative pairs in the right order, a tie counting half."""
    scores, labels = tensor([0.9, 0.8, 0.2, 0.1]), tensor([1, 0, 1, 0], torch.int64)
    value = metrics.auc(scores, labels)
    assert_scalar(value, 0.75, rtol=1e-6, what="scores [.9, .8, .2, .1], labels [1, 0, 1, 0]")
    value = metrics.auc(-scores, labels)
    assert_scalar(value, 0.25, rtol=1e-6, what="the scores negated")
    case = golden("golden.json")["auc"]
    scores, labels = tensor(case["scores"]), tensor(case["labels"], torch.int64)
    value = metrics.auc(scores, labels)
    assert_scalar(value, case["expected"], rtol=1e-6, what="the golden rows")
    value = metrics.auc(scores * 0, labels)
    assert_scalar(value, 0.5, rtol=1e-6, what="all scores equal: every pair is a tie")
    for same in (0, 1):
        value = metrics.auc(scores, torch.full_like(labels, same))
        assert_scalar(value, NAN, what=f"all labels {same}: no pair to compare")
    for given, marks, wanted in [
        ([NAN, 1.0, NAN, -INF], [1, 0, 0, 1], 1 / 4),
        ([NAN, 1.0, -INF, 2.0], [1, 0, 0, 1], 5 / 8),
        ([0.0, NAN, -3e38, INF, 5.0], [0, 1, 0, 0, 1], 2 / 6),
    ]:
        scores, labels = tensor(given), tensor(marks, torch.int64)
        with unchanged(scores, labels):
            value = metrics.auc(scores, labels)
        assert_scalar(value, wanted, rtol=1e-6, what=f"scores {given}, labels {marks}")
    for seed, (rows, share) in enumerate([(101, 0.5), (3000, 0.02), (997, 0.9)]):
        g = generator(seed)
        scores = (torch.randn(rows, generator=g, dtype=torch.float64) * 6).round() / 1e3 + 500
        labels = torch.rand(rows, generator=g) < share
        gap = scores[labels][:, None] - scores[~labels][None, :]
        wanted = float(((gap > 0).double() + (gap == 0).double() / 2).mean())
        scores, labels = scores.to(device()), labels.to(device())
        for dtype in (torch.int64, torch.float32, torch.bool):
            value = metrics.auc(scores, labels.to(dtype))
            assert_scalar(value, wanted, rtol=1e-6, what=f"{rows} rows, labels {dtype}")
    users = [([0.9, 0.1], [1, 0]), ([0.3, 0.6], [1, 1])]
    values = [float(metrics.auc(tensor(s), tensor(y, torch.int64))) for s, y in users]
    mean = metrics.mean_over_users(tensor(values, torch.float64))
    assert_scalar(mean[0], 1.0, call="mean_over_users of the users' AUC",
                  what="user A: AUC 1; user B: positives only")  # fmt: skip
    assert_scalar(mean[1], 1, call="mean_over_users of the users' AUC", what="the count")
    rows = torch.arange(60_001, device=device())
    rare = rows % 20_000 == 7  # 4 negatives: float32 loses them among the ranks of 60,000 rows
    scores = (rows * 12_347 % 60_001).double()
    wanted = float((scores[None, ~rare] > scores[rare][:, None]).double().mean())
    value = metrics.auc(scores, ~rare)
    assert_scalar(value, wanted, rtol=1e-6, what="60,001 rows, 4 of them negative")


@rung(
    hints=[
        "Predicting the base rate for every row must give exactly 1.",
        "The inputs are logits: a sigmoid followed by a log is infinite at logit 200. Which "
        "function takes logits?",
        "binary_cross_entropy_with_logits in float64, divided by -(p ln p + (1 - p) ln(1 - p)) "
        "with p the mean label.",
    ]
)
def test_normalized_entropy():
    """Log loss over that of the base rate: 1 for the base rate, finite for any finite logit."""
    labels = tensor([1, 0, 0, 1, 0, 0, 0], torch.int64)
    base = tensor([math.log(2 / 5)] * 7)
    value = metrics.normalized_entropy(base, labels)
    assert_scalar(value, 1.0, rtol=1e-6, what="the base rate 2/7 predicted for every row")
    case = golden("golden.json")["normalized_entropy"]
    logits = tensor(case["logits"])
    for dtype in (torch.int64, torch.float32, torch.bool):
        labels = tensor(case["labels"], torch.int64).to(dtype)
        value = metrics.normalized_entropy(logits, labels)
        assert_scalar(value, case["expected"], rtol=1e-6, what=f"9 golden rows, labels {dtype}")
    logits, labels = tensor([200, -200, 150.0, -3e4]), tensor([1, 0, 0, 1], torch.int64)
    value = metrics.normalized_entropy(logits, labels)
    assert_scalar(value, 30150 / 4 / math.log(2), rtol=1e-6, what="logits 200, -200, 150, -30000")
    rows = torch.arange(20_000, device=device())
    logits = rows.double() / 1e4 - 9
    wanted = float(torch.nn.functional.softplus(logits).mean() - logits[77] / 20_000)
    p = 1 / 20_000
    wanted /= -(p * math.log(p) + (1 - p) * math.log1p(-p))
    labels = (rows == 77).long()
    with unchanged(logits, labels):
        value = metrics.normalized_entropy(logits, labels)
    assert_scalar(value, wanted, rtol=1e-6, what="one positive among 20,000 rows")
    logits, labels = torch.linspace(-3, 2, 9, device=device()).half(), labels[73:82]
    x, p = logits.double(), 1 / 9
    wanted = float((torch.nn.functional.softplus(x) - x * labels).mean())
    wanted /= -(p * math.log(p) + (1 - p) * math.log1p(-p))
    value = metrics.normalized_entropy(logits, labels)
    assert_scalar(value, wanted, rtol=1e-6, what="float16 logits")
    logits, labels = logits[:4], labels[:4]
    for same in (0, 1):
        value = metrics.normalized_entropy(logits, torch.full_like(labels, same))
        assert_scalar(value, NAN, what=f"all labels {same}")
