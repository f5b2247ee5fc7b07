"""Kata 02, towers: what `models/tower.py` must do, from the simplest on.

Nothing here knows how the parts of a tower are called or in which order they are concatenated. The
rows of the tables are given; where all other parameters hold one and the same number, the output is
known exactly (fixtures/02_tower/golden.json), and elsewhere they are drawn at random.
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
TABLED = ("id", "multi_hot", "history")
FEATURES = (  # name, kind, size and, if it is not the name, table
    ("age", "id", 5),
    ("genres", "multi_hot", 7),
    ("history", "history", 9, "item"),
    ("year", "dense", 2),
    ("plot", "text", 3),
)


def make(features=FEATURES, dim=6, *, rows=None, seed=0, **options):
    """A tower in evaluation mode on tables with known rows; and all its other parameters."""
    draw = generator(seed)
    tables = {}
    for name, kind, size, *table in features:
        name = table[0] if table else name
        if kind in TABLED and name not in tables:
            weight = torch.randn(size, dim, generator=draw)
            weight[0] = 0
            weight = weight if rows is None else torch.tensor(rows[name], dtype=torch.float32)
            tables[name] = embedding.EmbeddingTable(size, dim)
            tables[name].load_state_dict({"weight": weight})
    torch.manual_seed(seed)
    made = tower.Tower(described(features), dim, max_history=PLACES, tables=tables, **options)
    given = {id(table.weight) for table in tables.values()}
    made = made.to(device()).eval()
    return made, [p for p in made.parameters() if id(p) not in given]


def described(features):
    return [data.Feature(*feature) for feature in features]


def are_places(parameter):
    """One number, or PLACES: nothing else in the towers here has so many."""
    return parameter.numel() == 1 or parameter.numel() > 0 == parameter.numel() % PLACES


def fill(parameters, value):
    """One number for all; 1 for the weights of places, whose formula is not known here."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(1.0 if are_places(parameter) else value)


def stir(parameters, seed=1):
    """Random numbers for all, so that nothing rests on how they were initialised."""
    draw = generator(seed)
    with torch.no_grad():
        for parameter in parameters:
            values = 0.5 * torch.randn(parameter.shape, generator=draw)
            parameter.copy_(values.abs() + 0.1 if are_places(parameter) else values)


def stirred(features=FEATURES, dim=6, **options):
    made, own = make(features, dim, **options)
    stir(own)
    return made


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


def differs(one, other):
    return float((one - other).detach().abs().max()) > 1e-4


def lengths(out):
    return (out.detach().double() ** 2).sum(1).sqrt()


def check_golden(cases):
    """Towers whose own parameters all hold one number, against what float64 NumPy makes of it."""
    rows = golden("golden.json")["tables"]
    kinds = {
        "age": ("id", 4),
        "genres": ("multi_hot", 5),
        "history": ("history", 6, "item"),
        "year": ("dense", 2),
        "plot": ("text", 4),
    }
    for case in golden("golden.json")[cases]:
        features = [(name, *kinds[name]) for name in case["batch"]]
        model, own = make(features, 3, rows=rows, hidden_dims=case["hidden_dims"])
        fill(own, case["fill"])
        batch = {name: integers(column) for name, column in case["batch"].items()}
        out = model(batch)
        what = f"{case['what']}, where the weights and biases are all {case['fill']:g}"
        assert_close(out, case["out"], dtype=torch.float32, what=what, call="tower(batch)")


# --- the output -----------------------------------------------------------------------------------


@rung(
    hints=[
        "Every row is a direction: its length is 1.",
        "Which axis is summed over for the length of a row? And a batch of one stays a batch. "
        "Length 0 has no direction: bound the divisor from below, so low that it does not show "
        "beside a short row. A gradient that passes through sqrt(0) is infinite.",
        "F.normalize(out, dim=-1), without a squeeze, does it forwards and backwards",
    ]
)
def test_unit_rows():
    """B rows become (B, dim), each of length 1 however short before; zeros stay zeros."""
    for hidden_dims in ((), (8, 5)):
        features = described(FEATURES)
        model = tower.Tower(features, 6, hidden_dims=hidden_dims).to(device()).eval()
        for rows in (4, 1):
            batch = batch_of(rows)
            out = model(batch)
            shape = list(out.shape)
            check(shape == [rows, 6], f"shape [{rows}, 6]", came_back=shape)
            one = torch.ones(rows, dtype=torch.float64)
            assert_close(lengths(out), one, rtol=1e-5, what="length of each row")
    for size in (1e-5, 1e5):
        rows = {"age": [[0.0, 0, 0], [0, size, 0], [-0.6 * size, 0, 0.8 * size]]}
        model, own = make([("age", "id", 3)], 3, rows=rows)
        fill(own, 0.0)
        out = model({"age": integers([1, 2])})
        expected = torch.tensor([[0.0, 1, 0], [-0.6, 0, 0.8]])
        assert_close(out, expected, rtol=1e-4, what=f"rows of length {size:g} before")
    model, own = make(hidden_dims=(8,))
    fill(own, 0.0)
    batch = {name: torch.zeros_like(column) for name, column in batch_of(2).items()}
    batch["age"][1] = 2
    out = model(batch)
    call = "tower(batch), all zeros and padding but an id in row 1; the MLP gives 0"
    expected = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert_close(lengths(out), expected, rtol=1e-5, what="length of each row", call=call)
    grads = torch.autograd.grad(out.sum(), list(model.parameters()), allow_unused=True)
    finite = all(bool(grad.isfinite().all()) for grad in grads if grad is not None)
    check(finite, "finite gradients of all parameters", call="out.sum().backward()")
    model = stirred(hidden_dims=(8,))
    batch = batch_of(4)
    with torch.autocast(device().type, dtype=torch.bfloat16):
        out = model(batch)
    call = "tower(batch) under bfloat16 autocast"
    one = torch.ones(4, dtype=torch.float64)
    assert_close(lengths(out), one, rtol=1e-2, what="length of each row", call=call)
    assert_close(out.double(), model(batch).detach().double(), rtol=0.05, atol=0.2, call=call)


@rung(
    hints=[
        "With an MLP that gives 0, what is left is the plain sum of the parts.",
        "An id is a row of its table, a multi-hot column the mean of its rows without padding. A "
        "padded (B, L) column is a flat tensor of values with offsets 0, L, 2L, ...: a bag.",
        "torch.stack(parts).sum(0) + self.mlp(torch.cat(parts, dim=-1))",
    ]
)
def test_sum_of_parts():
    """Where the MLP gives 0, the output is the normalised sum of the parts: rows and means."""
    check_golden("sums")


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
    model, _ = history_tower()
    for history in ([3, 1, 4, 2], [2, 4, 1, 0, 0], [4, 2, 0], [5], [0, 0]):
        shares = shares_of(model, history)
        call = f"tower({{'age': [1], 'history': [{history}]}})"
        items = [item for item in history if item]
        total = 2.0 if items else 0.0
        what = "the weights of all items: a mean (1) and the last item (1), or nothing"
        assert_scalar(shares.sum(), total, rtol=1e-4, atol=1e-5, what=what, call=call)
        for item, share in enumerate(shares.tolist(), start=1):
            low, high, words = 0.0, 0.0, "it is not in the history"
            if item in items[:1]:
                low, high, words = 1.0, 2.0, "the last item: 1 for itself and its share in the mean"
            elif item in items:
                low, high, words = 0.0, 1.0, "its share in the mean"
            good = low - 1e-5 <= share <= high + 1e-5
            what = f"weight of item {item}"
            between = f"between {low:g} and {high:g}: {words}"
            check(good, between, came_back=share, what=what, call=call)
    seen_again = shares_of(model, [1, 2, 1, 3])[:3]
    apart = shares_of(model, [1, 2, 4, 3])[:4]
    expected = torch.stack([apart[0] + apart[3], apart[1], apart[2]])
    call = "tower({'age': [1], 'history': [[1, 2, 1, 3]]})"
    what = "weights of items 1, 2, 3: an item that comes twice has both its places"
    assert_close(seen_again, expected.detach(), rtol=1e-3, atol=1e-4, what=what, call=call)
    # a share is the weight of the place over those of all places that hold an item
    last = torch.tensor([1.0, 0, 0, 0])
    whole = shares_of(model, [1, 2, 3, 4])[:4] - last
    for length in (2, 3):
        history = [1, 2, 3, 4][:length] + [0] * (5 - length)
        shares = (shares_of(model, history)[:4] - last)[:length]
        expected = whole[:length] / whole[:length].sum()
        call = f"tower({{'age': [1], 'history': [{history}]}})"
        what = "shares in the mean, in the proportions they have in [1, 2, 3, 4]"
        assert_close(shares, expected, rtol=1e-3, atol=1e-4, what=what, call=call)


def history_tower():
    """A tower whose sum of parts shows how often each item is in it: the items are the axes."""
    size = PLACES + 1
    features = [("age", "id", 2), ("history", "history", size, "item")]
    axes = torch.eye(size)
    item = torch.cat([torch.zeros(1, size), axes[:-1]])
    age = torch.stack([torch.zeros(size), axes[-1]])  # a part of weight 1 to measure by
    model, own = make(features, size, rows={"age": age.tolist(), "item": item.tolist()})
    fill(own, 0.0)
    return model, own


def shares_of(model, history):
    """The weight of each item in the sum of the parts."""
    out = model({"age": integers([1]), "history": integers([history])})[0]
    return (out[:-1] / out[-1]).cpu()


@rung(
    hints=[
        "Where an item stands in the history matters: each place has a weight of its own, which "
        "is learned.",
        "The weights are a parameter with max_history entries, one for each place; what lies "
        "beyond is cut. What keeps them from becoming negative?",
    ]
)
def test_history_places():
    """Each place of a history has a learned weight, never negative; beyond the last it is cut."""
    model, own = history_tower()
    call = "tower({'age': [1], 'history': [[1, 2, ..., 11]]})"
    full = list(range(1, PLACES + 1))
    # weights of places cancel where there is one item; all else is seen there too
    places = []
    for parameter in own:
        alone, many = (
            torch.autograd.grad((shares**2).sum(), parameter, allow_unused=True)[0]
            for shares in (shares_of(model, [3]), shares_of(model, full))
        )
        moves = [g is not None and float(g.abs().max()) > 1e-5 for g in (alone, many)]
        places += [parameter] if moves == [False, True] else []
    count = sum(parameter.numel() for parameter in places)
    words = f"{PLACES} weights that are learned, one for each place"
    if not count and any(parameter.numel() == PLACES for parameter in own):
        words += ": moving one has to move the mean (is a part of it detached?)"
    check(count == PLACES, words, came_back=count, call=f"Tower(..., max_history={PLACES})")
    fill(places, 0.0)
    mean = shares_of(model, full).detach() - torch.eye(PLACES)[0]
    moved = []
    for parameter in places:
        for i in range(parameter.numel()):
            with torch.no_grad():
                parameter.view(-1)[i] += 0.5
            ratio = (shares_of(model, full).detach() - torch.eye(PLACES)[0]) / mean
            with torch.no_grad():
                parameter.view(-1)[i] -= 0.5
            moved += [k for k in range(PLACES) if abs(ratio[k] / ratio.median() - 1) > 1e-3]
    words = "each number moves the weight of one place, and of no other"
    check(sorted(moved) == list(range(PLACES)), words, came_back=moved, what="places moved")
    for seed in range(3):
        with torch.no_grad():
            for parameter in places:
                draw = 3 * torch.randn(parameter.shape, generator=generator(seed))
                parameter.copy_(draw)
        shares = shares_of(model, full)
        fine = bool((shares >= -1e-6).all()) and bool(shares.isfinite().all())
        words = "no negative weight, whatever is learned"
        check(fine, words, came_back=shares.tolist(), call=call)
    model = stirred()
    batch = batch_of(2)
    long = torch.randint(1, 9, (2, PLACES + 5), generator=generator(3)).to(device())
    out = model({**batch, "history": long})
    cut = model({**batch, "history": long[:, :PLACES]}).detach()
    what = f"a history of {PLACES + 5}, of which the {PLACES} most recent count"
    assert_close(out, cut, what=what, rtol=1e-4)


# --- linear maps and the MLP ----------------------------------------------------------------------


@rung(
    hints=[
        "Numbers and texts come as vectors of another width. What brings them to the tower's?",
        "A text of zeros is no text, so its map has no bias; a number of 0 is a number.",
        "nn.Linear(feature.size, dim, bias=feature.kind == 'dense')",
    ]
)
def test_linear_maps():
    """Dense numbers pass a linear map with a bias, texts one without."""
    check_golden("linear")


@rung(
    hints=[
        "A Linear and a ReLU for each hidden width, then one more Linear and nothing behind it.",
        "A sum forgets who said what. The MLP needs the parts side by side.",
        "out = torch.stack(parts).sum(0) + self.mlp(torch.cat(parts, dim=-1))",
    ]
)
def test_mlp():
    """The MLP sees the parts side by side, bends behind each hidden layer, and corrects the sum."""
    check_golden("mlp")
    pair = {"first": integers([1, 2, 3]), "second": integers([3, 4, 1])}
    draw = generator(4)
    numbers = {name: torch.randn(3, 4, generator=draw).to(device()) for name in pair}
    bags = {name: torch.stack([column, column % 4 + 1], 1) for name, column in pair.items()}
    twins = {"id": pair, "multi_hot": bags, "history": bags, "dense": numbers, "text": numbers}
    for hidden_dims in ((), (8,)):
        for kind, batch in twins.items():
            size, table = (4, []) if kind in ("dense", "text") else (5, ["shared"])
            model = stirred([(name, kind, size, *table) for name in batch], hidden_dims=hidden_dims)
            out = model(batch)
            swapped = model({"first": batch["second"], "second": batch["first"]})
            call = f"tower with two {kind} features, hidden_dims={hidden_dims}"
            words = "another output if two features swap their values"
            check(differs(out, swapped), words, came_back="the same", call=call)


@rung(
    hints=[
        "PyTorch learns what it finds: list model.parameters().",
        "A Python list of layers is invisible; Sequential, ModuleList and ModuleDict are not. Each "
        "feature has a linear map, or weights of places, of its own.",
        "The parts reach the output twice, in the sum and through the MLP, and the length that is "
        "divided by depends on them too: no detach, no .data, no no_grad.",
    ]
)
def test_everything_is_learned():
    """Everything is a parameter with the right gradient, and in state_dict."""
    more = (("watched", "history", 9, "item"), ("votes", "dense", 2), ("say", "text", 3))
    model, own = make((*FEATURES, *more), hidden_dims=(8, 8, 8))
    # linear maps, an MLP from ten parts of width 6, the weights of places
    least = 2 * (2 * 6 + 6 + 3 * 6) + (60 * 8 + 8 + 2 * (8 * 8 + 8) + 8 * 6 + 6) + 2 * PLACES
    count = sum(parameter.numel() for parameter in own)
    call = "Tower(features, 6, hidden_dims=(8, 8, 8)).parameters()"
    words = f"at least {least} beside the tables: each feature has its own, {PLACES} a history"
    what = "how many numbers are learned"
    check(count >= least, words, came_back=count, call=call, what=what)

    model, own = make(hidden_dims=(8,))
    stir(own)
    model = model.double()
    batch = {n: x.double() if x.is_floating_point() else x for n, x in batch_of(12).items()}
    history = torch.randint(1, 9, (12, PLACES), generator=generator(8))
    batch["history"] = history.to(device())  # each place has an item
    upstream = torch.randn(12, 6, generator=generator(6), dtype=torch.float64).to(device())
    parameters = dict(model.named_parameters())
    out = model(batch)
    grads = torch.autograd.grad(
        (out * upstream).sum(), list(parameters.values()), allow_unused=True
    )
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        call = f"gradient of {name}"
        there = grad is not None and bool((grad != 0).any())
        came_back = "none" if grad is None else "zeros"
        check(there, "a gradient for every parameter", came_back=came_back, call=call)
        draw = torch.randn(parameter.shape, generator=generator(7), dtype=torch.float64)
        step = 1e-6 * draw.to(device())
        if parameter.shape == (5, 6) or parameter.shape == (7, 6) or parameter.shape == (9, 6):
            step[0] = 0  # padding has no gradient
        with torch.no_grad():
            parameter.add_(step)
            up = (model(batch) * upstream).sum()
            parameter.sub_(2 * step)
            down = (model(batch) * upstream).sum()
            parameter.add_(step)
        rise = float((grad * step).sum()) / 1e-6
        slope = float(up - down) / 2e-6
        what = "slope along a random direction by the gradient; expected is the measured one"
        assert_scalar(rise, slope, what=what, rtol=1e-5, atol=1e-6, call=call)

    model = stirred(hidden_dims=(8, 5))
    copy = stirred(hidden_dims=(8, 5))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(1.0)
    copy.load_state_dict(state)
    out = copy(batch_of(3))
    what = "a second tower with the first one's state_dict"
    assert_close(out, model(batch_of(3)).detach(), what=what, call="load_state_dict")


@rung(
    hints=[
        "Dropout acts in training only, also on what enters the MLP.",
        "nn.Dropout looks at the module's mode by itself; F.dropout has to be told. The sum of the "
        "parts goes by untouched.",
        "[nn.Dropout(dropout)], then nn.Linear, nn.ReLU and nn.Dropout(dropout) for each width",
    ]
)
def test_dropout():
    """In training dropout acts on what enters each Linear of the MLP, and nowhere else."""
    rows, fraction, weight = 1000, 0.25, 0.3
    table = {"age": [[0.0] * 4, [2.0, -1.0, 0.0, 0.0]]}
    batch = {"age": torch.ones(rows, dtype=torch.int64, device=device())}
    # where 2 and -1 each stay or go, and what stays is scaled, the Linear gives one of four numbers
    expected = {(): [weight * x / (1 - fraction) + weight for x in (0, 2, -1, 1)]}
    for hidden_dims in ((3,), (3, 2)):  # of the units of a layer, which are equal, n stay
        stay = [n / (1 - fraction) for n in range(hidden_dims[-1] + 1)]
        given = expected[hidden_dims[:-1]]
        expected[hidden_dims] = [weight * max(x, 0) * n + weight for x in given for n in stay]
    for hidden_dims, values in expected.items():
        options = {"hidden_dims": hidden_dims, "dropout": fraction}
        model, own = make([("age", "id", 2)], 4, rows=table, **options)
        fill(own, weight)
        call = f"tower(batch), hidden_dims={hidden_dims}, dropout={fraction}"
        out = model(batch)
        assert_close(model(batch), out.detach(), what="two calls after eval()", rtol=0, atol=0)
        assert_close(out[1:], out[:-1].detach(), what="equal rows after eval()", rtol=0, atol=0)
        torch.manual_seed(0)
        out = model.train()(batch)
        check(model.training, "still in training mode after the call", call=call)
        out = out.detach().double().cpu()
        one = torch.ones(rows, dtype=torch.float64)
        assert_close(lengths(out), one, rtol=1e-5, what="length of each row", call=call)
        scale = (out[:, 0] - out[:, 1]) / 3  # the sum [2, -1, 0, 0] plus m in each coordinate
        m = out[:, 2] / scale
        alike = bool(((out[:, 3] - out[:, 2]).abs() < 1e-5).all())
        alike = alike and bool(((out[:, 0] / scale - m - 2).abs() < 1e-4).all())
        words = "the sum of the parts and the output as they are, whatever is dropped in the MLP"
        check(alike, words, came_back=out[:2].tolist(), call=call)
        gap = (m[:, None] - torch.tensor(values, dtype=torch.float64)).abs()
        fits = bool((gap.min(1).values < 1e-4).all())
        seen = sorted({round(float(x), 4) for x in m})
        allowed = sorted({round(x, 4) for x in values})
        what = "what the MLP adds to the sum, all values"
        words = f"these: {allowed}"
        check(fits, words, came_back=seen, what=what, call=call)
        every = len(hidden_dims) > 1 or len(seen) == len(allowed)  # in depth, some are too rare
        check(every, words, came_back=seen, what=what, call=call)
        nothing = float((gap[:, 3] < 1e-4).double().mean()) if not hidden_dims else 0.5625
        what = f"rows of which nothing was dropped, with a probability of {fraction} each"
        assert_scalar(nothing, 0.5625, atol=0.08, rtol=0, what=what, call=call)
    model = stirred(hidden_dims=(8,))
    expected = model(batch_of(8)).detach()
    out = model.train()(batch_of(8))
    what = "training mode against evaluation mode, dropout=0"
    assert_close(out, expected, what=what, rtol=1e-5)


# --- the batch ------------------------------------------------------------------------------------


@rung(
    hints=[
        "A request may build its dict in another order than the training data did.",
        "Go through the tower's own list of features, never through the batch.",
        "x.to(linear.weight.dtype) converts what comes as float64.",
    ]
)
def test_columns():
    """Columns are found by name and left as they are; a missing or wrong one is refused."""
    model = stirred(hidden_dims=(8,))
    batch = batch_of(3)
    given = {**batch, "year": batch["year"].double()}
    given["history"] = torch.cat([batch["history"]] * 4, dim=1)  # longer than what counts
    before = {name: (column, column.clone()) for name, column in given.items()}
    model(given)
    check(list(given) == list(before), "the batch has the columns it had", came_back=list(given))
    for name, (column, copy) in before.items():
        same = given[name] is column and torch.equal(column, copy)
        check(same, "unchanged by the call", what=f"column {name}")
    out = model(batch)
    for name, column in batch.items():
        other = column % 4 + 1 if not column.is_floating_point() else column + 1
        moved = model({**batch, name: other})
        words = "another output for another value"
        check(differs(out, moved), words, came_back="the same", what=f"column {name}")
    more = {"aaa": torch.ones(1, 2, 2, device=device()), **batch, "zzz": "x"}
    turned = {name: more[name] for name in reversed(more)}
    for given, what in (
        (more, "two columns that no feature names"),
        (turned, "columns in another order, two of which no feature names"),
    ):
        assert_close(model(given), out.detach(), what=what, rtol=0, atol=1e-6)
    views = {name: torch.stack([column, column], -1)[..., 0] for name, column in batch.items()}
    assert_close(model(views), out.detach(), what="columns that are not contiguous", rtol=1e-4)
    hollow = {**batch, "year": batch["year"].clone()}
    hollow["year"][1] = float("nan")
    left = hollow["year"].clone()
    model(hollow)
    assert_close(hollow["year"], left, rtol=0, atol=0, what="column year, after the call")
    for into in (torch.float32, torch.float64):
        model = model.to(into)
        for dtype in (torch.float32, torch.float64):
            floats = {n: x.to(dtype) if x.is_floating_point() else x for n, x in batch.items()}
            got = model(floats)
            what = f"{dtype} columns in a tower of {into}".replace("torch.", "")
            assert_close(got, out.detach().to(into), rtol=1e-4, atol=1e-5, what=what)
    fine = batch["year"].double() + 1e-9  # more digits than float32 holds
    outs = [model({**batch, "year": x}) for x in (fine, fine.float().double())]
    words = "another output: a float64 tower sees all digits of a float64 column"
    check(not torch.equal(*outs), words, what="column year, all its digits or those of float32")
    model = model.float()
    for name in batch:
        rest = {other: column for other, column in batch.items() if other != name}
        expect_error(
            lambda r=rest: model(r), KeyError, about=name, call=f"tower(batch without {name!r})"
        )
    wide = torch.ones(3, 1, 1, dtype=torch.int64, device=device())
    for name, column in (
        ("age", batch["genres"]),
        ("age", batch["age"][:, None]),
        ("genres", batch["age"]),
        ("genres", wide),
        ("history", batch["age"]),
        ("history", wide),
        ("year", batch["plot"]),
        ("year", batch["year"][:, :1]),
        ("year", batch["year"][:, 0]),
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
    features = [("word", "id", 4), ("second", "history", 4, "word")]
    features.append(("third", "multi_hot", 4, "word"))
    alone = tower.Tower(described(features), 6, max_history=PLACES).to(device())
    tables = [p for p in alone.parameters() if p.shape == (4, 6)]
    call = "Tower([word, second and third in the table 'word'], 6)"
    what = "how many parameters have the shape of that table, [4, 6]"
    check(len(tables) == 1, "1", came_back=len(tables), call=call, what=what)
    other = embedding.EmbeddingTable(13, 6)
    word = embedding.EmbeddingTable(4, 6).to(device())
    given = {"word": word, "other": other}
    more, widths = described([*features, ("age", "id", 5)]), [8, 5]
    options = {"hidden_dims": widths, "max_history": PLACES, "tables": given}
    model = tower.Tower(more, 6, **options).to(device())
    call = "Tower([word, second, third, age], 6, tables={'word': table, 'other': other})"
    names = [feature.name for feature in more]
    same = names == ["word", "second", "third", "age"] and widths == [8, 5]
    check(same, "features and hidden_dims unchanged", came_back=[names, widths], call=call)
    mine = [p for p in model.parameters() if p.shape == (4, 6)]
    used = len(mine) == 1 and mine[0] is word.weight
    check(used, "the given table itself, and no other", came_back=len(mine), call=call)
    unused = [p for p in model.parameters() if p.shape == (13, 6)]
    check(not unused, "a given table that no feature names is left alone", call=call)
    check(list(given) == ["word", "other"], "`tables` unchanged", came_back=list(given), call=call)
    # tables that the tower makes have a padding row
    batch = {
        "word": integers([0, 0]),
        "second": integers([[2, 0], [0, 0]]),
        "third": integers([[1, 0], [0, 0]]),
    }
    out = alone(batch)
    row = tables[0].detach()[0]
    call = "Tower([word, second, third], 6)(batch)"
    what = "row 0 of a table that the tower made"
    assert_close(row, torch.zeros(6), what=what, call=call)
    grad = torch.autograd.grad(out[:, 0].sum(), tables[0])[0]
    what = "gradient of row 0, the padding row"
    assert_close(grad[0], torch.zeros(6), what=what, call=call)
    longer = {**batch, "second": integers([[2, 0, 0], [0] * 3]), "third": integers([[1], [0]])}
    what = "more padding in one column, less in another"
    assert_close(alone(longer), out.detach(), what=what, rtol=1e-5, call=call)

    age = ("age", "id", 5)
    for wrong, words in (
        ([], "no features"),
        ([age, ("age", "dense", 2)], "two features of one name"),
        ([("age", "ids", 5)], "an unknown kind"),
        ([age, ("old", "id", 6, "age")], "two sizes for one table"),
        ([("old", "history", 6, "age"), age], "two sizes for one table"),
    ):
        expect_error(
            lambda f=wrong: tower.Tower(described(f), 6), ValueError, call=f"Tower with {words}"
        )
    for shape in ((5, 7), (6, 6), (4, 6)):
        tables = {"age": embedding.EmbeddingTable(*shape)}
        expect_error(
            lambda t=tables: tower.Tower(described([age]), 6, tables=t),
            ValueError,
            call=f"Tower([age of size 5], 6, tables={{'age': a table of shape {list(shape)}}})",
        )


# --- two towers -----------------------------------------------------------------------------------

ITEM = (
    ("item", "id", 9),
    ("plot", "text", 3),
    ("genres", "multi_hot", 7, "tags"),
    ("buyers", "history", 4),
)
OPTIONS = {"max_history": PLACES, "hidden_dims": (8,), "dropout": 0.5}


def two_towers(users=FEATURES, items=ITEM, **options):
    torch.manual_seed(0)
    made = tower.TwoTower(described(users), described(items), 6, **{**OPTIONS, **options})
    return made.to(device()).eval()


@rung(
    hints=[
        "One tower for users, one for items; they meet only in the dot product.",
        "Tables of the same name are one table, across the towers too: hand one tower's to the "
        "other. Everything else each tower has for itself, a text map of the same name included.",
    ]
)
def test_two_towers():
    """Users and items become unit vectors; towers share the tables that both name, nothing else."""
    model = two_towers()
    users, items = batch_of(3), batch_of(5)
    items |= {"item": integers([1, 2, 3, 4, 5]), "buyers": items["history"] % 3 + 1}
    made = model(users, items)
    call = "two_tower(user_batch of 3, item_batch of 5)"
    check(isinstance(made, tuple) and len(made) == 2, "a pair", came_back=made, call=call)
    sides = (
        ("user_tower", FEATURES, users, model.user_tower, made[0]),
        ("item_tower", ITEM, items, model.item_tower, made[1]),
    )
    for name, features, batch, side, out in sides:
        assert_close(out, side(batch).detach(), what=f"what {name} gives", call=call)
        one = torch.ones(len(batch["plot"]), dtype=torch.float64)
        assert_close(lengths(out), one, rtol=1e-5, what=f"lengths, {name}", call=call)
        alone = tower.Tower(described(features), 6, **OPTIONS).to(device()).eval()
        counts = [sum(p.numel() for p in each.parameters()) for each in (side, alone)]
        options = ", ".join(f"{key}={value}" for key, value in OPTIONS.items())
        words = f"{counts[1]} numbers, as in Tower({options})"
        check(counts[0] == counts[1], words, came_back=counts[0], what=f"parameters of {name}")
        alone.load_state_dict(side.state_dict())
        what = f"{name} against a Tower with its state_dict"
        assert_close(out, alone(batch).detach(), what=what, rtol=1e-5, call=call)
    stir(model.parameters())
    model.zero_grad()
    user, item = model(users, items)
    (user @ item.T).square().sum().backward()
    for name, _, _, side, _ in sides:
        learned = {n: p for n, p in side.named_parameters() if not are_places(p)}
        none = [n for n, p in learned.items() if p.grad is None or not bool(p.grad.any())]
        words = "a gradient for every parameter"
        call = "(user @ item.T).square().sum().backward()"
        check(not none, words, came_back=f"none for {none}", what=name, call=call)
    model.train()
    for name, _, batch, side, _ in sides:
        one, two = side(batch), side(batch)
        words = "two outputs in training mode with dropout=0.5"
        check(differs(one, two), words, came_back="the same twice", what=name, call=call)
    shared = [("item", [[7, 6], [9, 6]]), ("elsewhere", [[7, 6]])]
    for table, expected in shared:
        users = [("history", "history", 9, table), ("plot", "text", 3), ("year", "dense", 2)]
        users.append(("likes", "multi_hot", 7, "tags"))
        items = [*ITEM, ("year", "dense", 2), ("history", "history", 9, "item")]
        model = two_towers(users, items)
        ids = [{id(p) for p in side.parameters()} for side in (model.user_tower, model.item_tower)]
        shapes = sorted(list(p.shape) for p in model.parameters() if id(p) in ids[0] & ids[1])
        what = f"shapes of what is shared: users name {table!r} and 'tags', items 'item' and 'tags'"
        call = "TwoTower(user_features, item_features, 6)"
        check(shapes == expected, f"{expected}", came_back=shapes, what=what, call=call)
    expect_error(
        lambda: two_towers([("history", "history", 8, "item")]),
        ValueError,
        call="TwoTower, users with 8 rows in the table 'item', items with 9",
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
    for start in (0.07, 1):
        model = two_towers(temperature=start)
        value = model.temperature
        call = f"TwoTower(..., temperature={start}).temperature"
        assert_scalar(value, start, call=call, rtol=1e-5)
        learned = isinstance(value, torch.Tensor) and value.shape == () and value.requires_grad
        words = "a 0-dim tensor that can be differentiated"
        check(learned, words, came_back=value, call=call)
        grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        own = [(p, g) for p, g in zip(model.parameters(), grads, strict=True) if g is not None]
        words = "one parameter that the temperature is made of"
        check(len(own) == 1, words, came_back=len(own), call=call)
        assert_scalar(own[0][1].sum(), start, rtol=1e-4, what="its gradient, of an exp", call=call)
        with torch.no_grad():
            own[0][0].sub_(20.0)  # as after a long, steep descent
        what = "after its parameter fell by 20"
        expected = start * 2.0611536e-9
        assert_scalar(model.temperature, expected, rtol=1e-4, atol=0, what=what, call=call)
    for bad in (0, -0.1):
        expect_error(
            lambda t=bad: two_towers(temperature=t),
            ValueError,
            call=f"TwoTower(..., temperature={bad})",
        )
