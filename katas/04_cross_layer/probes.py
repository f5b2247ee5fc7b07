"""The questions that tell known mistakes of kata 04 apart.

Names and layout of the ranking model's parameters are free, so all of them are set to 0.1 (a zero
row of a table stays zero), and what is compared does not depend on the bias of the logit: logits
less the first one, and gradients under a cotangent that adds up to 0.
"""

import math

import torch

from harness.cost import count
from harness.devices import other_device_findings
from harness.message import UnwrittenName, is_stub
from harness.probe import probe
from harness.spec import learner

cross = learner("models.cross")
ranking = learner("models.ranking")
features = learner("data.features")

INFINITE = float("inf")


def t(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def leaf(values, dtype=torch.float64):
    return t(values, dtype).requires_grad_()


def outcome(function):
    """The type of what a call raises, or that it is accepted."""
    try:
        function()
    except Exception as error:
        if is_stub(error) or isinstance(error, UnwrittenName):
            raise
        return type(error).__name__
    return "accepted"


# --- cross layers ---------------------------------------------------------------------------------


FULL = {"weight": [[0.3, -0.7], [1.1, 0.2]], "bias": [0.4, -0.9]}
LOW = {
    "u": [[0.5, -0.3], [1.2, 0.8], [-0.6, 0.1]],
    "v": [[0.9, -0.4, 0.2], [-1.1, 0.3, 0.7]],
    "bias": [0.4, -0.9, 0.25],
}


def loaded(module, state):
    module.load_state_dict({name: t(value) for name, value in state.items()})
    return module.double()


def network(state, depth=2):
    state = {f"layers.{i}.{name}": t(value) * (1 - 0.4 * i) for i in range(depth)
             for name, value in state.items()}
    module = cross.CrossNetwork(len(state["layers.0.bias"]), depth)
    module.load_state_dict(state)
    return module.double()


def named(module):
    return dict(sorted(module.named_parameters()))


def with_gradients(out, **inputs):
    """`out`, and the gradients of its product with numbers that fit no pattern."""
    cotangent = torch.linspace(0.7, -1.9, out.numel(), dtype=torch.float64).reshape(out.shape)
    grads = torch.autograd.grad(
        (out * cotangent.cos()).sum(), list(inputs.values()), allow_unused=True
    )
    return {"out": out, **dict(zip(inputs, grads, strict=True))}


@probe
def full_layer():
    """A layer with a full matrix: output and gradients."""
    layer = loaded(cross.CrossLayer(2), FULL)
    x0, xl = leaf([[1.5, -0.8], [0.6, 2.0]]), leaf([[0.7, 1.3], [-1.1, 0.9]])
    return with_gradients(layer(x0, xl), x0=x0, xl=xl, **named(layer))


@probe
def low_rank_layer():
    """A layer of rank 2 and width 3: output and gradients."""
    layer = loaded(cross.CrossLayer(3, rank=2), LOW)
    x0, xl = leaf([[1.5, -0.8, 0.6]]), leaf([[0.7, 1.3, -1.1]])
    return with_gradients(layer(x0, xl), x0=x0, xl=xl, **named(layer))


@probe
def network_of_two():
    """Two layers: output and gradients."""
    module = network(FULL)
    x0 = leaf([[1.5, -0.8]])
    return with_gradients(module(x0), x0=x0, **named(module))


@probe
def network_without_gradient():
    """Two layers under no_grad: output, and the input afterwards."""
    x0 = t([[1.5, -0.8]])
    with torch.no_grad():
        out = network(FULL)(x0)
    return {"out": out, "x0": x0}


@probe
def layer_without_gradient():
    """A layer under no_grad: the inputs afterwards."""
    x0, xl = t([[1.5, -0.8]]), t([[0.7, 1.3]])
    with torch.no_grad():
        loaded(cross.CrossLayer(2), FULL)(x0, xl)
    return {"x0": x0, "xl": xl}


@probe
def layouts():
    """Names and shapes in state_dict, and how many parameters are no one else's."""
    found = {}
    for name, module in (
        ("full", cross.CrossLayer(3)),
        ("low rank", cross.CrossLayer(3, rank=2)),
        ("network", cross.CrossNetwork(3, 2)),
        ("low-rank network", cross.CrossNetwork(3, 1, rank=2)),
        ("no layers", cross.CrossNetwork(3, 0)),
    ):
        state = sorted(module.state_dict().items())
        found[name] = [f"{key} {list(value.shape)}" for key, value in state]
        found[f"{name}: parameters"] = len(list(module.parameters()))
    return found


@probe
def leading_axes():
    """A vector, and a batch of lists."""
    x = t([0.7, -1.3, 0.4])
    found = {}
    for name, layer in (("full", cross.CrossLayer(3)), ("low", cross.CrossLayer(3, rank=2))):
        state = LOW if name == "low" else {"weight": [[0.3, -0.7, 0.1]] * 3, "bias": [0.4] * 3}
        layer = loaded(layer, state)
        found[name] = [layer(x, 2 * x), layer(x.expand(1, 2, 3), x.expand(1, 2, 3) + 1)]
    return found


@probe
def start():
    """Spread of the start values in units of 1 / sqrt(columns), and how many are within one."""
    found = {}
    for name, module in (
        ("full", cross.CrossLayer(120)),
        ("low rank", cross.CrossLayer(300, rank=40)),
    ):
        for key, value in sorted(module.state_dict().items()):
            if value.dim() == 2:
                value = value * math.sqrt(value.shape[1])
                inside = (value.abs() < 1).float().mean().item()
                found[f"{name} {key}"] = [round(value.std().item(), 1), round(inside, 1)]
            else:
                found[f"{name} {key}"] = round(value.std().item() * math.sqrt(len(value)), 1)
    return found


@probe
def refused_layers():
    """What happens to sizes and shapes that make no sense."""
    found = {}
    for dim, rank in ((0, None), (3, 0), (3, 4), (3, -1)):
        call = outcome(lambda dim=dim, rank=rank: cross.CrossLayer(dim, rank=rank))
        found[f"dim={dim}, rank={rank}"] = call
    found["num_layers=-1"] = outcome(lambda: cross.CrossNetwork(3, -1))
    layer = cross.CrossLayer(3)
    for one, other in (((4, 3), (1, 3)), ((3,), (4, 3)), ((4, 1), (4, 3))):
        call = outcome(lambda a=one, b=other: layer(torch.ones(a), torch.ones(b)))
        found[f"x0 {list(one)}, xl {list(other)}"] = call
    return found


@probe
def cost_of_layers():
    """Whether a layer makes tensors of dim x dim numbers, or batch x dim x dim."""
    found = {}
    for dim, rank, rows in ((64, 2, 3), (16, None, 50)):
        layer, x = cross.CrossLayer(dim, rank=rank), torch.ones(rows, dim)
        largest = count(lambda layer=layer, x=x: layer(x, 2 * x)).largest_bytes
        found[f"dim={dim}, rank={rank}"] = largest > 4 * 2 * max(rows * dim, dim * (rank or dim))
    return found


# --- the ranking model ----------------------------------------------------------------------------


WIDTH = 3  # embedding_dim; no other axis has it
ALL = [
    ("price", "dense", 2),
    ("plot", "text", 4),
    ("item", "id", 11, "item"),
    ("genres", "multi_hot", 7),
    ("seen", "history", 11, "item"),
]


def model_of(specs=ALL, *, hidden_dims=(5, 4), fill=True, **options):
    chosen = [features.Feature(*spec) for spec in specs]
    model = ranking.RankingModel(
        chosen, embedding_dim=WIDTH, hidden_dims=hidden_dims, **options
    ).double()
    with torch.no_grad():
        for parameter in model.parameters() if fill else ():
            rows = parameter if parameter.dim() == 2 and parameter.shape[1] == WIDTH else None
            zero = None if rows is None else (rows == 0).all(1)
            parameter.fill_(0.1)
            if zero is not None:
                parameter[zero] = 0.0
    return model


def batch_of():
    """Rows with and without padding, one with nothing but padding, one with low numbers."""
    return {
        "price": t([[0.5, -1.0], [2.0, 1.5], [-9.0, -20.0], [1.0, 0.3]]),
        "plot": t([[0.2, -0.4, 1.0, 0.7], [1.0] * 4, [-3.0, -9.0, 0.0, 1.0], [0.0] * 4]),
        "item": torch.tensor([3, 5, 7, 0]),
        "genres": torch.tensor([[1, 2, 3], [4, 0, 0], [0, 0, 0], [2, 2, 5]]),
        "seen": torch.tensor([[3, 5, 0], [5, 5, 7], [9, 0, 0], [0, 0, 0]]),
    }


def seen_from_outside(model, batch):
    """Logits less the first one, gradients of what is dense, and the size of all others."""
    inputs = {
        name: column.clone().requires_grad_()
        for name, column in batch.items()
        if column.is_floating_point()
    }
    logits = model({**batch, **inputs})
    if logits.shape != (4,):
        return {"shape": list(logits.shape)}
    leaves = [*inputs.values(), *model.parameters()]
    way = t([0.9, -1.7, 0.5, 0.3])
    grads = torch.autograd.grad((logits * way).sum(), leaves, allow_unused=True)
    size = sum(g.square().sum() for g in grads[len(inputs) :] if g is not None)
    return {"logits": logits[1:] - logits[0], "gradients": grads[: len(inputs)], "size": size}


@probe
def parallel():
    """The parallel model on all kinds of features."""
    return seen_from_outside(model_of(), batch_of())


@probe
def stacked():
    """The stacked model on all kinds of features, low rank."""
    return seen_from_outside(model_of(structure="stacked", rank=2), batch_of())


@probe
def linear():
    """Neither cross layers nor deep part: x0 and the last Linear."""
    model = model_of(num_cross_layers=0, hidden_dims=(), structure="stacked")
    return seen_from_outside(model, batch_of())


@probe
def one_hidden_layer():
    """A deep part of one layer, and no crosses: where ReLU bends."""
    batch = {name: batch_of()[name] for name in ("price", "plot")}
    options = {"num_cross_layers": 0, "structure": "stacked", "hidden_dims": (4,)}
    return seen_from_outside(model_of(ALL[:2], **options), batch)


@probe
def lists():
    """Logits of lists of one feature less that of [3, 5], and the size of each one's gradient."""
    options = {"num_cross_layers": 0, "hidden_dims": (), "structure": "stacked"}
    model = model_of([("seen", "history", 11)], **options)
    ids = torch.tensor([[3, 5, 0], [3, 3, 5], [3, 0, 0], [0, 0, 0], [0, 5, 5], [4, 5, 6]])
    logits = model({"seen": ids})
    if logits.shape != (6,):
        return {"shape": list(logits.shape)}
    sizes = []
    for logit in logits:
        grads = torch.autograd.grad(logit, list(model.parameters()), retain_graph=True)
        sizes.append(sum(grad.square().sum() for grad in grads))
    sizes = torch.stack(sizes)
    return {"logits": logits[1:] - logits[0], "sizes": sizes[1:] - sizes[0]}


@probe
def one_row():
    """The shape of the logits of four rows and of one."""
    batch = batch_of()
    one = {name: column[:1] for name, column in batch.items()}
    return {
        structure: [list(model_of(structure=structure)(each).shape) for each in (batch, one)]
        for structure in ("parallel", "stacked")
    }


@probe
def sizes():
    """How many parameters there are, and how many names in state_dict have a tensor of theirs."""
    found = {}
    options = {"structure": "stacked", "num_cross_layers": 1, "hidden_dims": (5, 4), "fill": False}
    two = [("a", "id", 9), ("b", "history", 9)]
    for name, specs in (
        ("all", ALL),
        ("two tables of one size", two),
        ("one names the other", [two[0], (*two[1], "a")]),
    ):
        model = model_of(specs, **options)
        found[name] = sum(parameter.numel() for parameter in model.parameters())
    for name, kind, size, *_ in ALL:
        model = model_of([(name, kind, size)], **{**options, "hidden_dims": ()})
        found[kind] = sum(parameter.numel() for parameter in model.parameters())
    return found


@probe
def facts_of_the_model():
    """Columns by name, the batch left alone, rows alone, a second time."""
    model, batch = model_of(dropout=0.5).eval(), batch_of()

    def same(other):
        other = {name: column.clone() for name, column in other.items()}
        return torch.allclose(model(other), logits)

    logits = model({name: column.clone() for name, column in batch.items()})
    given = dict(batch)
    model(given)
    turned = dict(reversed(list(batch.items())))
    more = {"a": t([[1.0, 2.0]] * 4), **batch, "z": t([0.0] * 4)}
    found = {
        "twice": same(batch),
        "turned": outcome(lambda: same(turned)) + (" and the same" if same(turned) else ""),
        "more columns": outcome(lambda: model(more)),
        "names afterwards": list(given),
        "columns are what they were": all(given[name] is batch[name] for name in given),
    }
    for name in batch:
        rest = {other: column for other, column in batch.items() if other != name}
        call = outcome(lambda rest=rest: model(rest))
        found[f"without {name}"] = call if call != "accepted" else bool(model(rest)[0] == logits[0])
    found["mode"] = model.training
    return found


@probe
def rows_alone():
    """Each row's logit alone less its logit among the others, in training mode."""
    model, batch = model_of(), batch_of()
    logits = model(batch).reshape(-1)
    alone = [model({n: c[i : i + 1] for n, c in batch.items()}).reshape(()) for i in range(4)]
    return (torch.stack(alone) - logits).abs() < 1e-9


@probe
def dropout():
    """What is random in training mode, and what a unit gives that is left out or not."""
    ones = {"x": torch.ones(1000, 2, dtype=torch.float64)}
    options = {"dropout": 0.2, "structure": "stacked", "num_cross_layers": 0}
    found = {}
    for hidden in ((), (1,)):
        model = model_of([("x", "dense", 2)], hidden_dims=hidden, **options)
        many, calm = model(ones), model.eval()(ones)
        values = many.unique()
        found[f"{hidden}"] = min(len(values), 3)
        found[f"{hidden} in eval mode"] = min(len(calm.unique()), 3)
        if len(values) == 2 and hidden:
            found["between the two"] = values[1] - values[0]
            found["share of the lower one"] = round((many == values[0]).double().mean().item(), 1)
    return found


@probe
def refused_models():
    """What happens to features and structures that make no sense."""
    return {
        "none": outcome(lambda: model_of([])),
        "one name": outcome(lambda: model_of([("a", "dense", 1), ("a", "dense", 1)])),
        "kind": outcome(lambda: model_of([("a", "one_hot", 5)])),
        "two sizes": outcome(lambda: model_of([("a", "id", 6, "t"), ("b", "id", 5, "t")])),
        "structure": outcome(lambda: model_of(structure="serial")),
    }


@probe
def cost_of_the_model():
    """Whether more rows cost more operations, and what goes wrong on another device."""
    model = model_of().float()
    batch = {n: c.float() if c.is_floating_point() else c for n, c in batch_of().items()}
    many = {name: torch.cat([column] * 4) for name, column in batch.items()}
    few, more = (count(lambda b=b: model(b)).operations for b in (batch, many))

    def scenario(place):
        return model_of().to(place)({name: c.to(place) for name, c in batch_of().items()})

    found = other_device_findings(scenario).findings
    return {"grows": more > few + 4, "device": [finding.text for finding in found]}


# --- the losses -----------------------------------------------------------------------------------


def loss_and_gradient(function, logits, *given, **options):
    loss = function(logits, *given, **options)
    if not (isinstance(loss, torch.Tensor) and loss.requires_grad):
        return {"loss": loss, "gradient": "none"}
    return {"loss": loss, "gradient": torch.autograd.grad(loss, logits)[0]}


@probe
def binary():
    """Five rows with a soft label."""
    logits, labels = leaf([1.2, -0.4, 0.3, 2.1, -1.7]), t([1.0, 0.0, 0.25, 0.0, 0.7])
    return loss_and_gradient(ranking.binary_loss, logits, labels)


@probe
def binary_weighted():
    """Five rows with weights, that add up to 3.1 and to 0.031."""
    labels, weight = t([1.0, 0.0, 1.0, 0.0, 1.0]), t([0.5, 1.2, 0.0, 0.4, 1.0])
    found = []
    for scale in (1, 0.01):
        logits = leaf([1.2, -0.4, 0.3, 2.1, -1.7])
        found.append(
            loss_and_gradient(ranking.binary_loss, logits, labels, sample_weight=scale * weight)
        )
    return found


@probe
def binary_without_weight():
    """All weights are 0."""
    logits, labels = leaf([1.2, -0.4]), t([1.0, 0.0])
    return loss_and_gradient(ranking.binary_loss, logits, labels, sample_weight=0 * labels)


@probe
def binary_extremes():
    """Logits of many sizes, each alone, in float32."""
    found = []
    for z, y in ((-1e4, 1), (-200, 1), (-40, 1), (25, 0), (95, 0), (1e4, 0), (1e4, 1)):
        logits = leaf([float(z)], torch.float32)
        found.append(loss_and_gradient(ranking.binary_loss, logits, torch.tensor([float(y)])))
    return found


@probe
def dtypes_of_losses():
    """In what dtype a loss comes for logits of each, and its value from bfloat16."""
    z = t([[0.37, -1.21, 2.6], [0.11, 0.53, -0.7]])
    y = t([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        binary = ranking.binary_loss(z[0].to(dtype), y[0])
        listwise = ranking.listwise_loss(z.to(dtype), y)
        found[str(dtype)] = [str(binary.dtype), str(listwise.dtype)]
        if dtype == torch.bfloat16:
            found["values"] = [round(float(binary), 4), round(float(listwise), 4)]
    return found


@probe
def half_beside_large():
    """float16 logits beside labels and weights that float16 cannot hold; tiny weights too."""
    z = t([[0.375, -1.25, 2.5], [0.125, 0.5, -0.75]])
    large, y = t([1e5, 1.0, 3e5]).float(), t([0.301, 0.7777, 1.0]).float()
    lists = torch.stack([large, y])
    losses = {
        "weights": ranking.binary_loss(z[0].half(), y, sample_weight=large),
        "labels": ranking.binary_loss(z[0].half(), y),
        "lists": ranking.listwise_loss(z.half(), lists),
        "tiny": ranking.binary_loss(z[0], y, sample_weight=1e-14 * large.double()),
    }
    return {name: round(float(loss), 5) for name, loss in losses.items()}


@probe
def refused_losses():
    """What happens to shapes that differ, and to empty ones."""
    shapes = {
        "binary": (((4,), (4, 1)), ((4, 1), (4,)), ((4,), (1,)), ((0,), (0,))),
        "weighted": (((4,), (4,), (1,)), ((4,), (4,), (4, 1)), ((4,), (4,), ())),
        "listwise": (((4, 3), (4, 1)), ((4, 3), (1, 3)), ((4, 3), (3,)), ((0, 3), (0, 3))),
    }
    found = {}
    for name, several in shapes.items():
        for some in several:
            tensors = [torch.ones(shape) for shape in some]
            found[f"{name} {', '.join(str(list(shape)) for shape in some)}"] = outcome(
                lambda x=tensors, n=name: ranking.listwise_loss(*x)
                if n == "listwise"
                else ranking.binary_loss(*x[:2], sample_weight=x[2] if x[2:] else None)
            )
    return found


@probe
def waiting_losses():
    """What the host waits for."""
    z, y = t([[0.3, -0.7], [1.1, 0.2]]), t([[1.0, 0.0], [0.0, 0.0]])
    return {
        "binary": count(lambda: ranking.binary_loss(z[0], y[0])).syncs,
        "weighted": count(lambda: ranking.binary_loss(z[0], y[0], sample_weight=y[0])).syncs,
        "listwise": count(lambda: ranking.listwise_loss(z, y)).syncs,
    }


@probe
def listwise():
    """Lists with one positive, several and none."""
    logits = leaf([[1.2, -0.4, 0.3], [2.1, -1.7, 0.6], [0.2, 0.9, -0.5], [0.8, -0.1, 1.4]])
    labels = t([[0, 1, 0], [1, 0, 1], [0, 0, 0], [3, 0, 0.5]])
    return loss_and_gradient(ranking.listwise_loss, logits, labels)


@probe
def listwise_one_positive():
    """Lists with one positive of label 1 each: softmax cross-entropy."""
    logits = leaf([[1.2, -0.4, 0.3], [2.1, -1.7, 0.6]])
    return loss_and_gradient(ranking.listwise_loss, logits, t([[0.0, 1, 0], [0, 0, 1]]))


@probe
def listwise_masked():
    """Candidates at minus infinity, with and without a label."""
    low = -INFINITE
    found = []
    for labels in ([[1, 0, 0], [0, 1, 0]], [[1, 1, 0], [0, 1, 0]], [[0, 1, 0], [0, 0, 1]]):
        logits = leaf([[1.0, low, 0.4], [0.3, -0.2, low]])
        found.append(loss_and_gradient(ranking.listwise_loss, logits, t(labels)))
    return found


@probe
def listwise_all_masked():
    """A list that is masked out as a whole, beside another one."""
    logits = leaf([[1.0, -0.3], [-INFINITE, -INFINITE]])
    return loss_and_gradient(ranking.listwise_loss, logits, t([[1.0, 0.0], [0.0, 0.0]]))


@probe
def listwise_without_positive():
    """No list has a positive."""
    logits = leaf([[1.0, -0.3], [0.2, 0.4]])
    return loss_and_gradient(ranking.listwise_loss, logits, t([[0.0, 0.0], [0.0, 0.0]]))


@probe(tolerance=1e-5)
def listwise_extremes():
    """Logits of many sizes, in float32."""
    found = []
    for row in ([0.0, -1e4], [0.0, -30.0], [120.0, 119.0], [-500.0, -501.0]):
        logits = leaf([row], torch.float32)
        found.append(loss_and_gradient(ranking.listwise_loss, logits, torch.tensor([[0.0, 1.0]])))
    return found
