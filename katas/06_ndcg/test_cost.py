"""Kata 06: what metrics and full ranking may cost, counted; and that they stay on their device."""

import weakref
from unittest import mock

import torch

from harness.cost import count
from harness.devices import other_device_findings
from harness.spec import device, fail, learner, rung

metrics = learner("evaluation.metrics")

ALLOWANCE = 10  # operations that a call for four times the users or items may make on top


def calls(users, items, place):
    """Every function at this size, with the words for it: half of the users have ties."""
    number = torch.arange(users * items, device=place).reshape(users, items)
    scores = (number * 37 % 1009).double()
    scores[::2] = scores[::2].div(100, rounding_mode="floor")
    grades = (number * 7 % 5 - 2).clamp(min=0)
    target = torch.arange(users, device=place) % 5
    shape = f"[{users}, {items}]"
    both = f"scores{shape}, relevance{shape}"
    yield f"ranked_relevance({both}, 4)", lambda: metrics.ranked_relevance(scores, grades, 4)
    yield f"ndcg_at_k({both}, 4)", lambda: metrics.ndcg_at_k(scores, grades, 4)
    yield f"recall_at_k({both}, 4)", lambda: metrics.recall_at_k(scores, grades, 4, capped=True)
    yield f"hit_rate_at_k({both}, 4)", lambda: metrics.hit_rate_at_k(scores, grades, 4)
    yield f"mrr_at_k({both}, 4)", lambda: metrics.mrr_at_k(scores, grades, 4)
    yield (
        f"rank_of_target(scores{shape}, target[{users}])",
        lambda: metrics.rank_of_target(scores, target),
    )
    lists = number[:, :5] % items, scores[:, :5].sort(1, descending=True).values
    yield (
        f"list_metrics(items[{users}, 5], scores[{users}, 5], target[{users}], ks=(1, 3))",
        lambda: metrics.list_metrics(*lists, target, ks=(1, 3)),
    )
    rows = scores.flatten()
    yield f"auc(scores[{len(rows)}], labels[{len(rows)}])", lambda: metrics.auc(rows, rows % 3 > 1)
    yield (
        f"normalized_entropy(logits[{len(rows)}], labels[{len(rows)}])",
        lambda: metrics.normalized_entropy(rows / 99, rows % 3 > 1),
    )


def ranking(users, items, chunk_size, place, score_fn=None):
    """full_ranking of a catalogue; everybody has seen two items."""
    number = torch.arange(items, device=place)
    seen = torch.arange(2 * users, device=place) % items, 2 * torch.arange(users + 1, device=place)
    score_fn = score_fn or (lambda batch: (batch[:, None] * 31 + number * 37) % 1009 / 7)
    return (
        f"full_ranking(score_fn, {users}, seen=..., k=3, chunk_size={chunk_size})",
        lambda: metrics.full_ranking(score_fn, users, seen=seen, k=3, chunk_size=chunk_size),
    )


def refuse_growth(call, small, large):
    before, after = count(small), count(large)
    if after.operations > before.operations + ALLOWANCE:
        place = (after.by_place - before.by_place).most_common(1)[0][0]
        fail(
            call=call,
            came_back=f"{after.operations} operations, {before.operations} for a quarter of them",
            expected=f"{before.operations} here too (at most {ALLOWANCE} more): no loop",
            more=place.facts() if place else (),
        )


def refuse_larger(call, function, limit, why):
    made = count(function).largest
    if made and made.bytes > limit:
        fail(
            call=call,
            came_back=f"{made.operation} made {made.shape} {made.dtype}, {made.bytes:,} bytes",
            expected=f"nothing of more than {limit:,} bytes, {why}",
            more=made.place.facts() if made.place else (),
        )


@rung(
    hints=[
        "What happens for each user, and what once? Which tensor is larger than the scores?",
        "A Python loop over users, a table of all pairs, all users' scores at once: all right, and "
        "all too much. On a GPU nothing may be mixed with a tensor of the CPU.",
        "topk, gather, a matrix product with the discounts; chunks of users in full_ranking alone; "
        "device=scores.device for what you make yourself.",
    ]
)
def test_cost():
    """No loop over users, items or rows, no table of pairs; all stays on its device."""
    no_python_lists()
    sizes = [(12, 15), (48, 15), (12, 60)]
    base, *larger = (list(calls(*size, device())) for size in sizes)
    for each in larger:
        for (_, small), (call, large) in zip(base, each, strict=True):
            refuse_growth(call, small, large)
    refuse_growth("a chunk of 48 users: " + ranking(48, 15, 100, device())[0],
                  ranking(12, 15, 100, device())[1], ranking(48, 15, 100, device())[1])  # fmt: skip
    for call, function in calls(6, 800, device()):
        refuse_larger(call, function, 6 * 800 * 8 * 32, "32 times the scores")
    call, function = ranking(256, 200, 4, device())
    refuse_larger(call, function, 256 * 200 // 2, "nothing of (num_users, N), not of bools either")
    few_chunks_at_a_time()
    stays_on_its_device()


def no_python_lists():
    """tolist() is where a loop in Python begins, and no operation shows it."""
    users = 50
    tolist = torch.Tensor.tolist
    for call, function in calls(users, 15, device()):
        sizes = []

        def watched(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tolist(tensor)

        with mock.patch.object(torch.Tensor, "tolist", watched):
            function()
        if max(sizes, default=0) >= users:
            fail(
                call=call,
                came_back=f"tolist() of {max(sizes)} numbers, for a loop in Python",
                expected="tensor operations on all users at once",
            )


def few_chunks_at_a_time():
    alive, most = weakref.WeakSet(), 0

    def score_fn(users):
        nonlocal most
        most = max(most, len(alive))
        scores = (users[:, None] * 31 + torch.arange(20, device=users.device) * 37) % 1009 / 7
        alive.add(scores)
        return scores

    call, function = ranking(64, 20, 2, device(), score_fn)
    function()
    if most > 4:
        fail(
            call=call,
            came_back=f"{most} chunks of scores kept",
            expected="a chunk's scores are dropped when its top k are taken",
        )


def stays_on_its_device():
    def scenario(place):
        results = [function() for _, function in calls(7, 11, place)]
        results.append(metrics.mean_over_users(torch.ones(3, device=place)))
        return [*results, ranking(7, 11, 3, place)[1]()]

    for finding in other_device_findings(scenario).findings[:1]:
        more = finding.place.facts() if finding.place else ()
        if finding.made:
            more = [*more, *finding.made.facts("made in")]
        fail(
            call="every function of kata 06, its inputs on a GPU",
            came_back=finding.text,
            expected="all of it on the device of the inputs",
            more=more,
        )
