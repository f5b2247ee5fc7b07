"""Kata 02, towers: what holds for every batch, however wide its columns are padded."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.spec import assert_close, device, generator, learner, rung

tower = learner("models.tower")
embedding = learner("models.embedding")
data = learner("data.features")

EXAMPLES = settings(max_examples=12, derandomize=True, database=None, deadline=None)
PLACES = 5
SIZES = {"genres": 7, "item": 9}


def a_tower():
    """Random numbers for everything but the padding rows."""
    draw = generator(3)
    tables = {}
    for name, size in SIZES.items():
        weight = torch.randn(size, 6, generator=draw)
        weight[0] = 0
        tables[name] = embedding.EmbeddingTable(size, 6)
        tables[name].load_state_dict({"weight": weight})
    features = [
        data.Feature("genres", "multi_hot", 7),
        data.Feature("history", "history", 9, "item"),
        data.Feature("year", "dense", 2),
    ]
    made = tower.Tower(features, 6, hidden_dims=(8,), max_history=PLACES, tables=tables)
    given_tables = {id(table.weight) for table in tables.values()}
    with torch.no_grad():
        for parameter in made.parameters():
            if id(parameter) not in given_tables:
                values = torch.randn(parameter.shape, generator=draw)
                places = parameter.numel() == 1 or parameter.numel() % PLACES == 0
                parameter.copy_(values.abs() + 0.1 if places else 0.5 * values)
    return made.to(device())


row = st.tuples(
    st.lists(st.integers(1, 6), max_size=8),
    st.lists(st.integers(1, 8), max_size=PLACES + 2),
    st.floats(-2, 2, width=16),
)


def padded(bags, width):
    rows = [bag + [0] * (width - len(bag)) for bag in bags]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(bags), width).to(device())


def batch_of(rows, more=0):
    """The rows as columns, as narrow as they can be, or with some more padding."""
    genres, histories, years = zip(*rows, strict=True)
    return {
        "genres": padded(genres, max(map(len, genres)) + more),
        "history": padded(histories, max(map(len, histories)) + 2 * more),
        "year": torch.tensor([[year, 1.0] for year in years]).to(device()),
    }


@rung(
    hints=[
        "At serving time one user comes alone; in training the same row had others around it, and "
        "as much padding as the longest of them needed.",
        "Leave padding out of sums and of counts. Whatever averages over the batch ties rows to "
        "each other: BatchNorm, or a norm along dim=0.",
        "Place 0 is column 0, however wide the column is; no weight may depend on the width.",
    ]
)
def test_rows_are_independent():
    """A row depends on its own features only: not on other rows, padding, or the order of a set."""
    model = a_tower()

    @EXAMPLES
    @given(rows=st.lists(row, min_size=1, max_size=4), more=st.integers(0, 3), train=st.booleans())
    def holds(rows, more, train):
        model.train(train)
        mode = "training" if train else "evaluation"
        whole = model(batch_of(rows, more))
        for i, (genres, history, year) in enumerate(rows):
            alone = model(batch_of([(genres[::-1], history, year)]))
            what = f"row {i} alone, without padding, genres in another order; {mode} mode"
            assert_close(alone, whole[i : i + 1].detach(), what=what, rtol=1e-4, atol=1e-5)

    holds()
