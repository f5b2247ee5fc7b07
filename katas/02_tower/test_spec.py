"""Kata 02, towers: what `models/tower.py` must do, from the simplest on.

Nothing here knows how the parts of a tower are called or in which order they are concatenated.
"""

import torch

from harness.spec import (
    assert_close,
    assert_scalar,
    check,
    device,
    expect_error,
    generator,
    golden,
    learner,
    rung,
)

tower = learner("models.tower")
embedding = learner("models.embedding")
data = learner("data.features")

PLACES = 11  # max_history: a number that no other dimension here has
FEATURES = (  # name, kind, size and, if it is not the name, table
    ("age", "id", 5),
    ("genres", "multi_hot", 7),
    ("history", "history", 9, "item"),
    ("year", "dense", 2),
    ("plot", "text", 3),
)


def make(features=FEATURES, dim=6, *, seed=0, **options):
    """A seeded tower in evaluation mode. Its numbers are never compared with anybody's."""
    torch.manual_seed(seed)
    features = described(features)
    return tower.Tower(features, dim, max_history=PLACES, **options).to(device()).eval()


def described(features):
    return [data.Feature(*feature) for feature in features]


def batch_of(rows=4, seed=1):
    draw = generator(seed)
    batch = {
        "age": torch.randint(1, 5, (rows,), generator=draw),
        "genres": torch.randint(1, 7, (rows, 3), generator=draw),
        "history": torch.randint(1, 9, (rows, 4), generator=draw),
        "year": torch.randn(rows, 2, generator=draw),
        "plot": torch.randn(rows, 3, generator=draw),
    }
    return {name: column.to(device()) for name, column in batch.items()}


def integers(values):
    return torch.tensor(values, device=device())


def tables_of(**rows):
    """The learner's embedding tables with these rows, row 0 for padding, by name."""
    tables = {}
    for name, weight in rows.items():
        weight = torch.tensor(weight, dtype=torch.float32)
        tables[name] = embedding.EmbeddingTable(*weight.shape)
        tables[name].load_state_dict({"weight": weight})
    return tables


def without_mlp(model, tables):
    """The tower with zeros for all it learns, except for tables and weights of places."""
    kept = {id(table.weight) for table in tables.values()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in kept and parameter.numel() != PLACES:
                parameter.zero_()
    return model


def set_places(model, values):
    """Give the places of a history other weights; by which formula is not known here."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == PLACES:
                parameter.copy_(torch.as_tensor(values).reshape(parameter.shape))


def differs(one, other):
    return float((one - other).detach().abs().max()) > 1e-4


# --- the output -----------------------------------------------------------------------------------


@rung(
    hints=[
        "Every row is a direction: its length is 1.",
        "Which axis is summed over for the length of a row? And a batch of one stays a batch.",
        "F.normalize(out, dim=-1), without a squeeze",
    ]
)
def test_unit_rows():
    """A batch of B rows becomes (B, dim), each row of length 1, also for B = 1."""
    for hidden_dims in ((), (8, 5)):
        model = make(hidden_dims=hidden_dims)
        for rows in (4, 1):
            batch = batch_of(rows)
            out = model(batch)
            shape = list(out.shape)
            check(shape == [rows, 6], f"shape [{rows}, 6]", came_back=shape)
            length = (out.double() ** 2).sum(1).sqrt()
            one = torch.ones(rows, dtype=torch.float64)
            assert_close(length, one, rtol=1e-5, what="length of each row")


@rung(
    hints=[
        "With an MLP that gives 0, what is left is the plain sum of the parts.",
        "out = sum of the parts + MLP(parts side by side), then normalise.",
        "torch.stack(parts).sum(0) + self.mlp(torch.cat(parts, dim=-1))",
    ]
)
def test_sum_of_parts():
    """Where the MLP gives 0, ids and multi-hot features give the normalised sum of their parts."""
    values = golden("golden.json")
    features = [("age", "id", 4), ("genres", "multi_hot", 5)]
    tables = tables_of(age=values["age"], genres=values["genres"])
    model = without_mlp(make(features, dim=3, tables=tables), tables)
    for case in values["cases"]:
        batch = {"age": integers(case["age"]), "genres": integers(case["genres"])}
        out = model(batch)
        assert_close(out, case["out"], dtype=torch.float32, rtol=1e-5, what=case["what"])


@rung(
    hints=[
        "The MLP corrects the sum of the parts: how much each counts is part of the formula.",
        "A sum, not a mean. No text (zeros) adds nothing, so its linear map has no bias.",
        "nn.Linear(feature.size, dim, bias=False) for text",
    ]
)
def test_residual():
    """The MLP's output is added to the sum of the parts, to which a text of zeros adds nothing."""
    features = [("age", "id", 3), ("sex", "id", 2), ("plot", "text", 4)]
    tables = tables_of(
        age=[[0.0] * 3, [1.0, -2.0, 0.5], [3.0, 1.0, -1.0]], sex=[[0.0] * 3, [0.5] * 3]
    )
    model = without_mlp(make(features, dim=3, tables=tables), tables)
    bias = torch.tensor([0.7, 0.2, -1.5], device=device())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.shape == (3,):  # the bias of the last Linear, and no other
                parameter.copy_(bias)
    batch = {"age": integers([1, 2, 0]), "sex": integers([1, 1, 0])}
    batch["plot"] = torch.zeros(3, 4, device=device())
    out = model(batch)
    expected = torch.tensor([[1.5, -1.5, 1.0], [3.5, 1.5, -0.5], [0.0, 0.0, 0.0]]) + bias.cpu()
    expected = expected / (expected**2).sum(1, keepdim=True).sqrt()
    assert_close(out, expected, what="an MLP that gives [0.7, 0.2, -1.5] for every row")


@rung(
    hints=[
        "Length 0 has no direction, and 0 / 0 is NaN.",
        "Bound the divisor from below. A gradient that passes through sqrt(0) is infinite.",
        "F.normalize does it, forwards and backwards.",
    ]
)
def test_zero_vector():
    """A zero vector stays zero and finite, and so do its gradients."""
    features = [("age", "id", 4), ("genres", "multi_hot", 5)]
    model = without_mlp(make(features), {})
    batch = {"age": integers([0, 2]), "genres": integers([[0, 0], [0, 0]])}
    out = model(batch)
    assert_close(out, torch.zeros(2, 6))
    grads = torch.autograd.grad(out.sum(), list(model.parameters()), allow_unused=True)
    finite = all(bool(grad.isfinite().all()) for grad in grads if grad is not None)
    check(finite, "finite gradients of all parameters", call="out.sum().backward()")


@rung(
    hints=[
        "A history gives two parts: a weighted mean of its rows, and the row of its last item.",
        "Most recent first: the last item is in column 0. Divide by the weights of the places that "
        "hold an item, so that one item alone is its own mean.",
        "table.bag(..., mode='mean', weights=weight of each place) does both; exp or softplus of a "
        "parameter is never negative.",
    ]
)
def test_history():
    """A history gives the weighted mean of its rows, padding left out, and its last item's row."""
    features = [("age", "id", 2), ("history", "history", 3, "item")]
    rows = {"age": [[0.0] * 3, [0, 0, 1]], "item": [[0.0] * 3, [1, 0, 0], [0, 1, 0]]}
    tables = tables_of(**rows)
    model = without_mlp(make(features, dim=3, tables=tables), tables)
    history = integers([[1, 0, 0], [2, 0, 0], [0, 0, 0]])
    out = model({"age": integers([1, 1, 1]), "history": history})
    expected = torch.tensor([[2.0, 0, 1], [0, 2, 1], [0, 0, 1]])
    expected = expected / (expected**2).sum(1, keepdim=True).sqrt()
    assert_close(out, expected, what="histories of one item and of none")
    history = integers([[1, 2, 0], [2, 1, 0], [1, 1, 2]])
    for first in (0.0, 9.0, -9.0):  # the weight of place 0 is about that of the others, or far off
        set_places(model, [first, *[0.0] * (PLACES - 1)])
        out = model({"age": integers([1, 1, 1]), "history": history}).detach()
        parts = out[:, :2] / out[:, 2:]  # how often each of the two items is in the sum
        two = torch.full((3,), 2.0)
        assert_close(parts.sum(1), two, rtol=1e-3, what="a mean (weights of sum 1) and a last item")
        for row, last in ((0, 0), (1, 1)):
            check(
                0.99 < float(parts[row, last]) < 2.01,
                "the last item once for itself, and with its share in the mean",
                came_back=f"{float(parts[row, last]):.3f} times",
                what=f"history {history[row].tolist()}",
            )


@rung(
    hints=[
        "Where an item stands in the history matters: each place has a weight of its own, which "
        "is learned.",
        "The weights are a parameter with max_history entries, one for each place; what lies "
        "beyond is cut.",
    ]
)
def test_history_places():
    """The order of a history matters, what lies beyond max_history does not; places are learned."""
    model = make()
    batch = batch_of(2)
    batch["history"] = integers([[1, 2, 3, 4], [5, 6, 7, 8]])
    swapped = {**batch, "history": integers([[1, 4, 2, 3], [5, 8, 7, 6]])}
    set_places(model, torch.linspace(1.0, -1.0, PLACES))  # they differ, whatever they begin with
    out = model(batch)
    check(differs(out, model(swapped)), "another output if older items change places")
    long = torch.randint(1, 9, (2, PLACES + 5), generator=generator(3)).to(device())
    out = model({**batch, "history": long})
    cut = model({**batch, "history": long[:, :PLACES]})
    assert_close(out, cut, what=f"history of {PLACES + 5}, of which {PLACES} count", rtol=1e-4)
    places = [p for p in model.parameters() if p.numel() == PLACES]
    grads = torch.autograd.grad(cut[:, 0].sum(), places, allow_unused=True) if places else []
    learned = any(grad is not None and bool((grad != 0).all()) for grad in grads)
    check(
        learned,
        f"a parameter of {PLACES} weights, one a place, each with a gradient",
        call="out.sum().backward()",
    )


@rung(
    hints=[
        "Row 0 of each table is nothing, however often it occurs.",
        "Leave padding out of sums and of counts; then it does not matter how long rows are.",
    ]
)
def test_padding_and_order():
    """More padding, or none, changes nothing; neither does the order inside a multi-hot row."""
    model = make(hidden_dims=(8,))
    set_places(model, torch.randn(PLACES, generator=generator(5)))
    batch = batch_of(3)
    out = model(batch)
    zeros = torch.zeros(3, 5, dtype=torch.int64, device=device())
    for name in ("genres", "history"):
        more = model({**batch, name: torch.cat([batch[name], zeros], dim=1)})
        assert_close(more, out, rtol=1e-4, atol=1e-5, what=f"5 columns of padding behind {name}")
    turned = model({**batch, "genres": batch["genres"].flip(1)})
    assert_close(turned, out, rtol=1e-4, atol=1e-5, what="genres in another order")
    empty = model({**batch, "history": zeros, "genres": zeros})
    none = model({**batch, "history": zeros[:, :0], "genres": zeros[:, :0]})
    check(bool(empty.isfinite().all()), "finite numbers without history and genres")
    assert_close(none, empty, rtol=1e-4, atol=1e-5, what="columns of no width at all")


# --- the MLP --------------------------------------------------------------------------------------


@rung(
    hints=[
        "Change one feature at a time: what should happen to the output?",
        "A sum forgets who said what. The MLP needs the parts side by side.",
        "self.mlp(torch.cat(parts, dim=-1))",
    ]
)
def test_every_feature_counts():
    """Every feature has influence, and the same value in another feature means something else."""
    model = make(hidden_dims=(8,))
    batch = batch_of(3)
    out = model(batch)
    for name, column in batch.items():
        other = column % 4 + 1 if not column.is_floating_point() else column + 1
        moved = model({**batch, name: other})
        check(differs(out, moved), "another output for another value", what=f"column {name}")
    twins = [("first", "id", 6, "shared"), ("second", "id", 6, "shared")]
    for hidden_dims in ((), (8,)):
        model = make(twins, hidden_dims=hidden_dims)
        one, two = integers([1, 2]), integers([3, 4])
        out = model({"first": one, "second": two})
        swapped = model({"first": two, "second": one})
        check(differs(out, swapped), "another output if two features swap their values")


@rung(
    hints=[
        "PyTorch learns what it finds: list model.parameters().",
        "A Python list of layers is invisible; Sequential, ModuleList and ModuleDict are not. "
        "Nothing on the way may be detached.",
    ]
)
def test_everything_is_learned():
    """All layers and tables are parameters with gradients, and state_dict holds all of them."""
    model = make(hidden_dims=(8, 5))
    parameters = dict(model.named_parameters())
    # tables, linear maps, and the matrices of an MLP from six parts of width 6
    least = 6 * (5 + 7 + 9 + 2 + 3) + (36 * 8 + 8 * 5 + 5 * 6) + PLACES
    count = sum(parameter.numel() for parameter in parameters.values())
    check(
        count >= least,
        f"at least {least} numbers to learn",
        came_back=count,
        call="Tower(features, 6, hidden_dims=(8, 5)).parameters()",
    )
    touched = set()
    for seed in range(4):  # a ReLU may be off for all rows of one batch
        batch = batch_of(16, seed)
        out = model(batch)
        grads = torch.autograd.grad(out[:, 0].sum(), list(parameters.values()), allow_unused=True)
        named = zip(parameters, grads, strict=True)
        touched |= {name for name, grad in named if grad is not None and bool((grad != 0).any())}
    missing = sorted(set(parameters) - touched)
    check(
        not missing,
        "a gradient for every parameter",
        came_back=f"none for {missing}",
        call="out[:, 0].sum().backward()",
    )
    copy = make(hidden_dims=(8, 5), seed=5)
    copy.load_state_dict(model.state_dict())
    out = copy(batch)
    assert_close(out, model(batch), what="a second tower with the first one's state_dict")


@rung(
    hints=[
        "Is something on the way cut out of the graph?",
        "The parts reach the output twice, in the sum and through the MLP, and the length that "
        "is divided by depends on them too: no detach, no .data, no no_grad.",
    ]
)
def test_gradients():
    """Gradients are the slopes of the output, for every parameter (central differences)."""
    model = make(hidden_dims=(8,)).double()
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch_of(6).items()}
    upstream = torch.randn(6, 6, generator=generator(6), dtype=torch.float64).to(device())
    parameters = dict(model.named_parameters())
    out = model(batch)
    grads = torch.autograd.grad(
        (out * upstream).sum(), list(parameters.values()), allow_unused=True
    )
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        draw = torch.randn(parameter.shape, generator=generator(7), dtype=torch.float64)
        step = 1e-6 * draw.to(device())
        with torch.no_grad():
            parameter.add_(step)
            up = (model(batch) * upstream).sum()
            parameter.sub_(2 * step)
            down = (model(batch) * upstream).sum()
            parameter.add_(step)
        rise = 0.0 if grad is None else float((grad * step).sum()) / 1e-6
        what = f"slope along a random direction of {name}, by its gradient"
        slope = float(up - down) / 2e-6
        assert_scalar(rise, slope, what=what, rtol=1e-5, atol=1e-6, call="out.backward()")


@rung(
    hints=[
        "Can an output point away from every input it was built on?",
        "A Linear and a ReLU for each hidden width, then one more Linear and nothing behind it.",
    ]
)
def test_mlp():
    """The MLP has a ReLU behind each hidden layer, and none at its end."""
    feature = [("age", "id", 9)]
    negative = 0
    for seed in range(3):
        model = make(feature, dim=16, hidden_dims=(8,), seed=seed)
        out = model({"age": integers([0])})  # no parts: the MLP alone
        negative += int((out < 0).sum())
    check(negative > 0, "negative coordinates too; a ReLU at the end leaves none", came_back=out)
    # rows on one line: affine maps keep them within a plane, a ReLU does not
    line = torch.linspace(-4, 4, 8)[:, None] * torch.randn(1, 16, generator=generator(4))
    tables = tables_of(age=torch.cat([torch.zeros(1, 16), line]).tolist())
    for hidden_dims, bent in (((), False), ((40,), True)):
        model = make(feature, dim=16, hidden_dims=hidden_dims, tables=tables).double()
        out = model({"age": torch.arange(1, 9, device=device())})
        sizes = torch.linalg.svdvals(out.detach().double().cpu())
        flat = float(sizes[2] / sizes[0]) < 1e-5
        words = "a non-linear map (ReLU)" if bent else "a linear map: the last Linear alone"
        check(flat != bent, words, what=f"hidden_dims={hidden_dims}")


@rung(
    hints=[
        "Dropout acts in training only, also on what enters the MLP.",
        "nn.Dropout looks at the module's mode by itself; F.dropout has to be told.",
    ]
)
def test_dropout():
    """Dropout acts in training mode, before the first Linear too; eval() makes it deterministic."""
    batch = batch_of(8)
    before = {name: column.clone() for name, column in batch.items()}
    for hidden_dims in ((), (8,)):
        model = make(hidden_dims=hidden_dims, dropout=0.5)
        out = model(batch)
        assert_close(model(batch), out.detach(), what="two calls after eval()", rtol=0, atol=0)
        model.train()
        one, two = model(batch), model(batch)
        check(
            differs(one, two),
            "two different outputs in training mode with dropout=0.5",
            what=f"hidden_dims={hidden_dims}",
        )
        plain = make(hidden_dims=hidden_dims).train()
        out = plain(batch)
        assert_close(plain(batch), out.detach(), what="two calls in training mode, dropout=0")
    for name, column in batch.items():
        same = torch.equal(column, before[name])
        check(same, "unchanged by the call", what=f"column {name}")


# --- the batch ------------------------------------------------------------------------------------


@rung(
    hints=[
        "At serving time one user comes alone.",
        "Whatever averages over the batch ties rows to each other: BatchNorm, or a norm along "
        "dim=0.",
    ]
)
def test_rows_are_independent():
    """A row depends on its own features only, whatever else is in the batch, in training too."""
    for mode in (True, False):
        model = make(hidden_dims=(8,)).train(mode)
        batch = batch_of(5)
        whole = model(batch)
        for row in (0, 3):
            alone = {name: column[row : row + 1] for name, column in batch.items()}
            out = model(alone)
            what = f"row {row} alone, {'training' if mode else 'evaluation'} mode"
            assert_close(out, whole[row : row + 1].detach(), what=what, rtol=1e-4, atol=1e-5)


@rung(
    hints=[
        "A request may build its dict in another order than the training data did.",
        "Go through the tower's own list of features, never through the batch.",
    ]
)
def test_columns_by_name():
    """Columns are found by name: order and further columns mean nothing, a missing one is named."""
    model = make(hidden_dims=(8,))
    batch = batch_of(3)
    out = model(batch)
    turned = {name: batch[name] for name in reversed(batch)}
    assert_close(model(turned), out.detach(), what="columns in another order", rtol=0, atol=1e-6)
    more = {"aaa": torch.ones(3, device=device()), **batch, "zzz": torch.ones(7, device=device())}
    assert_close(model(more), out.detach(), what="two further columns", rtol=0, atol=1e-6)
    for name in batch:
        rest = {other: column for other, column in batch.items() if other != name}
        expect_error(
            lambda r=rest: model(r), KeyError, about=name, call=f"tower(batch without {name!r})"
        )
    for name, column in (
        ("age", batch["genres"]),
        ("genres", batch["age"]),
        ("history", batch["age"]),
        ("year", batch["plot"]),
        ("plot", batch["year"]),
        ("plot", batch["plot"][0]),
    ):
        expect_error(
            lambda b={**batch, name: column}: model(b),
            ValueError,
            call=f"tower(batch with {name} of shape {list(column.shape)})",
        )


@rung(
    hints=[
        "Features that name the same table share its rows, and what one learns the other knows.",
        "The table's name is feature.table or, without one, feature.name. Use a table that is "
        "given; make one only where none is there yet.",
    ]
)
def test_tables():
    """Features that name a table share it; given tables are used; what does not fit is refused."""
    features = [("first", "id", 4, "word"), ("second", "id", 4, "word")]
    sizes = [p.numel() for p in make(features).parameters() if p.shape == (4, 6)]
    check(
        len(sizes) == 1,
        "one table of shape [4, 6]",
        came_back=len(sizes),
        call="Tower(features, 6)",
    )
    word = embedding.EmbeddingTable(4, 6).to(device())
    model = make(features, tables={"word": word, "other": embedding.EmbeddingTable(8, 6)})
    check(
        any(p is word.weight for p in model.parameters()),
        "the given table is used",
        call="Tower(features, 6, tables={'word': table})",
    )
    unused = [p for p in model.parameters() if p.shape == (8, 6)]
    check(
        not unused,
        "a given table that no feature names is not taken in",
        call="Tower(features, 6, tables={'word': table, 'other': other})",
    )
    age = ("age", "id", 5)
    for wrong, words in (
        ([], "no features"),
        ([age, ("age", "dense", 2)], "two features of one name"),
        ([("age", "ids", 5)], "an unknown kind"),
        ([age, ("old", "id", 6, "age")], "two sizes for one table"),
    ):
        expect_error(
            lambda f=wrong: tower.Tower(described(f), 6), ValueError, call=f"Tower with {words}"
        )
    tables = {"age": embedding.EmbeddingTable(5, 7)}
    expect_error(
        lambda: tower.Tower(described([age]), 6, tables=tables),
        ValueError,
        call="Tower([age], 6, tables={'age': a table of width 7})",
    )


# --- two towers -----------------------------------------------------------------------------------

ITEM = (("item_id", "id", 9, "item"), ("plot", "text", 3))


def two_towers(**options):
    torch.manual_seed(0)
    features = described(FEATURES), described(ITEM)
    return tower.TwoTower(*features, 6, max_history=PLACES, **options).to(device()).eval()


@rung(
    hints=[
        "One tower for users, one for items; they meet only in the dot product.",
        "Tables of the same name are one table, across the towers too: hand one tower's to the "
        "other. Everything else each tower has for itself, a text map of the same name included.",
    ]
)
def test_two_towers():
    """Users and items become unit vectors; towers share the tables that both name, nothing else."""
    model = two_towers(hidden_dims=(8,))
    users = batch_of(3)
    items = {"item_id": torch.arange(1, 6, device=device()), "plot": batch_of(5)["plot"]}
    user, item = model(users, items)
    for out, expected in ((user, model.user_tower(users)), (item, model.item_tower(items))):
        assert_close(out, expected.detach(), call="two_tower(user_batch[3], item_batch[5])")
    names = (user.shape, item.shape)
    check(names == ((3, 6), (5, 6)), "shapes [3, 6] and [5, 6]", came_back=str(names))
    sides = [{id(p) for p in side.parameters()} for side in (model.user_tower, model.item_tower)]
    shared = [p for p in model.parameters() if id(p) in sides[0] & sides[1]]
    shapes = [list(p.shape) for p in shared]
    check(
        shapes == [[9, 6]],
        "one shared parameter, the item table of shape [9, 6]",
        came_back=shapes,
        call="TwoTower(user_features, item_features, 6)",
    )
    model = tower.TwoTower(described(FEATURES[:1]), described(ITEM[1:]), 6)
    sides = [{id(p) for p in side.parameters()} for side in (model.user_tower, model.item_tower)]
    check(
        not sides[0] & sides[1],
        "nothing shared where no table has the same name",
        call="TwoTower([age], [plot], 6)",
    )


@rung(
    hints=[
        "The temperature is learned, and can never become 0 or negative.",
        "Learn its logarithm: what do you start it at, so that exp gives the start value?",
        "self.log_temperature = nn.Parameter(torch.tensor(temperature).log())",
    ]
)
def test_temperature():
    """The temperature starts as given, is learned, and stays above 0 whatever is learned."""
    for start in (0.07, 0.5):
        model = two_towers(temperature=start)
        value = model.temperature
        assert_scalar(
            value, start, call=f"TwoTower(..., temperature={start}).temperature", rtol=1e-5
        )
        learned = isinstance(value, torch.Tensor) and value.shape == () and value.requires_grad
        check(learned, "a 0-dim tensor that can be differentiated", came_back=value)
        grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        own = [(p, g) for p, g in zip(model.parameters(), grads, strict=True) if g is not None]
        check(len(own) == 1, "one parameter that the temperature is made of", came_back=len(own))
        with torch.no_grad():
            own[0][0].sub_(20.0)  # as after a long, steep descent
        check(
            bool(model.temperature.detach() > 0),
            "above 0",
            came_back=model.temperature,
            what="temperature after its parameter fell by 20",
        )
        assert_scalar(own[0][1].sum(), start, rtol=1e-4, what="gradient of the temperature, an exp")
    for bad in (0, -0.1):
        expect_error(
            lambda t=bad: two_towers(temperature=t),
            ValueError,
            call=f"TwoTower(..., temperature={bad})",
        )


@rung(
    hints=[
        "bfloat16 carries three digits; that is enough for a length near 1.",
        "Keep ids as integers and let autocast choose the rest.",
    ]
)
def test_autocast():
    """Under bfloat16 autocast rows keep a length of 1, as far as three digits go."""
    model = make(hidden_dims=(8,))
    batch = batch_of(4)
    with torch.autocast(device().type, dtype=torch.bfloat16):
        out = model(batch)
    length = (out.detach().double() ** 2).sum(1).sqrt()
    assert_close(length, torch.ones(4, dtype=torch.float64), rtol=1e-2, what="length of each row")
    exact = model(batch).detach().double()
    assert_close(out.double(), exact, rtol=0.05, atol=0.05, what="compared with float32")
