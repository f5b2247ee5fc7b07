"""Kata 04, DCN-V2: what `models/cross.py` and `models/ranking.py` must do, the simplest first."""

import math

import numpy as np
import torch

from harness.spec import (
    assert_close,
    assert_equal,
    assert_scalar,
    check,
    device,
    expect_error,
    fail,
    generator,
    golden,
    learner,
    rung,
)

cross = learner("models.cross")
ranking = learner("models.ranking")
features = learner("data.features")

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}  # many times what orders of summation differ by


# --- inputs, gradients and the definitions --------------------------------------------------------


def tensor(values, dtype=torch.float32):
    """A float tensor on the device that gets a gradient."""
    return torch.as_tensor(values).to(device(), dtype).clone().requires_grad_()


def constant(values, dtype=torch.float32):
    return torch.as_tensor(values).to(device(), dtype)


def draw(seed, *shape):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def arrays(**tensors):
    return {name: x.detach().cpu().double().numpy() for name, x in tensors.items()}


def load(module, state, dtype=torch.float32):
    """Put `state` into a module whose `state_dict` must have just these names and shapes."""
    found = {name: list(value.shape) for name, value in module.state_dict().items()}
    wanted = {name: list(np.shape(value)) for name, value in state.items()}
    assert_equal(found, wanted, what="names and shapes in state_dict()")
    module.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})
    return module.to(device(), dtype)


def assert_refused(function, *shapes):
    """ValueError from losses of tensors of these shapes."""
    for some in shapes:
        logits, labels, *weight = (torch.ones(shape, device=device()) for shape in some)
        shown = ", ".join(str(list(shape)) for shape in some)
        options = {"sample_weight": weight[0]} if weight else {}
        expect_error(
            lambda a=logits, b=labels, options=options: function(a, b, **options),
            ValueError,
            call=f"{function.__name__}({shown})",
        )


def assert_gradients(scalar, expected, inputs, *, call=None, **tolerance):
    """The gradients of `scalar` with respect to `inputs`, both by name."""
    check(
        isinstance(scalar, torch.Tensor) and scalar.requires_grad,
        "a tensor that can be differentiated (no .item(), no detach, no no_grad)",
        came_back=scalar,
        call=call,
    )
    found = torch.autograd.grad(scalar, list(inputs.values()), allow_unused=True)
    for (name, value), grad in zip(inputs.items(), found, strict=True):
        what = f"gradient of {name}"
        if grad is None:
            fail(expected="a gradient", came_back="none at all", call=call, what=what)
        assert_close(grad, expected[name], like=value, call=call, what=what, **tolerance)


def layer_by_hand(x0, xl, layer, cotangent):
    """x0 * (W xl + b) + xl in float64, and the gradients of its product with `cotangent`."""
    w = layer["weight"] if "weight" in layer else layer["u"] @ layer["v"]
    inner, s = xl @ w.T + layer["bias"], cotangent * x0
    slope = s.reshape(-1, len(w)).T @ xl.reshape(-1, len(w))
    grads = {"bias": s.reshape(-1, len(w)).sum(0)}
    if "weight" in layer:
        grads["weight"] = slope
    else:
        grads.update(u=slope @ layer["v"].T, v=layer["u"].T @ slope)
    return x0 * inner + xl, {"x0": cotangent * inner, "xl": cotangent + s @ w, **grads}


def run_golden(case):
    """A layer with a golden case's values: output and every gradient."""
    given, expected = case["arguments"], case["expected"]
    state = {name: given[name] for name in given if name in ("weight", "u", "v", "bias")}
    rank = np.shape(given["u"])[1] if "u" in given else None
    layer = load(cross.CrossLayer(np.shape(given["x0"])[1], rank=rank), state)
    x0, xl = tensor(given["x0"]), tensor(given["xl"])
    out = layer(x0, xl)
    assert_close(out, expected["out"], like=x0, what="golden values", **FLOAT32)
    inputs = {"x0": x0, "xl": xl, **dict(layer.named_parameters())}
    scalar = (out * constant(given["cotangent"])).sum()
    assert_gradients(scalar, expected, inputs, **FLOAT32)
    return layer


# --- cross layers ---------------------------------------------------------------------------------


@rung(
    hints=[
        "Set W = 0 in the formula of the docstring: what is left? The residual is xl, not x0.",
        "The bias is inside the product: x0 multiplies it. Every coordinate of W xl is a mix of "
        "its own; one number for all would be version 1.",
        "x0 * (xl @ self.weight.T + self.bias) + xl: the second axis of weight is the input, as in "
        "nn.Linear",
    ]
)
def test_full_matrix():
    """out = x0 * (W xl + b) + xl: by hand, then golden values with every gradient."""
    x0, xl = constant([[1.0, 2.0, -3.0]]), constant([[5.0, 7.0, 11.0]])
    state = {"weight": np.zeros((3, 3)), "bias": np.zeros(3)}
    layer = load(cross.CrossLayer(3), state)
    assert_close(layer(x0, xl), xl, what="W = 0 and b = 0: xl comes back")
    layer = load(cross.CrossLayer(3), {**state, "bias": [1.0, 10.0, 100.0]})
    out = layer(x0, xl)
    assert_close(out, [[6.0, 27.0, -289.0]], like=x0, what="W = 0, b = [1, 10, 100]")
    state = {"weight": [[0.0, 2.0], [0.0, 0.0]], "bias": [0.0, 0.0]}
    layer = load(cross.CrossLayer(2), state)
    x0, xl = constant([[3.0, 5.0]]), constant([[1.0, 10.0]])
    out = layer(x0, xl)
    assert_close(out, [[61.0, 10.0]], like=x0, what="W = [[0, 2], [0, 0]], b = 0")
    run_golden(golden("golden.json")["layer"]["full"])


@rung(
    hints=[
        "W = U V, nothing else: what does V do to xl first, and what is its width then?",
        "There is no activation between the two, no second bias, and no scaling by the rank.",
        "(xl @ self.v.T) @ self.u.T, with u of shape (dim, rank) and v of shape (rank, dim)",
    ]
)
def test_low_rank():
    """A low-rank layer is the full layer with W = U V; golden values with every gradient."""
    given = golden("golden.json")["layer"]["low_rank"]["arguments"]
    layer = run_golden(golden("golden.json")["layer"]["low_rank"])
    x0, xl = constant(given["x0"]), constant(given["xl"])
    weight = np.asarray(given["u"]) @ np.asarray(given["v"])
    full = load(cross.CrossLayer(4), {"weight": weight, "bias": given["bias"]})
    for factor in (1.0, -2.0):  # both signs: an activation would show
        low, high = layer(factor * x0, factor * xl), full(factor * x0, factor * xl)
        assert_close(low, high.detach(), call="layer(x0, xl)", what="against W = U V", **FLOAT32)


@rung(
    hints=[
        "With x0 = 2, W = 1, b = 0: the first layer gives 6. The second gives 2 * 6 + 6.",
        "Every layer multiplies by x0, the input of the network, and adds its own input xl. "
        "`x = x0` makes no copy, so `x += ...` would change x0 too.",
        "x = x0, then for each layer of an nn.ModuleList: x = layer(x0, x)",
    ]
)
def test_network():
    """Each layer gets the network's input and the last state: by hand, then golden values."""
    one = {"weight": [[1.0]], "bias": [0.0]}
    state = {f"layers.{i}.{name}": value for i in range(2) for name, value in one.items()}
    network = load(cross.CrossNetwork(1, 2), state)
    x0 = constant([[2.0]])
    with torch.no_grad():
        out = network(x0)
    assert_close(out, [[18.0]], like=x0, what="two layers with W = 1, b = 0 on x0 = 2")
    assert_close(x0, [[2.0]], what="x0 afterwards: the caller's tensor is not changed")
    state = {**state, "layers.0.weight": [[0.0]], "layers.0.bias": [1.0]}
    state["layers.1.weight"] = [[0.0]]
    network = load(cross.CrossNetwork(1, 2), state)
    out = network(x0)
    assert_close(out, [[4.0]], like=x0, what="W = 0 in both layers, b = 1 in the first only")
    out = network(x0)
    assert_close(out, [[4.0]], like=x0, what="the same call once more")
    empty = cross.CrossNetwork(1, 0)
    assert_close(empty(x0), x0, what="a network without layers")
    case = golden("golden.json")["network"]
    given, expected = case["arguments"], case["expected"]
    state = {name: value for name, value in given.items() if name.startswith("layers.")}
    network = load(cross.CrossNetwork(4, 3), state)
    x0 = tensor(given["x0"])
    out = network(x0)
    assert_close(out, expected["out"], like=x0, **FLOAT32)
    inputs = {"x0": x0, **dict(network.named_parameters())}
    scalar = (out * constant(given["cotangent"])).sum()
    assert_gradients(scalar, expected, inputs, rtol=1e-4, atol=1e-4)


@rung(
    hints=[
        "The docstring says what the values start from; nn.Linear's own start is another one.",
        "torch.randn(...) / math.sqrt(fan_in): the fan in of V is dim, that of U is rank. "
        "Compare the shapes of x0 and xl before you calculate.",
    ]
)
def test_start_values_and_bad_input():
    """Biases start at 0, matrices at Normal(0, 1 / sqrt(fan in)); bad input is refused."""
    torch.manual_seed(4)
    for text, module in (
        ("CrossNetwork(120, 2)", cross.CrossNetwork(120, 2)),
        ("CrossNetwork(300, 2, rank=40)", cross.CrossNetwork(300, 2, rank=40)),
        ("CrossLayer(90, rank=60)", cross.CrossLayer(90, rank=60)),
    ):
        call, means = f"{text}.state_dict()", set()
        for name, value in module.state_dict().items():
            if value.dim() == 1:
                assert_close(value, torch.zeros(len(value)), what=f"{name} at the start", call=call)
                continue
            fan_in = value.shape[1]
            value = value.cpu() * math.sqrt(fan_in)  # now Normal(0, 1), of 5,400 at least
            rms, inner = value.square().mean().sqrt(), (value.abs() < 1).float().mean()
            what = f"{name}: root mean square times sqrt({fan_in})"
            assert_scalar(rms, 1.0, what=what, atol=0.06, call=call)
            what = f"{name}: share of values within one standard deviation, .683 if Normal"
            assert_scalar(inner, 0.683, what=what, atol=0.03, call=call)
            means.add(float(value.mean()))
        check(
            len(means) == len([name for name in module.state_dict() if "bias" not in name]),
            "different values in each matrix: layers have parameters of their own",
            call=call,
        )
    for dim, rank in ((0, None), (3, 0), (3, 4), (3, -1)):
        expect_error(
            lambda d=dim, r=rank: cross.CrossLayer(d, rank=r),
            ValueError,
            call=f"CrossLayer({dim}, rank={rank})",
        )
    expect_error(lambda: cross.CrossNetwork(3, -1), ValueError, call="CrossNetwork(3, -1)")
    for shape0, shape in (
        ((4, 3), (1, 3)),
        ((3,), (4, 3)),
        ((1, 3), (4, 3)),
        ((4, 1), (4, 3)),
        ((1, 4, 3), (4, 3)),
        ((4, 3), (1, 4, 3)),
    ):
        for rank in (None, 3):
            layer = cross.CrossLayer(3, rank=rank).to(device())
            x0, xl = (torch.ones(each, device=device()) for each in (shape0, shape))
            expect_error(
                lambda layer=layer, x0=x0, xl=xl: layer(x0, xl),
                ValueError,
                call=f"layer(x0{list(shape0)}, xl{list(shape)})",
            )


# --- the ranking model ----------------------------------------------------------------------------


ALL = [  # name, kind, size: every kind, and two features with one table
    ("price", "dense", 2),
    ("plot", "text", 5),
    ("item", "id", 11, "item"),
    ("genres", "multi_hot", 7),
    ("seen", "history", 11, "item"),
]


def build(specs, *, seed=11, **options):
    """A model on the device, of features given as tuples."""
    torch.manual_seed(seed)
    chosen = [features.Feature(*spec) for spec in specs]
    model = ranking.RankingModel(chosen, **options)
    return model.to(device())


def columns(specs, rows, seed=0, dtype=torch.float32):
    """Random columns of `rows` rows; lists of ids are 4 long, with and without padding."""
    batch = {}
    for number, (name, kind, size, *_) in enumerate(specs):
        source = generator(100 * seed + number)
        if kind in ("dense", "text"):
            column = torch.randn(rows, size, generator=source).to(dtype)
        else:
            length = () if kind == "id" else (4,)
            column = torch.randint(1, size, (rows, *length), generator=source)
            if kind != "id":
                column[torch.arange(4) >= 1 + torch.arange(rows)[:, None] % 4] = 0
        batch[name] = column.to(device())
    return batch


def gradients(scalar, leaves):
    """Of each leaf, dense; None where there is none."""
    found = torch.autograd.grad(scalar, list(leaves), allow_unused=True)
    return [None if grad is None else grad.to_dense() for grad in found]


def settled(model, batch, steps=3):
    """The model after a few plain gradient steps, so that nothing hangs on how it starts."""
    sign = 1 - 2 * (torch.arange(len(next(iter(batch.values()))), device=device()) % 2)
    parameters = list(model.parameters())
    for _ in range(steps):
        loss = torch.nn.functional.softplus(sign * model(batch)).mean()
        grads = gradients(loss, parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    parameter -= 0.3 * grad
    return model


def assert_slopes(model, batch, text):
    """Gradients of parameters and columns, along a direction each, against differences."""
    model.double()
    batch = {
        name: column.detach().double().requires_grad_() if column.is_floating_point() else column
        for name, column in batch.items()
    }
    weights = draw(6, len(batch["item"])).to(device())
    leaves = dict(model.named_parameters())
    leaves.update({name: column for name, column in batch.items() if column.requires_grad})
    middle = (model(batch) * weights).sum()
    grads = gradients(middle, leaves.values())
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        # where there is no gradient is padding, or what was not asked for
        way = draw(7, *leaf.shape).to(device()) * (grad != 0)
        kept, slopes = leaf.detach().clone(), []
        with torch.no_grad():
            for step in (1e-6, -1e-6):
                leaf.copy_(kept + step * way)
                slopes.append((((model(batch) * weights).sum() - middle) / step).item())
            leaf.copy_(kept)
        what = f"gradient of {name} along a direction, against differences ({text})"
        call = "(model(batch) * weights).sum().backward()"
        # the two slopes differ where a ReLU bends
        room = abs(slopes[0] - slopes[1]) / 2 + 1e-5 * float((grad * way).abs().sum()) + 1e-6
        assert_scalar((grad * way).sum(), sum(slopes) / 2, what=what, call=call, atol=room)
    model.float()


def size_of(specs, **options):
    return sum(parameter.numel() for parameter in build(specs, **options).parameters())


@rung(
    hints=[
        "Which layers are left with num_cross_layers=0 and hidden_dims=()? What can they say?",
        "x0 enters the last Linear as it is: no sigmoid, no activation, no normalisation. A list "
        "is the mean of its rows, not their sum.",
        "torch.cat the vectors of all features, then Linear(width, 1) and squeeze(-1), which "
        "leaves a batch of one alone (squeeze() does not)",
    ]
)
def test_one_logit_a_row():
    """Logits are (B,). Without cross layers and deep part they are linear in x0, a row as it is."""
    for structure in ("parallel", "stacked"):
        options = {"num_cross_layers": 0, "hidden_dims": (), "structure": structure}
        model = build(ALL, **options)
        for rows in (6, 1):
            batch = columns(ALL, rows)
            logits = model(batch)
            dtype = batch["price"]
            assert_close(logits, logits.detach().reshape(rows), like=dtype, what="its shape")
        model = build(ALL, **options).double()
        batch = columns(ALL, 6, dtype=torch.float64)
        for name in ("price", "plot"):
            middle, step = batch[name], 1000 * torch.ones_like(batch[name])
            low = model({**batch, name: middle - step})
            logits = model({**batch, name: middle + step})
            mean, at = (low + logits).detach() / 2, model(batch)
            text = f"a step up and down in {name!r} ({structure}): their mean is the middle"
            assert_close(mean, at.detach(), what=text)
        for name in ("genres", "seen"):
            call = f"model(batch with {name}=...)"

            def logits_of(*ids, batch=batch, name=name, model=model):
                lists = torch.tensor([ids] * 6, device=device())
                return model({**batch, name: lists}).detach()

            one, other = logits_of(3), logits_of(5)
            for ids, share in (((3, 5), 1 / 2), ((3, 5, 3, 5), 1 / 2), ((3, 3, 5), 1 / 3)):
                text = f"{name} {list(ids)}: the mean of its rows, by the logits of [3] and [5]"
                expected = one + share * (other - one)
                assert_close(logits_of(*ids), expected, what=text, call=call)
        before = model(batch).detach()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        after = model(batch).detach()
        text = f"all parameters doubled ({structure}): logits less the first one, 4 times as large"
        assert_close(after - after[0], 4 * (before - before[0]), what=text)


@rung(
    hints=[
        "What does a row that knows nothing say? All zeros, which the last bias moves.",
        "Divide a list by the number of its real entries, at least 1. Give the table a padding "
        "row that never learns; the linear map of a text has no bias.",
    ]
)
def test_padding_and_missing_text():
    """Padding has no influence, and neither has a text of zeros; an empty list gives zeros."""
    model = settled(build(ALL, dropout=0.5).eval(), columns(ALL, 8)).double()
    batch = columns(ALL, 5, 1, torch.float64)
    for name in ("genres", "seen"):
        ids = torch.tensor([[3, 5]] * 5, device=device())
        with torch.no_grad():
            plain = model({**batch, name: ids})
            for places in ([1, 2, 0, 0], [0, 0, 1, 0, 2]):
                padded = torch.tensor([0, 3, 5], device=device())[torch.tensor(places)]
                logits = model({**batch, name: padded.expand(5, -1)})
                text = f"{name} {padded.tolist()} instead of [3, 5]"
                assert_close(logits, plain, what=text)
    nothing = {"plot": 0.0, "item": 0, "genres": 0, "seen": 0}
    for spec in ALL[1:]:
        name = spec[0]
        model = build([spec], hidden_dims=(), num_cross_layers=2)
        settled(model, columns([spec], 8))
        batch = {name: torch.full_like(columns([spec], 3)[name], nothing[name])}
        logits = model(batch)
        text = f"three rows of zeros in {name!r} ({spec[1]}), the only feature"
        assert_close(logits, logits[:1].detach().expand(3), what=text)
        names, parameters = zip(*model.named_parameters(), strict=True)
        moving = {
            name: int(grad.count_nonzero())
            for name, grad in zip(names, gradients(logits.sum(), parameters), strict=True)
            if grad is not None and bool(grad.count_nonzero())
        }
        text = f"{text}: numbers of a parameter that have a gradient"
        expected = "that of the logit's bias alone (two, if two parts are added)"
        check(sum(moving.values()) <= 2, expected, came_back=moving, what=text)


@rung(
    hints=[
        "Is every part registered, used, and connected to the logit?",
        "Modules belong in nn.ModuleDict and nn.ModuleList, not in a dict or list. The output of "
        "the cross network has to reach the head, in both structures.",
        "parallel: head(cat([cross(x0), deep(x0)])); stacked: head(deep(cross(x0)))",
    ]
)
def test_everything_has_an_influence():
    """Everything moves the logit, by its right gradient, and is in the state_dict."""
    for structure in ("parallel", "stacked"):
        for rank in (None, 3):
            options = {"structure": structure, "rank": rank, "hidden_dims": (17, 13)}
            model = settled(build(ALL, **options), columns(ALL, 40))
            batch = columns(ALL, 40, 1)
            for name in ("price", "plot"):
                batch[name].requires_grad_()
            logits = model(batch)
            check(logits.requires_grad, "logits that can be differentiated")
            leaves = {f"parameter {key}": value for key, value in model.named_parameters()}
            leaves.update(price=batch["price"], plot=batch["plot"])
            grads = gradients(logits.sum(), leaves.values())
            for name, grad in zip(leaves, grads, strict=True):
                text = f"gradient of {name} ({structure}, rank={rank})"
                if grad is None or not bool(grad.count_nonzero()):
                    came_back = "none at all" if grad is None else "zeros everywhere"
                    fail(expected="an influence on the logits", came_back=came_back, what=text)
                check(grad.isfinite().all(), "finite gradients", what=text)
            for name in ("price", "plot"):
                text = f"gradient of each column of {name!r} ({structure})"
                check(grads[list(leaves).index(name)].count_nonzero(0).all(), "not 0", what=text)
            with torch.no_grad():
                for name, kind, size, *_ in ALL[2:]:
                    other = torch.where(batch[name] > 0, batch[name] % (size - 1) + 1, 0)
                    moved = model({**batch, name: other})
                    text = f"other ids in {name!r} ({kind}, {structure})"
                    check((moved != logits).any(), "other logits", what=text)
            if (structure == "stacked") == (rank is None):
                assert_slopes(model, batch, f"{structure}, rank={rank}")
            twin = ranking.RankingModel([features.Feature(*spec) for spec in ALL], **options)
            twin.load_state_dict(model.state_dict())
            twin = twin.to(device())
            text = "a second model with the first one's state_dict"
            assert_close(twin(batch), logits.detach(), what=text)


@rung(
    hints=[
        "Count the numbers that the table in the docstring asks for: a scale and a shift each, "
        "embedding_dim a row, and so on.",
        "x0 is as wide as all vectors side by side: the sizes of the dense features plus "
        "embedding_dim for each of the others. Features that name one table share it.",
        "tables[feature.table or feature.name], made once; Linear(size, embedding_dim, bias=False)",
    ]
)
def test_sizes():
    """Every part has the stated size; features that make no sense are refused."""
    plain = {"num_cross_layers": 0, "hidden_dims": (), "structure": "stacked", "embedding_dim": 3}

    def grows(what, by, before, after):
        assert_equal(after - before, by, what=what, call="RankingModel(features, ...)")

    for kind, by in (("dense", 3), ("text", 3), ("id", 3), ("multi_hot", 3), ("history", 3)):
        rest = {"dense": " (scale, shift, head)"}.get(kind, ", embedding_dim=3")
        sizes = [size_of([("one", kind, size)], **plain) for size in (6, 7)]
        grows(f"parameters that one more of {kind!r} takes{rest}", by, *sizes)
    for kind, size, parts in (("dense", 19, "scale, shift, head"), ("text", 22, "map, head")):
        what = f"parameters for six numbers of kind {kind!r} ({parts} with its bias)"
        assert_equal(size_of([("one", kind, 6)], **plain), size, what=what, call="RankingModel")
    alone = size_of([("a", "id", 9, "t"), ("b", "history", 9, "u")], **plain)
    shared = size_of([("a", "id", 9, "t"), ("b", "history", 9, "t")], **plain)
    what = "parameters fewer than with a table each: id and history name one of 9 rows"
    grows(what, 27, shared, alone)
    own = size_of([("a", "id", 9), ("b", "history", 9)], **plain)
    grows("parameters fewer than with a table each, where two features name none", 0, own, alone)
    named = size_of([("a", "id", 9), ("b", "history", 9, "a")], **plain)
    what = "parameters fewer than with a table each: a history names that of the feature 'a'"
    grows(what, 27, named, own)
    # x0 of ALL is 2 + 4 * 3 = 14 wide
    for rank, by in ((None, 14 * 14 + 14), (2, 2 * 14 * 2 + 14)):
        sizes = [size_of(ALL, **{**plain, "num_cross_layers": n, "rank": rank}) for n in (1, 2)]
        grows(f"parameters of one more cross layer of width 14, rank={rank}", by, *sizes)
    sizes = [size_of(ALL, **{**plain, "hidden_dims": (6, n)}) for n in (4, 5)]
    grows("parameters of one more unit in hidden_dims[1], after 6 units", 8, *sizes)
    sizes = [size_of(ALL, **{**plain, "hidden_dims": (n, 5)}) for n in (6, 7)]
    grows("parameters of one more unit in hidden_dims[0], on x0 of width 14", 20, *sizes)
    stacked, parallel = (
        size_of(ALL, **{**plain, "hidden_dims": (6,), "structure": name})
        for name in ("stacked", "parallel")
    )
    check(
        parallel - stacked in (14, 15),  # 15: a Linear for each part, and each with a bias
        "a head that is 14 wider: it reads the deep part and every column of the cross network",
        came_back=parallel - stacked,
        call="RankingModel(features, structure='parallel', ...)",
        what="parameters that 'parallel' has more than 'stacked'",
    )
    for specs, text in (
        ([], "no features"),
        ([("a", "dense", 1), ("a", "id", 5)], "two features called 'a'"),
        ([("a", "dense", 1), ("b", "one_hot", 5)], "a feature of kind 'one_hot'"),
        ([("a", "id", 6, "t"), ("b", "id", 5, "t")], "two sizes for one table"),
    ):
        expect_error(
            lambda specs=specs: build(specs, **plain), ValueError, call=f"RankingModel({text})"
        )
    for structure in ("serial", "Parallel"):
        expect_error(
            lambda structure=structure: build(ALL, structure=structure),
            ValueError,
            about=(structure, "structure"),
            call=f"RankingModel(features, structure={structure!r})",
        )


def gated(hidden, ways):
    """A model whose deep part ends in one unit; its logits, and the one where ReLU gives 0."""
    options = {"hidden_dims": hidden, "num_cross_layers": 0, "structure": "stacked"}
    for seed in range(20):  # a unit may happen to let all rows through, or none
        model = build([("x", "dense", 2)], seed=seed, dropout=0.2, **options)
        settled(model.eval(), {"x": ways.float() / 100})
        with torch.no_grad():
            calm = model.double()({"x": ways})
        values, counts = calm.unique(return_counts=True)
        if counts.max() > 1 and len(values) > 1:
            return model.train(), calm, values[counts.argmax()]
    fail(
        call=f"RankingModel([x], hidden_dims={hidden}, num_cross_layers=0, ...)",
        came_back="a different logit for each of 40 rows, in each of 20 models",
        expected="one and the same for all rows where ReLU makes the last hidden unit 0",
    )


def assert_dropout():
    """What dropout does in training, behind a single unit, and behind thirty and then one."""
    ways = 100 * draw(8, 20, 2).to(device())
    ways = torch.cat([ways, -ways])  # a ReLU lets some of them through, and not others
    for hidden in ((1,), (30, 1)):
        model, calm, without = gated(hidden, ways)
        call = f"RankingModel([x], dropout=0.2, hidden_dims={hidden}, ...) in training mode"
        best = (calm - without).abs().argmax()
        with torch.no_grad():
            many = model({"x": ways[best].expand(2000, 2)}) - without
        left_out = many.abs() < 1e-9
        share = left_out.double().mean()
        what = "share of rows whose last hidden unit is left out"
        if hidden == (30, 1):  # what the first layer leaves out may close the last unit too
            check(share > 0.15, "0.2 or a little more", came_back=share, what=what, call=call)
            kinds, what = len(many.unique()), "different logits of one row"
            expected = "many: dropout behind the first ReLU too"
            check(kinds > 10, expected, came_back=kinds, what=what, call=call)
            continue
        assert_scalar(share, 0.2, atol=0.05, what=what, call=call)
        expected = torch.where(left_out, 0.0, (calm[best] - without) / 0.8)
        what = "what the hidden unit adds where it is not left out: 1 / 0.8 times that of eval mode"
        assert_close(many, expected, what=what, call=call)


@rung(
    hints=[
        "Would the answer for one user change with who else is in the batch?",
        "No batch normalisation. Walk through the features, not through the batch. Dropout belongs "
        "to the deep part and obeys model.training (nn.Dropout does).",
    ]
)
def test_rows_columns_and_dropout():
    """Rows do not see each other, columns go by name; only dropout in training is random."""
    model = settled(build(ALL), columns(ALL, 16)).double()
    batch = columns(ALL, 7, 2, torch.float64)
    before = {name: column.clone() for name, column in batch.items()}
    with torch.no_grad():
        logits = model(batch)
        for row in range(7):
            alone = model({name: column[row : row + 1] for name, column in batch.items()})
            assert_close(alone, logits[row : row + 1], what=f"row {row} alone, in training mode")
        turned = dict(reversed(list(batch.items())))
        turned["a column without a feature"] = torch.zeros(7, 2, device=device())
        assert_close(model(turned), logits, what="columns in another order, and one more")
        assert_close(model(batch), logits, what="training mode, dropout 0: the same again")
    assert_equal(list(batch), list(before), what="names in the batch afterwards")
    for name, column in batch.items():
        assert_close(column, before[name], what=f"column {name!r} afterwards: not changed")
    for missing in batch:
        some = {name: column for name, column in batch.items() if name != missing}
        expect_error(
            lambda some=some: model(some),
            KeyError,
            about=missing,
            call=f"model(batch without {missing!r})",
        )
    model = settled(build(ALL, dropout=0.5), columns(ALL, 16)).double()
    with torch.no_grad():
        check((model(batch) != model(batch)).any(), "dropout in training mode: other logits again")
        model.eval()
        assert_close(model(batch), model(batch), what="eval mode: the same twice", rtol=0, atol=0)
        check(not any(m.training for m in model.modules()), "a model that is still in eval mode")
        model = build(ALL, dropout=0.5, hidden_dims=()).double()
        logits = model(batch)
        assert_close(model(batch), logits, what="training mode without deep part: nothing random")
    assert_dropout()


@rung(
    hints=[
        "The label is whether two numbers have the same sign. A linear model can only guess.",
        "parallel: the deep part reads x0, so all curvature comes from the cross network and is "
        "the same everywhere. stacked: the deep part reads what the cross network gives.",
        "stacked: head(deep(cross(x0))). parallel: head(cat([cross(x0), deep(x0)], -1)).",
    ]
)
def test_what_each_part_can_do():
    """A cross layer alone learns a product; parallel and stacked differ in curvature."""
    specs = [("a", "dense", 1), ("b", "dense", 1)]
    ends = constant([[1.0], [1.0], [-1.0], [-1.0]]), constant([[1.0], [-1.0], [1.0], [-1.0]])
    batch = dict(zip("ab", ends, strict=True))
    target = (batch["a"] * batch["b"])[:, 0]
    for structure, rank, layers in (
        ("parallel", None, 1),
        ("stacked", None, 1),
        ("parallel", 1, 1),
        ("parallel", None, 0),
    ):
        model = build(
            specs, structure=structure, rank=rank, num_cross_layers=layers, hidden_dims=()
        )
        parameters = list(model.parameters())
        for _ in range(150 if layers else 10):
            logits = model(batch)
            loss = torch.nn.functional.softplus(-target * logits).mean()
            grads = gradients(loss, parameters)
            with torch.no_grad():
                for value, grad in zip(parameters, grads, strict=True):
                    value -= 0.5 * (0 if grad is None else grad)
        text = f"loss of the product of two signs, {layers} cross layers ({structure}, {rank=})"
        if layers:
            check(loss < 0.3, "below 0.3: learned", came_back=loss, what=text)
        else:
            check(loss > 0.69, "log 2: out of reach", came_back=loss, what=text)
    for structure in ("parallel", "stacked"):
        options = {"hidden_dims": (16,), "structure": structure}
        specs = [("x", "dense", 3)]
        model = settled(build(specs, num_cross_layers=1, **options), columns(specs, 12)).double()
        x, way = draw(5, 30, 3).to(device()), 1e-4 * constant([1.0, 2.0, -1.0], torch.float64)
        with torch.no_grad():
            low, middle, high = (model({"x": x + step * way}) for step in (-1, 0, 1))
        curve = ((low - 2 * middle + high) * 1e8).sort().values[5:-5]  # a kink of ReLU may be near
        spread, size = curve[-1] - curve[0], curve.abs().max()
        text = f"second derivative of the logit by a dense feature ({structure})"
        if structure == "parallel":
            check(size > 1e-4, "not 0, from the cross layer", came_back=size, what=text)
            check(spread < 1e-5, "the same in all rows", came_back=curve, what=text)
        else:
            expected = "different from row to row: the deep part comes after the products"
            check(spread > 1e-4, expected, came_back=curve, what=text)
        for hidden, least in (((16,), 0), ((64, 4), 8)):
            options = {"hidden_dims": hidden, "structure": structure, "num_cross_layers": 0}
            model = settled(build(specs, **options), columns(specs, 12)).double()
            line = torch.linspace(-20, 20, 3000, device=device(), dtype=torch.float64)
            with torch.no_grad():
                logits = model({"x": line[:, None] * draw(9, 3).to(device())})
            kinks = ((logits[2:] - 2 * logits[1:-1] + logits[:-2]).abs() > 1e-9).sum()
            text = f"places where the logit bends along a line ({structure}, hidden_dims={hidden})"
            expected = f"more than {least}: ReLU behind each layer of the deep part"
            check(kinks > least, expected, came_back=kinks, what=text)
            check(kinks < 300, "a few: straight between them", came_back=kinks, what=text)


# --- the losses -----------------------------------------------------------------------------------


@rung(
    hints=[
        "The logit of a row against its own label, then a mean with weights. exp(100) is infinite "
        "in float32, and 1 - sigmoid(20) is 0.",
        "Do not go through a probability, nor clamp one: the loss of a logit of 10,000 for a 0 is "
        "10,000. Divide by the sum of the weights, unless it is 0. Convert bfloat16 before you "
        "calculate. Compare the shapes first: (B,) against (B, 1) broadcasts to (B, B).",
        "F.softplus(logits) - labels * logits for each row, torch.logaddexp, or "
        "F.binary_cross_entropy_with_logits; masked_fill(total == 0, 1.0) for the divisor",
    ]
)
def test_binary_loss():
    """The weighted mean of log(1 + exp(z)) - y z, right for every dtype, weight and size of z."""
    zeros, labels = torch.zeros(3, device=device()), torch.tensor([0, 1, 1], device=device())
    loss = ranking.binary_loss(zeros, labels)
    assert_scalar(loss, math.log(2), what="three logits of 0: even odds")
    for case in golden("golden.json")["binary"].values():
        logits, labels = tensor(case["arguments"]["logits"]), constant(case["arguments"]["labels"])
        weight = case["arguments"].get("sample_weight")
        sample_weight = None if weight is None else constant(weight)
        loss = ranking.binary_loss(logits, labels, sample_weight=sample_weight)
        assert_scalar(loss, case["expected"]["loss"], **FLOAT32)
        # a loss is often one term of several: its gradients scale with what comes from above
        expected = {"logits": 3 * np.asarray(case["expected"]["logits"])}
        assert_gradients(3 * loss, expected, {"logits": logits}, **FLOAT32)
    for seed, rows in enumerate((1, 2, 7)):
        for dtype, label_dtype, weight_dtype in (
            (torch.float32, torch.bool, torch.int64),
            (torch.float32, torch.float64, torch.float64),
            (torch.float64, torch.int64, torch.float32),
            (torch.bfloat16, torch.bfloat16, torch.bool),
            (torch.float16, torch.float64, torch.bfloat16),
        ):
            source = constant(4 * draw(seed, rows, 2), dtype)
            logits, labels = source[:, 0], constant(source[:, 1] > 1, label_dtype)  # one strided
            weight = constant(torch.arange(2, 2 + rows) % 3, weight_dtype)
            given = {"logits": logits, "labels": labels, "sample_weight": weight}
            before = {name: x.clone() for name, x in given.items()}
            z, y, w = arrays(z=logits, y=labels, w=weight).values()
            losses = np.logaddexp(0, z) - y * z
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            digits = {} if wide == torch.float64 else FLOAT32
            for options, expected in (
                ({}, losses.mean()),
                ({"sample_weight": weight}, w @ losses / max(w.sum(), 1e-9)),
            ):
                loss = ranking.binary_loss(logits, labels, **options)
                assert_close(loss, expected, dtype=wide, **digits)
            for name, x in given.items():
                assert_close(x, before[name], what=f"{name} afterwards: not changed")
    logits, labels = tensor(draw(1, 5)), constant([1, 0, 0, 1, 1])
    z, y = arrays(z=logits, y=labels).values()
    weight = np.array([0.01, 0.02, 0.0, 0.03, 0.02])
    for scale, digits in ((1, 1e-5), (1e-3, 1e-3)):
        sample_weight = constant(scale * weight)
        loss = ranking.binary_loss(logits, labels, sample_weight=sample_weight)
        expected = weight @ (np.logaddexp(0, z) - y * z) / weight.sum()
        assert_scalar(loss, expected, what=f"weights that sum to {0.08 * scale:g}", rtol=digits)
    for scale in (1e-9, 1e9):
        loss = ranking.binary_loss(logits, labels, sample_weight=constant(scale * weight))
        expected = weight @ (np.logaddexp(0, z) - y * z) / weight.sum()
        assert_scalar(loss, expected, what=f"the same weights times {scale:g}", rtol=1e-5)
    half, large = constant(draw(3, 3), torch.float16), constant([1e5, 1.0, 3e5])
    z, w = arrays(z=half, w=large).values()
    loss = ranking.binary_loss(half, labels[:3], sample_weight=large)
    expected = w @ (np.logaddexp(0, z) - np.array([1.0, 0, 0]) * z) / w.sum()
    assert_scalar(loss, expected, what="float16 logits, float32 weights up to 3e5", **FLOAT32)
    loss = ranking.binary_loss(half, constant([0.301, 0.7777, 1.0]))
    expected = (np.logaddexp(0, z) - np.array([0.301, 0.7777, 1.0]) * z).mean()
    assert_scalar(loss, expected, what="float16 logits, labels .301, .7777, 1", **FLOAT32)
    sample_weight = torch.zeros(5, device=device())
    loss = ranking.binary_loss(logits, labels, sample_weight=sample_weight)
    assert_scalar(loss, 0.0, what="all weights are 0")
    assert_gradients(loss, {"logits": np.zeros(5)}, {"logits": logits})
    for value in (-1e5, -1e4, -20.0, -0.5, 3.0, 90.0, 1e4):
        for y in (0.0, 1.0) if value != 3 else (0.0, 1.0, 0.3):
            logits, labels = tensor([value]), constant([y])
            loss = ranking.binary_loss(logits, labels)
            text = f"logit {value:g}, label {y:g}"
            z = logits.item()
            assert_scalar(loss, np.logaddexp(0, z) - float(labels) * z, what=text, **FLOAT32)
            slope = [0.5 + 0.5 * math.tanh(z / 2) - y]
            assert_gradients(
                loss, {"logits": slope}, {"logits": logits}, call=f"loss.backward(), {text}"
            )
    assert_refused(
        ranking.binary_loss,
        ((4,), (4, 1)),
        ((4, 1), (4,)),
        ((4,), (1,)),
        ((4,), ()),
        ((4,), (4,), (1,)),
        ((4,), (4,), (4, 1)),
        ((4,), (4,), ()),
        ((0,), (0,)),
    )


@rung(
    hints=[
        "Softmax over the candidates of one user, cross-entropy with the labels made to sum to 1.",
        "A list without a positive is not in the mean. Minus infinity times 0 is not a number.",
        "log_p = logits.log_softmax(1), set to 0 where the label is; lists without a positive get "
        "harmless logits before the softmax, and a divisor of 1. Shapes that differ are refused",
    ]
)
def test_listwise_loss():
    """The mean over lists with a positive of -sum p log softmax(z): values and gradients."""
    case = golden("golden.json")["listwise"]
    logits, labels = tensor(case["arguments"]["logits"]), constant(case["arguments"]["labels"])
    loss = ranking.listwise_loss(logits, labels)
    assert_scalar(loss, case["expected"]["loss"], **FLOAT32)
    expected = {"logits": 3 * np.asarray(case["expected"]["logits"])}
    assert_gradients(3 * loss, expected, {"logits": logits}, **FLOAT32)
    higher = logits.detach() + constant([[1e3], [-1e3], [1e4], [0.0]])
    loss = ranking.listwise_loss(higher, labels)
    text = "each list 1000 or so higher or lower: the same loss"
    assert_scalar(loss, case["expected"]["loss"], what=text, rtol=1e-3, atol=1e-3)
    # softmax of 0 and -1e4: the loss is 1e4 where the second is the positive
    steep = constant([[0.0, -1e4], [0.0, -1e4]])
    loss = ranking.listwise_loss(steep, constant([[0, 1], [1, 0]], torch.int64))
    assert_scalar(loss, 5000.0, what="logits 0 and -1e4, the positive once at either")
    low = float("-inf")
    logits = tensor([[1.0, low, 0.0, low], [low, low, low, low], [2.0, 1.0, 0.0, low]])
    for labels, expected, slopes, text in (
        ([[1, 0, 0, 0], [0] * 4, [0] * 4], math.log1p(math.exp(-1)), [1, 0], "one positive"),
        ([[1, 1, 0, 0], [0] * 4, [0] * 4], math.log1p(math.exp(-1)), [1, 0], "one at -inf"),
        ([[0, 1, 0, 0], [1] * 4, [0] * 4], 0.0, [0, 0], "positives at -inf only"),
        ([[0] * 4, [0] * 4, [0] * 4], 0.0, [0, 0], "no positive at all"),
        ([[0, 0, 1, 0], [1] * 4, [0, 1, 0, 0]], None, None, "positives in the first and last"),
    ):
        labels = constant(labels)
        before = labels.clone()
        loss = ranking.listwise_loss(logits, labels)
        assert_close(labels, before, what="labels afterwards: not changed")
        far = ranking.listwise_loss(logits.detach() - 1e5, labels)
        assert_close(far, loss.detach(), what="logits of -1e5, and minus infinity", atol=1e-2)
        text = f"candidates at minus infinity, {text}"
        if expected is None:
            first = 1 + math.log1p(math.exp(-1))
            last = math.log(math.exp(2) + math.e + 1) - 1
            assert_scalar(loss, (first + last) / 2, what=text)
            continue
        assert_scalar(loss, expected, what=text)
        grad = -1 / (1 + math.e)
        slope = [[slopes[0] * grad, 0, -slopes[0] * grad, 0], [0.0] * 4, [0.0] * 4]
        call = "loss.backward()"
        assert_gradients(loss, {"logits": slope}, {"logits": logits}, call=f"{call}, {text}")
    half, large = constant(draw(4, 2, 3), torch.float16), constant([[1e5, 0, 3e5], [0.301, 1, 0]])
    z, y = arrays(z=half, y=large).values()
    expected = (np.log(np.exp(z).sum(1)) - (y * z).sum(1) / y.sum(1)).mean()
    loss = ranking.listwise_loss(half, large)
    assert_scalar(loss, expected, what="float16 logits, float32 labels up to 3e5", **FLOAT32)
    for seed, (rows, candidates) in enumerate(((1, 1), (1, 4), (6, 3))):
        for dtype, label_dtype in (
            (torch.float32, torch.float64),
            (torch.float64, torch.int64),
            (torch.bfloat16, torch.bool),
        ):
            source = draw(10 + seed, candidates, 2, rows)[:, 0].T  # strided
            logits = constant(4 * source, dtype)
            labels = constant((source > 0).long().cumsum(1), label_dtype)
            labels[0, -1] = 1
            given = {"logits": logits, "labels": labels}
            before = {name: x.clone() for name, x in given.items()}
            z, y = arrays(z=logits, y=labels).values()
            losses = np.log(np.exp(z).sum(1)) - (y * z).sum(1) / np.maximum(y.sum(1), 1e-9)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            digits = {} if wide == torch.float64 else FLOAT32
            loss = ranking.listwise_loss(logits, labels)
            assert_close(loss, losses[y.sum(1) > 0].mean(), dtype=wide, **digits)
            for name, x in given.items():
                assert_close(x, before[name], what=f"{name} afterwards: not changed")
            loss = ranking.listwise_loss(logits, constant(1e-3 * labels.double()))
            text = "labels a thousandth as large: the same loss"
            assert_close(loss, losses[y.sum(1) > 0].mean(), what=text, rtol=1e-4, atol=1e-5)
    assert_refused(
        ranking.listwise_loss,
        ((4, 3), (4, 1)),
        ((4, 3), (3,)),
        ((4, 3), (1, 3)),
        ((4, 3), (3, 4)),
        ((0, 3), (0, 3)),
    )
