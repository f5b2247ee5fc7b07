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
    """Options as a caller gives them: ids, log_q and weights as tensors, the others as they are."""
    kinds = {"item_ids": torch.int64, "target": torch.int64, "log_q": dtype, "sample_weight": dtype}
    return {
        name: torch.tensor(value, dtype=kinds[name], device=device()) if name in kinds else value
        for name, value in options.items()
    }


def pair(seed, batch, width, dtype=torch.float32):
    """A random user and item batch, on different scales."""
    draw = torch.randn(2, batch, width, generator=generator(seed), dtype=torch.float64)
    return tensor(draw[0], dtype), tensor(0.8 * draw[1] + 0.3 * draw[0], dtype)


def exact(
    user,
    item,
    temperature,
    *,
    target=None,
    item_ids=None,
    log_q=None,
    sample_weight=None,
    symmetric=False,
):
    """The docstring's formulas number by number, in float64: the loss and its gradients."""
    scores = user @ item.T / temperature
    weight = [1.0] * len(scores) if sample_weight is None else sample_weight
    slope = np.zeros_like(scores)  # of the loss with respect to each score
    directions = [(scores, slope, [0.0] * scores.shape[1] if log_q is None else log_q)]
    if symmetric:
        directions.append((scores.T, slope.T, [0.0] * len(scores)))
    loss = 0.0
    for s, ds, correction in directions:
        for i in range(len(s)):
            own = i if target is None else target[i]
            candidates = [
                j
                for j in range(s.shape[1])
                if j == own or item_ids is None or item_ids[j] != item_ids[i]
            ]
            corrected = {j: s[i, j] - correction[j] for j in candidates}
            top = max(corrected.values())
            odds = {j: math.exp(value - top) for j, value in corrected.items()}
            total = math.fsum(odds.values())
            share = weight[i] / math.fsum(weight) / len(directions)
            loss += share * (top - corrected[own] + math.log(total))
            for j in odds:
                ds[i, j] += share * (odds[j] / total - (j == own))
    return {
        "loss": loss,
        "user": slope @ item / temperature,
        "item": slope.T @ user / temperature,
        "temperature": -(slope * scores).sum() / temperature,
    }


def plain(user, item, label, temperature):
    """The loss without options, for sizes at which `exact` is slow."""
    user, item = (x.cpu().double().numpy() for x in (user, item))
    scores = user @ item.T / temperature
    return np.mean(np.log(np.exp(scores).sum(1)) - scores[np.arange(len(scores)), label])


def assert_gradients(loss, expected, inputs, *, what="", **tolerance):
    """The gradients of `loss` with respect to `inputs`, both by name."""
    check(
        isinstance(loss, torch.Tensor) and loss.requires_grad,
        "a tensor that can be differentiated (no .item(), no detach, no no_grad)",
        came_back=loss,
    )
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    for (name, value), grad in zip(inputs.items(), found, strict=True):
        of = f"gradient of the loss with respect to {name}{what and ', '}{what}"
        if grad is None:
            fail(expected="a gradient", came_back="none at all", what=of)
        assert_close(grad, expected[name], like=value, what=of, **tolerance)


def assert_golden(case):
    """Loss and all gradients of a golden case of the in-batch loss, in float32."""
    given = golden("golden.json")["in_batch"][case]
    options = constants(given["arguments"])
    user, item, temperature = (
        tensor(options.pop(name)) for name in ("user", "item", "temperature")
    )
    loss = losses.in_batch_softmax_loss(user, item, temperature=temperature, **options)
    assert_scalar(loss, given["expected"]["loss"], **FLOAT32)
    inputs = {"user": user, "item": item, "temperature": temperature}
    assert_gradients(loss, given["expected"], inputs, rtol=1e-4, atol=1e-5)


def assert_golden_full(case):
    """The same for the full softmax."""
    given = golden("golden.json")["full"][case]
    options = constants(given["arguments"])
    user, catalogue = tensor(options.pop("user")), tensor(options.pop("catalogue"))
    temperature = tensor(options.pop("temperature"))
    loss = losses.full_softmax_loss(user, catalogue, temperature=temperature, **options)
    assert_scalar(loss, given["expected"]["loss"], **FLOAT32)
    inputs = {"user": user, "catalogue": catalogue, "temperature": temperature}
    assert_gradients(loss, given["expected"], inputs, rtol=1e-4, atol=1e-5)


def assert_exact(user, item, temperature, options, *, autocast=False, **tolerances):
    """Loss and gradients of the in-batch loss on these leaves are those of the definition."""
    with torch.autocast(device().type, dtype=torch.bfloat16, enabled=autocast):
        loss = losses.in_batch_softmax_loss(user, item, temperature=temperature, **options)
    compare(loss, {"user": user, "item": item}, temperature, options, **tolerances)


def assert_exact_full(user, catalogue, temperature, options, *, autocast=False, **tolerances):
    """The same for the full softmax."""
    with torch.autocast(device().type, dtype=torch.bfloat16, enabled=autocast):
        loss = losses.full_softmax_loss(user, catalogue, temperature=temperature, **options)
    compare(loss, {"user": user, "catalogue": catalogue}, temperature, options, **tolerances)


def compare(loss, inputs, temperature, options, *, value, slope, what=""):
    """`value` and `slope` are the tolerances of the loss and of its gradients."""
    vectors = [x.detach().cpu().double().numpy() for x in inputs.values()]
    fixed = {name: x.tolist() if hasattr(x, "tolist") else x for name, x in options.items()}
    number = temperature.item() if isinstance(temperature, torch.Tensor) else temperature
    expected = exact(*vectors, number, **fixed)
    expected["catalogue"] = expected["item"]
    assert_scalar(loss, expected["loss"], what=what, **value)
    if isinstance(temperature, torch.Tensor):
        inputs = {**inputs, "temperature": temperature}
    # a loss is often one term of several: its gradients scale with what comes from above
    tripled = {name: 3 * x for name, x in expected.items()}
    assert_gradients(3 * loss, tripled, inputs, what=what, **slope)


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
    """A batch of B pairs with equal scores has the loss log B, and a batch of one the loss 0."""
    for batch in (4, 7, 1):
        user = torch.zeros(batch, 3, device=device())
        item = torch.randn(batch, 3, generator=generator(0)).to(device())
        loss = losses.in_batch_softmax_loss(user, item, temperature=0.5)
        assert_scalar(loss, math.log(batch), **FLOAT32)


@rung(
    hints=[
        "A small temperature makes the softmax sharper, a large one flatter.",
        "Cosines lie in [-1, 1]: they have to be stretched, not shrunk. Nothing else scales them.",
        "s = user @ item.T / temperature",
    ]
)
def test_temperature_divides():
    """The scores are divided by the temperature: the smaller it is, the sharper the softmax."""
    user = item = torch.eye(4, device=device())
    for temperature in (0.1, 2, 0.5):
        loss = losses.in_batch_softmax_loss(user, item, temperature=temperature)
        expected = math.log(1 + 3 * math.exp(-1 / temperature))
        assert_scalar(loss, expected, rtol=1e-5, atol=1e-6)
    user, item = 3 * user, 2 * item
    loss = losses.in_batch_softmax_loss(user, item, temperature=3.0)
    expected = math.log(1 + 3 * math.exp(-2))
    assert_scalar(loss, expected, what="vectors of length 3 and 2: taken as they are", **FLOAT32)


@rung(
    hints=[
        "Row i asks: which of the items of the batch did user i choose?",
        "The sum in the denominator runs over j, the items, and holds the positive too. Gradients "
        "reach user and item through every score, and a temperature that is a tensor too: "
        "float() or .item() would cut it out of the graph.",
        "scores[i, j] = <user[i], item[j]> / temperature; normalise along dim=1 (log_softmax or "
        "logsumexp), take the diagonal, negate, average.",
    ]
)
def test_candidates_are_items():
    """The candidates of a user are the items of the batch; loss and gradients, golden values."""
    assert_golden("plain")
    user, item = (x.detach() for x in pair(15, 301, 3))
    loss = losses.in_batch_softmax_loss(user, item, temperature=0.5)
    expected = plain(user, item, np.arange(301), 0.5)
    assert_scalar(loss, expected, what="a batch of 301", **FLOAT32)


@rung(
    hints=[
        "Rows 0 and 1 hold the same item: for each of them the other is no negative.",
        "A score of 0 is a competitor (exp(0) = 1). Each row's own entry has to stay, and so has "
        "each row's term.",
        "hit = item_ids[:, None] == item_ids[None, :], less its diagonal; "
        "scores.masked_fill(hit, -inf)",
    ]
)
def test_accidental_hits():
    """With item_ids, the same item in another row leaves the denominator, and only there."""
    eye = torch.eye(3, device=device())
    scores = torch.tensor([[-5.0, -4, -8], [-6, -5, -8], [-9, -7, -4]], device=device())
    item_ids = torch.tensor([7, 7, 3], device=device())
    rows = [[-5, -8], [-5, -8], [-4, -9, -7]]  # own score first
    expected = sum(math.log(sum(math.exp(s) for s in row)) - row[0] for row in rows) / 3
    loss = losses.in_batch_softmax_loss(scores, eye, temperature=1.0, item_ids=item_ids)
    assert_scalar(loss, expected, **FLOAT32)
    lower, eye64 = scores.double() - 20000, eye.double()
    loss = losses.in_batch_softmax_loss(lower, eye64, temperature=1.0, item_ids=item_ids)
    assert_scalar(loss, expected, what="all scores 20000 lower: the hit too is out", rtol=1e-6)
    ahead = scores.clone()
    ahead[0, 1] = ahead[1, 0] = 1000.0
    loss = losses.in_batch_softmax_loss(ahead, eye, temperature=1.0, item_ids=item_ids)
    assert_scalar(loss, expected, what="the hits' scores are 1000: out all the same", **FLOAT32)
    assert_golden("item_ids")


@rung(
    hints=[
        "Two equal vectors may be two items, and one item may have two vectors (dropout).",
        "Compare item_ids, as the integers they are: floats mix up large ones, and no id is "
        "special.",
        "item_ids[:, None] == item_ids[None, :] knows everything that is needed.",
    ]
)
def test_items_are_told_apart_by_id():
    """Whether two rows hold the same item is a matter of ids, never of vectors."""
    user, item = pair(2, 5, 3, torch.float64)
    item = item.detach()
    item[3] = item[1]  # two items with one vector: both stay candidates
    item.requires_grad_()
    for ids in (
        [4, 0, 2, 3, 1],
        [0, 0, -1, 1, -1],
        [2**53, 2**53 + 1, 5, 2**32 + 5, 2**53],
        [16777217, 16777216, 16777217, 100000, 100001],
        [6, 6, 6, 6, 6],
    ):
        for dtype in (torch.int64, torch.int32)[: 1 + (max(ids) < 2**31)]:
            assert_exact(
                user,
                item,
                0.5,
                {"item_ids": torch.tensor(ids, dtype=dtype, device=device())},
                what=f"item_ids = {ids}",
                value={"rtol": 1e-5, "atol": 1e-9},
                slope={"rtol": 1e-4, "atol": 1e-6},
            )


@rung(
    hints=[
        "A popular item is a candidate more often than it deserves; its score is lowered by log Q, "
        "which is a log-probability: the temperature must not stretch it.",
        "A softmax ignores a constant in a row, so the correction has to differ between the "
        "columns. It is the given log_q, not a count within this batch.",
        "scores = user @ item.T / temperature - log_q[None, :]",
    ]
)
def test_log_q():
    """log_q[j] is subtracted from the final score of candidate j in each row, its own included."""
    user = torch.zeros(3, 2, device=device())
    item = torch.randn(3, 2, generator=generator(1)).to(device())
    log_q = torch.tensor([0.5, 0.3, 0.2], device=device()).log()
    item_ids = torch.tensor([4, 9, 1], device=device())  # each once: nothing to count in the batch
    odds = [2, 10 / 3, 5]  # 1 / q
    expected = sum(math.log(sum(odds) / odd) for odd in odds) / 3
    for options in ({"log_q": log_q}, {"log_q": log_q, "item_ids": item_ids}):
        loss = losses.in_batch_softmax_loss(user, item, temperature=0.5, **options)
        assert_scalar(loss, expected, what="all inner products are 0", **FLOAT32)
    assert_golden("log_q")


@rung(
    hints=[
        "A weighted mean is a sum of w times loss, divided by something.",
        "Divide by the sum of the weights, not by B. A row of weight 0 is still a candidate of "
        "the others. A sum of 0 must not become 0 / 0, in the gradient neither.",
        "(w * row_loss).sum() / w.sum(), with the divisor replaced by 1 where it is 0",
    ]
)
def test_sample_weights():
    """sample_weight makes a weighted mean of the rows' losses; weights that sum to 0 give 0."""
    assert_golden("sample_weight")
    user, item = pair(3, 4, 3)
    for scale in (0.01, 100.0, 1e-7, 1e-10):
        sample_weight = scale * torch.tensor([1.0, 2.0, 0.0, 5.0], device=device())
        assert_exact(
            user,
            item,
            0.5,
            {"sample_weight": sample_weight},
            what=f"sample_weight = {scale:g} * [1, 2, 0, 5]",
            value=FLOAT32,
            slope={"rtol": 1e-4, "atol": 1e-5},
        )
    sample_weight = torch.zeros(4, device=device())
    loss = losses.in_batch_softmax_loss(user, item, temperature=0.5, sample_weight=sample_weight)
    assert_scalar(loss, 0.0, what="all weights are 0")
    zeros = {"user": np.zeros((4, 3)), "item": np.zeros((4, 3))}
    assert_gradients(loss, zeros, {"user": user, "item": item}, what="all weights are 0")


@rung(
    hints=[
        "The other direction asks: which user of the batch chose this item?",
        "It is the mean of the two losses. Its candidates are users, so logQ does not enter; the "
        "accidental hits and the weights are the same.",
        "(loss(scores - log_q) + loss(scores.T)) / 2, both masked and weighted alike",
    ]
)
def test_symmetric():
    """symmetric averages with the loss of items over users, where logQ has no part."""
    assert_golden("symmetric")
    user, item = pair(4, 5, 3)
    options = constants(
        {
            "log_q": np.log([0.4, 0.03, 0.2, 0.01, 0.1]).tolist(),
            "item_ids": [3, 8, 3, 1, 8],
            "sample_weight": [0.2, 1.0, 3.5, 0.0, 2.0],
        }
    )
    for name, given in options.items():
        assert_exact(
            user,
            item,
            0.5,
            {"symmetric": True, name: given},
            what=f"symmetric with {name}",
            value=FLOAT32,
            slope={"rtol": 1e-4, "atol": 1e-5},
        )
    assert_golden("all")


@rung(
    hints=[
        "The candidates are all items of the catalogue, and target says which one was chosen.",
        "Nothing is sampled, so there is no logQ and no accidental hit; two users may have chosen "
        "the same item. Temperature and weights mean what they mean in the batch.",
        "Cross-entropy of user @ catalogue.T / temperature with the label target, then the same "
        "weighted mean.",
    ]
)
def test_full_softmax():
    """The full softmax has every item of the catalogue as a candidate; golden values."""
    assert_golden_full("plain")
    assert_golden_full("sample_weight")
    user, catalogue = (x.detach() for x in pair(12, 5, 3))
    order = torch.tensor([2, 0, 4, 1, 3], device=device())
    in_batch = losses.in_batch_softmax_loss(user, catalogue[order], temperature=0.2)
    loss = losses.full_softmax_loss(user, catalogue, order, temperature=0.2)
    what = "a batch that holds each item once: as in_batch_softmax_loss"
    assert_scalar(loss, in_batch.item(), what=what, **FLOAT32)
    user, catalogue = pair(16, 301, 3)
    user, catalogue, target = user.detach()[:7], catalogue.detach(), 43 * torch.arange(7)
    loss = losses.full_softmax_loss(user, catalogue, target.to(device()), temperature=0.5)
    expected = plain(user, catalogue, target.numpy(), 0.5)
    assert_scalar(loss, expected, what="a catalogue of 301", **FLOAT32)
    user, catalogue = pair(3, 4, 3)
    target = torch.tensor([1, 3, 1, 0], device=device())
    tiny = 1e-7 * torch.tensor([1.0, 2.0, 0.0, 5.0], device=device())
    options = {"target": target, "sample_weight": tiny}
    slope = {"rtol": 1e-4, "atol": 1e-5}
    what = "sample_weight = 1e-7 * [1, 2, 0, 5]"
    assert_exact_full(user, catalogue, 0.2, options, what=what, value=FLOAT32, slope=slope)
    none = torch.zeros(4, device=device())
    loss = losses.full_softmax_loss(user, catalogue, target, temperature=0.2, sample_weight=none)
    assert_scalar(loss, 0.0, what="all weights are 0")
    zeros = {"user": np.zeros((4, 3)), "catalogue": np.zeros((4, 3))}
    leaves = {"user": user, "catalogue": catalogue}
    assert_gradients(loss, zeros, leaves, what="all weights are 0")


# --- both losses ----------------------------------------------------------------------------------


@rung(
    hints=[
        "exp(1000) is infinite, and the log of a softmax that rounds to 0 is too.",
        "Let one function do log, sum and exp together; it subtracts the maximum first. No "
        "epsilon, no clamp.",
        "torch.logsumexp, F.log_softmax or F.cross_entropy, never torch.exp or softmax(...).log()",
    ]
)
def test_small_temperatures():
    """Loss and gradients are finite and right at temperatures as small as 0.001."""
    angle = torch.tensor([[0.0, 1.0, 3.0, 4.1], [0.3, 0.9, 2.5, 3.0]], dtype=torch.float64)
    vectors = torch.stack([angle.cos(), angle.sin()], dim=-1)
    in_batch = {"item_ids": torch.tensor([5, 1, 2, 5], device=device()), "symmetric": True}
    full = {"target": torch.tensor([2, 1, 3, 1], device=device())}
    slope = {"rtol": 1e-3, "atol": 1e-2}  # gradients of size 1000
    for dtype, rtol in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        user, item = tensor(vectors[0], dtype), tensor(vectors[1], dtype)
        for check_loss, options in ((assert_exact, in_batch), (assert_exact_full, full)):
            for temperature in (0.001, tensor(0.001, dtype)):
                check_loss(user, item, temperature, options, value={"rtol": rtol}, slope=slope)


@rung(
    hints=[
        "bfloat16 keeps three digits: too few for a difference of large numbers. float64 inputs "
        "keep their own precision.",
        "Convert user and item before the matrix product. Under autocast that is not enough: the "
        "product itself would run in bfloat16.",
        "dtype = torch.promote_types(user.dtype, torch.float32); "
        "with torch.autocast(user.device.type, enabled=False): ...",
    ]
)
def test_precision():
    """bfloat16 and float16 are computed in float32, autocast or not; float64 stays float64."""
    weight = {"sample_weight": [0.3, 2.0, 0.7, 1.1, 0.0, 5.0]}
    in_batch = {"symmetric": True, "item_ids": [3, 1, 4, 1, 5, 9], **weight}
    full = {"target": [5, 0, 1, 1, 3, 0], **weight}
    for check_loss, given in ((assert_exact, in_batch), (assert_exact_full, full)):
        options = constants(given)
        for dtype in (torch.bfloat16, torch.float16):
            user, item = pair(5, 6, 4, dtype)
            slope = {"rtol": 3e-2, "atol": 3e-2}  # rounded to bfloat16, perhaps twice
            what = f"{dtype} inputs"
            check_loss(user, item, 0.1, options, what=what, value=FLOAT32, slope=slope)
        user, item = (tensor(150 * x, torch.float16) for x in pair(5, 6, 4, torch.float64))
        value, slope = {"rtol": 1e-5, "atol": 1e-4}, {"rtol": 1e-2, "atol": 1e-2}
        what = "float16 inputs whose products are beyond 65504"
        check_loss(user, item, 500.0, options, what=what, value=value, slope=slope)
        user, item = pair(6, 6, 4)
        slope = {"rtol": 1e-4, "atol": 1e-4}
        more = {"value": FLOAT32, "slope": slope, "autocast": True, "what": "under autocast"}
        check_loss(user, item, tensor(0.1), options, **more)
        user, item = pair(6, 6, 4, torch.float64)
        options, temperature = constants(given, torch.float64), tensor(0.3, torch.float64)
        value, slope = {"rtol": 1e-9}, {"rtol": 1e-8, "atol": 1e-9}
        what = "float64 inputs"
        check_loss(user, item, temperature, options, what=what, value=value, slope=slope)


@rung(
    hints=[
        "A shape that broadcasts by accident gives a loss that is merely wrong: refuse it. And "
        "operations that end in _ change what the caller handed in.",
        "log_q of shape (B, 1) would be subtracted from rows. Compare shapes with (B,) first.",
        'raise ValueError(f"log_q must have shape {(B,)}, not {tuple(log_q.shape)}")',
    ]
)
def test_inputs():
    """Inputs are not changed; shapes that do not fit and temperatures <= 0 are a ValueError."""
    user, item = (x.detach() for x in pair(8, 4, 3))
    catalogue = torch.cat([item, -item]).detach()
    in_batch = {"user": user, "item": item, "temperature": torch.tensor(0.1, device=device())}
    full = {**in_batch, "catalogue": catalogue}
    del full["item"]
    full |= constants({"target": [5, 0, 7, 1], "sample_weight": [1.0, 0.5, 2.0, 4.0]})
    options = constants(
        {
            "log_q": [-1.0, -2.0, -3.0, -1.0],
            "item_ids": [1, 2, 3, 1],
            "sample_weight": [1.0, 0.5, 2.0, 4.0],
            "symmetric": True,
        }
    )
    for loss, given in (
        (losses.in_batch_softmax_loss, {**in_batch, **options}),
        (losses.full_softmax_loss, full),
    ):
        tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        before = {name: x.clone() for name, x in tensors.items()}
        loss(**given)
        for name, x in tensors.items():
            same = torch.equal(x, before[name])
            call = f"{loss.__name__}(...)"
            check(same, "unchanged by the call", came_back=x, call=call, what=name)

    def refused(function, given, **changes):
        told = {k: list(v.shape) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
        call = f"{function}(...) with {', '.join(f'{k}: {v}' for k, v in told.items())}"
        loss = getattr(losses, function)
        expect_error(lambda: loss(**{**given, **changes}), ValueError, call=call)

    name = "in_batch_softmax_loss"
    refused(name, in_batch, item=item[:3])
    refused(name, in_batch, item=item[:, :2])
    refused(name, in_batch, user=user[0], item=item[0])
    refused(name, in_batch, user=user[None], item=item[None])
    refused(name, in_batch, user=user[:0], item=item[:0])
    for temperature in (0, 0.0, -0.1):
        refused(name, in_batch, temperature=temperature)
    for option in ("item_ids", "log_q", "sample_weight"):
        for shape in ((4, 1), (3,), (1,), (), (4, 4)):
            refused(name, in_batch, **{option: options[option][0].expand(shape)})
    name = "full_softmax_loss"
    refused(name, full, catalogue=catalogue[:, :2])
    refused(name, full, catalogue=catalogue[0])
    refused(name, full, user=user[0])
    for shape in ((4, 1), (3,), ()):
        refused(name, full, target=full["target"][0].expand(shape))
    for shape in ((4, 1), (3,), (1,), ()):
        refused(name, full, sample_weight=full["sample_weight"][0].expand(shape))
    for temperature in (0.0, -1):
        refused(name, full, temperature=temperature)
    empty = {"target": full["target"][:0], "sample_weight": None}
    refused(name, full, user=user[:0], **empty)
