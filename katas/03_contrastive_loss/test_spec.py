"""Kata 03, contrastive losses: what `training/losses.py` must do, from the simplest on."""

import math

import numpy as np
import torch

from harness.spec import (
    assert_close,
    assert_scalar,
    check,
    device,
    expect_error,
    fail,
    generator,
    golden,
    learner,
    rung,
)

losses = learner("training.losses")

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}  # four times what orders of summation differ by


# --- inputs, gradients and the definition ---------------------------------------------------------


def tensor(values, dtype=torch.float32):
    """A float tensor on the device that gets a gradient."""
    return torch.as_tensor(values).to(device(), dtype).clone().requires_grad_()


def constants(options, dtype=torch.float32):
    """Options of a golden case as a caller gives them: log_q and weights as tensors, and so on."""
    kinds = {"item_ids": torch.int64, "target": torch.int64, "log_q": dtype, "sample_weight": dtype}
    return {
        name: torch.tensor(value, dtype=kinds[name], device=device()) if name in kinds else value
        for name, value in options.items()
    }


def pair(seed, batch, width, dtype=torch.float32):
    """A random user and item batch, on different scales."""
    draw = torch.randn(2, batch, width, generator=generator(seed), dtype=torch.float64)
    return tensor(draw[0], dtype), tensor(0.8 * draw[1] + 0.3 * draw[0], dtype)


def assert_gradients(loss, expected, inputs, **tolerance):
    """The gradients of `loss` with respect to `inputs`, both by name."""
    check(
        isinstance(loss, torch.Tensor) and loss.requires_grad,
        "a tensor that can be differentiated (no .item(), no detach, no no_grad)",
        came_back=loss,
        call="loss.backward()",
    )
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    for (name, value), grad in zip(inputs.items(), found, strict=True):
        what = f"gradient of the loss with respect to {name}"
        if grad is None:
            fail(expected="a gradient", came_back="none at all", call="loss.backward()", what=what)
        assert_close(
            grad, expected[name], like=value, call="loss.backward()", what=what, **tolerance
        )


def definition(
    user, item, temperature, item_ids=None, log_q=None, sample_weight=None, symmetric=False
):
    """The formulas of the docstring, number by number, in float64."""
    rows = range(len(user))
    weight = [1.0 for _ in rows] if sample_weight is None else sample_weight

    def row_loss(i, score):
        """-score(i) + log sum of exp(score(j)) over C(i)."""
        others = [j for j in rows if item_ids is None or item_ids[j] != item_ids[i]]
        scores = [score(j) for j in sorted({i, *others})]
        top = max(scores)
        return top - score(i) + math.log(math.fsum(math.exp(s - top) for s in scores))

    def score(i, j):
        return float(user[i] @ item[j]) / temperature

    def mean(terms):
        return math.fsum(w * t for w, t in zip(weight, terms, strict=True)) / math.fsum(weight)

    loss = mean(
        [
            row_loss(i, lambda j: score(i, j) - (0 if log_q is None else log_q[j]))  # noqa: B023
            for i in rows
        ]
    )
    if not symmetric:
        return loss
    return (loss + mean([row_loss(i, lambda j: score(j, i)) for i in rows])) / 2  # noqa: B023


def slopes(function, inputs, step=1e-5):
    """Central differences of `function(**inputs)` with respect to each of the float64 arrays."""
    found = {}
    for name, value in inputs.items():
        slope = np.empty_like(value)
        for index in np.ndindex(value.shape):
            up, down = value.copy(), value.copy()
            up[index] += step
            down[index] -= step
            rise = function(**{**inputs, name: up}) - function(**{**inputs, name: down})
            slope[index] = rise / (2 * step)
        found[name] = slope
    return found


def assert_golden(case):
    """Loss and gradients of an in-batch golden case, in float32."""
    options = dict(case["arguments"])
    user, item = tensor(options.pop("user")), tensor(options.pop("item"))
    options = constants(options)
    loss = losses.in_batch_softmax_loss(user, item, **options)
    assert_scalar(loss, case["expected"]["loss"], **FLOAT32)
    assert_gradients(loss, case["expected"], {"user": user, "item": item}, rtol=1e-4, atol=1e-5)


# --- the in-batch loss ----------------------------------------------------------------------------


@rung(
    hints=[
        "With all scores equal, a user's own item is one of four equally likely candidates.",
        "It is a softmax over the items of the batch, not a yes or no for each pair; and a mean "
        "over the rows, not a sum.",
        "-log(1 / 4) = log 4: the cross-entropy of the (B, B) scores, where row i has the label i.",
    ]
)
def test_equal_scores():
    """A batch of B pairs with equal scores has the loss log B."""
    user = torch.zeros(4, 3, device=device())
    item = torch.randn(4, 3, generator=generator(0)).to(device())
    loss = losses.in_batch_softmax_loss(user, item, temperature=0.5)
    assert_scalar(loss, math.log(4))


@rung(
    hints=[
        "A small temperature makes the softmax sharper, a large one flatter.",
        "Cosines lie in [-1, 1]: they have to be stretched, not shrunk.",
        "s = user @ item.T / temperature",
    ]
)
def test_temperature_divides():
    """The scores are divided by the temperature: the smaller it is, the sharper the softmax."""
    user = item = torch.eye(4, device=device())
    sharp = losses.in_batch_softmax_loss(user, item, temperature=0.1)
    assert_scalar(sharp, math.log(1 + 3 * math.exp(-10)))
    flat = losses.in_batch_softmax_loss(user, item, temperature=2.0)
    assert_scalar(flat, math.log(1 + 3 * math.exp(-0.5)))


@rung(
    hints=[
        "Row i asks: which of the items of the batch did user i choose?",
        "The sum in the denominator runs over j, the items, and holds the positive too. Gradients "
        "reach user and item through every score.",
        "scores[i, j] = <user[i], item[j]> / temperature; normalise along dim=1 (log_softmax or "
        "logsumexp), take the diagonal, negate, average.",
    ]
)
def test_candidates_are_items():
    """The candidates of a user are the items of the batch; loss and gradients, golden values."""
    assert_golden(golden("golden.json")["in_batch"]["plain"])


@rung(
    hints=[
        "The temperature may be a parameter that is learned.",
        "float(temperature) or .item() cuts it out of the graph; dividing by the tensor does not.",
    ]
)
def test_learned_temperature():
    """A temperature that is a 0-dim tensor counts like a number and gets a gradient."""
    case = golden("golden.json")["in_batch"]["plain"]
    user, item = tensor(case["arguments"]["user"]), tensor(case["arguments"]["item"])
    temperature = tensor(case["arguments"]["temperature"])
    loss = losses.in_batch_softmax_loss(user, item, temperature=temperature)
    assert_scalar(loss, case["expected"]["loss"], **FLOAT32)
    assert_gradients(loss, case["expected"], {"temperature": temperature}, rtol=1e-4, atol=1e-5)


@rung(
    hints=[
        "A popular item is a candidate more often than it deserves; its score is lowered by log Q.",
        "A softmax ignores a constant in a row, so the correction has to differ between the "
        "columns. It is the given log_q, not a count within this batch.",
        "scores = user @ item.T / temperature - log_q[None, :]",
    ]
)
def test_log_q_of_the_candidate():
    """log_q[j] is subtracted from the score of candidate j, of every row, the positive included."""
    user = torch.zeros(3, 2, device=device())
    item = torch.randn(3, 2, generator=generator(1)).to(device())
    log_q = torch.tensor([0.5, 0.3, 0.2], device=device()).log()
    loss = losses.in_batch_softmax_loss(user, item, temperature=1.0, log_q=log_q)
    odds = [2, 10 / 3, 5]  # 1 / q
    expected = sum(math.log(sum(odds) / odd) for odd in odds) / 3
    assert_scalar(loss, expected, **FLOAT32)


@rung(
    hints=[
        "Which comes first, the division or the subtraction?",
        "log_q is a log-probability on the scale of the final scores: the temperature must not "
        "stretch it.",
        "(user @ item.T) / temperature - log_q, not (user @ item.T - log_q) / temperature",
    ]
)
def test_log_q_after_the_temperature():
    """log_q is subtracted after the division by the temperature; golden values."""
    assert_golden(golden("golden.json")["in_batch"]["log_q"])


@rung(
    hints=[
        "Rows 0 and 1 hold the same item: for each of them the other is no negative.",
        "A score of 0 is a competitor (exp(0) = 1). And each row's own entry has to stay.",
        "hit = item_ids[:, None] == item_ids[None, :], less its diagonal; "
        "scores.masked_fill(hit, -inf)",
    ]
)
def test_accidental_hits():
    """With item_ids, the same item in another row leaves the denominator."""
    eye = torch.eye(3, device=device())
    scores = torch.tensor([[-5.0, -4, -8], [-6, -5, -8], [-9, -7, -4]], device=device())
    item_ids = torch.tensor([7, 7, 3], device=device())
    rows = [[-5, -8], [-5, -8], [-4, -9, -7]]  # own score first
    expected = sum(math.log(sum(math.exp(s) for s in row)) - row[0] for row in rows) / 3
    loss = losses.in_batch_softmax_loss(scores, eye, temperature=1.0, item_ids=item_ids)
    assert_scalar(loss, expected, **FLOAT32)
    lower = scores - 1000  # a hit is out of the race even if all others are far behind
    loss = losses.in_batch_softmax_loss(lower, eye, temperature=1.0, item_ids=item_ids)
    assert_scalar(loss, expected, what="all scores 1000 lower", rtol=1e-3)


@rung(
    hints=[
        "Two equal vectors may be two items, and one item may have two vectors (dropout).",
        "Compare item_ids, as the integers they are: floats mix up large ones.",
        "item_ids[:, None] == item_ids[None, :] knows everything that is needed.",
    ]
)
def test_items_are_told_apart_by_id():
    """Whether two rows hold the same item is a matter of ids, never of vectors."""
    user, item = pair(2, 5, 3, torch.float64)
    item = item.detach()
    item[3] = item[1]  # two items with one vector: both stay candidates
    numbers = {"user": user.detach().cpu().numpy(), "item": item.cpu().numpy(), "temperature": 0.5}
    for ids in ([4, 0, 2, 3, 1], [2**53, 2**53 + 1, 5, 2**32 + 5, 2**53], [6, 6, 6, 6, 6]):
        item_ids = torch.tensor(ids, device=device())
        loss = losses.in_batch_softmax_loss(user, item, temperature=0.5, item_ids=item_ids)
        what = f"item_ids = {ids}"
        assert_scalar(loss, definition(**numbers, item_ids=ids), what=what, rtol=1e-5)
    item_ids = torch.tensor([3, 3, 1, 2, 1], dtype=torch.int32, device=device())
    loss = losses.in_batch_softmax_loss(user, item, temperature=0.5, item_ids=item_ids)
    assert_scalar(loss, definition(**numbers, item_ids=item_ids.tolist()), rtol=1e-5)


@rung(
    hints=[
        "A weighted mean is a sum of w times loss, divided by something.",
        "Divide by the sum of the weights, not by B. A row of weight 0 is still a candidate of "
        "the others. A sum of 0 must not become 0 / 0.",
        "(w * row_loss).sum() / w.sum(), with the divisor replaced by 1 where it is 0",
    ]
)
def test_sample_weights():
    """sample_weight makes a weighted mean of the rows' losses; weights that sum to 0 give 0."""
    assert_golden(golden("golden.json")["in_batch"]["sample_weight"])
    user, item = pair(3, 4, 3)
    numbers = [x.detach().cpu().double().numpy() for x in (user, item)]
    sample_weight = torch.tensor([0.01, 0.02, 0.0, 0.05], device=device())
    loss = losses.in_batch_softmax_loss(user, item, temperature=0.5, sample_weight=sample_weight)
    expected = definition(*numbers, 0.5, sample_weight=sample_weight.tolist())
    assert_scalar(loss, expected, what="weights that sum to 0.08", **FLOAT32)
    sample_weight = torch.zeros(4, device=device())
    loss = losses.in_batch_softmax_loss(user, item, temperature=0.5, sample_weight=sample_weight)
    assert_scalar(loss, 0.0, what="all weights are 0")
    zeros = {"user": np.zeros((4, 3)), "item": np.zeros((4, 3))}
    assert_gradients(loss, zeros, {"user": user, "item": item})


@rung(
    hints=[
        "The other direction asks: which user of the batch chose this item?",
        "It is the mean of the two losses. Its candidates are users, so logQ does not enter; the "
        "accidental hits are the same.",
        "(loss(scores - log_q) + loss(scores.T)) / 2, both masked and weighted alike",
    ]
)
def test_symmetric():
    """symmetric averages with the loss of items over users, where logQ has no part."""
    assert_golden(golden("golden.json")["in_batch"]["symmetric"])
    user, item = pair(4, 5, 3)
    log_q = torch.tensor([0.4, 0.03, 0.2, 0.01, 0.1], device=device()).log()
    loss = losses.in_batch_softmax_loss(user, item, temperature=0.5, log_q=log_q, symmetric=True)
    numbers = [x.detach().cpu().double().numpy() for x in (user, item)]
    expected = definition(*numbers, 0.5, log_q=log_q.tolist(), symmetric=True)
    assert_scalar(loss, expected, what="with log_q", **FLOAT32)


@rung(
    hints=[
        "Each option works alone; now they meet. Take one away after the other.",
        "Weights act on rows after the row losses, in both directions; the mask acts on both "
        "directions; log_q on one.",
    ]
)
def test_all_together():
    """All options at once, on random batches in float64: loss and every gradient."""
    assert_golden(golden("golden.json")["in_batch"]["all"])
    for seed, (batch, width, symmetric) in enumerate([(6, 2, True), (4, 7, False)]):
        # every other column of a wider tensor: not contiguous
        wide = [
            tensor(
                torch.randn(batch, 2 * width, generator=generator(10 * seed + side)), torch.float64
            )
            for side in (1, 2)
        ]
        user, item = (x.detach()[:, ::2].requires_grad_() for x in wide)
        temperature = tensor(0.3 + seed, torch.float64)
        options = constants(
            {
                "item_ids": [3, 8, 3, 1, 8, 0][:batch],
                "log_q": np.log([0.3, 0.02, 0.3, 0.1, 0.02, 0.2])[:batch].tolist(),
                "sample_weight": [0.2, 1.0, 3.5, 0.7, 0.0, 2.0][:batch],
                "symmetric": symmetric,
            },
            torch.float64,
        )
        loss = losses.in_batch_softmax_loss(user, item, temperature=temperature, **options)
        leaves = {"user": user, "item": item, "temperature": temperature}
        numbers = {name: x.detach().cpu().numpy() for name, x in leaves.items()}
        fixed = {name: x.tolist() if hasattr(x, "tolist") else x for name, x in options.items()}

        def exact(fixed=fixed, **inputs):
            return definition(**inputs, **fixed)

        assert_scalar(loss, exact(**numbers), rtol=1e-9)
        # a loss is often one term of several: its gradients scale with what comes from above
        expected = {name: 3 * slope for name, slope in slopes(exact, numbers).items()}
        assert_gradients(3 * loss, expected, leaves, rtol=1e-6, atol=1e-7)


@rung(
    hints=[
        "exp(1000) is infinite, and the log of a softmax that rounds to 0 is too.",
        "Let one function do log, sum and exp together; it subtracts the maximum first.",
        "torch.logsumexp, F.log_softmax or F.cross_entropy, never torch.exp or softmax(...).log()",
    ]
)
def test_small_temperatures():
    """Loss and gradients are finite and right at temperatures as small as 0.001."""
    angle = torch.tensor([[0.0, 1.0, 3.0, 4.1], [0.3, 0.9, 2.5, 3.0]], dtype=torch.float64)
    vectors = torch.stack([angle.cos(), angle.sin()], dim=-1)
    numbers = {"user": vectors[0].numpy(), "item": vectors[1].numpy()}
    item_ids = torch.tensor([5, 1, 2, 5], device=device())

    def exact(**inputs):
        return definition(**inputs, temperature=0.001, item_ids=item_ids.tolist())

    for dtype, rtol in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        user, item = tensor(vectors[0], dtype), tensor(vectors[1], dtype)
        loss = losses.in_batch_softmax_loss(user, item, temperature=0.001, item_ids=item_ids)
        assert_scalar(loss, exact(**numbers), rtol=rtol)
        expected = slopes(exact, numbers, step=1e-7)
        leaves = {"user": user, "item": item}
        assert_gradients(loss, expected, leaves, rtol=1e-3, atol=1e-2)  # they are of size 1000


@rung(
    hints=[
        "bfloat16 keeps three digits: too few for a difference of large numbers.",
        "Convert user and item before the matrix product. Under autocast that is not enough: the "
        "product itself would run in bfloat16.",
        "dtype = torch.promote_types(user.dtype, torch.float32); "
        "with torch.autocast(user.device.type, enabled=False): ...",
    ]
)
def test_precision():
    """The loss is computed in float32 at least: from bfloat16 and float16, and under autocast."""
    for dtype in (torch.bfloat16, torch.float16):
        user, item = pair(5, 6, 4, dtype)
        loss = losses.in_batch_softmax_loss(user, item, temperature=0.1)
        numbers = {"user": user, "item": item}
        numbers = {name: x.detach().cpu().double().numpy() for name, x in numbers.items()}
        expected = definition(**numbers, temperature=0.1)
        assert_scalar(loss, expected, what=f"{dtype} inputs", rtol=1e-5, atol=1e-5)
    user, item = pair(6, 6, 4)
    numbers = [x.detach().cpu().double().numpy() for x in (user, item)]
    with torch.autocast(device().type, dtype=torch.bfloat16):
        loss = losses.in_batch_softmax_loss(user, item, temperature=0.1)
    assert_scalar(loss, definition(*numbers, 0.1), what="under autocast", **FLOAT32)


@rung(
    hints=[
        "With one candidate there is nothing to confuse.",
        "Name the axis when you reduce or squeeze, and do not divide by B - 1. Operations that "
        "end in _ change what the caller handed in.",
    ]
)
def test_one_pair_and_untouched_inputs():
    """A batch of one has the loss 0 and zero gradients; inputs are not changed."""
    user, item = pair(7, 1, 3)
    loss = losses.in_batch_softmax_loss(user, item, temperature=0.1, symmetric=True)
    assert_scalar(loss, 0.0)
    zeros = {"user": np.zeros((1, 3)), "item": np.zeros((1, 3))}
    assert_gradients(loss, zeros, {"user": user, "item": item}, atol=1e-5)
    user, item = (x.detach() for x in pair(8, 4, 3))
    options = constants(
        {
            "log_q": [-1.0, -2.0, -3.0, -1.0],
            "item_ids": [1, 2, 3, 1],
            "sample_weight": [1.0, 0.5, 2.0, 4.0],
        }
    )
    given = {"user": user, "item": item, **options}
    before = {name: x.clone() for name, x in given.items()}
    losses.in_batch_softmax_loss(user, item, temperature=0.1, **options)
    for name, x in given.items():
        check(torch.equal(x, before[name]), "unchanged by the call", came_back=x, what=name)


@rung(
    hints=[
        "A shape that broadcasts by accident gives a loss that is merely wrong: refuse it.",
        "log_q of shape (B, 1) would be subtracted from rows. Compare shapes with (B,) first.",
        'raise ValueError(f"log_q must have shape {(B,)}, not {tuple(log_q.shape)}")',
    ]
)
def test_bad_input():
    """Shapes that do not fit, an empty batch and a temperature of 0 or less are a ValueError."""
    user, item = (x.detach() for x in pair(9, 4, 3))
    loss = losses.in_batch_softmax_loss
    for users, items in (
        (user, item[:3]),
        (user, item[:, :2]),
        (user[0], item[0]),
        (user[:0], item[:0]),
    ):
        shapes = f"user{list(users.shape)}, item{list(items.shape)}"
        expect_error(
            lambda u=users, i=items: loss(u, i, temperature=0.1),
            ValueError,
            call=f"in_batch_softmax_loss({shapes}, temperature=0.1)",
        )
    for temperature in (0, 0.0, -0.1):
        expect_error(
            lambda t=temperature: loss(user, item, temperature=t),
            ValueError,
            call=f"in_batch_softmax_loss(user, item, temperature={temperature})",
        )
    for name in ("item_ids", "log_q", "sample_weight"):
        for shape in ((4, 1), (3,), (1,), ()):
            value = torch.ones(shape, dtype=torch.int64 if name == "item_ids" else torch.float32)
            options = {"temperature": 0.1, name: value.to(device())}
            expect_error(
                lambda o=options: loss(user, item, **o),
                ValueError,
                call=f"in_batch_softmax_loss(user[4, 3], item[4, 3], temperature=0.1, "
                f"{name}={list(shape)})",
            )


# --- the full softmax -----------------------------------------------------------------------------


@rung(
    hints=[
        "The candidates are all items of the catalogue, and target says which one was chosen.",
        "Nothing is sampled, so there is no logQ and no accidental hit; two users may have chosen "
        "the same item.",
        "Cross-entropy of user @ catalogue.T / temperature with the label target.",
    ]
)
def test_full_softmax():
    """The full softmax has every item of the catalogue as a candidate; golden values."""
    for case in golden("golden.json")["full"].values():
        options = constants(case["arguments"])
        target, temperature = options["target"], options["temperature"]
        user, catalogue = tensor(options["user"]), tensor(options["catalogue"])
        more = {name: options[name] for name in ("sample_weight",) if name in options}
        loss = losses.full_softmax_loss(user, catalogue, target, temperature=temperature, **more)
        assert_scalar(loss, case["expected"]["loss"], **FLOAT32)
        leaves = {"user": user, "catalogue": catalogue}
        assert_gradients(loss, case["expected"], leaves, rtol=1e-4, atol=1e-5)


@rung(
    hints=[
        "Row i of the batch holds item target[i]: then both forms have the same candidates.",
        "What the in-batch form takes care of holds here too: learned and small temperatures, "
        "low precision, autocast, weights that sum to 0.",
        "Let both functions share the helpers: scores, row losses, the weighted mean.",
    ]
)
def test_full_softmax_is_the_limit():
    """On a batch that holds each item once, both forms agree, at any temperature and precision."""
    order = torch.tensor([2, 0, 4, 1, 3], device=device())
    for dtype, value in ((torch.float64, 0.2), (torch.float32, 0.002), (torch.bfloat16, 0.1)):
        draw = torch.randn(2, 5, 3, generator=generator(11), dtype=torch.float64)
        user, catalogue = (tensor(x, dtype) for x in draw)
        temperature = tensor(value, torch.float64 if dtype == torch.float64 else torch.float32)
        loss = losses.full_softmax_loss(user, catalogue, order, temperature=temperature)
        numbers = {"user": user, "item": catalogue[order], "temperature": temperature}
        numbers = {name: x.detach().cpu().double().numpy() for name, x in numbers.items()}
        rtol = 1e-9 if dtype == torch.float64 else 1e-5
        assert_scalar(loss, definition(**numbers), what=f"{dtype} inputs", rtol=rtol, atol=1e-5)
        if dtype == torch.float64:
            expected = slopes(definition, numbers)
            leaves = {"user": user, "temperature": temperature}
            assert_gradients(loss, expected, leaves, rtol=1e-6, atol=1e-7)
    user, catalogue = (x.detach() for x in pair(12, 5, 3))
    numbers = [x.cpu().double().numpy() for x in (user, catalogue[order])]
    with torch.autocast(device().type, dtype=torch.bfloat16):
        loss = losses.full_softmax_loss(user, catalogue, order, temperature=0.1)
    assert_scalar(loss, definition(*numbers, 0.1), what="under autocast", **FLOAT32)
    sample_weight = torch.zeros(5, device=device())
    loss = losses.full_softmax_loss(
        user, catalogue, order, temperature=0.1, sample_weight=sample_weight
    )
    assert_scalar(loss, 0.0, what="all weights are 0")


@rung(
    hints=[
        "target is (B,), one label a row; user and catalogue share their width D.",
        "Check shapes and the temperature first, and say what was expected.",
    ]
)
def test_full_softmax_bad_input():
    """The full softmax refuses shapes that do not fit, an empty batch and a bad temperature."""
    user, catalogue = torch.ones(4, 3, device=device()), torch.ones(6, 3, device=device())
    target = torch.tensor([5, 0, 1, 1], device=device())
    good = {"user": user, "catalogue": catalogue, "target": target, "temperature": 0.1}
    for name, value in (
        ("catalogue", catalogue[:, :2]),
        ("catalogue", catalogue[0]),
        ("user", user[0]),
        ("target", target[:3]),
        ("target", target[:, None]),
        ("sample_weight", torch.ones(4, 1, device=device())),
        ("sample_weight", torch.ones(1, device=device())),
        ("temperature", 0.0),
        ("temperature", -1),
    ):
        text = list(value.shape) if isinstance(value, torch.Tensor) else value
        expect_error(
            lambda o={**good, name: value}: losses.full_softmax_loss(**o),
            ValueError,
            call=f"full_softmax_loss(...) with {name}: {text}",
        )
    empty = {**good, "user": user[:0], "target": target[:0]}
    expect_error(
        lambda: losses.full_softmax_loss(**empty),
        ValueError,
        call="full_softmax_loss(user[0, 3], catalogue[6, 3], target[0])",
    )
