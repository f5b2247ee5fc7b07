"""Kata 01, embedding tables: what `models/embedding.py` must do, from the simplest on."""

import builtins
import random as python_random
import runpy
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from harness.spec import (
    assert_close,
    check,
    device,
    expect_error,
    fail,
    generator,
    golden,
    learner,
    rung,
)

embedding = learner("models.embedding")


# --- inputs and gradients -------------------------------------------------------------------------


def table_of(weight, **options):
    """The learner's table with these rows."""
    rows, width = weight.shape
    table = embedding.EmbeddingTable(rows, width, device=device(), dtype=weight.dtype, **options)
    table.load_state_dict({"weight": weight})
    return table


def integers(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=device())


def floats(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, device=device())


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(device(), dtype)


def expect(condition, expected, came_back, **where):
    """As `check`, with what came back in words."""
    if not condition:
        fail(came_back=str(came_back), expected=expected, **where)


def assert_gradients(out, upstream, expected, inputs, *, what="", **tolerance):
    """The gradients of `(out * upstream).sum()` with respect to `inputs`, both by name."""
    rest = f", {what}" if what else ""
    check(out.requires_grad, "a result that gradients flow through")
    for value in inputs.values():
        value.grad = None
    (out * upstream).sum().backward()
    for name, value in inputs.items():
        what, grad = f"gradient of {name}{rest}", value.grad
        if grad is None:
            fail(expected="a gradient", came_back="none at all", what=what)
        if grad.layout != torch.strided:
            fail(expected="a dense one", came_back=f"{grad.layout}", what=what)
        assert_close(grad, expected[name], like=value, what=what, **tolerance)


# --- the table ------------------------------------------------------------------------------------


@rung(
    hints=[
        "A module saves what it holds as parameters, under the name of the attribute.",
        "Assign an nn.Parameter of shape (num_embeddings, embedding_dim) in __init__, after "
        "super().__init__().",
        "self.weight = nn.Parameter(torch.empty(rows, width, device=device, dtype=dtype))",
    ]
)
def test_one_parameter():
    """The table is one parameter, `weight`, one row per id, and all that state_dict holds."""
    call = "EmbeddingTable(5, 3, dtype=torch.float64)"
    table = embedding.EmbeddingTable(5, 3, device=device(), dtype=torch.float64)
    keys, names = list(table.state_dict()), [name for name, _ in table.named_parameters()]
    expect(keys == ["weight"], "state_dict() with the one key 'weight'", f"keys {keys}", call=call)
    expect(names == ["weight"], "the one parameter 'weight'", f"parameters {names}", call=call)
    shape = list(table.weight.shape)
    expect(shape == [5, 3], "weight of shape [5, 3]", f"shape {shape}", call=call)
    dtype, place = table.weight.dtype, table.weight.device.type
    expect(dtype == torch.float64, "weight in the dtype given, float64", dtype, call=call)
    expect(place == device().type, f"weight on {device()}", f"weight on {place}", call=call)
    learned = table.weight.requires_grad
    expect(learned, "a weight that is learned", f"requires_grad={learned}", call=call)
    smallest = embedding.EmbeddingTable(1, 1, device=device())
    padding = "weight, whose only row is the padding row"
    assert_close(smallest.weight, torch.zeros(1, 1), call="EmbeddingTable(1, 1)", what=padding)
    usual = torch.get_default_dtype()
    for default in (torch.float32, torch.float64):
        try:
            torch.set_default_dtype(default)
            dtype = embedding.EmbeddingTable(5, 3).weight.dtype
        finally:
            torch.set_default_dtype(usual)
        expected = f"weight in torch's default dtype, {default}"
        expect(dtype == default, expected, dtype, call="EmbeddingTable(5, 3)")


@rung(
    hints=[
        "The rows come out in the shape of the ids, with one more axis behind.",
        "Indexing a matrix with a tensor of integers takes its rows; so does F.embedding. Nothing "
        "on the way may turn ids into floats.",
        "F.embedding(ids, self.weight, ...)",
    ]
)
def test_lookup():
    """One row per id, for ids of any shape, int32 or int64, from the first to the last row."""
    weight = random(6, 4)
    table = table_of(weight)
    for ids in (
        integers([[3, 1, 5], [0, 3, 2]]),
        integers([5, 4], torch.int32),
        integers(2),
        integers([]).reshape(2, 0),
        integers([[1, 2, 3], [4, 5, 0]]).T,
    ):
        out = table(ids)
        assert_close(out, weight[ids.long()], like=weight, what=f"ids {ids.tolist()}")
    rows = 2**24 + 2  # beyond what float32 tells apart
    with mock.patch.object(torch.Tensor, "normal_", lambda self, *args, **options: self):
        large = embedding.EmbeddingTable(rows, 1, device=device(), dtype=torch.bfloat16)  # quickly
    with torch.no_grad():
        large.weight[-2:] = torch.tensor([[0.0], [1.0]])
        out = large(integers([rows - 1]))
    assert_close(out, torch.ones(1, 1), like=large.weight, what=f"id {rows - 1}, the last one")


@rung(
    hints=[
        "An id that is looked up three times is used three times. The padding row is read as it "
        "stands, but nothing is learned for it.",
        "Autograd counts by itself, as long as the rows are taken from self.weight and not from "
        "its .data, a copy or a detached tensor. The padding row may be any row, or none: look at "
        "padding_idx, not at 0.",
        "F.embedding(ids, self.weight, padding_idx=self.padding_idx)",
    ]
)
def test_gradient():
    """An id that occurs m times collects m gradients; the padding row is read and gets none."""
    weight = random(6, 4)
    ids = integers([[2, 0, 2], [5, 2, 0]])
    upstream = random(2, 3, 4, seed=2)
    every = torch.zeros_like(weight).index_add(0, ids.flatten(), upstream.reshape(6, 4))
    for options in ({"padding_idx": None}, {}, *({"padding_idx": i} for i in (2, 5, 0, 1))):
        table = table_of(weight, **options)
        padding_idx = options.get("padding_idx", 0)
        what = f"padding_idx={padding_idx}" + ("" if options else ", the default")
        out = table(ids)
        assert_close(out, weight[ids], what=what)
        expected = every.clone()
        if padding_idx is not None:
            expected[padding_idx] = 0
        name = f"weight, {what}"
        assert_gradients(out, upstream, {name: expected}, {name: table.weight})


@rung(
    hints=[
        "The wider a row, the smaller its numbers, so that its length stays the same.",
        "Normal, not uniform; the padding row is zeroed after the draw. reset_parameters writes "
        "into the parameter it finds: an optimizer may hold it already.",
        "with torch.no_grad(): self.weight.normal_(0, self.init_std); then the padding row",
    ]
)
def test_initialisation():
    """Rows are drawn from Normal(0, init_std), by default 1 / sqrt(D); the padding row is zero."""
    for options, std in (({}, 1 / 8), ({"init_std": 3.0, "padding_idx": 7}, 3.0)):
        table = embedding.EmbeddingTable(400, 64, device=device(), **options)
        call = "EmbeddingTable(400, 64)" if not options else "EmbeddingTable(400, 64, init_std=3.0)"
        padding = options.get("padding_idx", 0)
        parameter, first = table.weight, table.weight.detach().clone()
        with torch.no_grad():
            table.weight.fill_(9.0)
        table.reset_parameters()
        same = table.weight is parameter
        expect(same, "the parameter that is there, with new numbers", "another one", call=RESET)
        for weight, what in ((first, "as made"), (table.weight.detach(), "after reset_parameters")):
            zero = torch.zeros(64, device=device())
            assert_close(weight[padding], zero, call=call, what=f"padding row, {what}")
            rest = torch.cat([weight[:padding], weight[padding + 1 :]]).double() / std
            # 25,536 draws: the allowances are four or more standard errors
            found = float(rest.std())
            expect(
                abs(found - 1) < 0.03,
                f"a standard deviation of {std:g}",
                f"a standard deviation of {found * std:.3g}",
                call=call,
                what=what,
            )
            mean = float(rest.mean())
            found = f"a mean of {mean * std:.3g}"
            expect(abs(mean) < 0.04, "a mean of 0", found, call=call, what=what)
            inside = float((rest.abs() < 1).double().mean())
            expect(
                abs(inside - 0.683) < 0.02,
                "68 % within one standard deviation (a normal)",
                f"{inside:.0%} within one",
                call=call,
                what=what,
            )
            squared = rest.square().mean(1)  # of 64 numbers each: standard deviation sqrt(2 / 64)
            expect(
                0.13 < float(squared.std()) < 0.23 and float(rest.abs().max()) > 3,
                "rows of various lengths, and a few numbers beyond three standard deviations",
                f"lengths from {squared.min().sqrt() * 8 * std:.3g} to "
                f"{squared.max().sqrt() * 8 * std:.3g}, numbers up to {rest.abs().max() * std:.3g}",
                call=call,
                what=what,
            )
            beyond = float((rest.abs() > 2).double().mean())
            expect(
                abs(beyond - 0.0455) < 0.01,
                "4.6 % beyond two standard deviations (a normal)",
                f"{beyond:.1%} beyond two",
                call=call,
                what=what,
            )
            shared = max(float((rest[1:] == rest[:-1]).double().mean()), repeated_columns(rest))
            found = f"{shared:.0%} equal to a neighbour"
            expect(shared < 0.01, "each number drawn for itself", found, call=call, what=what)
        again = bool((table.weight.detach() == first).all())
        expect(not again, "another draw each time", "the same numbers", call=RESET)
    none = embedding.EmbeddingTable(3, 64, padding_idx=None, device=device()).weight
    check(
        bool(none.detach().abs().sum(1).gt(0).all()),
        "no zero row without a padding row",
        call="EmbeddingTable(3, 64, padding_idx=None)",
    )
    flat = embedding.EmbeddingTable(3, 2, init_std=0.0, device=device()).weight.detach()
    assert_close(flat, torch.zeros(3, 2), call="EmbeddingTable(3, 2, init_std=0.0)")
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(embedding.EmbeddingTable(3, 2, device=device()).weight.detach())
    call = "torch.manual_seed(seed); EmbeddingTable(3, 2)"
    check(drawn[0].equal(drawn[1]), "the same draw under the same seed", call=call)
    check(not drawn[0].equal(drawn[2]), "another draw under another seed", call=call)


RESET = "EmbeddingTable(400, 64).reset_parameters()"


def repeated_columns(weight):
    """The share of numbers that are equal to their left neighbour."""
    return float((weight[:, 1:] == weight[:, :-1]).double().mean())


# --- bags -----------------------------------------------------------------------------------------


@rung(
    hints=[
        "offsets say where each bag starts; the last bag goes on to the end.",
        "Bag lengths [2, 1, 3] have the offsets [0, 2, 3], not [2, 3, 6].",
        "F.embedding_bag(values, self.weight, offsets, mode=mode, padding_idx=self.padding_idx)",
    ]
)
def test_offsets_are_starts():
    """Bag b holds values[offsets[b] : offsets[b + 1]], the last the rest; mean by default."""
    weight = torch.arange(7.0, device=device())[:, None] * torch.tensor([1.0, 10.0]).to(device())
    table = table_of(weight)
    values, offsets = integers([1, 2, 3, 4, 5, 6]), integers([0, 2, 3])
    for dtype in (torch.int64, torch.int32):
        out = table.bag(values.to(dtype), offsets.to(dtype))
        assert_close(out, torch.tensor([[1.5, 15], [3, 30], [5, 50]]), like=weight)
    out = table.bag(values, offsets, mode="sum")
    assert_close(out, torch.tensor([[3.0, 30], [3, 30], [15, 150]]), like=weight)
    strided = torch.stack([values, values.flip(0)], 1)[:, 0]
    out = table.bag(strided, integers([0, 9, 2, 9, 3, 9])[::2], mode="max")
    assert_close(out, torch.tensor([[2.0, 20], [3, 30], [6, 60]]), like=weight)
    out = table.bag(integers([]), integers([]))
    assert_close(out, torch.zeros(0, 2), like=weight, what="no bags at all")


def assert_golden_bag(name):
    """One golden bag: values and gradients, in float64 and float32."""
    data = golden("golden.json")
    case = data["bags"][name]
    ends = [*data["offsets"][1:], None]
    bags = [data["values"][i:j] for i, j in zip(data["offsets"], ends, strict=True)]
    what = f"bags {bags}, padding_idx={data['padding_idx']}"
    for dtype in (torch.float64, torch.float32):
        tolerance = {"rtol": 1e-7, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 2e-5}
        weight, upstream = (torch.tensor(data[key], dtype=dtype) for key in ("weight", "upstream"))
        table = table_of(weight.to(device()), padding_idx=data["padding_idx"])
        values, offsets = integers(data["values"]), integers(data["offsets"])
        options, leaves = {"mode": case["mode"]}, {"weight": table.weight}
        if case["weights"] is not None:
            weights = torch.tensor(case["weights"], dtype=dtype, device=device())
            options["weights"] = leaves["weights"] = weights.requires_grad_()
        out = table.bag(values, offsets, **options)
        assert_close(out, case["out"], like=table.weight, what=what, **tolerance)
        grads = {leaf: case[f"{leaf}_grad"] for leaf in leaves}
        assert_gradients(out, upstream.to(device()), grads, leaves, what=what, **tolerance)


@rung(
    hints=[
        "A padding entry is not there: it adds nothing and is not counted.",
        "A bag may have no entries at all, and 0 / 0 is NaN: decide what comes out. An id that "
        "occurs twice counts twice.",
        "Divide by the number of entries that are not padding, but at least by 1.",
    ]
)
def test_sum_and_mean():
    """Sums and means leave padding out; empty bags give zeros; gradients too, golden values."""
    assert_golden_bag("sum")
    assert_golden_bag("mean")
    table = table_of(floats([[5.0], [0.0], [3.0]]))
    out = table.bag(integers([1, 0, 2]), integers([0]), mode="mean")
    assert_close(out, [[1.5]], what="a row that happens to be zero, and is no padding")
    for mode in ("sum", "mean"):
        out = table.bag(integers([2]), integers([0, 0, 1]), mode=mode)
        assert_close(out, [[0.0], [3.0], [0.0]], what="empty bags in front and at the end")
        out = table.bag(integers([]), integers([0, 0]), mode=mode)
        assert_close(out, [[0.0], [0.0]], what="two bags, both empty")
    weight = random(4, 3, seed=1, dtype=torch.float32)
    weight[1] *= 1e7
    table = table_of(weight)
    for mode, expected in (("sum", weight[2] + weight[3]), ("mean", (weight[2] + weight[3]) / 2)):
        out = table.bag(integers([1, 2, 3]), integers([0, 1]), mode=mode)
        assert_close(out[1], expected, what="the bag after one with numbers 1e7 times as large")
    table = table_of(floats([[0.0], [1.0], [2.0]], torch.bfloat16))
    long = integers([1, 2] * 500)
    for mode, expected in (("sum", 1500.0), ("mean", 1.5)):
        out = table.bag(long, integers([0]), mode=mode)
        assert_close(out, [[expected]], like=table.weight, what="a bag of 1,000 in bfloat16")


@rung(
    hints=[
        "What is the maximum of negative numbers and a padding row of zeros?",
        "Padding must not win: it has to leave the race, not enter it with 0, nor with some number "
        "that is thought to be small enough. The gradient goes to the entry that won, column by "
        "column.",
        "Before the maximum put -inf where an entry is padding; what is left without any entry is "
        "an empty bag.",
    ]
)
def test_max():
    """The maximum is element-wise over the entries, without padding; empty bags give zeros."""
    assert_golden_bag("max")
    weight = -random(5, 3, seed=3).abs() - 1
    weight[0] = 0.0
    weight[4] *= 1e30
    table = table_of(weight)
    out = table.bag(integers([0, 3, 0, 0, 4, 0]), integers([0, 3, 3, 4]), mode="max")
    zero = torch.zeros_like(weight[0])
    expected = torch.stack([weight[3], zero, zero, weight[4]])
    assert_close(out, expected, what="all rows are below 0, but for padding")
    weight = random(5, 3, seed=8)
    table, ids = table_of(weight), integers([3, 1, 3, 3])
    out = table.bag(ids, integers([0]), mode="max")
    upstream = random(1, 3, seed=9)
    rows = torch.zeros_like(weight)
    first = weight[1] > weight[3]
    rows[1], rows[3] = upstream[0].where(first, rows[1]), upstream[0].where(~first, rows[1])
    what = "weight, where the largest entry is there three times"
    assert_gradients(out, upstream, {what: rows}, {what: table.weight})
    out = table.bag(integers([]), integers([0, 0]), mode="max")
    assert_close(out, torch.zeros(2, 3), like=weight, what="two bags, both empty")


@rung(
    hints=[
        "A weighted mean divides by the weights' sum, and only by those of real entries.",
        "mode='mean' of torch's embedding_bag takes no weights: make it of two sums. The sum may "
        "be small, or below 0; only 0 itself cannot be divided by.",
        "total / norm, where norm adds up the weights of the entries of a bag; where norm is 0 "
        "divide by something else, before dividing, and the result is 0.",
    ]
)
def test_weights():
    """Weighted sums, and weighted means divided by the sum of weights; weights get gradients."""
    assert_golden_bag("weighted_sum")
    assert_golden_bag("weighted_mean")
    weight = random(5, 3, seed=4)
    upstream = random(3, 3, seed=5)
    for scale in (1.0, -1e-4, 1e6, 1e-9):
        table = table_of(weight)
        weights = (floats([0.1, 0.3, 5.0, 0.2, 0.5, -0.5]) * scale).requires_grad_()
        values, offsets = integers([1, 4, 0, 3, 2, 1]), integers([0, 3, 4])
        out = table.bag(values, offsets, mode="mean", weights=weights)
        zero = torch.zeros_like(weight[0])
        what = f"weights {[float(f'{w:.6g}') for w in weights.tolist()]}"
        first = (weight[1] + 3 * weight[4]) / 4
        assert_close(out, torch.stack([first, weight[3], zero]), what=what)
        rows = torch.zeros_like(weight)
        rows[1], rows[4], rows[3] = upstream[0] / 4, upstream[0] * 0.75, upstream[1]
        # by the quotient rule; alone in its bag a weight does nothing, nor do those that cancel
        along = torch.stack([(weight[i] - first) @ upstream[0] for i in (1, 4)]) / (0.4 * scale)
        grads = {"weight": rows, "weights": torch.cat([along, along.new_zeros(4)])}
        leaves = {"weight": table.weight, "weights": weights}
        assert_gradients(out, upstream, grads, leaves, atol=1e-10 / min(abs(scale), 1.0))
    for mode in ("sum", "mean"):
        out = table.bag(integers([]), integers([0, 0]), mode=mode, weights=floats([]))
        assert_close(out, torch.zeros(2, 3), like=weight, what="two bags, both empty")
    table = table_of(floats([[0.0], [1.0], [2.0]], torch.bfloat16))
    long = integers([1, 2] * 500)
    for dtype in (torch.float32, torch.bfloat16):
        weights = torch.full((1000,), 0.75, device=device(), dtype=dtype)
        out = table.bag(long, integers([0]), weights=weights)
        assert_close(out, [[1.5]], like=table.weight, what="a bag of 1,000 in bfloat16")


@rung(
    hints=[
        "Looking something up is reading.",
        "max_norm rescales the stored rows. Operations that end in _ change what they are given, "
        "and += on a tensor is one of them.",
        "Compute in a wider dtype where you must, and return out.to(self.weight.dtype).",
    ]
)
def test_nothing_is_changed():
    """Calls change neither table nor inputs nor torch's state; results keep the table's dtype."""
    for dtype, other in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32)):
        weight = random(6, 4, seed=10, dtype=dtype) * 100
        table = table_of(weight.double(), padding_idx=5).to(dtype)
        given = {
            "values": integers([1, 0, 5, 2]),
            "offsets": integers([0, 3]),
            "weights": floats([0.5, 0.25, 2.0, 1.0], other),
        }
        before = {name: x.clone() for name, x in given.items()}
        values, offsets, weights = given.values()
        draws = torch.get_rng_state()

        def calls(table=table, values=values, offsets=offsets, weights=weights):
            outs = [table(values)]
            outs += [table.bag(values, offsets, mode=mode) for mode in ("sum", "mean", "max")]
            return outs + [
                table.bag(values, offsets, mode=mode, weights=weights) for mode in ("sum", "mean")
            ]

        call = "table(values), table.bag(values, offsets, ...)"
        exact = {"rtol": 0, "atol": 0, "call": call}
        first = calls()
        for name, x in given.items():
            assert_close(x, before[name], what=f"{name} after the calls", **exact)
        assert_close(table.weight, weight, what="weight after the calls", **exact)
        second = calls(table.eval())
        for out in first:
            expected = f"a result in the table's dtype, {dtype}"
            expect(out.dtype == dtype, expected, out.dtype, call=call)
        for out, again in zip(first, second, strict=True):
            assert_close(again, out, rtol=0, atol=0, call=call, what="a second time, in eval mode")
        check(torch.is_grad_enabled(), "gradients still on", call=call)
        with torch.no_grad():
            calls()
            check(not torch.is_grad_enabled(), "gradients still off", call=call, what="no_grad")
        check(torch.equal(torch.get_rng_state(), draws), "no random number drawn", call=call)
        check(list(table.state_dict()) == ["weight"], "state_dict() as before", call=call)
        with torch.no_grad():
            table.weight.mul_(-2.0)
        for out, again in zip(first[:3], calls()[:3], strict=True):
            assert_close(again, out * -2, call=call, what="after the weight was changed")
        offsets[1] = 2  # a loader may fill the same tensors with the next batch
        values.copy_(integers([2, 5, 4, 1]))
        filled, copies = calls(), calls(table, values.clone(), offsets.clone())
        for again, fresh in zip(filled, copies, strict=True):
            assert_close(again, fresh, call=call, what="values and offsets filled anew")


@rung(
    hints=[
        "An id that does not exist must not quietly give somebody else's row.",
        "table[-1] is the last row for Python; here a negative id is an error. Floats are no ids, "
        "nor are booleans. What is broadcast by accident gives numbers too.",
        "Check dtype first (TypeError), then shapes and offsets (ValueError).",
    ]
)
def test_bad_input():
    """Ids that are no ids, offsets that are no starts, and impossible sizes are refused."""
    table = table_of(random(5, 3))

    def lookup(error, ids):
        given = torch.tensor(ids, device=device())
        expect_error(lambda: table(given), error, call=f"table(ids={ids}), 5 rows")

    def bag(error, values, offsets, mode="mean", weights=None):
        given = [torch.tensor(x, device=device()) for x in (values, offsets)]
        given[0] = given[0].long() if not values else given[0]
        options = {} if weights is None else {"weights": torch.ones(weights, device=device())}
        call = f"table.bag({values}, {offsets}, mode={mode!r}"
        call += ("" if weights is None else f", weights{list(weights)}") + "), 5 rows"
        expect_error(lambda: table.bag(*given, mode=mode, **options), error, call=call)

    for ids in ([1.0, 2.0], [True, False]):
        lookup(TypeError, ids)
        bag(TypeError, ids, [0, 1])
        bag(TypeError, [1, 2], ids)
    if device().type == "cpu":  # on a GPU these end the process, or would have to synchronise
        for bad in (5, -1):
            lookup(IndexError, [1, bad])
            for mode in ("sum", "mean", "max"):
                bag((IndexError, RuntimeError), [1, bad], [0, 1], mode)
            for mode in ("sum", "mean"):
                bag((IndexError, RuntimeError), [1, bad], [0, 1], mode, weights=(2,))
        for offsets in ([1, 2], [0, 2, 1], [0, 4], [-1, 1]):
            bag(ValueError, [1, 2, 3], offsets)
    for mode in ("median", "MEAN", ""):
        bag(ValueError, [1, 2], [0, 1], mode)
    bag(ValueError, [[1, 2]], [0, 1])
    bag(ValueError, [1, 2], [[0, 1]])
    bag(ValueError, [1, 2], [[0], [1]], weights=(2,))
    bag(ValueError, [[1, 2], [3, 4]], [0, 1], weights=(2, 2))
    bag(ValueError, [1, 2], [0, 1], "median", weights=(2,))
    bag(ValueError, [1, 2], [0, 1], "max", weights=(2,))
    for mode in ("sum", "mean"):
        for shape in ((3,), (1,), (2, 1)):
            bag(ValueError, [1, 2], [0, 1], mode, weights=shape)
        bag(ValueError, [], [0], mode, weights=(2,))
    bag(ValueError, [], [0], "median")
    for rows, width, options in (
        (0, 3, {"padding_idx": None}),
        (4, 0, {}),
        (-1, 3, {"padding_idx": None}),
        (4, -2, {}),
        (4, 3, {"padding_idx": 4}),
        (4, 3, {"padding_idx": -1}),
        (4, 3, {"init_std": -0.1}),
    ):
        given = "".join(f", {name}={value}" for name, value in options.items())
        expect_error(
            lambda r=rows, w=width, o=options: embedding.EmbeddingTable(r, w, **o),
            ValueError,
            call=f"EmbeddingTable({rows}, {width}{given})",
        )


# --- hashing --------------------------------------------------------------------------------------


@rung(
    hints=[
        "Python salts its own hash of strings anew in each process.",
        "Take a hash that is a function of bytes: hashlib has several. Nothing may be "
        "remembered between calls.",
        "int.from_bytes(hashlib.blake2b(str(key).encode()).digest()[:8], 'little') % num_buckets",
    ]
)
def test_hash_is_stable():
    """A key's bucket depends on nothing but key, salt and number of buckets, in any process."""
    keys = ["user_42", "user_43", 7, "7", -3, "Amélie", "", 2**53 + 1, 2**53, "user_42"]
    keys += ["User_42", " user_42", "user_24", -7, "a" * 200 + "1", "a" * 200 + "2", "Amlie"]
    given, draws = list(keys), (torch.get_rng_state(), python_random.getstate())
    buckets = embedding.hash_ids(keys, 1009)
    check(
        isinstance(buckets, torch.Tensor)
        and buckets.dtype == torch.int64
        and buckets.shape == (17,)
        and buckets.device.type == "cpu",
        "an int64 tensor of shape [17] on the CPU",
        came_back=buckets,
    )
    found = f"buckets {int(buckets[2])} and {int(buckets[3])}"
    expect(buckets[2] == buckets[3], "7 and '7' in one bucket", found)
    check(keys == given, "the keys as they were", came_back=keys)
    same = torch.equal(torch.get_rng_state(), draws[0]) and python_random.getstate() == draws[1]
    check(same, "no random generator seeded or used", what="torch's and Python's generators")
    backwards = embedding.hash_ids(keys[::-1], 1009)
    assert_close(backwards, buckets.flip(0), what="the same keys in another order")
    alone = embedding.hash_ids(["Amélie"], 1009)
    assert_close(alone, buckets[5:6], what="one key alone")
    large = embedding.hash_ids(keys, 2**40)
    different = len(set(large.tolist()))
    expect(
        different == 15,
        "15 different keys told apart in 2**40 buckets",
        f"{different} different buckets",
        what="keys that differ in case, space, order, sign, an accent, the last character",
    )
    salted = builtins.hash
    file = sys.modules[embedding.hash_ids.__module__].__file__
    with pytest.MonkeyPatch.context() as patch:  # what another PYTHONHASHSEED does to hash()
        patch.setattr(builtins, "hash", lambda key: salted(("another process", key)))
        fresh = runpy.run_path(file)["hash_ids"]  # nothing remembered
        again = fresh(keys[::-1], 1009).flip(0)
    assert_close(again, buckets, call="hash_ids(keys, 1009)", what="in another process")
    none = embedding.hash_ids([], 5)
    assert_close(none, torch.zeros(0, dtype=torch.int64), what="no keys")


@rung(
    hints=[
        "Each of the buckets 0 .. num_buckets - 1 gets its share. Two tables with different salts "
        "should not confuse the same keys.",
        "The remainder of a negative number is negative with fmod, not with %. A number is no hash "
        "of itself: ids in steps of ten use every tenth bucket. If the salt only shifts the "
        "bucket, keys that collide go on to collide.",
        "Put the salt into what is hashed, before the key, then % num_buckets; do not keep only a "
        "few bits before.",
    ]
)
def test_hash_spreads():
    """Keys fall into 0 .. num_buckets - 1, evenly, and independently under another salt."""
    for keys, what in (
        ([f"user_{i}" for i in range(3_000)], "keys user_0, user_1, ..."),
        (list(range(3_000)), "keys 0, 1, ..."),
        (range(0, 300_000, 100), "keys 0, 100, ..."),
    ):
        for num_buckets in (97, 100):
            buckets = embedding.hash_ids(keys, num_buckets).numpy()
            low, high = int(buckets.min()), int(buckets.max())
            expect(
                low == 0 and high == num_buckets - 1,
                f"buckets 0 .. {num_buckets - 1}, the first and the last too",
                f"buckets {low} .. {high}",
                what=what,
            )
            load = np.bincount(buckets, minlength=num_buckets)
            expect(
                load.max() < 70 and load.min() > 3,  # 30 on average, nearly 5 deviations
                "about 30 of 3,000 keys in each bucket",
                f"{load.min()} to {load.max()} keys in a bucket",
                what=what,
            )
        many = 12_000_000
        lower = float((embedding.hash_ids(keys, many) < many // 2).double().mean())
        expect(
            abs(lower - 0.5) < 0.05,  # more than 5 deviations
            f"half of the keys in the lower half of {many:,} buckets",
            f"{lower:.0%} of the keys there",
            what=what,
        )
        assert_salts_are_independent(keys[:1_000], what)
    wide = len(set(embedding.hash_ids([f"user_{i}" for i in range(3_000)], 2**40).tolist()))
    expect(
        wide > 2_997,
        "hardly a collision of 3,000 keys in 2**40 buckets",
        f"{wide} different buckets",
    )
    one = embedding.hash_ids(["a", "b"], 1)
    assert_close(one, torch.zeros(2, dtype=torch.int64))
    for keys in (["a"], []):
        for bad in (0, -5):
            expect_error(
                lambda k=keys, b=bad: embedding.hash_ids(k, b),
                ValueError,
                call=f"hash_ids({keys}, {bad})",
            )


def assert_salts_are_independent(keys, what):
    first = embedding.hash_ids(keys, 101, salt="genre")
    second = embedding.hash_ids(keys, 101, salt="actor")
    default = embedding.hash_ids(keys, 101)
    for one, other in ((first, second), (first, default)):
        same = float((one == other).double().mean())
        expect(
            same < 0.05,
            "about 1 % of the keys in the same bucket under two salts",
            f"{same:.0%} of them",
            what=what,
        )
        collide = (one[:-1, None] == one[None, 1:]).triu()
        still = float((other[:-1, None] == other[None, 1:])[collide].double().mean())
        expect(
            still < 0.1,
            "about 1 % of colliding pairs to collide under the other salt too",
            f"{still:.0%} of them",
            what=what,
        )
