"""What the diagnosis of kata 01 asks the learner's code."""

import builtins
import math
import random
import runpy
import sys
from unittest import mock

import torch

from harness.cost import count
from harness.devices import other_device_findings
from harness.probe import probe
from harness.spec import learner

embedding = learner("models.embedding")

VALUES = torch.tensor([4, 1, 4, 2, 6, 2, 2, 0, 5, 3, 1])
OFFSETS = torch.tensor([0, 3, 3, 5, 7, 11])  # padding is 2: bags 1, 3 and 5 have no entries
WEIGHTS = [0.5, 1.25, 0.3, 7.0, 0.2, 3.0, 1.0, 2.5, -0.4, 0.9, 1.1]


# --- asking ---------------------------------------------------------------------------------------


def irregular(*shape, dtype=torch.float64):
    """Fixed numbers without a pattern."""
    number = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((number * 12.9898 + 1).sin() * 43.7).sin().mul(2).reshape(shape).to(dtype)


def table_of(weight, **options):
    table = embedding.EmbeddingTable(*weight.shape, dtype=weight.dtype, **options)
    with torch.no_grad():
        table.weight.copy_(weight)
    return table


def gradient(leaf):
    if leaf.grad is None:
        return "none"
    return leaf.grad if leaf.grad.layout == torch.strided else "not dense"


def seen(table, out, weights=None):
    """A result, its gradients, and the table afterwards."""
    found = {"out": out, "after": table.weight.detach().clone()}
    if out.requires_grad:
        (out * irregular(*out.shape, dtype=out.dtype)).sum().backward()
    found["gradient"] = gradient(table.weight)
    if weights is not None:
        found["gradient of weights"] = gradient(weights)
    return found


def outcome(function):
    """What came back, or what was raised."""
    try:
        out = function()
    except Exception as error:
        return type(error).__name__
    return out if isinstance(out, torch.Tensor) else "accepted"


# --- the table ------------------------------------------------------------------------------------


@probe
def state():
    """What the module holds."""
    table = embedding.EmbeddingTable(5, 3, dtype=torch.float64)
    saved = table.state_dict(keep_vars=True).values()
    return {
        "keys": len(table.state_dict()),
        "weight is one": "weight" in table.state_dict(),
        "parameters": len(list(table.parameters())),
        "weight, times": sum(each is table.weight for each in saved),
        "shape": list(table.weight.shape),
        "dtype": str(table.weight.dtype),
    }


@probe
def default_dtype():
    """The dtype of a table that is not told one."""
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        return str(embedding.EmbeddingTable(5, 3).weight.dtype)
    finally:
        torch.set_default_dtype(usual)


@probe
def bad_sizes():
    """Sizes that are refused."""
    sizes = {
        "no rows": ((0, 3), {"padding_idx": None}),
        "-1 rows": ((-1, 3), {"padding_idx": None}),
        "no width": ((4, 0), {}),
        "padding behind": ((4, 3), {"padding_idx": 4}),
        "padding before": ((4, 3), {"padding_idx": -1}),
        "negative std": ((4, 3), {"init_std": -0.5}),
    }
    return {
        name: outcome(lambda a=args, o=options: embedding.EmbeddingTable(*a, **o))
        for name, (args, options) in sizes.items()
    }


def spread(weight, std):
    """How rows are distributed: rounded so far that another draw gives the same."""
    rest = (weight / std).double()
    squared = rest.square().mean(1)
    ratio = max(float(rest.std()), 1e-9)
    return {
        "log2 of std": round(8 * math.log2(ratio)) / 8,
        "within one": round(10 * float((rest.abs() < 1).double().mean())),
        "beyond two": round(40 * float((rest.abs() > 2).double().mean())),
        "lengths vary": bool(squared.max() > 1.1 * squared.min()),
        "rows alike": bool((rest[1:] == rest[:-1]).all()),
        "columns alike": bool((rest[:, 1:] == rest[:, :-1]).all()),
    }


@probe
def drawn():
    """How the rows are distributed, by default and with a given std."""
    one = embedding.EmbeddingTable(400, 64)
    other = embedding.EmbeddingTable(90, 256, init_std=3.0)
    return {
        "default": spread(one.weight.detach()[1:], 1 / 8),
        "given": spread(other.weight.detach()[1:], 3.0),
    }


@probe
def std_zero():
    """A table with a standard deviation of 0."""
    weight = embedding.EmbeddingTable(30, 20, init_std=0.0).weight.detach()
    return bool((weight == 0).all())


@probe
def padding_row_at_first():
    """Which rows are zero when a table is made, and when it is reset."""

    def zero_rows(table):
        return (table.weight.detach() == 0).all(1).nonzero().flatten().tolist()

    table = embedding.EmbeddingTable(6, 20, padding_idx=4)
    with torch.no_grad():
        table.weight.fill_(3.0)
    table.reset_parameters()
    return {
        "default": zero_rows(embedding.EmbeddingTable(6, 20)),
        "none": zero_rows(embedding.EmbeddingTable(6, 20, padding_idx=None)),
        "4, reset": zero_rows(table),
    }


@probe
def redrawn():
    """What reset_parameters does to the parameter and to torch's generator."""
    table = embedding.EmbeddingTable(6, 20)
    parameter, first = table.weight, table.weight.detach().clone()
    table.reset_parameters()
    return {
        "the same parameter": table.weight is parameter,
        "the same numbers": bool(torch.equal(first, table.weight.detach())),
    }


# --- lookup ---------------------------------------------------------------------------------------

IDS = torch.tensor([[2, 0, 2, 5], [5, 2, 0, 1]])


@probe
def lookup():
    """A lookup with a padding row in the middle."""
    table = table_of(irregular(6, 3), padding_idx=2)
    return seen(table, table(IDS))


@probe
def lookup_padding_zero():
    """A lookup with the default padding row."""
    table = table_of(irregular(6, 3))
    return seen(table, table(IDS))


@probe
def lookup_no_padding():
    """A lookup without a padding row."""
    table = table_of(irregular(6, 3), padding_idx=None)
    return seen(table, table(IDS))


@probe
def lookup_shapes():
    """Ids in other shapes and strides, and in int32."""
    table = table_of(irregular(6, 3))
    given = {
        "transposed": IDS.T,
        "one": IDS[0, 3],
        "none": IDS[:0],
        "int32": IDS[0].int(),
    }
    return {name: outcome(lambda i=ids: table(i)) for name, ids in given.items()}


@probe
def lookup_dtype():
    """Dtypes of results, by that of the table."""
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        table = table_of(irregular(6, 3, dtype=dtype))
        found[str(dtype)] = str(table(IDS).dtype)
    return found


@probe
def large_ids():
    """The last rows of a table that is larger than float32 can count."""
    rows = 2**24 + 2
    table = embedding.EmbeddingTable(rows, 1, init_std=0.0, dtype=torch.bfloat16)
    with torch.no_grad():
        table.weight[-2], table.weight[-1] = 2.0, 3.0
        return table(torch.tensor([rows - 1, rows - 2, 1]))


@probe
def bad_ids():
    """What is done with ids that are none, or of no row."""
    table = table_of(irregular(6, 3))
    given = {
        "float": torch.tensor([1.0, 4.0]),
        "bool": torch.tensor([True, False]),
        "negative": torch.tensor([1, -2]),
        "beyond": torch.tensor([1, 7]),
    }
    return {name: outcome(lambda i=ids: table(i)) for name, ids in given.items()}


# --- bags -----------------------------------------------------------------------------------------


def pooled(mode, *, weighted=False, padding_idx=2, dtype=torch.float64, **options):
    weight = irregular(7, 3, dtype=dtype)
    weight[1], weight[2] = -3.0 + weight[1] * 0.1, 0.5  # padding would win some maxima
    table = table_of(weight, padding_idx=padding_idx)
    if not weighted:
        return seen(table, table.bag(VALUES, OFFSETS, mode=mode, **options))
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, requires_grad=True)
    return seen(table, table.bag(VALUES, OFFSETS, mode=mode, weights=weights), weights)


@probe
def bag_sum():
    """Sums."""
    return pooled("sum")


@probe
def bag_mean():
    """Means."""
    return pooled("mean")


@probe
def bag_max():
    """Maxima."""
    return pooled("max")


@probe
def bag_weighted_sum():
    """Weighted sums."""
    return pooled("sum", weighted=True)


@probe
def bag_weighted_mean():
    """Weighted means."""
    return pooled("mean", weighted=True)


@probe
def bag_with_a_zero_row():
    """Means where a row that is no padding happens to be zero."""
    weight = irregular(7, 3)
    weight[3] = 0.0
    table = table_of(weight, padding_idx=2)
    return table.bag(VALUES, OFFSETS, mode="mean")


@probe
def bag_default_mode():
    """The mode that is taken when none is given."""
    table = table_of(irregular(7, 3))
    return table.bag(VALUES, OFFSETS)


@probe
def bag_padding_zero():
    """Bags with the default padding row, and without one."""
    return {
        f"{mode}, {padding_idx}": pooled(mode, padding_idx=padding_idx)["out"]
        for mode in ("sum", "mean", "max")
        for padding_idx in (0, None)
    }


@probe
def bag_padding_zero_weighted():
    """Weighted means with the default padding row, and without one."""
    return [pooled("mean", weighted=True, padding_idx=i)["out"] for i in (0, None)]


@probe
def weights_that_cancel():
    """A bag whose weights add up to 0, and one whose weights are all 0."""
    table = table_of(irregular(7, 3))
    weights = torch.tensor([0.5, -0.5, 0.0, 0.0, 1.5, 0.7], dtype=torch.float64)
    weights.requires_grad_()
    values, offsets = torch.tensor([1, 4, 3, 3, 5, 6]), torch.tensor([0, 2, 4])
    return seen(table, table.bag(values, offsets, mode="mean", weights=weights), weights)


@probe
def weights_small_or_negative():
    """Bags whose weights add up to less than 1, and to less than 0."""
    table = table_of(irregular(7, 3))
    weights = torch.tensor([1e-4, 3e-4, -0.2, -0.6, -1.0, 0.25], dtype=torch.float64)
    weights.requires_grad_()
    values, offsets = torch.tensor([1, 4, 3, 5, 2, 6]), torch.tensor([0, 2, 4])
    return seen(table, table.bag(values, offsets, mode="mean", weights=weights), weights)


@probe
def weights_tiny():
    """A bag whose weights add up to much less than 1e-6."""
    table = table_of(irregular(7, 3))
    weights = torch.tensor([1e-10, 3e-10, 2e-10], dtype=torch.float64)
    return table.bag(torch.tensor([1, 4, 3]), torch.tensor([0, 2]), mode="mean", weights=weights)


@probe
def filled_anew():
    """The same tensors with other contents, and what is left in them."""
    table = table_of(irregular(7, 3), padding_idx=5)
    values, offsets = torch.tensor([1, 5, 4, 3]), torch.tensor([0, 1])
    weights = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
    ways = ({"mode": "sum"}, {"mode": "mean"}, {"mode": "max"})
    ways += ({"mode": "sum", "weights": weights}, {"mode": "mean", "weights": weights})
    for options in ways:
        table.bag(values, offsets, **options)
    left = {"values": values.clone(), "offsets": offsets.clone()}
    offsets[1] = 3
    values.copy_(torch.tensor([1, 5, 4, 3]))
    return left | {str(i): table.bag(values, offsets, **o)[0] for i, o in enumerate(ways)}


@probe
def cost_in_half():
    """How large the largest tensor is beside the table, in bfloat16."""
    table = embedding.EmbeddingTable(4000, 32, dtype=torch.bfloat16)
    values, offsets = torch.arange(1, 9), torch.tensor([0, 3])
    found = {}
    for mode in ("sum", "mean", "max"):
        cost = count(lambda m=mode: table.bag(values, offsets, mode=m))
        found[mode] = int(cost.largest_bytes > 4000 * 32)
    return found


@probe
def nothing_to_pool():
    """What is refused even where there is no value."""
    table = table_of(irregular(7, 3))
    none, zero = torch.zeros(0, dtype=torch.int64), torch.tensor([0])
    return {
        "mode": refused(outcome(lambda: table.bag(none, zero, mode="median"))),
        "weights": refused(outcome(lambda: table.bag(none, zero, weights=torch.ones(2)))),
    }


@probe
def empty_bags():
    """Bags without entries in all places."""
    table = table_of(irregular(7, 3))
    values, offsets = torch.tensor([3, 0, 5]), torch.tensor([0, 0, 1, 2, 3])
    return {
        mode: outcome(lambda m=mode: table.bag(values, offsets, mode=m))
        for mode in ("sum", "mean", "max")
    }


@probe
def very_small_numbers():
    """Maxima of numbers below -1e9."""
    weight = irregular(7, 3)
    weight[3], weight[5] = -1e12 - weight[3].abs() * 1e11, -3e11
    table = table_of(weight)
    return table.bag(torch.tensor([3, 0, 5, 3, 0]), torch.tensor([0, 2]), mode="max")


@probe(tolerance=1e-4)
def after_large_numbers():
    """A bag that follows one of much larger numbers, in float32."""
    weight = irregular(7, 3, dtype=torch.float32)
    weight[1] = 3e7
    table = table_of(weight)
    values, offsets = torch.tensor([1, 1, 3, 4]), torch.tensor([0, 2])
    return [table.bag(values, offsets, mode=mode)[1] for mode in ("sum", "mean", "max")]


@probe(tolerance=2e-2)
def long_bags():
    """Bags of 1,000 entries in bfloat16."""
    table = table_of(torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.bfloat16))
    values, offsets = torch.tensor([1, 2] * 500), torch.tensor([0, 990])
    return [table.bag(values, offsets, mode=mode).double() for mode in ("sum", "mean")]


@probe(tolerance=2e-2)
def long_weighted_bags():
    """Weighted bags of 1,000 entries in bfloat16."""
    table = table_of(torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.bfloat16))
    values, offsets = torch.tensor([1, 2] * 500), torch.tensor([0, 990])
    weights = torch.full((1000,), 0.75, dtype=torch.bfloat16)
    out = table.bag(values, offsets, mode="mean", weights=weights)
    return out.double()


@probe
def dtypes():
    """Ids in int32, and weights of another dtype than the table's."""

    def bag(*args, **options):
        table = table_of(irregular(7, 3, dtype=options.pop("dtype", torch.float64)))
        return outcome(lambda: str(table.bag(*args, **options).dtype))

    weights = torch.tensor(WEIGHTS)
    narrow = (VALUES.int(), OFFSETS.int())
    found = {"int32": bag(*narrow), "int32, max": bag(*narrow, mode="max")}
    found["int32, weights"] = bag(*narrow, weights=weights.double())
    for mode in ("sum", "mean"):
        for dtype in (torch.float64, torch.bfloat16):
            given = {"mode": mode, "weights": weights, "dtype": dtype}
            found[f"float32 weights, {mode}, {dtype}"] = bag(VALUES, OFFSETS, **given)
    return found


@probe
def inputs_afterwards():
    """Whether a call writes into what it is given."""
    table = table_of(irregular(7, 3), padding_idx=2)
    values, offsets, weights = VALUES.clone(), OFFSETS.clone(), torch.tensor(WEIGHTS).double()
    given = weights.clone()
    for mode in ("sum", "mean"):
        table.bag(values, offsets, mode=mode, weights=given)
    return {
        "values": bool(values.equal(VALUES)),
        "offsets": bool(offsets.equal(OFFSETS)),
        "weights": given,
    }


@probe
def bad_bag_ids():
    """What a bag does with ids that are none, or of no row."""
    table = table_of(irregular(6, 3))
    given = {
        "float": torch.tensor([1.0, 4.0]),
        "bool": torch.tensor([True, True]),
        "negative": torch.tensor([1, -2]),
        "beyond": torch.tensor([1, 7]),
    }
    return {
        name: refused(outcome(lambda v=values: table.bag(v, torch.tensor([0, 1]))))
        for name, values in given.items()
    }


def refused(found):
    """Both kinds of error that an id outside may raise are one."""
    return "an error" if found in ("IndexError", "RuntimeError") else found


@probe
def bad_offsets():
    """What a bag does with offsets that are no starts."""
    table = table_of(irregular(6, 3))
    values = torch.tensor([1, 2, 3])
    given = {"late": [1, 2], "falling": [0, 2, 1], "beyond": [0, 4]}
    found = {
        name: outcome(lambda o=offsets: table.bag(values, torch.tensor(o), mode="sum"))
        for name, offsets in given.items()
    }
    return {name: out if isinstance(out, str) else "accepted" for name, out in found.items()}


@probe
def bad_options():
    """Modes, weights and shapes that are refused."""
    table = table_of(irregular(6, 3))
    values, offsets, weights = torch.tensor([1, 2, 3]), torch.tensor([0, 1]), torch.ones(3).double()

    def bag(values=values, offsets=offsets, **options):
        return outcome(lambda: table.bag(values, offsets, **options))

    return {
        "mode": bag(mode="median"),
        "weights for max": bag(mode="max", weights=weights),
        "one weight": bag(weights=weights[:1]),
        "values 2-D": bag(values.reshape(3, 1)),
        "offsets 2-D": bag(offsets=offsets.reshape(2, 1)),
    }


# --- cost and device ------------------------------------------------------------------------------

POOLING = (("sum", False), ("mean", False), ("max", False), ("sum", True), ("mean", True))


def large(rows, width, num_bags, length, device="cpu"):
    table = embedding.EmbeddingTable(rows, width, device=device)
    number = torch.arange(num_bags * length, device=device)
    weights = 0.5 + 0.1 * (number % 7)
    return table, 1 + number * 7 % (rows - 1), number[::length].contiguous(), weights


def bags(table, values, offsets, weights):

    def bag(mode, weighted):
        return lambda: table.bag(values, offsets, mode=mode, weights=weights if weighted else None)

    return [bag(mode, weighted) for mode, weighted in POOLING]


@probe
def loops():
    """Whether the number of operations grows with ids, with bags and with their length."""
    few, many, long = (large(50, 4, *sizes) for sizes in ((4, 3), (40, 3), (4, 30)))

    def grows(more):
        pairs = zip(bags(*few), bags(*more), strict=True)
        return max(count(b).operations - count(a).operations for a, b in pairs) > 20

    lookups = [count(lambda x=x: x[0](x[1])).operations for x in (few, many)]
    return {
        "bags": grows(many),
        "length": grows(long),
        "lookup": lookups[1] - lookups[0] > 20,
    }


@probe
def as_large_as_the_table():
    """Whether something of the table's size is made, and whether it grows with the ids."""
    rows, width = 3_000, 32
    few, many = (large(rows, width, number, 4) for number in (5, 20))
    lookups = [count(lambda x=x: x[0](x[1])).largest_bytes for x in (few, many)]
    pools = [max(count(each).largest_bytes for each in bags(*x)) for x in (few, many)]
    limit = rows * width * 2
    return {
        "lookup": lookups[0] > limit,
        "lookup, with the ids": lookups[0] > limit and lookups[1] > 2 * lookups[0],
        "bag": pools[0] > limit,
    }


@probe
def ids_by_bags():
    """Whether something of ids x bags is made."""
    few, many = (large(50, 4, number, 2) for number in (100, 400))
    sizes = [max(count(each).largest_bytes for each in bags(*x)) for x in (few, many)]
    return sizes[1] > 8 * sizes[0]


@probe
def on_a_device():
    """Whether tensors of the CPU come in on another device."""

    def scenario(device):
        table, values, *rest = large(9, 4, 5, 3, device)
        return [table(values), *(each() for each in bags(table, values, *rest))]

    return bool(other_device_findings(scenario).findings)


@probe
def moved_to_a_device():
    """Whether tensors of the CPU come in where the table was moved."""

    def scenario(device):
        table, values, *rest = large(9, 4, 5, 3, device)
        table = embedding.EmbeddingTable(9, 4).to(device)
        return [table(values), *(each() for each in bags(table, values, *rest))]

    return bool(other_device_findings(scenario).findings)


# --- hashing: facts in words, which many bugs share, so that a name has to fit all of them --------

KEYS = ["user_42", "user_43", 7, "Amélie", "", -3, 2**53 + 1, "x"]
MANY = [f"user_{i}" for i in range(3_000)]


def alike(one, other):
    return bool(torch.equal(one.long(), other.long()))


@probe
def hash_elsewhere():
    """The same keys under another PYTHONHASHSEED, and in a fresh process."""
    here, own = embedding.hash_ids(KEYS, 10_007), builtins.hash
    with mock.patch.object(builtins, "hash", lambda key: own(("another", key))):
        salted = embedding.hash_ids(KEYS, 10_007)
    file = sys.modules[embedding.hash_ids.__module__].__file__
    fresh = runpy.run_path(file)["hash_ids"](KEYS[::-1], 10_007).flip(0)
    return {"other seed": alike(here, salted), "fresh": alike(here, fresh)}


@probe
def hash_among_others():
    """The same keys in another order, and among fewer others."""
    here = embedding.hash_ids(KEYS, 10_007)
    return {
        "order": alike(here, embedding.hash_ids(KEYS[::-1], 10_007).flip(0)),
        "fewer": alike(here[3:], embedding.hash_ids(KEYS[3:], 10_007)),
    }


@probe
def hash_key_forms():
    """Which keys are taken for the same."""
    pairs = {
        "7": (7, "7"),
        "case": ("User", "user"),
        "space": (" user", "user"),
        "end": ("a_rather_long_key_1", "a_rather_long_key_2"),
        "order": ("abc", "cba"),
        "sign": (-7, 7),
        "accent": ("Amélie", "Amlie"),
        "large": (2**53, 2**53 + 1),
    }
    found = {name: embedding.hash_ids(list(pair), 2**31 - 1) for name, pair in pairs.items()}
    return {name: bool(pair[0] == pair[1]) for name, pair in found.items()}


@probe
def hash_range():
    """The lowest and the highest bucket, and whether one in between is missing."""
    buckets = embedding.hash_ids(MANY, 11).long()
    inside = buckets[(buckets >= 0) & (buckets < 11)]
    return {
        "lowest": f"{max(int(buckets.min()), -1)}",
        "highest": f"{min(int(buckets.max()), 12)}",
        "inside": f"{len(inside.unique())}",
        "of one": outcome(lambda: embedding.hash_ids(["a", "b"], 1)),
    }


@probe
def hash_type():
    """Dtypes and the empty list."""
    found = {"some": ["a"], "none": []}
    return {name: str(embedding.hash_ids(keys, 9).dtype) for name, keys in found.items()} | {
        "wide": outcome(lambda: embedding.hash_ids(["a"], 2**40).dtype)
    }


@probe
def hash_spread():
    """How many keys collide where hardly any should, and how many buckets stay empty: log2."""
    lost = 3_000 - len(embedding.hash_ids(MANY, 2**31 - 1).unique())
    empty = 300 - len(embedding.hash_ids(MANY, 300).unique())
    return f"2^{round(math.log2(1 + lost))} lost, 4^{round(math.log2(1 + empty) / 2)} empty"


@probe
def hash_of_steps():
    """In how many of 97 buckets the multiples of 97 fall, roughly."""
    found = len(embedding.hash_ids(range(0, 97 * 3_000, 97), 97).unique())
    return f"{round(found / 10)}0"


@probe
def hash_salts():
    """What a salt does: to buckets, to collisions, and by how many different shifts."""
    found = {}
    for name, keys in (("text", MANY[:800]), ("numbers", list(range(800)))):
        one, other = (embedding.hash_ids(keys, 101, salt=salt).long() for salt in "ab")
        pairs = (one[:-1, None] == one[None, 1:]).triu()
        still = (other[:-1, None] == other[None, 1:])[pairs].double().mean()
        found[name] = {
            "same bucket": float((one == other).double().mean()) > 0.5,
            "same collisions": float(still) > 0.5,
            "shifts": f"{min(len(((one - other) % 101).unique()), 30)}",
        }
    return found


@probe
def hash_side_effects():
    """Whether the generators of torch and Python are left as they were."""
    before = torch.get_rng_state(), random.getstate()
    embedding.hash_ids(KEYS, 10_007)
    return bool(before[0].equal(torch.get_rng_state())) and before[1] == random.getstate()


@probe
def hash_bad_input():
    """Numbers of buckets that are refused."""
    return {
        f"{keys}, {n}": outcome(lambda k=keys, n=n: embedding.hash_ids(k, n))
        for keys in ([], ["a"])
        for n in (0, -5)
    }
