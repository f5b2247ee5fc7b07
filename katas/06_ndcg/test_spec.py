"""What ranking metrics and the full-ranking evaluation must do (kata 06)."""

import math

import torch

from harness.spec import (
    assert_close,
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


def by_hand(name, scores, relevance, k):
    """One metric of every user in float64, from the sorted rows."""
    values = []
    for ranked in ranked_by_sorting(scores, relevance):
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


# --- the order that a user sees -------------------------------------------------------------------


@rung(
    hints=[
        "The best item has the HIGHEST score. Which way does your sort go?",
        "torch.topk or argsort(descending=True) gives item indices, best first; gather looks up "
        "the relevance at those indices, row by row.",
        "scores.topk(k, dim=1).indices, then relevance.gather(1, indices), with k at most N.",
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
    for dtype in (torch.float64, torch.bool):
        ranked = metrics.ranked_relevance(scores, relevance.to(dtype), 2)
        assert_close(ranked, whole[:, :2].to(dtype), what=f"relevance given as {dtype}")


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
        ([[NAN, NAN, NAN, NAN, NAN]], [[0, 0, 1, 2, 3]]),
    ]:
        for k in (5, 3, 1):
            ranked = metrics.ranked_relevance(tensor(scores), relevance, k)
            wanted = tensor(expected, torch.int64)[:, :k]
            assert_close(ranked, wanted, what=f"scores {scores[0]}, relevance [3, 0, 2, 1, 0]")


@rung(
    hints=[
        "Two tensors of different shapes would be broadcast or indexed silently.",
        "Raise ValueError for anything but two equal 2-D shapes, and for k below 1.",
    ]
)
def test_bad_input_is_refused():
    """Shapes that differ or are not 2-D, a k below 1 and an unknown gain are ValueErrors."""
    scores, relevance = tensor([[0.1, 0.9, 0.5]]), tensor([[0.0, 1.0, 0.0]])
    bad = [
        ("shapes (1, 3) and (1, 2)", lambda: metrics.ranked_relevance(scores, relevance[:, :2])),
        ("1-D tensors", lambda: metrics.ranked_relevance(scores[0], relevance[0])),
        ("k = 0", lambda: metrics.ranked_relevance(scores, relevance, 0)),
        ("k = -1", lambda: metrics.ndcg_at_k(scores, relevance, -1)),
        ("gain='squared'", lambda: metrics.ndcg_at_k(scores, relevance, 2, gain="squared")),
    ]
    for what, function in bad:
        expect_error(function, ValueError, call=f"a metric with {what}")


# --- metrics of one user --------------------------------------------------------------------------


@rung(
    hints=[
        "Whom does a user without any relevant item say something about? Their value is NaN.",
        "hit rate: is any of the first k relevant; MRR: 1 / rank, ranks from 1. A grade of 3 is as "
        "relevant as a grade of 1 here.",
        "The position of the first relevant item: (ranked > 0).double().argmax(1); it is 0 also "
        "where nothing is relevant, so mask that case.",
    ]
)
def test_hit_rate_and_mrr():
    """Hit rate and MRR see the first relevant item among k; NaN if there is none to find."""
    falling = [4, 3, 2, 1.0]
    scores = tensor([falling, [0.6, 0.7, 0.8, 0.9], falling, falling])
    relevance = tensor([[0, 0, 3, 1], [0, 0, 0, 2], [0, 0, 0, 0], [0, 1, 1, 0]], torch.int64)
    for k, hit, reciprocal in [
        (1, [0, 1, NAN, 0], [0, 1, NAN, 0]),
        (2, [0, 1, NAN, 1], [0, 1, NAN, 1 / 2]),
        (3, [1, 1, NAN, 1], [1 / 3, 1, NAN, 1 / 2]),
        (9, [1, 1, NAN, 1], [1 / 3, 1, NAN, 1 / 2]),
    ]:
        value = metrics.hit_rate_at_k(scores, relevance, k)
        assert_close(value, exact(hit), what="hit rate of 4 users, the 3rd without")
        value = metrics.mrr_at_k(scores, relevance, k)
        assert_close(value, exact(reciprocal), what="MRR of 4 users, the 3rd without")


@rung(
    hints=[
        "Recall asks how MANY of the relevant items were found, not whether one was.",
        "Plain recall divides by all relevant items of the user; capped by min(that, k).",
        "relevant.clamp(max=k) is the capped denominator; 0 / 0 is NaN by itself.",
    ]
)
def test_recall():
    """Recall is the share of the relevant items among the first k; capped, of min(them, k)."""
    scores = tensor([[5, 4, 3, 2, 1.0], [5, 4, 3, 2, 1.0], [5, 4, 3, 2, 1.0]])
    relevance = tensor([[0, 2, 0, 0, 1], [1, 1, 3, 0, 1], [0, 0, 0, 0, 0]], torch.int64)
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
    assert_close(value, wanted, rtol=1e-6, what=what)
    for gain in ("linear", "exponential"):
        value = metrics.ndcg_at_k(scores, relevance.long(), 6, gain=gain)
        wanted = exact([dcg(shown, gain) / dcg(best, gain)])
        assert_close(value, wanted, rtol=1e-6, what=what)


@rung(
    hints=[
        "A metric that passed its own rung fails here: look at the users with ties, or with more "
        "relevant items than k.",
        "Build every metric on ranked_relevance, then the tie rule holds for all of them.",
    ]
)
def test_golden_values():
    """Every metric agrees with the golden tables: distinct and tied scores, k from 1 past N."""
    tables = golden("golden.json")
    for kind in ("distinct", "tied"):
        table = tables[kind]
        scores, relevance = tensor(table["scores"]), tensor(table["relevance"], torch.int64)
        for name in NAMES:
            for k, expected in table["expected"][name].items():
                value = measured(name, scores, relevance, int(k))
                assert_close(value, optional(expected), rtol=1e-6, atol=1e-8,
                             call=call(name, scores, k), what=f"{kind} scores")  # fmt: skip


@rung(
    hints=[
        "The same numbers in another layout, dtype or magnitude must give the same result.",
        "Is something changed in place, cut to float32, or assumed to be contiguous?",
    ]
)
def test_against_sorting():
    """Random scores of any magnitude, layout and dtype agree with a plain sort, user by user."""
    for seed, (users, items, scale) in enumerate([(7, 11, 1.0), (4, 23, 1e4), (13, 5, 1e-4)]):
        g = generator(seed)
        scores = (torch.randn(items, users, generator=g) * 3).round() * scale + 500 * scale
        scores[::4, ::3] = NAN
        relevance = torch.randint(0, 4, (items, users), generator=g)
        relevance[torch.rand(items, users, generator=g) < 0.6] = 0
        scores, relevance = scores.double().to(device()).T, relevance.to(device()).T
        before = scores.clone(), relevance.clone()
        if seed == 1:
            scores = scores + torch.arange(items, device=device()) * 1e-9  # float64 tells these
            before = scores.clone(), before[1]
        ranked = metrics.ranked_relevance(scores, relevance)
        assert_close(ranked, torch.tensor(ranked_by_sorting(scores, relevance)))
        for name in NAMES:
            for k in (1, 3, items, items + 9):
                for grades in (relevance, relevance.float()):
                    value = measured(name, scores, grades, k)
                    wanted = by_hand(name, scores, relevance, k)
                    assert_close(value, wanted, rtol=1e-6, call=call(name, scores, k))
        same = torch.equal(scores.nan_to_num(1.5), before[0].nan_to_num(1.5))
        same = same and torch.equal(relevance, before[1])
        check(same, "inputs that are not changed", call="the metrics of kata 06")


@rung(
    hints=[
        "A model that has collapsed scores everything alike. What would your metric report?",
        "Count an item with the same score as ranked above the relevant one.",
        "rank = (scores >= score of the target).sum(): the target itself is the 1.",
    ]
)
def test_constant_and_nan_never_win():
    """A constant or NaN scorer never beats chance, in no metric."""
    users, items, k = 40, 50, 10
    target = torch.randint(0, items, (users,), generator=generator(1)).to(device())
    relevance = torch.zeros(users, items, device=device())
    relevance[torch.arange(users), target] = 1.0
    chance = k / items
    constant = torch.zeros_like(relevance)
    for what, scores in [
        ("all scores equal", constant),
        ("all scores NaN", torch.full_like(relevance, NAN)),
        ("NaN for the target, 0 elsewhere", constant.masked_fill(relevance > 0, NAN)),
    ]:
        for name in NAMES:
            value = measured(name, scores, relevance, k)
            check(float(value.mean()) <= chance, f"at most {chance}, the level of chance ({what})",
                  came_back=value.mean(), call=call(name, scores, k))  # fmt: skip
        rank = metrics.rank_of_target(scores, target)
        hits = (rank <= k).double().mean()
        check(hits <= chance, f"a rank <= {k} for at most {chance} of the users ({what})",
              came_back=rank)  # fmt: skip
        lists = torch.arange(k, device=device()).repeat(users, 1)
        taken = scores.gather(1, lists)
        result = metrics.list_metrics(lists, taken, target)
        check(result["hit_rate@10"] <= chance, f"at most {chance} ({what})", came_back=result)


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
        ([1.0, 0.0], 0.5, 2),
        ([NAN, NAN], NAN, 0),
        ([], NAN, 0),
    ]:
        result = metrics.mean_over_users(tensor(values, torch.float64))
        check(isinstance(result, tuple) and len(result) == 2, "a pair (mean, count)",
              came_back=result)  # fmt: skip
        assert_scalar(result[0], mean, what=f"the mean of {values}")
        assert_scalar(result[1], count, what=f"the count of {values}")


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
    rank = metrics.rank_of_target(scores, target)
    what = "distinct, tie of two, NaN target, NaN elsewhere, tie of NaN and -inf, all equal"
    assert_close(rank, tensor([3, 2, 3, 2, 3, 3], torch.int64), what=what)
    g = generator(3)
    scores = torch.randint(0, 9, (17, 31), generator=g).float().to(device())
    target = torch.randint(0, 31, (17,), generator=g).to(device())
    rows = zip(scores.tolist(), target.tolist(), strict=True)
    wanted = [sum(x >= row[t] for x in row) for row, t in rows]
    rank = metrics.rank_of_target(scores, target)
    assert_close(rank, tensor(wanted, torch.int64))


# --- the whole catalogue --------------------------------------------------------------------------


@rung(
    hints=[
        "What must the score of a seen item be, so that no top-k ever takes it?",
        "offsets[u] and offsets[u + 1] bound the seen items of user u; a user may have none.",
        "Make a (b, N) mask: rows by repeat_interleave of the users' counts, columns the seen "
        "items; masked_fill with minus infinity; topk. (Fill a copy: the scores are not yours.)",
    ]
)
def test_full_ranking():
    """Every user gets the best items that they have not seen, with falling scores."""
    table = tensor([[1, 5, 3, 4, 2.0], [9, 8, 7, 6, 5], [10, 30, 20, 50, 40], [-1, -2, -3, -4, -5]])
    before = table.clone()
    seen = seen_lists([[1], [], [3, 0, 3], [2, 0]])
    items, scores = metrics.full_ranking(lambda users: table[users], 4, seen=seen, k=2)
    assert_close(items, tensor([[3, 2], [0, 1], [4, 1], [1, 3]], torch.int64), what="the items")
    assert_close(scores, tensor([[4, 3], [9, 8], [40, 30], [-2, -4]]), what="the scores")
    items, scores = metrics.full_ranking(lambda users: table.double(), 4, seen=seen, k=1)
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
    table = tensor([[1, 5, 3, 4.0], [NAN, 8, NAN, 6], [7, -INF, 9, 8], [NAN, NAN, NAN, NAN]])
    seen = seen_lists([[0, 1, 2, 3], [3], [0], []])
    for k in (4, 3, 9):
        items, scores = metrics.full_ranking(lambda users: table[users], 4, seen=seen, k=k)
        wanted = tensor([[-1] * 4, [1, -1, -1, -1], [2, 3, -1, -1], [-1] * 4], torch.int64)
        assert_close(items, wanted[:, :k], what=f"the items for k = {k}, N = 4")
        wanted = tensor([[-INF] * 4, [8, -INF, -INF, -INF], [9, 8, -INF, -INF], [-INF] * 4])
        assert_close(scores, wanted[:, :k], what=f"the scores for k = {k}, N = 4")
    for k in (0, -1):

        def ranking(k=k):
            return metrics.full_ranking(lambda users: table[users], 4, seen=seen, k=k)

        expect_error(ranking, ValueError, call=f"full_ranking(..., k={k})")


@rung(
    hints=[
        "The second chunk starts at user chunk_size, not at user 0. Are its seen items its own?",
        "Row in the chunk = user - first user of the chunk. The last chunk may be shorter.",
    ]
)
def test_full_ranking_in_chunks():
    """The result does not depend on chunk_size, and no chunk holds more users than that."""
    users, catalogue, k = 23, 37, 6
    g = generator(5)
    order = torch.rand(users, catalogue, generator=g).argsort(1)  # all scores of a user differ
    table = (order.float() - 11).to(device())
    lists = [torch.randperm(catalogue, generator=g)[: u % 5 * 8].tolist() for u in range(users)]
    seen = seen_lists(lists)
    wanted, values = [], []
    for row, known in zip(table.tolist(), lists, strict=True):
        left = sorted(set(range(catalogue)) - set(known), key=lambda i: -row[i])[:k]
        wanted.append(left + [-1] * (k - len(left)))
        values.append([row[i] for i in left] + [-INF] * (k - len(left)))
    asked = []

    def score_fn(batch):
        asked.append(batch)
        return table[batch]

    for chunk_size in (1, 4, 22, 23, 100):
        asked.clear()
        items, scores = metrics.full_ranking(
            score_fn, users, seen=seen, k=k, chunk_size=chunk_size
        )
        assert_close(items, tensor(wanted, torch.int64), what=f"items, chunk_size={chunk_size}")
        assert_close(scores, tensor(values), what=f"scores, chunk_size={chunk_size}")
        check(max(map(len, asked)) <= chunk_size, f"at most {chunk_size} users at a time",
              came_back=[len(batch) for batch in asked])  # fmt: skip
        batch = torch.cat(asked)
        assert_close(batch, tensor(list(range(users)), torch.int64), call="score_fn(users)",
                     what=f"the users asked for, all chunks, chunk_size={chunk_size}")  # fmt: skip
    items, scores = metrics.full_ranking(lambda batch: table[batch], users, seen=seen, k=k)
    assert_close(items, tensor(wanted, torch.int64), what="items, default chunk_size")


@rung(
    hints=[
        "Where is the target in the list, and how many places have a score not below its own?",
        "Three targets are not found: one that the list does not hold, one whose tie reaches the "
        "last place, one with score minus infinity. They count 0 in the means.",
        "own = the target's score in the list; rank = (scores >= own).sum(1). A tie is open when "
        "the rank is K and more than one place has the score own.",
    ]
)
def test_list_metrics():
    """Metrics of lists: the worst rank in a tie; an open tie, or a NaN score, is not found."""
    items = tensor([[4, 2, 9, 7]] * 4 + [[4, 2, -1, -1], [4, 2, 9, 7]], torch.int64)
    scores = tensor([[8, 6, 5, 3], [8, 6, 6, 3], [8, 6, 3, 3], [8, 6, 5, 3], [8, 6, -INF, -INF],
                     [8, 6, 3, NAN]])  # fmt: skip
    cases = [  # row, target, rank (0: not found), why
        (0, 4, 1, "the first place"),
        (0, 7, 4, "alone in the last place"),
        (1, 2, 3, "in a tie of places 2 and 3"),
        (1, 9, 3, "in a tie of places 2 and 3"),
        (2, 9, 0, "in a tie that reaches the end of the list"),
        (2, 2, 2, "before that tie"),
        (3, 5, 0, "not in the list"),
        (4, 2, 2, "the last item of a list that ran out"),
        (5, 7, 0, "with score NaN"),
    ]
    called = "list_metrics(items[1, 4], scores[1, 4], target[1], ks=(1, 2, 3, 4))"
    for row, target, rank, why in cases:
        what = f"the target is {why}: "
        one = slice(row, row + 1)
        target = tensor([target], torch.int64)
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


@rung(
    hints=[
        "Recall above 1 means that a repeated item was counted twice.",
        "Compare the cuts with the width of the list before anything else.",
    ]
)
def test_list_metrics_edges():
    """A repeated target counts once; a cut that the list cannot judge is refused."""
    items = tensor([[5, 5, 3], [3, 5, 5]], torch.int64)
    scores = tensor([[3, 2, 1.0], [3, 2, 1]])
    target = tensor([5, 5], torch.int64)
    result = metrics.list_metrics(items, scores, target, ks=(2, 3))
    for key in ("hit_rate@2", "recall@2", "recall@3"):
        assert_scalar(result[key], 1.0, what=f"{key}: every list holds its target, twice")
    assert_scalar(result["mrr@3"], 0.75, what="mrr@3: the better places of 5 are 1 and 2")
    for ks in ((4,), (2, 10), (0, 2), (-1,)):
        expect_error(lambda ks=ks: metrics.list_metrics(items, scores, target, ks=ks), ValueError,
                     call=f"list_metrics(items[2, 3], ..., ks={ks})")  # fmt: skip


# --- scores against labels ------------------------------------------------------------------------


@rung(
    hints=[
        "AUC: of all pairs of a positive and a negative, how many does the score get right?",
        "A tie is half a pair. All rows go into one computation: batches have different pairs.",
        "Rank all scores (ties share the middle rank), sum the ranks of the positives, subtract "
        "P (P + 1) / 2, divide by P N. With one class only: NaN.",
    ]
)
def test_auc():
    """AUC is the share of positive-negative pairs in the right order, a tie counting half."""
    scores, labels = tensor([0.9, 0.8, 0.2, 0.1]), tensor([1, 0, 1, 0], torch.int64)
    value = metrics.auc(scores, labels)
    assert_scalar(value, 0.75, what="scores [.9, .8, .2, .1], labels [1, 0, 1, 0]")
    value = metrics.auc(-scores, labels)
    assert_scalar(value, 0.25, what="the scores negated")
    case = golden("golden.json")["auc"]
    scores, labels = tensor(case["scores"]), tensor(case["labels"], torch.int64)
    value = metrics.auc(scores, labels)
    assert_scalar(value, case["expected"], what=f"scores {case['scores']}, labels {case['labels']}")
    value = metrics.auc(scores * 0, labels)
    assert_scalar(value, 0.5, what="all scores equal: every pair is a tie")
    for same in (0, 1):
        value = metrics.auc(scores, torch.full_like(labels, same))
        assert_scalar(value, NAN, what=f"all labels {same}: no pair to compare")
    value = metrics.auc(tensor([NAN, 1.0, NAN, -INF]), tensor([1, 0, 0, 1], torch.int64))
    assert_scalar(value, 0.25, what="scores [NaN, 1, NAN, -inf], labels [1, 0, 0, 1]")


@rung(
    hints=[
        "Is it right for many rows, and for float and bool labels?",
        "Sums of ranks are large numbers: keep them in float64 or int64.",
    ]
)
def test_auc_against_pairs():
    """On random scores with ties AUC equals the count over all pairs, for labels of any dtype."""
    for seed, (rows, share) in enumerate([(101, 0.5), (3000, 0.02), (997, 0.9)]):
        g = generator(seed)
        scores = (torch.randn(rows, generator=g, dtype=torch.float64) * 6).round() / 1e3 + 500
        labels = torch.rand(rows, generator=g) < share
        gap = scores[labels][:, None] - scores[~labels][None, :]
        wanted = float(((gap > 0).double() + (gap == 0).double() / 2).mean())
        scores, labels = scores.to(device()), labels.to(device())
        for dtype in (torch.int64, torch.float32, torch.bool):
            value = metrics.auc(scores, labels.to(dtype))
            assert_scalar(value, wanted, what=f"{rows} rows, labels {dtype}")
    users = [([0.9, 0.1], [1, 0]), ([0.3, 0.6], [1, 1])]
    values = [float(metrics.auc(tensor(s), tensor(y, torch.int64))) for s, y in users]
    mean = metrics.mean_over_users(tensor(values, torch.float64))
    assert_scalar(mean[0], 1.0, call="mean_over_users of the users' AUC",
                  what="user A: AUC 1; user B: positives only")  # fmt: skip
    assert_scalar(mean[1], 1, call="mean_over_users of the users' AUC", what="the count")


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
    assert_scalar(value, 1.0, what="the base rate 2/7 predicted for every row")
    case = golden("golden.json")["normalized_entropy"]
    logits = tensor(case["logits"])
    for dtype in (torch.int64, torch.float32, torch.bool):
        labels = tensor(case["labels"], torch.int64).to(dtype)
        value = metrics.normalized_entropy(logits, labels)
        assert_scalar(value, case["expected"], what=f"9 golden rows, labels {dtype}")
    logits, labels = tensor([200, -200, 150.0, -3e4]), tensor([1, 0, 0, 1], torch.int64)
    value = metrics.normalized_entropy(logits, labels)
    assert_scalar(value, 30150 / 4 / math.log(2), what="logits 200, -200, 150, -30000")
    for same in (0, 1):
        value = metrics.normalized_entropy(logits, torch.full_like(labels, same))
        assert_scalar(value, NAN, what=f"all labels {same}")
