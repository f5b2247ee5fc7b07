"""What the diagnosis asks the learner's pooling, encoder, cache and projection."""

import math
import shutil
import tempfile
from pathlib import Path

import torch

from harness.cost import count
from harness.devices import other_device_findings
from harness.diagnosis import loaded
from harness.probe import probe
from harness.spec import learner

text = learner("models.text")
spec = loaded(Path(__file__).with_name("test_spec.py"))  # its tiny models and troubles

MODES = ("mean", "cls", "last")
TEXTS = ["Love at noon", "War", "The Golden Train on Fire II (2001)", "Ghost!", "My sister"]
LONG = "haunted moon ghost " * 40


def floats(values):
    return torch.tensor(values, dtype=torch.float64)


def irregular(*shape):
    number = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((number * 0.7311).frac() * 4 - 1.7).reshape(shape)


def refused(function):
    try:
        return function()
    except (ValueError, TypeError) as error:
        return type(error).__name__


HIDDEN = irregular(4, 4, 4)
MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1]])


# --- pooling --------------------------------------------------------------------------------------


def pooled(mode):
    hidden = HIDDEN.clone().requires_grad_()
    vector = text.pool(hidden, MASK, mode)
    found = {"vector": vector, "graph": vector.requires_grad}
    if vector.requires_grad:
        (vector * irregular(4, 4).sin()).sum().backward()
        found["gradient"] = hidden.grad.sum(2)
    return found


@probe
def pool_mean():
    return pooled("mean")


@probe
def pool_cls():
    return pooled("cls")


@probe
def pool_last():
    return pooled("last")


@probe
def pool_other_shape():
    return [text.pool(HIDDEN[:3, :, :2], MASK[:3], mode) for mode in MODES]


@probe
def pool_nothing():
    empty = torch.zeros(1, 4, dtype=torch.int64)
    return [text.pool(HIDDEN[:1], empty, mode) for mode in MODES]


@probe
def pool_no_columns():
    return [text.pool(HIDDEN[:1, :0], MASK[:1, :0], mode) for mode in MODES]


@probe
def pool_broken_padding():
    padding = torch.stack([HIDDEN[:2] * math.nan, HIDDEN[:2] * math.inf]).flatten(0, 1)
    mask = MASK[:2].repeat(2, 1)
    hidden = torch.where(mask.bool().unsqueeze(2), HIDDEN[:2].repeat(2, 1, 1), padding)
    return [text.pool(hidden, mask, mode) for mode in MODES]


@probe(tolerance=1e-5)
def pool_in_bfloat16():
    hidden = (irregular(1, 300, 3) + 4).to(torch.bfloat16)
    return [text.pool(hidden, torch.ones(1, 300, dtype=torch.bool), mode) for mode in MODES]


@probe
def pool_small_integers():
    hidden, mask = irregular(1, 300, 2), torch.ones(1, 300, dtype=torch.int8)
    mask[0, :5] = 0
    kinds = (torch.int8, torch.uint8, torch.bool)
    return [text.pool(hidden, mask.to(kind), mode) for kind in kinds for mode in MODES]


@probe
def pool_refused():
    return [
        refused(lambda: text.pool(HIDDEN, MASK, "max")),
        refused(lambda: text.pool(HIDDEN, MASK[:1], "mean")),
        refused(lambda: text.pool(HIDDEN, MASK[:, :1], "mean")),
    ]


@probe
def pool_inputs():
    hidden, mask = HIDDEN[:2].clone(), MASK[:2].clone()
    for mode in MODES:
        text.pool(hidden, mask, mode)
    return [hidden, mask]


@probe
def pool_cost():
    def operations(rows):
        hidden, mask = HIDDEN.repeat(rows, 1, 1), MASK.repeat(rows, 1)
        cost = count(lambda: text.pool(hidden, mask, "mean"))
        return cost.operations + cost.views

    return {"grows": operations(16) > operations(2) + 10}


@probe
def positions():
    mask = torch.tensor(spec.golden("golden.json")["positions"]["mask"])
    place, real = text.position_ids(mask), mask.bool()
    most = (real.sum(1, keepdim=True) - 1).clamp(min=0)
    outside = ~real & ((place < 0) | (place > most))
    return [torch.where(real, place, 7), torch.where(outside, place, 7)]


# --- the encoder ----------------------------------------------------------------------------------


def encoder(which="encoder", **more):
    return spec.make_encoder(which, **more)


def encoded(which, texts=TEXTS, batch_size=64, **more):
    return encoder(which, **more).encode(texts, batch_size=batch_size)[:, :3]


@probe(tolerance=1e-4)
def encode_alone():
    settings = [(pooling, normalize) for pooling in MODES for normalize in (True, False)]
    return [encoded("encoder", TEXTS[:1], pooling=p, normalize=n) for p, n in settings]


@probe(tolerance=1e-4)
def encode_many():
    return [encoded("encoder", [*TEXTS, TEXTS[0]], size) for size in (4, 64)]


@probe(tolerance=1e-4)
def encode_left():
    return [encoded("decoder", pooling=mode, normalize=False) for mode in MODES]


@probe(tolerance=1e-4)
def encode_long_and_empty():
    return [
        encoded("encoder", ["", LONG, " "], pooling="last", max_length=9),
        encoded("decoder", ["", LONG, " "], pooling="last", max_length=99),
    ]


@probe(tolerance=1e-4)
def encode_without_tokens():
    model, shapes = spec.watched(spec.make_model("encoder"))
    made = encoder(model=model, special=False, pooling="last")
    mixed = made.encode(["", "War", ""])[:, :3]
    shapes.clear()
    return {"mixed": mixed, "empty": made.encode(["", ""])[:, :3], "calls": len(shapes)}


@probe(tolerance=1e-4)
def encode_small_and_none():
    def times(scale):
        return spec.watched(spec.make_model("encoder"), lambda hidden: hidden * scale)[0]

    return [encoded("encoder", TEXTS[:2], model=times(scale)) for scale in (1e-3, 0.0)]


@probe(tolerance=1e-5)
def encode_in_bfloat16():
    fixed = irregular(40, 64).to(torch.bfloat16)

    def replaced(hidden):
        return fixed[: hidden.shape[1]].expand(len(hidden), -1, -1)

    model, _ = spec.watched(spec.make_model("encoder"), replaced)
    return encoded("encoder", TEXTS[2:3], model=model)


@probe
def encode_cost():
    lengths = [(37 * i) % 61 + 1 for i in range(40)]
    texts = ["haunted " * n if i % 2 else "!" * n for i, n in enumerate(lengths)]
    tokens = [len(ids) for ids in spec.make_tokenizer("encoder")(texts)["input_ids"]]
    found = []
    for batch_size in (5, 8):
        model, shapes = spec.watched(spec.make_model("encoder"))
        encoder(model=model).encode(texts, batch_size=batch_size)
        places, calls = sum(a * b for a, b in shapes), len(shapes)
        most = sum(tokens) + batch_size * max(tokens)
        found.append(places if places > most else 0)
        found.append(calls if calls > -(-40 // batch_size) else 0)
        found.append(max(rows for rows, _ in shapes) > batch_size)
    return found


@probe
def encode_frozen():
    made = encoder(model=spec.make_model("encoder").train())
    found = {
        "training": made.model.training,
        "trainable": any(each.requires_grad for each in made.model.parameters()),
    }
    made.model.train().requires_grad_(True)
    with torch.enable_grad():
        first, second = made.encode(TEXTS[:2]), made.encode(TEXTS[:2])
        found |= {"graph": first.requires_grad, "gradients on": torch.is_grad_enabled()}
    found |= {"inference": first.is_inference(), "same twice": torch.equal(first, second)}
    made.model.eval()
    for module in made.model.modules():
        module.training = isinstance(module, torch.nn.Dropout)
    found["dropout layers alone"] = torch.equal(made.encode(TEXTS[:2]), made.encode(TEXTS[:2]))
    return found


@probe
def encode_refused():
    made = encoder()
    return [
        refused(lambda: list(made.encode("War").shape)),
        refused(lambda: made.encode(["War", None])),
        refused(lambda: made.encode(["War"], batch_size=0)),
        encoder(max_length=10**6).max_length,
    ]


@probe
def encode_elsewhere():
    def scenario(place):
        made = encoder("decoder", device=place)
        vectors = made.encode(TEXTS[:2]) + torch.zeros(1)
        return vectors.to(place)

    return [finding.text for finding in other_device_findings(scenario).findings]


# --- identity and cache ---------------------------------------------------------------------------


@probe
def identity():
    mine = encoder(name="tiny").identity()
    with spec.another_process():
        found = {"another process": encoder(name="tiny").identity() == mine}

    def swap(model):
        model.encoder.layer[0], model.encoder.layer[1] = model.encoder.layer[1::-1]

    for what, change in {
        "nothing": lambda m: None,
        "last": lambda m: list(m.parameters())[-1].data.add_(1),
        "rows": lambda m: m.get_input_embeddings().weight.data.copy_(
            m.get_input_embeddings().weight.data.flip(0)
        ),
        "layers": swap,
        "shape": lambda m: m.register_parameter("x", torch.nn.Parameter(torch.zeros(2))),
    }.items():
        model = spec.make_model("encoder")
        change(model)
        found[what] = encoder(model=model, name="tiny").identity() == mine
    rounded = [spec.make_model("encoder").bfloat16(), spec.make_model("encoder").bfloat16().float()]
    one, other = (encoder(model=model, name="tiny").identity() for model in rounded)
    found["types"] = one == other
    for options in ({"pooling": "cls"}, {"normalize": False}, {"max_length": 9}, {"name": "b"}):
        found[str(options)] = encoder(**{"name": "tiny", **options}).identity() == mine
    found["device"] = encoder(name="tiny", device="cpu:0").identity() == mine
    made = encoder(name="tiny")
    made.identity()
    next(iter(made.model.parameters())).data.add_(1)
    found["in place"] = made.identity() == mine
    return found


def with_folder(function):
    with tempfile.TemporaryDirectory(prefix="kata-") as folder:
        return function(Path(folder))


@probe(tolerance=1e-4)
def cache_rows():
    def ask(folder):
        model, shapes = spec.watched(spec.make_model("encoder"))
        made, given, out = encoder(model=model), [], []
        stem = "the golden train on fire and the moon "
        for texts in (
            [stem + "war", stem + "ghost", "War", "War"],
            [stem + "ghost", "War"],
            ["Ghost!", "War", "Quest", "war", "War "],
            ["Quest", stem + "war"],
        ):
            shapes.clear()
            with spec.another_process():
                out.append(text.cached_embeddings(made, texts, folder)[:, :2])
            given.append(sum(rows for rows, _ in shapes))
        shapes.clear()
        text.cached_embeddings(made, TEXTS[1:2], folder)
        return {"vectors": out, "given": given, "another process": len(shapes)}

    return with_folder(ask)


@probe(tolerance=1e-4)
def cache_of_others():
    def ask(folder):
        others = [{}, {"pooling": "cls"}, {"normalize": False}, {"max_length": 3}]
        return [
            text.cached_embeddings(encoder(name="tiny", **other), TEXTS[:2], folder)[:, :3]
            for other in others
        ]

    return with_folder(ask)


@probe
def cache_exactly():
    def ask(folder):
        made = encoder()
        direct = made.encode(TEXTS[:2])
        kept = [text.cached_embeddings(made, TEXTS[:2], folder) for _ in range(2)]
        return [bool((each - direct).abs().max() < 1e-5) for each in kept]

    return with_folder(ask)


@probe
def cache_folder():
    def ask(folder):
        found = text.cached_embeddings(encoder(), TEXTS[:1], folder / "a" / "b")
        return list(found.shape)

    return with_folder(ask)


@probe
def cache_interrupted():
    def ask(folder):
        model, shapes = spec.watched(spec.make_model("encoder"))
        made = encoder(model=model)
        kept = folder / "kept"
        text.cached_embeddings(made, TEXTS[:3], kept)
        places = [folder / str(n) for n in range(6)]
        lost = {}
        troubles = [spec.full_disk(100), *(spec.Kill(p, n) for n, p in enumerate(places[1:]))]
        for place, trouble in zip(places, troubles, strict=True):
            shutil.copytree(kept, place)
            with trouble:
                try:
                    text.cached_embeddings(made, TEXTS, place)
                except (Exception, spec.Killed):
                    pass
            shapes.clear()
            text.cached_embeddings(made, TEXTS, place)
            given = sum(rows for rows, _ in shapes)
            lost.setdefault("full disk" if place is places[0] else "killed", []).append(given > 2)
        return {what: any(each) for what, each in lost.items()}

    return with_folder(ask)


@probe
def cache_broken():
    def ask(folder):
        found, trap = [], folder / "trap"
        for data in (b"", b"something else ", spec.pickle.dumps(spec.Bomb(trap))):
            kept = folder / str(len(found))
            text.cached_embeddings(encoder(), TEXTS[:1], kept)
            for file in [path for path in kept.rglob("*") if path.is_file()]:
                file.write_bytes(data)
            try:
                found.append(list(text.cached_embeddings(encoder(), TEXTS[:1], kept).shape))
            except Exception as error:
                found.append(f"raises {type(error).__name__}")
        return {"found": found, "code was run": trap.exists()}

    return with_folder(ask)


# --- to the items ---------------------------------------------------------------------------------

X, Y, NEW = irregular(6, 3) + 2, irregular(6, 2).sin() + 5, irregular(2, 3).cos()
W = floats([1, 0.25, 3, 0, 2, 1.5])


@probe(tolerance=1e-5)
def projection():
    return text.TextProjection.fit(X.float(), Y.float(), ridge=2.5)(NEW.float())


@probe(tolerance=1e-5)
def projection_weighted():
    fits = [text.TextProjection.fit(X, Y, ridge=ridge, sample_weight=W) for ridge in (0.5, 1e6)]
    return [fit(NEW) for fit in fits]


@probe(tolerance=1e-5)
def projection_alone():
    fitted = text.TextProjection.fit(X, Y, ridge=1.0)
    return [fitted(NEW[:1]), fitted(NEW[1:])]


@probe
def projection_digits():
    x = (irregular(40, 4) * 3).sin()
    x[:, 3] = x[:, 0] + 1e-3 * x[:, 3]  # two columns that are nearly the same
    x = x.float()
    y = (x[:, 3:].double() - x[:, :1].double()) * 1e3
    fitted = text.TextProjection.fit(x, y, ridge=1e-6)
    slope = fitted(torch.eye(4)) - fitted(torch.zeros(4, 4))
    centred = torch.cat([x.double() - x.double().mean(0), 1e-3 * torch.eye(4).double()])
    wanted = torch.linalg.lstsq(centred, torch.cat([y - y.mean(), y[:4] * 0])).solution
    return {"near": bool((slope - wanted).abs().max() < 3e-3 * wanted.abs().max())}


@probe(tolerance=1e-5)
def projection_state():
    fitted = text.TextProjection.fit(X, Y, ridge=1.0)
    fresh = text.TextProjection(3, 2)
    before = fresh(NEW)
    fresh.load_state_dict(fitted.state_dict())
    trained = sum(each.requires_grad for each in fitted.parameters())
    return {"before": before, "after": fresh(NEW), "trained": trained}


@probe(tolerance=1e-5)
def projection_gradient():
    new = NEW.clone().requires_grad_()
    out = text.TextProjection.fit(X, Y, ridge=1.0)(new)
    if not out.requires_grad:
        return "no graph"
    return torch.autograd.grad(out.sum(), new)[0]


@probe
def projection_inputs():
    x, y, w = X.clone(), Y.clone(), W.clone()
    text.TextProjection.fit(x, y, ridge=1.0, sample_weight=w)
    return [x, y, w]


@probe
def projection_refused():
    def fit(**how):
        return refused(lambda: text.TextProjection.fit(X, Y, **how)(NEW))

    return [fit(ridge=1, sample_weight=W - 0.5), fit(ridge=1, sample_weight=0 * W), fit(ridge=0)]


@probe
def projection_cost():
    x, y = irregular(600, 2), irregular(600, 1)
    cost = count(lambda: text.TextProjection.fit(x, y, ridge=1.0, sample_weight=x[:, 0] ** 2))
    return {"n x n": cost.largest_bytes >= 600 * 600 * 4}
