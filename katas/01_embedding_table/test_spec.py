"""Kata 01, embedding tables: what `models/embedding.py` must do, from the simplest on."""

import builtins

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


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(device(), dtype)


def assert_gradients(out, upstream, expected, inputs, **tolerance):
    """The gradients of `(out * upstream).sum()` with respect to `inputs`, both by name."""
    call = "(out * upstream).sum().backward()"
    check(out.requires_grad, "a result that gradients flow through", call=call)
    found = torch.autograd.grad((out * upstream).sum(), list(inputs.values()), allow_unused=True)
    for (name, value), grad in zip(inputs.items(), found, strict=True):
        what = f"gradient of {name}"
        if grad is None:
            fail(expected="a gradient", came_back="none at all", call=call, what=what)
        grad = grad.to_dense() if grad.is_sparse else grad
        assert_close(grad, expected[name], like=value, call=call, what=what, **tolerance)


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
    table = embedding.EmbeddingTable(5, 3, device=device(), dtype=torch.float64)
    keys, names = list(table.state_dict()), [name for name, _ in table.named_parameters()]
    call = "EmbeddingTable(5, 3)"
    check(keys == ["weight"], "state_dict() with the one key 'weight'", came_back=keys, call=call)
    check(names == ["weight"], "the one parameter 'weight'", came_back=names, call=call)
    shape = list(table.weight.shape)
    check(shape == [5, 3], "weight of shape [5, 3]", came_back=shape, call=call)
    dtype, place = table.weight.dtype, table.weight.device.type
    check(dtype == torch.float64, "weight in the dtype given, float64", came_back=dtype, call=call)
    check(place == device().type, f"weight on {device()}", came_back=place, call=call)


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
    large = embedding.EmbeddingTable(rows, 1, init_std=0.0, device=device(), dtype=torch.bfloat16)
    with torch.no_grad():
        large.weight[-1] = 1.0
    out = large(integers([rows - 1]))
    assert_close(out, torch.ones(1, 1), like=large.weight, what=f"id {rows - 1}, the last one")


@rung(
    hints=[
        "An id that is looked up three times is used three times.",
        "Autograd does this by itself, as long as the rows are taken from self.weight and not from "
        "its .data, a copy or a detached tensor.",
    ]
)
def test_gradient_counts_occurrences():
    """An id that occurs m times collects m gradients; rows that are not looked up get zeros."""
    weight = random(6, 4)
    ids = integers([[3, 1, 3], [5, 3, 2]])
    upstream = random(2, 3, 4, seed=1)
    table = table_of(weight, padding_idx=None)
    out = table(ids)
    expected = torch.zeros_like(weight).index_add(0, ids.flatten(), upstream.reshape(6, 4))
    assert_gradients(out, upstream, {"weight": expected}, {"weight": table.weight})


@rung(
    hints=[
        "The padding row may be any row, or none; look at padding_idx, not at 0.",
        "It is read as it stands, but nothing is learned for it.",
        "F.embedding(ids, self.weight, padding_idx=self.padding_idx)",
    ]
)
def test_padding_row():
    """The padding row is read like any other, and gets no gradient."""
    weight = random(6, 4)
    ids = integers([2, 0, 2, 5, 0])
    upstream = random(5, 4, seed=2)
    every = torch.zeros_like(weight).index_add(0, ids, upstream)
    for padding_idx in (2, 0, 5, None):
        table = table_of(weight, padding_idx=padding_idx)
        out = table(ids)
        assert_close(out, weight[ids], what=f"padding_idx={padding_idx}")
        expected = every.clone()
        if padding_idx is not None:
            expected[padding_idx] = 0
        assert_gradients(out, upstream, {"weight": expected}, {"weight": table.weight})
    table = table_of(weight)
    expected = every.clone()
    expected[0] = 0
    assert_gradients(table(ids), upstream, {"weight": expected}, {"weight": table.weight})


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
        check(table.weight is parameter, "reset_parameters() keeps the parameter", call=call)
        for weight, what in ((first, "as made"), (table.weight.detach(), "after reset_parameters")):
            zero = torch.zeros(64, device=device())
            assert_close(weight[padding], zero, call=call, what=f"padding row, {what}")
            rest = torch.cat([weight[:padding], weight[padding + 1 :]]).double() / std
            # 25,536 draws: the allowances are four or more standard errors
            found = float(rest.std())
            check(
                abs(found - 1) < 0.03,
                f"a standard deviation of {std:g}",
                came_back=found * std,
                call=call,
                what=what,
            )
            mean = float(rest.mean())
            check(abs(mean) < 0.04, "a mean of 0", came_back=mean * std, call=call, what=what)
            inside = float((rest.abs() < 1).double().mean())
            check(
                abs(inside - 0.683) < 0.02,
                "68 % within one standard deviation (a normal)",
                came_back=inside,
                call=call,
                what=what,
            )
            shared = float((rest[1:] == rest[:-1]).double().mean())
            check(shared < 0.01, "each row drawn for itself", call=call, what=what)
    none = embedding.EmbeddingTable(3, 64, padding_idx=None, device=device()).weight
    check(
        bool(none.detach().abs().sum(1).gt(0).all()),
        "no zero row without a padding row",
        call="EmbeddingTable(3, 64, padding_idx=None)",
    )
    flat = embedding.EmbeddingTable(3, 2, init_std=0.0, device=device()).weight.detach()
    assert_close(flat, torch.zeros(3, 2), call="EmbeddingTable(3, 2, init_std=0.0)")


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


def assert_golden_bag(name):
    """One golden bag: values and gradients, in float64 and float32."""
    data = golden("golden.json")
    case = data["bags"][name]
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
        assert_close(out, case["out"], like=table.weight, **tolerance)
        grads = {leaf: case[f"{leaf}_grad"] for leaf in leaves}
        assert_gradients(out, upstream.to(device()), grads, leaves, **tolerance)


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


@rung(
    hints=[
        "What is the maximum of negative numbers and a padding row of zeros?",
        "Padding must not win: it has to leave the race, not enter it with 0. The gradient goes "
        "to the entry that won, column by column.",
    ]
)
def test_max():
    """The maximum is element-wise over the entries, without padding; empty bags give zeros."""
    assert_golden_bag("max")
    weight = -random(5, 3, seed=3).abs() - 1
    weight[0] = 0.0
    table = table_of(weight)
    out = table.bag(integers([0, 3, 0, 0]), integers([0, 3, 3]), mode="max")
    zero = torch.zeros_like(weight[0])
    assert_close(out, torch.stack([weight[3], zero, zero]), what="all rows are below 0")


@rung(
    hints=[
        "A weighted mean divides by the weights' sum, and only by those of real entries.",
        "mode='mean' of torch's embedding_bag takes no weights: make it of two sums.",
        "total / norm, where norm adds up the weights of the entries of a bag; where norm is 0 "
        "the result is 0.",
    ]
)
def test_weights():
    """Weighted sums, and weighted means divided by the sum of weights; weights get gradients."""
    assert_golden_bag("weighted_sum")
    assert_golden_bag("weighted_mean")
    table = table_of(random(5, 3, seed=4))
    weights = torch.tensor([0.0, 0.0, 9.0, 2.0], dtype=torch.float64, device=device())
    weights.requires_grad_()
    out = table.bag(integers([1, 4, 0, 3]), integers([0, 3]), mode="mean", weights=weights)
    expected = torch.stack([torch.zeros_like(table.weight[3]), table.weight[3]]).detach()
    assert_close(out, expected, what="weights of the first bag add up to 0")
    upstream = random(2, 3, seed=5)
    rows = torch.zeros_like(table.weight)
    rows[3] = upstream[1]
    # by the quotient rule the last weight's gradient is 0: it is alone in its bag
    grads = {"weight": rows, "weights": torch.zeros_like(weights)}
    assert_gradients(out, upstream, grads, {"weight": table.weight, "weights": weights})


@rung(
    hints=[
        "Without a padding row every id is an entry, 0 as well.",
        "Bags may be empty in front, in between and at the end; there may be none at all.",
        "What a padding row holds must not matter: 0 * inf is NaN, so leave it out, do not "
        "multiply it by 0.",
    ]
)
def test_bags_against_torch():
    """Any bags, against torch.nn.EmbeddingBag in float64."""
    rows, width = 9, 4
    weight = random(rows, width, seed=6)
    values = torch.randint(rows, (24,), generator=generator(7)).to(device())
    offsets = integers([0, 0, 5, 5, 6, 17, 24, 24])
    weights = random(48, seed=8)[::2].abs()
    upstream = random(len(offsets), width, seed=9)
    for padding_idx in (None, 4, 0):
        for mode, given in (("sum", None), ("mean", None), ("max", None), ("sum", weights)):
            table = table_of(weight, padding_idx=padding_idx)
            oracle = torch.nn.EmbeddingBag.from_pretrained(
                weight.clone(), freeze=False, mode=mode, padding_idx=padding_idx
            )
            expected = oracle(values, offsets, per_sample_weights=given)
            out = table.bag(values, offsets, mode=mode, weights=given)
            what = f"padding_idx={padding_idx}"
            assert_close(out, expected, what=what)
            (grad,) = torch.autograd.grad((expected * upstream).sum(), [oracle.weight])
            assert_gradients(out, upstream, {"weight": grad}, {"weight": table.weight})
    weight[2] = float("inf")
    table = table_of(weight, padding_idx=2)
    for mode, given in (("sum", None), ("mean", None), ("max", None), ("mean", weights[:4])):
        out = table.bag(integers([2, 5, 2, 5]), integers([0, 2]), mode=mode, weights=given)
        assert_close(out, weight[[5, 5]], what=f"mode {mode}, the padding row is infinite")
    out = table.bag(integers([]), integers([]))
    assert_close(out, torch.zeros(0, width), like=weight, what="no bags at all")
    out = table.bag(integers([]), integers([0, 0]), mode="max")
    assert_close(out, torch.zeros(2, width), like=weight, what="two empty bags")


@rung(
    hints=[
        "Looking something up is reading.",
        "max_norm rescales the stored rows. Operations that end in _ change what they are given.",
    ]
)
def test_nothing_is_changed():
    """Forward and bags change neither the table nor the inputs, and keep the table's dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = random(6, 4, seed=10, dtype=dtype) * 100
        table = table_of(weight)
        values, offsets, weights = integers([1, 0, 5, 2]), integers([0, 3]), torch.ones(4)
        weights = (weights * 0.5).to(device())
        before = [x.clone() for x in (values, offsets, weights)]
        outs = [table(values), table.bag(values, offsets)]
        outs += [table.bag(values, offsets, mode=mode, weights=weights) for mode in ("sum", "mean")]
        for out in outs:
            check(
                out.dtype == dtype,
                f"a result in the table's dtype, {dtype}",
                came_back=out.dtype,
                call="table(ids), table.bag(values, offsets)",
            )
        assert_close(
            table.weight,
            weight,
            rtol=0,
            atol=0,
            call="table.bag(values, offsets)",
            what="weight after the calls",
        )
        for name, x, old in zip(
            ("values", "offsets", "weights"), (values, offsets, weights), before, strict=True
        ):
            check(torch.equal(x, old), "unchanged by the call", came_back=x, what=name)


@rung(
    hints=[
        "An id that does not exist must not quietly give somebody else's row.",
        "table[-1] is the last row for Python; here a negative id is an error. Floats are no ids.",
        "Check dtype first (TypeError), then shapes and offsets (ValueError).",
    ]
)
def test_bad_input():
    """Ids that are no ids, offsets that are no starts, and impossible sizes are refused."""
    table = table_of(random(5, 3))

    def bag(values, offsets, **options):
        return lambda: table.bag(
            torch.as_tensor(values, device=device()),
            torch.as_tensor(offsets, device=device()),
            **options,
        )

    for ids in ([1.0, 2.0], [True, False]):
        expect_error(
            lambda i=ids: table(torch.tensor(i, device=device())),
            TypeError,
            call=f"table(ids={ids})",
        )
    expect_error(bag([1.0], [0]), TypeError, call="table.bag(values=[1.0], offsets=[0])")
    expect_error(bag([1], [0.0]), TypeError, call="table.bag(values=[1], offsets=[0.0])")
    outside = (IndexError, RuntimeError)
    if device().type == "cpu":  # on a GPU these end the process, or would have to synchronise
        for bad in (5, -1):
            expect_error(
                lambda b=bad: table(integers([1, b])),
                IndexError,
                call=f"table(ids=[1, {bad}]) of a table with 5 rows",
            )
            for mode in ("sum", "mean", "max"):
                expect_error(
                    bag([1, bad], [0], mode=mode),
                    outside,
                    call=f"table.bag([1, {bad}], [0], mode={mode!r})",
                )
        for offsets in ([1, 2], [0, 2, 1], [0, 4], [-1, 1]):
            expect_error(
                bag([1, 2, 3], offsets),
                ValueError,
                call=f"table.bag(values=[1, 2, 3], offsets={offsets})",
            )
    expect_error(bag([1, 2], [0], mode="median"), ValueError, call="table.bag(mode='median')")
    expect_error(bag([[1, 2]], [0]), ValueError, call="table.bag(values=[[1, 2]], offsets=[0])")
    expect_error(bag([1, 2], [[0]]), ValueError, call="table.bag(values=[1, 2], offsets=[[0]])")
    weights = torch.ones(2, device=device())
    expect_error(
        bag([1, 2], [0], mode="max", weights=weights),
        ValueError,
        call="table.bag(values=[1, 2], offsets=[0], mode='max', weights=...)",
    )
    for shape in ((3,), (1,), (2, 1)):
        expect_error(
            bag([1, 2], [0], weights=torch.ones(shape, device=device())),
            ValueError,
            call=f"table.bag(values[2], offsets[1], weights{list(shape)})",
        )
    for rows, width, options in (
        (0, 3, {"padding_idx": None}),
        (4, 0, {}),
        (-1, 3, {"padding_idx": None}),
        (4, 3, {"padding_idx": 4}),
        (4, 3, {"padding_idx": -1}),
        (4, 3, {"init_std": -0.1}),
    ):
        expect_error(
            lambda r=rows, w=width, o=options: embedding.EmbeddingTable(r, w, **o),
            ValueError,
            call=f"EmbeddingTable({rows}, {width}, **{options})",
        )


# --- hashing --------------------------------------------------------------------------------------


@rung(
    hints=[
        "Python salts its own hash of strings anew in each process.",
        "Take a hash that is a function of bytes: zlib.crc32, or one from hashlib. Nothing may be "
        "remembered between calls.",
        "int.from_bytes(hashlib.blake2b(str(key).encode()).digest()[:8], 'little') % num_buckets",
    ]
)
def test_hash_is_stable():
    """A key's bucket depends on nothing but key, salt and number of buckets, in any process."""
    keys = ["user_42", "user_43", 7, "7", -3, "Amélie", "", 2**53 + 1, 2**53]
    buckets = embedding.hash_ids(keys, 1009)
    check(
        isinstance(buckets, torch.Tensor)
        and buckets.dtype == torch.int64
        and buckets.shape == (9,)
        and buckets.device.type == "cpu",
        "an int64 tensor of shape [9] on the CPU",
        came_back=buckets,
    )
    check(buckets[2] == buckets[3], "7 and '7' in one bucket", came_back=buckets.tolist())
    backwards = embedding.hash_ids(keys[::-1], 1009)
    assert_close(backwards, buckets.flip(0), what="the same keys in another order")
    alone = embedding.hash_ids(["Amélie"], 1009)
    assert_close(alone, buckets[5:6], what="one key alone")
    salted = builtins.hash
    with pytest.MonkeyPatch.context() as patch:  # what another PYTHONHASHSEED does to hash()
        patch.setattr(builtins, "hash", lambda key: salted(("another process", key)))
        again = embedding.hash_ids(keys, 1009)
    assert_close(again, buckets, what="the same keys in another process")
    none = embedding.hash_ids([], 5)
    assert_close(none, torch.zeros(0, dtype=torch.int64), what="no keys")


@rung(
    hints=[
        "Each of the buckets 0 .. num_buckets - 1 gets its share.",
        "The remainder of a negative number is negative with fmod, not with %.",
        "Hash, then % num_buckets; do not keep only a few bits before.",
    ]
)
def test_hash_spreads():
    """Keys fall into 0 .. num_buckets - 1, evenly."""
    for keys in ([f"user_{i}" for i in range(10_000)], list(range(10_000))):
        for num_buckets in (97, 1000):
            buckets = embedding.hash_ids(keys, num_buckets).numpy()
            low, high = int(buckets.min()), int(buckets.max())
            check(
                0 <= low and high < num_buckets,
                f"buckets in 0 .. {num_buckets - 1}",
                came_back=[low, high],
            )
            load = np.bincount(buckets, minlength=num_buckets)
            fair = 10_000 / num_buckets
            check(
                load.max() < fair + 7 * fair**0.5,
                f"about {fair:.0f} keys in each bucket",
                came_back=f"{load.max()} keys in one bucket",
            )
            check(
                (load == 0).mean() < 0.01,
                "hardly any bucket empty",
                came_back=f"{(load == 0).sum()} of {num_buckets} are",
            )
    wide = len(set(embedding.hash_ids(list(range(10_000)), 2**40).tolist()))
    check(
        wide > 9_900,
        "hardly a collision of 10,000 keys in 2**40 buckets",
        came_back=f"{wide} different buckets",
    )
    one = embedding.hash_ids(["a", "b"], 1)
    assert_close(one, torch.zeros(2, dtype=torch.int64))
    for bad in (0, -5):
        expect_error(
            lambda b=bad: embedding.hash_ids(["a"], b), ValueError, call=f"hash_ids(['a'], {bad})"
        )


@rung(
    hints=[
        "Two tables with different salts should not confuse the same keys.",
        "If the salt only shifts the bucket, keys that collide go on to collide.",
        "Put the salt into what is hashed, before the key.",
    ]
)
def test_salts_are_independent():
    """Keys that collide under one salt are told apart by another."""
    keys = [f"user_{i}" for i in range(3_000)]
    first = embedding.hash_ids(keys, 101, salt="genre")
    second = embedding.hash_ids(keys, 101, salt="director")
    default = embedding.hash_ids(keys, 101)
    for one, other in ((first, second), (first, default)):
        same = float((one == other).double().mean())
        check(
            same < 0.05,
            "about 1 % of the keys in the same bucket under two salts",
            came_back=f"{same:.0%}",
        )
        collide = (one[:-1, None] == one[None, 1:]).triu()
        still = float((other[:-1, None] == other[None, 1:])[collide].double().mean())
        check(
            still < 0.1,
            "about 1 % of colliding pairs to collide under the other salt too",
            came_back=f"{still:.0%}",
        )
