"""Kata 02: questions whose answers tell known mistakes of the towers apart.

Tables are given, all other parameters hold one number (see test_spec.py): the answers depend on no
names and no order. Weights of places, whose formula is free, enter where they cancel only, or as
facts.
"""

import functools

import torch

from harness.probe import probe
from harness.spec import learner

tower = learner("models.tower")
embedding = learner("models.embedding")
data = learner("data.features")

PLACES = 11
AGE = ("age", "id", 4)
GENRES = ("genres", "multi_hot", 5)
HISTORY = ("history", "history", 6, "item")
YEAR = ("year", "dense", 2)
PLOT = ("plot", "text", 4)
ALL = (AGE, GENRES, HISTORY, YEAR, PLOT)


def pattern(*shape, scale=0.9):
    """Irregular numbers that no generator has to agree on."""
    count = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64)
    return (scale * (count * count * 0.37 + count * 1.7).sin()).reshape(shape)


def described(features):
    return [data.Feature(*feature) for feature in features]


def tables_of(features, dim, scale=0.9):
    tables = {}
    for i, (name, kind, size, *table) in enumerate(features):
        name = table[0] if table else name
        if kind in ("id", "multi_hot", "history") and name not in tables:
            weight = pattern(size + i, dim, scale=scale)[i:].clone()
            weight[0] = 0
            tables[name] = embedding.EmbeddingTable(size, dim)
            tables[name].load_state_dict({"weight": weight.float()})
            tables[name].double()
            with torch.no_grad():
                tables[name].weight.copy_(weight)
    return tables


def are_places(parameter):
    return parameter.numel() == 1 or parameter.numel() > 0 == parameter.numel() % PLACES


def make(features, value, dim=3, *, scale=0.9, **options):
    """A float64 tower in evaluation mode, its tables, and its other parameters, all of `value`."""
    tables = tables_of(features, dim, scale)
    made = tower.Tower(described(features), dim, max_history=PLACES, tables=tables, **options)
    made = made.double().eval()
    given = {id(table.weight) for table in tables.values()}
    own = [p for p in made.parameters() if id(p) not in given]
    with torch.no_grad():
        for parameter in own:
            parameter.fill_(1.0 if are_places(parameter) else value)
    return made, tables, own


def with_gradients(made, tables, batch):
    """The output, and of the gradients of the tables, under an irregular cotangent, a digest."""
    out = made(batch)
    weights = {name: table.weight for name, table in tables.items() if table.weight.requires_grad}
    if not out.requires_grad or not weights:
        return {"out": out, "gradients": "none"}
    upstream = pattern(*out.shape).to(out.dtype)
    grads = torch.autograd.grad((out * upstream).sum(), [*weights.values()], allow_unused=True)
    digests = [None if g is None else (g * (1 + pattern(*g.shape))).sum(1) for g in grads]
    return {"out": out, "gradients": dict(zip(weights, digests, strict=True))}


def integers(values):
    return torch.tensor(values)


def batch_of(features):
    """Three rows; histories hold one item, once or twice, so that weights of places cancel."""
    batch = {
        "age": integers([2, 1, 3]),
        "genres": integers([[4, 1, 0], [2, 2, 3], [3, 0, 0]]),
        "history": integers([[5, 5, 0], [2, 0, 0], [4, 4, 4]]),
        "year": pattern(3, 2, scale=1.3),
        "plot": pattern(3, 4, scale=0.7).flip(0),
    }
    return {name: batch[name] for name, *_ in features}


def outcome(function):
    """The kind of what came back, or of the error."""
    try:
        function()
    except Exception as error:
        return type(error).__name__
    return "accepted"


# --- the formula ----------------------------------------------------------------------------------


@probe
def one_id():
    """An id alone, the MLP giving 0."""
    made, tables, _ = make([AGE], 0.0)
    return with_gradients(made, tables, batch_of([AGE]))


@probe
def two_parts():
    """An id and genres, the MLP giving 0."""
    made, tables, _ = make([AGE, GENRES], 0.0)
    return with_gradients(made, tables, batch_of([AGE, GENRES]))


@probe
def one_row():
    """A batch of one."""
    made, _, _ = make([AGE, GENRES], 0.2)
    return made({"age": integers([2]), "genres": integers([[4, 1, 0]])})


@probe
def bags():
    """Genres alone: padding, repetition, no entry."""
    made, tables, _ = make([AGE, GENRES], 0.0)
    genres = integers([[4, 0, 0, 0], [1, 2, 0, 0], [3, 3, 3, 1], [0, 0, 0, 0]])
    return with_gradients(made, tables, {"age": integers([1, 1, 1, 1]), "genres": genres})


@probe
def histories():
    """Histories of one item, once and twice, and of none."""
    made, tables, _ = make([AGE, HISTORY], 0.0)
    history = integers([[5, 0, 0], [2, 2, 0], [0, 0, 0]])
    return with_gradients(made, tables, {"age": integers([1, 2, 3]), "history": history})


@probe
def history_in_the_mlp():
    """Histories of one item, with an MLP."""
    made, tables, _ = make([HISTORY], 0.3, hidden_dims=(4,))
    return with_gradients(made, tables, {"history": integers([[5, 5, 0], [2, 0, 0]])})


@probe
def dense_numbers():
    """A dense feature beside an id."""
    made, tables, _ = make([AGE, YEAR], 0.3)
    batch = batch_of([AGE, YEAR])
    batch["year"][1] = 0
    return with_gradients(made, tables, batch)


@probe
def texts():
    """A text beside an id."""
    made, tables, _ = make([AGE, PLOT], 0.3)
    batch = batch_of([AGE, PLOT])
    batch["plot"][1] = 0
    return with_gradients(made, tables, batch)


@probe
def dense_downwards():
    """Dense numbers and texts through negative weights."""
    made, _, _ = make([AGE, YEAR, PLOT], -0.2)
    return made(batch_of([AGE, YEAR, PLOT]))


@probe
def linear_tower():
    """Everything, hidden_dims=()."""
    made, tables, _ = make(ALL, 0.3)
    return with_gradients(made, tables, batch_of(ALL))


@probe
def one_hidden_layer():
    """Ids and genres, one hidden layer."""
    made, tables, _ = make([AGE, GENRES], 0.3, hidden_dims=(4,))
    return with_gradients(made, tables, batch_of([AGE, GENRES]))


@probe
def two_hidden_layers():
    """Everything, two hidden layers."""
    made, tables, _ = make(ALL, 0.3, hidden_dims=(5, 4))
    return with_gradients(made, tables, batch_of(ALL))


@probe
def negative_weights():
    """Hidden layers whose weights are negative: a correction below 0."""
    made, tables, _ = make([AGE, GENRES], -0.3, hidden_dims=(4,))
    return with_gradients(made, tables, batch_of([AGE, GENRES]))


@probe
def in_training_mode():
    """Training mode without dropout, a row beside others."""
    made, _, _ = make([AGE, GENRES], 0.3, hidden_dims=(4,))
    return made.train()(batch_of([AGE, GENRES]))


# --- length ---------------------------------------------------------------------------------------


@probe
def short_rows():
    """Rows of lengths near 1e-5."""
    made, _, _ = make([AGE], 0.0, scale=1e-5)
    return made(batch_of([AGE]))


@probe
def nothing_known():
    """A row of zeros beside another one, and the gradients."""
    made, _, _ = make([AGE, GENRES], 0.0)
    out = made({"age": integers([0, 2]), "genres": integers([[0, 0], [0, 0]])})
    weights = [p for p in made.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.sum(), weights, allow_unused=True) if out.requires_grad else []
    finite = all(grad is None or bool(grad.isfinite().all()) for grad in grads)
    return {"out": out, "finite": finite}


@probe(tolerance=1e-4)
def in_float32():
    """dtype and values of a float32 tower."""
    made, _, _ = make([AGE, YEAR], 0.3)
    made = made.float()
    batch = batch_of([AGE, YEAR])
    kinds = {}
    for dtype in (torch.float32, torch.float64):
        given = {**batch, "year": batch["year"].to(dtype)}
        kinds[str(dtype)] = outcome(lambda g=given: made(g))
    out = made({**batch, "year": batch["year"].float()})
    return {"out": out, "kinds": list(kinds.values())}


@probe
def in_float64():
    """dtype and values of a float64 tower on float32 columns."""
    made, _, _ = make([AGE, YEAR], 0.3)
    batch = {**batch_of([AGE, YEAR]), "year": integers([[0.5, -1.25], [2.0, 0.75], [0.0, 3.5]])}
    fine = batch_of([AGE, YEAR])
    rough = {**fine, "year": fine["year"].float().double() + 1e-9}
    digits = not torch.equal(made(rough), made({**rough, "year": rough["year"].float().double()}))
    kind, dtype = outcome(lambda: made(batch)), str(made(fine).dtype)
    return {"kind": kind, "dtype": dtype, "digits": digits}


@probe
def hollow_column():
    """A column with NaN, after the call."""
    made, _, _ = make([AGE, YEAR], 0.3)
    batch = {**batch_of([AGE, YEAR]), "year": torch.tensor([[0.5, -1.25], [float("nan"), 0.75]])}
    batch = {**batch, "year": batch["year"].double(), "age": batch["age"][:2]}
    made(batch)
    return batch["year"]


# --- history, its places --------------------------------------------------------------------------


def history_tower():
    """A tower whose sum of parts shows how often each item is in it: the items are the axes."""
    size = PLACES + 1
    features = [("age", "id", 2), ("history", "history", size, "item")]
    made, tables, own = make(features, 0.0, size)
    axes = torch.eye(size, dtype=torch.float64)
    with torch.no_grad():
        tables["item"].weight.copy_(torch.cat([0 * axes[:1], axes[:-1]]))
        tables["age"].weight.copy_(torch.stack([0 * axes[0], axes[-1]]))
    return made, own, tables["item"].weight


def shares_of(made, history):
    out = made({"age": integers([1]), "history": integers([history])})[0]
    return out[:-1] / out[-1]


def places_in(made, own):
    """Parameters that move a history of several items, but not one of a single item."""
    found = []
    for parameter in own:
        if not parameter.requires_grad:
            continue
        grads = [
            torch.autograd.grad(shares_of(made, some).square().sum(), parameter, allow_unused=True)
            for some in ([3], list(range(1, PLACES + 1)))
        ]
        moves = [g is not None and float(g.abs().max()) > 1e-9 for (g,) in grads]
        found += [parameter] if moves == [False, True] else []
    return found


@probe
def parts_of_a_history():
    """How much of all items is in the sum: by the number of items and of columns."""
    made, *_ = history_tower()
    histories = ([3, 1, 4, 2], [2, 4, 1, 0, 0], [4, 2, 0], [5], [5, 0], [0, 0])
    return [shares_of(made, history).sum() for history in histories]


@probe
def who_is_last():
    """Which item has most of the sum, and whether it is in the history at all."""
    made, *_ = history_tower()
    shares = [shares_of(made, history) for history in ([3, 1, 4, 2], [2, 4, 1, 0, 0], [4, 2, 0])]
    most = [int(each.argmax()) + 1 for each in shares]
    return {"most": most, "for itself": [bool(each.max() > 0.999) for each in shares]}


@probe
def weights_of_places():
    """How many there are, which are moved by one number, and their signs."""
    made, own, _ = history_tower()
    places = places_in(made, own)
    full = list(range(1, PLACES + 1))
    axis = torch.eye(PLACES, dtype=torch.float64)[0]
    before = shares_of(made, full).detach() - axis
    first = []
    for parameter in places[:1]:
        with torch.no_grad():
            parameter.view(-1)[0] += 0.5
            ratio = (shares_of(made, full) - axis) / before
            parameter.view(-1)[0] -= 0.5
        first += [int((ratio / ratio.median() - 1).abs().argmax())]
    with torch.no_grad():
        for i, parameter in enumerate(own):
            if are_places(parameter):
                parameter.copy_(3 * pattern(i + 1, *parameter.shape)[i])
    shares = shares_of(made, full) - axis
    sides = {"negative": bool((shares < 0).any()), "equal": bool(shares.std() < 1e-9)}
    return {"count": sum(p.numel() for p in places), **sides, "first": first}


@probe
def places_and_width():
    """Whether a share depends on how wide the column is."""
    made, own, _ = history_tower()
    with torch.no_grad():
        for i, parameter in enumerate(own):
            if are_places(parameter):
                parameter.copy_(1.5 + pattern(i + 1, *parameter.shape)[i])
        histories = ([1, 2, 3], [1, 2, 3, 0], [1, 2, 3] + [0] * 8)
        shares = [shares_of(made, history)[:3] for history in histories]
    return {"same": [bool((shares[0] - each).abs().max() < 1e-9) for each in shares[1:]]}


@probe
def a_long_history():
    """How many places count, and which."""
    made, *_ = history_tower()
    history = list(range(1, PLACES + 1)) + [1] * 3
    mixed = [1, 2, 3] + [4] * (PLACES - 3) + [5, 6, 7]
    asked = {
        "over": lambda: (shares_of(made, history) - shares_of(made, history[:PLACES])).abs().max(),
        "counted": lambda: int((shares_of(made, list(range(1, PLACES + 1))).abs() > 1e-9).sum()),
        "mixed": lambda: [int(n) + 1 for n in (shares_of(made, mixed) > 1e-9).nonzero()],
    }
    found = {name: outcome(ask) for name, ask in asked.items()}
    values = {name: ask() for name, ask in asked.items() if found[name] == "accepted"}
    over = values.get("over")
    if over is not None:
        values["over"] = bool(over > 1e-9)
    return {"kinds": list(found.values()), "values": values}


@probe
def gradients_of_places():
    """Whether weights of places have one, and the gradient of a table in all."""
    made, own, table = history_tower()
    shares = shares_of(made, [1, 2, 3])
    there = shares.requires_grad and table.requires_grad
    grad = torch.autograd.grad(shares.sum(), table, allow_unused=True)[0] if there else None
    total = None if grad is None else grad[:, :PLACES].sum()
    learned = [p.requires_grad for p in own]
    places = sum(p.numel() for p in places_in(made, own))
    return {"total": total, "places": places, "learned": all(learned)}


# --- dropout --------------------------------------------------------------------------------------


def dropped(hidden_dims):
    """What an MLP under dropout adds to the sum, the different values; and whether it adds it."""
    made, tables, _ = make([("age", "id", 2)], 0.3, 4, hidden_dims=hidden_dims, dropout=0.25)
    with torch.no_grad():
        tables["age"].weight[1] = torch.tensor([2.0, -1.0, 0.0, 0.0])
    ones = {"age": torch.ones(3000, dtype=torch.int64)}  # so many that all values occur
    with torch.no_grad():
        still = made(ones)
        out = made.train()(ones)
    scale = (out[:, 0] - out[:, 1]) / 3
    m = out[:, 2] / scale
    values = m.mul(1e6).round().unique().div(1e6)
    apart = (out[:, 3] - out[:, 2]).abs().max() + (out[:, 0] / scale - m - 2).abs().max()
    return {
        "still": bool((still == still[:1]).all()),
        "values": values[:: max(len(values) // 16, 1)][:20],
        "count": len(values),
        "apart": bool(apart > 1e-9),
        "training": made.training,
    }


@probe
def dropout_on_the_input():
    """hidden_dims=()."""
    return dropped(())


@probe
def dropout_in_a_hidden_layer():
    """One hidden layer."""
    return dropped((2,))


# --- telling features apart -----------------------------------------------------------------------


@probe
def swapped_values():
    """Whether an MLP of irregular numbers sees which feature said what."""
    twins = [("first", "id", 5, "word"), ("second", "id", 5, "word")]
    found = {}
    for hidden_dims in ((), (8,)):
        made, _, own = make(twins, 0.0, hidden_dims=hidden_dims)
        with torch.no_grad():
            for i, parameter in enumerate(own):
                parameter.copy_(pattern(*parameter.shape, scale=0.5 + 0.1 * i))
        one, two = integers([1, 2]), integers([3, 4])
        there, back = made({"first": one, "second": two}), made({"first": two, "second": one})
        found[str(hidden_dims)] = bool((there - back).abs().max() > 1e-9)
    return found


@probe
def order_of_columns():
    """Whether the order of the mapping, or a further column, changes anything."""
    made, _, own = make(ALL, 0.0, hidden_dims=(8,))
    with torch.no_grad():
        for i, parameter in enumerate(own):
            if not are_places(parameter):
                parameter.copy_(pattern(*parameter.shape, scale=0.5 + 0.1 * i))
    batch = batch_of(ALL)
    out = made(batch)
    turned = {name: batch[name] for name in reversed(batch)}
    more = {"aaa": "for the log", **batch}
    return {
        "kind": outcome(lambda: made(more)),
        "order": bool((made(turned) - out).abs().max() > 1e-9),
        "counted": sum(p.numel() for p in own),
    }


@probe
def what_is_learned():
    """How many numbers, how many of them without a gradient, and what state_dict holds."""
    twice = (*ALL, ("watched", "history", 6, "item"), ("votes", "dense", 2), ("say", "text", 4))
    made, tables, own = make(twice, 0.2, hidden_dims=(5, 4))
    full = torch.arange(3 * PLACES).reshape(3, PLACES)
    batch = {**batch_of(ALL), "history": 1 + full % 5, "watched": 1 + full * 2 % 5}
    batch |= {"votes": pattern(3, 2) + 1, "say": pattern(3, 4)}
    grads = torch.autograd.grad(
        (made(batch) * pattern(3, 3)).sum(),
        [p for p in made.parameters() if p.requires_grad],
        allow_unused=True,
    )
    state = made.state_dict()
    return {
        "numbers": sum(p.numel() for p in own),
        "fixed": sum(p.numel() for p in made.parameters() if not p.requires_grad),
        "unused": sum(grad is None for grad in grads),
        "in state": sum(v.numel() for v in state.values()) >= sum(p.numel() for p in own),
        "given": all(any(t.weight is p for p in made.parameters()) for t in tables.values()),
    }


# --- what is refused ------------------------------------------------------------------------------


@probe
def missing_columns():
    """What a batch without a column gives."""
    made, _, _ = make(ALL, 0.3)
    batch = batch_of(ALL)
    rest = ({n: x for n, x in batch.items() if n != name} for name in batch)
    return [outcome(lambda b=some: made(b)) for some in rest]


@probe
def wrong_columns():
    """What columns of a wrong shape give."""
    made, _, _ = make(ALL, 0.3)
    batch = batch_of(ALL)
    ids = batch["age"]
    wrong = [
        ("age", ids[:, None]),
        ("genres", ids),
        ("genres", ids[:, None, None]),
        ("history", ids),
        ("year", batch["plot"]),
        ("plot", batch["year"]),
        ("plot", batch["plot"][0]),
        ("plot", torch.cat([batch["plot"], batch["year"]], 1)),
    ]
    return [outcome(lambda b={**batch, name: x}: made(b)) for name, x in wrong]


@probe
def wrong_features():
    """What a tower of features that do not fit gives."""
    wrong = {
        "none": [],
        "names": [("a", "id", 5), ("a", "dense", 2)],
        "twins": [("a", "dense", 2), ("a", "dense", 2)],
        "kind": [("a", "ids", 5)],
        "sizes": [("a", "id", 5), ("b", "id", 6, "a")],
    }
    return {n: outcome(lambda f=f: tower.Tower(described(f), 3)) for n, f in wrong.items()}


@probe
def wrong_tables():
    """What given tables that do not fit give."""
    features = described([("a", "id", 5)])
    shapes = ((5, 4), (6, 3), (4, 3))
    tables = [{"a": embedding.EmbeddingTable(*shape)} for shape in shapes]
    return [outcome(lambda t=t: tower.Tower(features, 3, tables=t)) for t in tables]


@probe
def batch_as_it_was():
    """Whether the batch is what it was after a call."""
    made, _, _ = make(ALL, 0.3)
    batch = batch_of(ALL)
    batch["history"] = torch.ones(3, PLACES + 2, dtype=torch.int64)
    batch["year"] = batch["year"].float()
    before = {name: (column, column.clone()) for name, column in batch.items()}
    made(batch)
    same = [batch[n] is x and torch.equal(x, copy) for n, (x, copy) in before.items()]
    return {"same": same, "names": list(batch)}


# --- tables and two towers ------------------------------------------------------------------------


@probe
def tables_by_name():
    """How many tables there are, which are the given ones, and their padding rows."""
    features = [("a", "id", 4, "word"), ("word", "history", 4), ("c", "multi_hot", 4, "word")]
    made = tower.Tower(described(features), 3)
    given = {"word": embedding.EmbeddingTable(4, 3), "more": embedding.EmbeddingTable(7, 3)}
    taken = tower.Tower(described(features), 3, tables=given)
    tables = [p for p in made.parameters() if p.shape == (4, 3)]
    return {
        "tables": len(tables),
        "padding": [bool((p[0] == 0).all()) for p in tables],
        "taken": [any(t.weight is p for p in taken.parameters()) for t in given.values()],
        "fixed": [not t.weight.requires_grad for t in given.values()],
        "more": sum(p.shape == (7, 3) for p in taken.parameters()),
    }


USERS = (("age", "id", 4), ("history", "history", 6, "item"), ("year", "dense", 2), PLOT)
ITEMS = (("item", "id", 6), ("year", "dense", 2), PLOT, ("tags", "multi_hot", 5))
OPTIONS = {"hidden_dims": (5, 4), "dropout": 0.5, "max_history": PLACES}


def two_towers(**more):
    return tower.TwoTower(described(USERS), described(ITEMS), 3, **{**OPTIONS, **more}).double()


def sizes_of(side):
    return sum(p.numel() for p in side.parameters())


@probe
def towers_and_tables():
    """What the towers share, and how many numbers each has."""
    made = two_towers()
    sides = [{id(p) for p in side.parameters()} for side in (made.user_tower, made.item_tower)]
    shared = [list(p.shape) for p in made.parameters() if id(p) in sides[0] & sides[1]]
    alone = [tower.Tower(described(some), 3, **OPTIONS) for some in (USERS, ITEMS)]
    sizes = [sizes_of(side) for side in (made.user_tower, made.item_tower)]
    return {"shared": shared, "sizes": sizes, "alone": [sizes_of(each) for each in alone]}


@probe
def tables_of_two_sizes():
    """Whether the two sides may want one table in two sizes."""
    users = [("history", "history", 7, "item")]
    return outcome(lambda: tower.TwoTower(described(users), described(ITEMS), 3))


@probe
def both_outputs():
    """Shapes, lengths, and whether they are what the towers give; dropout on either side."""
    made = two_towers().eval()
    users = {"age": integers([1, 2]), "history": integers([[1, 2], [3, 0]])}
    users |= {"year": pattern(2, 2), "plot": pattern(2, 4)}
    items = {"item": integers([1, 2, 3]), "tags": integers([[1], [2], [0]])}
    items |= {"year": pattern(3, 2), "plot": pattern(3, 4)}
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            if parameter.shape != ():
                parameter.copy_(1.0 + 0.4 * pattern(*parameter.shape, scale=1 + 0.1 * i))
    outs = made(users, items)
    sides = [made.user_tower(users), made.item_tower(items)]
    lengths = [out.square().sum(1).sqrt().mean() for out in outs]
    torch.manual_seed(0)
    made.train()
    random = [
        any(not torch.equal(side(batch), side(batch)) for _ in range(4))
        for side, batch in ((made.user_tower, users), (made.item_tower, items))
    ]
    same = [
        out.shape == side.shape and bool(torch.equal(out, side))
        for out, side in zip(outs, sides, strict=True)
    ]
    flows = []
    for out, side in zip(outs, (made.user_tower, made.item_tower), strict=False):
        weights = [p for p in side.parameters() if p.requires_grad]
        there = out.requires_grad and weights
        grads = torch.autograd.grad(out[:, 0].sum(), weights, allow_unused=True) if there else []
        flows.append(any(grad is not None for grad in grads))
    shapes = [list(out.shape) for out in outs]
    return {"shapes": shapes, "lengths": lengths, "same": same, "on": random, "flows": flows}


@probe
def temperature():
    """Start values, the gradient, and what is left after a long descent."""
    found = []
    for start in (0.07, 0.5):
        made = two_towers(temperature=start)
        value = made.temperature
        parameters = [p for p in made.parameters() if p.shape == () or p.shape == (1,)]
        tensor = isinstance(value, torch.Tensor)
        grads = (
            torch.autograd.grad(value, parameters, allow_unused=True)
            if tensor and value.requires_grad
            else []
        )
        grads = [float(grad) for grad in grads if grad is not None]
        found.append({"value": float(value), "tensor": tensor, "gradients": grads})
        with torch.no_grad():
            for parameter in parameters:
                parameter.sub_(3.0)
        found[-1]["after"] = float(made.temperature)
    return found


@probe
def refused_temperatures():
    """Which temperatures are refused."""
    return [outcome(lambda t=t: two_towers(temperature=t)) for t in (0, 0.0, -0.1)]


# --- cost -----------------------------------------------------------------------------------------


@probe
def cost():
    """Whether operations grow with the rows, and memory with a table."""
    from harness.cost import count

    found = {}
    for kind in ("multi_hot", "history"):
        made = tower.Tower(described([("ids", kind, 3000)]), 3)
        columns = [torch.ones(rows, 3, dtype=torch.int64) for rows in (2, 20)]
        few, many = (count(functools.partial(made, {"ids": ids})) for ids in columns)
        grown = many.operations + many.views - few.operations - few.views
        largest = many.largest_bytes
        found[kind] = {"loop": grown > 9, "table": largest if largest >= 3000 * 4 else 0}
    return found
