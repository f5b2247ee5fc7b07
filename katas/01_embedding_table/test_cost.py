"""Kata 01: what a lookup and a bag may cost, counted; and that they stay on their device."""

import torch

from harness.spec import assert_budget, assert_device_safe, assert_scales, device, learner, rung

embedding = learner("models.embedding")

WAYS = ("lookup", "sum", "mean", "max", "weighted sum", "weighted mean")


def make(rows, width, bags, length, place, dtype=torch.float32):
    """A table, and bags of equal length."""
    table = embedding.EmbeddingTable(rows, width, device=place, dtype=dtype)
    number = torch.arange(bags * length, device=place)
    values, offsets = 1 + number * 7 % (rows - 1), number[::length].contiguous()
    return table, values, offsets, (0.5 + 0.1 * (number % 7)).requires_grad_()


def use(table, values, offsets, weights, way):
    """Call the table in one of the ways."""
    if way == "lookup":
        return table(values)
    given = {"weights": weights} if way.startswith("weighted") else {}
    return table.bag(values, offsets, mode=way.rpartition(" ")[2], **given)


def words(values, offsets, way):
    """What is called, for the message."""
    if way == "lookup":
        return f"table(ids[{values}])"
    mode = f"mode={way.rpartition(' ')[2]!r}" + (", weights=..." if " " in way else "")
    return f"table.bag(values[{values}], offsets[{offsets}], {mode})"


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
    for way in WAYS:

        def more_bags(size, way=way):
            inputs = make(50, 4, size, 3, device())
            return lambda: use(*inputs, way).sum().backward()

        def longer_bags(size, way=way):
            inputs = make(50, 4, 3, size, device())
            return lambda: use(*inputs, way).sum().backward()

        for bags, grown in ((64, more_bags), (3, longer_bags)):
            call = words(192, bags, way) + ".sum().backward()"
            assert_scales(grown, (8, 64), allowance=8, call=call)
    half, float32 = torch.bfloat16, torch.float32
    for rows, width, bags, length, dtype, most, why in (
        (20_000, 32, 5, 16, float32, 20_000 * 32 * 2, "half of the table"),
        (20_000, 32, 5, 16, half, 20_000 * 32, "half of the table, which is in bfloat16"),
        (50, 4, 800, 2, float32, 800 * 2 * 4 * 128, "32 times the rows that are looked up"),
    ):
        inputs = make(rows, width, bags, length, device(), dtype)
        for way in WAYS:
            call = f"{words(bags * length, bags, way)}, table [{rows}, {width}]"
            assert_budget(lambda i=inputs, w=way: use(*i, w), largest=most, why=why, call=call)


@rung(
    hints=[
        "On a GPU nothing may be mixed with a tensor of the CPU.",
        "torch.arange, torch.zeros and torch.tensor make theirs on the CPU unless you say where.",
        "device=values.device, or self.weight.new_zeros(...). A module takes along only parameters "
        "and buffers move with it.",
    ]
)
def test_on_a_gpu():
    """On a GPU everything stays on it: the table, what is looked up, and the gradients."""

    def scenario(place):
        table, values, offsets, weights = make(9, 4, 5, 3, place)
        outs = [use(table, values, offsets, weights, way) for way in WAYS]
        outs.append(table.bag(values[:0], offsets[:0]))
        moved = make(9, 4, 5, 3, "cpu")[0].to(place)  # as trainers do it
        outs += [use(moved, values, offsets, weights, way) for way in WAYS]
        sum(out.sum() for out in outs).backward()
        table.reset_parameters()
        return {"outs": outs, "weight": table.weight, "gradient": table.weight.grad}

    assert_device_safe(scenario, call="table(ids), table.bag(values, offsets, ...) on a GPU")
