"""Kata 06: what holds for any scores, small tables drawn by hypothesis."""

import math

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from harness.spec import assert_close, assert_scalar, check, device, generator, learner, rung

metrics = learner("evaluation.metrics")

NAMES = ("ndcg_at_k", "recall_at_k", "hit_rate_at_k", "mrr_at_k")
NAN, INF = math.nan, math.inf


SCORES = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0, NAN, -INF, INF], dtype=torch.float64)
GRADES = torch.tensor([0, 0, 0, 1, 2, 4])


def table(users, items, seed):
    """Scores with ties, NaN and infinities, and grades: (users, items) each."""
    g = generator(seed)
    drawn = [torch.randint(0, len(values), (users, items), generator=g).to(device())
             for values in (SCORES, GRADES)]  # fmt: skip
    return SCORES.to(device())[drawn[0]], GRADES.to(device())[drawn[1]]


def any_size(test):
    """Run `test(scores, relevance, k, seed)` on small tables of any size."""
    sizes = given(users=st.integers(1, 4), items=st.integers(1, 7), k=st.integers(1, 8),
                  seed=st.integers(0, 999))  # fmt: skip

    def on_table(users, items, k, seed):
        test(*table(users, items, seed), k, seed)

    # the tables are small already: without shrinking a red rung takes no longer than a green one
    return settings(derandomize=True, database=None, deadline=None, max_examples=6,
                    phases=[Phase.generate])(sizes(on_table))  # fmt: skip


def values_of(scores, relevance, k):
    found = {name: getattr(metrics, name)(scores, relevance, k) for name in NAMES}
    found["exponential"] = metrics.ndcg_at_k(scores, relevance, k, gain="exponential")
    found["capped"] = metrics.recall_at_k(scores, relevance, k, capped=True)
    return found


def call(name, k):
    option = {"exponential": ("ndcg_at_k", ', gain="exponential"')}
    option["capped"] = ("recall_at_k", ", capped=True")
    function, more = option.get(name, (name, ""))
    return f"{function}(scores, relevance, k={k}{more})"


def nothing_wins_by_luck():
    """A constant or NaN scorer is not above chance, in no metric."""
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
        for name, value in values_of(scores, relevance, k).items():
            check(float(value.mean()) <= chance, f"at most {chance}, the level of chance ({what})",
                  came_back=value.mean(), call=call(name, k))  # fmt: skip
        rank = metrics.rank_of_target(scores, target)
        hits = (rank <= k).double().mean()
        check(hits <= chance, f"a rank <= {k} for at most {chance} of the users ({what})",
              came_back=rank)  # fmt: skip
        lists = torch.arange(k, device=device()).repeat(users, 1)
        result = metrics.list_metrics(lists, scores.gather(1, lists), target)
        check(result["hit_rate@10"] <= chance, f"at most {chance} ({what})", came_back=result)


def same_for(scores, relevance, k, wanted, what):
    for name, value in values_of(scores, relevance, k).items():
        assert_close(value, wanted[name], rtol=1e-6, atol=1e-7, call=call(name, k), what=what)


@rung(
    hints=[
        "A model that has collapsed scores everything alike. What would your metric report? And "
        "does the order of the columns, or of the users, matter?",
        "Ties and NaN count against the relevant item, in every function alike. A strictly "
        "increasing function of the scores changes nothing.",
        "rank_of_target: (scores >= own).sum(1). With one relevant item MRR is 1 / rank and NDCG "
        "1 / log2(rank + 1) up to the cut, 0 beyond.",
    ]
)
def test_whatever_the_scores():
    """Nothing wins by luck; order of items and users, and scale, are free; metrics agree."""
    nothing_wins_by_luck()
    any_table()
    one_target()


@any_size
def any_table(scores, relevance, k, seed):
    wanted = values_of(scores, relevance, k)
    for name, value in wanted.items():
        check(not bool(((value < 0) | (value > 1 + 1e-6)).any()), "values from 0 to 1",
              came_back=value, call=call(name, k))  # fmt: skip
    items = torch.randperm(scores.shape[1], generator=generator(seed)).to(device())
    same_for(scores[:, items], relevance[:, items], k, wanted, "the items in another order")
    users = torch.arange(len(scores), device=device()).flip(0)
    flipped = {name: value[users] for name, value in wanted.items()}
    same_for(scores[users], relevance[users], k, flipped, "the users in another order")
    same_for(scores * 8 + 1, relevance, k, wanted, "scores * 8 + 1")
    noise = torch.rand(scores.shape, generator=generator(seed), dtype=scores.dtype) / 99
    for name, value in values_of(scores + noise.to(device()), relevance, k).items():
        lucky = wanted[name] > value + 1e-6
        check(not lucky.any(), "ties are worth no more than any order of the tied items",
              came_back=wanted[name], call=call(name, k))  # fmt: skip


@any_size
def one_target(scores, _, k, seed):
    users, items = scores.shape
    target = torch.randint(0, items, (users,), generator=generator(seed)).to(device())
    relevance = torch.zeros_like(scores).scatter(1, target[:, None], 1.0)
    rank = metrics.rank_of_target(scores, target).double()
    hit = (rank <= k).double()
    found = values_of(scores, relevance, k)
    for name, wanted in [
        ("hit_rate_at_k", hit), ("recall_at_k", hit), ("mrr_at_k", hit / rank),
        ("ndcg_at_k", hit / (rank + 1).log2()),
    ]:  # fmt: skip
        assert_close(found[name], wanted, rtol=1e-6, call=call(name, k),
                     what="one relevant item, of the rank that rank_of_target gives")  # fmt: skip
    seen = target.new_zeros(0), target.new_zeros(users + 1)  # nobody has seen anything
    listed = metrics.full_ranking(lambda batch: scores[batch], users, seen=seen, k=k + 1)
    if k < listed[0].shape[1]:
        real = scores.gather(1, target[:, None])[:, 0] > -INF  # such an item is in no list
        result = metrics.list_metrics(*listed, target, ks=(k,))
        for name, wanted in [("hit_rate", hit), ("mrr", hit / rank)]:
            assert_scalar(result[f"{name}@{k}"], float((wanted * real).mean()), rtol=1e-6,
                          call=f"list_metrics(*full_ranking(..., k={k + 1}), target, ks=({k},))",
                          what=f"{name}@{k}, as of rank_of_target")  # fmt: skip
    numbers = scores.nan_to_num(nan=-9.0, posinf=9.0, neginf=-9.0)
    for row, labels in zip(numbers, relevance, strict=True):
        both = float(metrics.auc(row, labels)) + float(metrics.auc(-row, labels))
        assert_scalar(both, 1.0 if items > 1 else NAN,
                      call="auc(scores, labels) + auc(-scores, labels)")  # fmt: skip
