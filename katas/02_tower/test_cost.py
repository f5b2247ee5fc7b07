"""Kata 02, towers: what a forward pass costs, counted; and that it stays on its device."""

import torch

from harness.spec import (
    assert_budget,
    assert_device_safe,
    assert_scales,
    device,
    generator,
    learner,
    rung,
)

tower = learner("models.tower")
data = learner("data.features")

ROWS = 20_000  # of a table: any tensor that grows with it is seen
FEATURES = (
    ("age", "id", 5),
    ("genres", "multi_hot", 7),
    ("history", "history", ROWS, "item"),
    ("tags", "multi_hot", ROWS, "item"),
    ("item", "id", ROWS),
    ("plot", "text", 3),
)
SMALL = tuple((name, kind, min(size, 9), *table) for name, kind, size, *table in FEATURES)


def described(features):
    return [data.Feature(*feature) for feature in features]


def batch_of(rows, place):
    draw = generator(1)
    batch = {
        "age": torch.randint(1, 5, (rows,), generator=draw),
        "genres": torch.randint(1, 7, (rows, 3), generator=draw),
        "history": torch.randint(0, 9, (rows, 4), generator=draw),
        "tags": torch.randint(0, 9, (rows, 2), generator=draw),
        "item": torch.randint(1, 9, (rows,), generator=draw),
        "plot": torch.randn(rows, 3, generator=draw),
    }
    return {name: column.to(place) for name, column in batch.items()}


@rung(
    hints=[
        "Rows are independent: what one row needs, all can have at once.",
        "No Python loop over rows or over ids, and nothing as long as a table: a lookup or a bag "
        "reads the rows it needs.",
    ]
)
def test_cost():
    """As many operations for many rows as for few, and no memory that grows with a table."""
    model = tower.Tower(described(FEATURES), 6, hidden_dims=(8,)).to(device()).eval()

    def forward(rows):
        batch = batch_of(rows, device())
        return lambda: model(batch)

    assert_scales(forward, (3, 24), call="tower(batch of 3 rows, or of 24)")
    assert_budget(
        forward(24),
        largest=4 * ROWS - 1,
        why=f"nothing as long as a table of {ROWS:,} rows",
        call="tower(batch of 24 rows)",
    )


@rung(
    hints=[
        "On a GPU nothing may be mixed with a tensor of the CPU.",
        "torch.arange, torch.zeros and torch.tensor make theirs on the CPU unless you say where.",
        "device=ids.device, or x.new_zeros(...); what belongs to the tower is a parameter",
    ]
)
def test_on_a_gpu():
    """On a GPU everything stays on it: towers, what they give, and the gradients."""

    def scenario(place):
        model = tower.TwoTower(described(SMALL), described(SMALL[2:]), 4, hidden_dims=(5,))
        model = model.to(place)
        outs = list(model(batch_of(3, place), batch_of(2, place)))
        none = torch.zeros(2, 0, dtype=torch.int64).to(place)
        outs += [model.user_tower({**batch_of(2, place), "history": none}), model.temperature]
        sum(out.sum() for out in outs).backward()
        return {"outs": outs, "gradients": [p.grad for p in model.parameters()]}

    assert_device_safe(scenario, call="two_tower(user_batch, item_batch) on a GPU")
