"""Kata 01: what a lookup and a bag may cost, counted; and that they stay on their device."""

import torch

from harness.cost import count
from harness.devices import other_device_findings
from harness.spec import device, fail, learner, rung

embedding = learner("models.embedding")

ALLOWANCE = 4  # operations that a call for eight times the bags may make on top


def make(rows, width, num_bags, length, place):
    """A table, and bags of equal length."""
    table = embedding.EmbeddingTable(rows, width, device=place)
    number = torch.arange(num_bags * length, device=place)
    values, offsets = 1 + number * 7 % (rows - 1), number[::length].contiguous()
    return table, values, offsets, (0.5 + 0.1 * (number % 7)).requires_grad_()


def calls(table, values, offsets, weights):
    """What may be called, with the words for it."""
    yield f"table(ids[{len(values)}])", lambda: table(values)
    given = f"values[{len(values)}], offsets[{len(offsets)}]"
    for mode in ("sum", "mean", "max"):
        for more in ({}, {"weights": weights})[: 1 if mode == "max" else 2]:
            yield (
                f"table.bag({given}, mode={mode!r}{', weights=...' if more else ''})",
                lambda mode=mode, more=more: table.bag(values, offsets, mode=mode, **more),
            )


def assert_no_larger(limit, why, rows, width, num_bags, length):
    for call, function in calls(*make(rows, width, num_bags, length, device())):
        made = count(function).largest
        if made and made.bytes > limit:
            fail(
                call=f"{call} of a table of {rows:,} rows, {width} wide",
                came_back=f"{made.operation} made {made.shape} {made.dtype}, {made.bytes:,} bytes",
                expected=f"nothing of more than {limit:,} bytes, {why}",
                more=made.place.facts() if made.place else (),
            )


@rung(
    hints=[
        "What happens for each bag or id, and what once? Which tensor's size has the rows of the "
        "table in it?",
        "A Python loop over bags, a one-hot matrix times the table, a copy of the table with a row "
        "zeroed, a mask of bags against entries: all right, and all too much. Take rows by their "
        "ids, all bags at once.",
        "F.embedding and F.embedding_bag do it; so does a gather, and an index_add with the number "
        "of each entry's bag.",
    ]
)
def test_cost():
    """No loop over ids or bags; nothing as large as the table, ids x rows or ids x bags."""
    few, many = (make(50, 4, num_bags, 3, device()) for num_bags in (5, 40))
    for (_, small), (call, large) in zip(calls(*few), calls(*many), strict=True):
        before, after = (count(lambda f=f: f().sum().backward()) for f in (small, large))
        if after.operations > before.operations + ALLOWANCE:
            place = (after.by_place - before.by_place).most_common(1)[0][0]
            fail(
                call=f"{call}.sum().backward()",
                came_back=f"{after.operations} operations, {before.operations} for 5 bags",
                expected=f"{before.operations} here too (at most {ALLOWANCE} more)",
                more=place.facts() if place else (),
            )
    rows, width = 20_000, 32
    assert_no_larger(rows * width * 2, "half the table", rows, width, 5, 16)
    rows, width, num_bags, length = 50, 4, 800, 2
    limit = num_bags * length * width * 128
    assert_no_larger(limit, "32 times the looked-up rows", rows, width, num_bags, length)


@rung(
    hints=[
        "On a GPU nothing may be mixed with a tensor of the CPU.",
        "torch.arange, torch.zeros and torch.tensor make theirs on the CPU unless you say where.",
        "device=values.device, or self.weight.new_zeros(...)",
    ]
)
def test_on_a_gpu():
    """On a GPU everything stays on it: the table, what is looked up, and the gradients."""

    def scenario(place):
        table, *given = make(9, 4, 5, 3, place)
        outs = [function() for _, function in calls(table, *given)]
        outs.append(table.bag(*(x[:0] for x in given[:2])))
        sum(out.sum() for out in outs).backward()
        table.reset_parameters()
        return {"outs": outs, "weight": table.weight, "gradient": table.weight.grad}

    run = other_device_findings(scenario)
    for finding in run.findings[:1]:
        more = finding.place.facts() if finding.place else ()
        if finding.made:
            more = [*more, *finding.made.facts("made in")]
        fail(
            call="table(ids), table.bag(values, offsets, ...), all on a GPU",
            came_back=finding.text,
            expected="all of it on the device of the table",
            more=more,
        )
