"""What the diagnosis asks of kata 10: see harness/probe.py.

Weights are drawn, so nothing that depends on them is asked: models are tables of fixed vectors, and
of a whole run only what was made from which rows.
"""

import dataclasses
import functools
import inspect
import sys
import tempfile
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from harness import encoders
from harness.probe import probe
from harness.spec import beside, device, learner

pipeline = learner("pipeline")
synthetic = learner("data.synthetic")
splits = learner("data.splits")
candidates = learner("data.candidates")
sequences = learner("models.sequence")
ranking_losses = learner("models.ranking")
compiled = learner("inference.compiled")
stand_ins = beside(__file__, "stand_ins")
pairs, next_item, replaced = stand_ins.pairs, stand_ins.next_item, stand_ins.replaced

FIT = {"epochs": 2, "batch_size": 32, "lr": 0.01, "warmup": 0.1}
RETRIEVAL = {
    "dim": 6,
    "hidden_dims": [5],
    "dropout": 0.5,
    "max_history": 4,
    "temperature": 0.2,
    "loss": "in_batch",
    "log_q": True,
    "mask_accidental_hits": True,
    "user_features": ["history", "age"],
    "item_features": ["item_id", "genres"],
    "select_epochs": True,
    "list_length": 12,
    "chunk_size": 7,
    "fit": FIT,
}
CONFIG = {
    "text": {"encoder": None},
    "retrieval": RETRIEVAL,
    "ranking": {
        "targets_per_user": 3,
        "candidates": 12,
        "text_dim": 3,
        "loss": "listwise",
        "embedding_dim": 4,
        "num_cross_layers": 1,
        "rank": None,
        "hidden_dims": [5],
        "dropout": 0.0,
        "structure": "parallel",
        "features": {"l2": 20.0, "decay": 0.8, "max_history": 5, "half_life_days": 14.0},
        "fit": {**FIT, "batch_size": 8},
    },
    "cold_start": {
        "fraction": 0.3,
        "item_features": ["text", "genres"],
        "max_history": 5,
        "epochs": 1,
        "factors": 3,
        "ridge": 1.0,
        "weights": {"text": 1.0, "tower": 0.0, "projection": 1.0},
    },
    "index": {"kind": "flat"},
    "compile": {"measure": False},
}


@functools.cache
def world():
    """A small data set with raw ids that are no rows, and its split."""
    made = synthetic.generate(seed=5, users=20, items=40)
    return made, splits.leave_last_one_out(made)


def silent(*said):
    """A log that nobody reads."""


def columns(rows=None, **changes):
    dataset, split = world()
    rows = split.train if rows is None else rows
    return pipeline.RetrievalData(dataset, rows, RETRIEVAL | changes, device())


class Tables(nn.Module):
    """In place of two towers: a fixed vector for each item, and one for each last item."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(8)
        rows = torch.randn(2, world()[0].num_items + 1, 6, generator=draw).double()
        self.users, self.items = (nn.Parameter(rows[i].to(device())) for i in (0, 1))
        self.temperature = torch.tensor(0.3, device=device())

    def user_tower(self, batch):
        return self.users[batch["history"][:, 0]]

    def item_tower(self, batch):
        return self.items[batch["item_id"]]

    def forward(self, users, items):
        return self.user_tower(users), self.item_tower(items)


# --- the parts ------------------------------------------------------------------------------------


@probe(tolerance=1e-5)
def counts():
    """How likely an item is, and which have an id."""
    dataset, split = world()
    data = columns(split.train[dataset.item[split.train] != 3])
    return {"log_q": data.log_q, "ids": data.items["item_id"]}


@probe
def examples():
    """Histories and targets of some places."""
    data = columns()
    order = torch.argsort(data.positions)[:: max(1, len(data.positions) // 12)]
    batch = data.example_batch(order)
    return {"history": batch["history"], "target": batch["target"]}


@probe(tolerance=1e-5)
def losses():
    """The loss of a batch with and without its corrections."""
    data = columns()
    data.log_q = torch.linspace(-4.0, -1.0, len(data.log_q), device=device()).double()
    batch = {
        "target": torch.tensor([4, 9, 4, 17, 9], device=device()),
        "history": torch.tensor([[2], [5], [11], [7], [3]], device=device()),
        "age": torch.zeros(5, dtype=torch.int64, device=device()),
    }
    ways = [(log_q, mask) for log_q in (True, False) for mask in (True, False)]
    return [
        pipeline.retrieval_loss(data, RETRIEVAL | {"log_q": q, "mask_accidental_hits": mask})(
            Tables(), batch
        )
        for q, mask in ways
    ]


@probe
def columns_of_the_towers():
    """Which columns the towers read, and what of a longer history."""
    text = torch.linspace(-1, 1, world()[0].num_items * 2, device=device()).view(-1, 2)
    options = RETRIEVAL | {"item_features": ["item_id", "genres", "text"]}
    data = pipeline.RetrievalData(*world()[:1], world()[1].train, options, device(), text)
    torch.manual_seed(0)
    model = pipeline.build_retrieval(data, options).to(device()).eval()
    everyone = torch.arange(world()[0].num_users, device=device())
    history = torch.arange(6 * len(everyone), device=device()).view(-1, 6) % 38 + 1
    sides = {
        "user": (model.user_tower, data.user_batch(everyone, history)),
        "item": (model.item_tower, data.item_batch(everyone)),
    }
    read = {}
    for side, (tower, batch) in sides.items():
        others = {name: batch | {name: column.roll(1, 0)} for name, column in batch.items()}
        read[side] = sorted(name for name in batch
                            if (tower(others[name]) - tower(batch)).abs().max() > 1e-5)
    return read | {"history": sides["user"][1]["history"][:2]}


@probe
def what_is_learned():
    """Whether the temperature and the towers are, by `learn_temperature`."""
    found = []
    for learned in (True, False):
        model = pipeline.build_retrieval(columns(), RETRIEVAL | {"learn_temperature": learned})
        towers = [*model.user_tower.parameters(), *model.item_tower.parameters()]
        found += [model.temperature.requires_grad, all(p.requires_grad for p in towers)]
    return found


@probe(tolerance=1e-5)
def full_loss():
    """The loss over the whole catalogue."""
    batch = {
        "target": torch.tensor([4, 9, 17], device=device()),
        "history": torch.tensor([[2], [5], [11]], device=device()),
        "age": torch.zeros(3, dtype=torch.int64, device=device()),
    }
    return pipeline.retrieval_loss(columns(), RETRIEVAL | {"loss": "full"})(Tables(), batch)


# --- attention: kata 11 comes later, what is needed of it stands in -------------------------------

ATTENTION = RETRIEVAL | stand_ins.ATTENTION


class Places(Tables):
    """Tables whose places have a state."""

    def __init__(self, *args, **options):
        super().__init__()
        users, items = nn.Module(), nn.Module()
        users.rows, items.rows = self.users, self.items
        users.states = lambda history: users.rows[history]
        items.forward = lambda batch: items.rows[batch["item_id"]]
        with torch.no_grad():  # far apart, as log Q is
            users.rows[:, 0], items.rows[8, 0] = 2.0, 4.0
        del self.users, self.items
        self.towers = nn.ModuleList([users, items])

    user_tower = property(lambda self: self.towers[0])
    item_tower = property(lambda self: self.towers[1])


def attention():
    """Kata 11 is there, in small."""
    return replaced(sequences, training_pairs=pairs, next_item_loss=next_item, SequenceModel=Places)


@probe
def windows():
    """Whether windows have the right sizes and their targets come next."""
    dataset, split = world()
    with attention():
        data = pipeline.RetrievalData(dataset, split.train, ATTENTION, device())
        batch = data.example_batch(torch.arange(len(data.positions), device=device()))
    history, target = batch["history"], batch["target"]
    return {
        "shapes": [list(history.shape[1:]), list(target.shape[1:])],
        "next": torch.equal(target[:, 1:] * (history[:, 1:] > 0), history[:, :-1] *
                            (history[:, 1:] > 0)),
        "same": torch.equal(target, history),
    }


@probe(tolerance=1e-5)
def losses_of_places():
    """Over all items, and over a sample that is one item, with log Q and without."""
    dataset, split = world()
    found = []
    with attention():
        data = pipeline.RetrievalData(dataset, split.train, ATTENTION, device())
        data.log_q = torch.full((dataset.num_items,), -20.0, device=device()).double()
        data.log_q[7] = 0.0
        batch = {
            "history": torch.tensor([[2, 5, 0], [11, 7, 3]], device=device()),
            "target": torch.tensor([[9, 2, 0], [4, 11, 7]], device=device()),
        }
        for sampled, log_q in ((0, True), (90, False), (90, True)):
            own = {**ATTENTION["attention"], "sampled": sampled}
            options = ATTENTION | {"log_q": log_q, "attention": own}
            torch.manual_seed(0)
            found.append(pipeline.retrieval_loss(data, options)(Places(), batch))
    return found


@probe
def windows_of_a_batch():
    """How many at most."""
    dataset, split = world()
    sizes = []
    with attention():
        data = pipeline.RetrievalData(dataset, split.train, ATTENTION, device())
        plain = data.example_batch
        data.example_batch = lambda index: sizes.append(len(index)) or plain(index)
        pipeline.train_retrieval(data, ATTENTION, seed=1, device=device(), epochs=1)
    return max(sizes)


# --- the parts, further ---------------------------------------------------------------------------


@probe
def moments():
    """When and where each user is asked for."""
    dataset, _ = world()
    asked = pipeline.requests_after_all(dataset, columns())
    return {"time": asked.time - int(dataset.time.min()), "end": asked.end}


@probe
def held_out():
    """Which places are the ranker's targets."""
    dataset, split = world()
    rows = np.concatenate([split.train[dataset.user[split.train] == u][: 2 + u] for u in range(9)])
    return {n: pipeline.split_off_last(dataset, rows, n)[1] for n in (2, 5)}


@probe(tolerance=1e-5)
def retrieved():
    """The best of the catalogue for some users."""
    data = columns()
    asked = pipeline.requests_after_all(world()[0], data)
    some = asked.of(torch.arange(0, 20, 3, device=device()))
    items, scores = pipeline.retrieve(Tables().eval(), data, some, k=8, chunk_size=3)
    return {"items": items, "scores": scores.float()}


@probe
def users_at_a_time():
    """How many are encoded at most."""
    data, sizes = columns(), []
    model = Tables().eval()
    plain = model.user_tower
    model.user_tower = lambda batch: sizes.append(len(batch["history"])) or plain(batch)
    asked = pipeline.requests_after_all(world()[0], data)
    pipeline.retrieve(model, data, asked, k=8, chunk_size=3)
    return max(sizes)


@probe(tolerance=1e-4)
def components():
    """Products of reduced vectors."""
    text = torch.linspace(-2, 2, 60, device=device()).sin().mul(3).cos().view(12, 5)
    found = pipeline.reduced(text - text.mean(0), 2)
    return found @ found.T


def proposals(text=None, chosen=True):
    """Requests with four candidates, without one here and there."""
    dataset, split = world()
    asked = pipeline.requests_after_all(dataset, columns())
    items = (torch.arange(80, device=device()) * 7 % dataset.num_items).view(20, 4)
    items[::3, 3], items[::5, 0] = -1, 0
    scores = torch.linspace(0.9, -0.9, 80, device=device()).view(20, 4)
    options = CONFIG["ranking"]["features"]
    statistics = candidates.CandidateFeatures(dataset, split.train, device=device(), **options)
    positive = items[:, 1] if chosen else None
    data = pipeline.RankingData(asked, items, scores, statistics, text=text, positive=positive)
    return data, items, scores


def sums(data):
    """A ranker whose logits are the sums of the dense numbers as they are."""
    one = torch.ones(data.dense.shape[2], device=device())
    return pipeline.Ranker(lambda batch: batch["dense"].sum(1), 0 * one, one)


def has(columns, wanted):
    return bool(((columns - wanted[..., None]).abs().flatten(0, -2).amax(0) < 1e-4).any())


@probe
def numbers_of_pairs():
    """Whether the likeness of texts is among them, and what is read of the texts themselves."""
    text = torch.arange(200.0, device=device()).sin()[: 3 * world()[0].num_items].view(-1, 3)
    data, items, scores = proposals(text)
    there = items >= 0
    match = torch.einsum("rw,rcw->rc", data.profile, text[items.clamp(min=0)])
    ranker = pipeline.Ranker(None, data.dense.mean((0, 1)), data.dense.std((0, 1)) + 1)
    index = torch.tensor([2, 7, 11], device=device())
    read = [column for column in ranker.columns(data, index).values() if column.shape == (12, 3)]
    wanted = {
        "text": text[items[index].clamp(min=0)].view(12, 3)[there[index].flatten()],
        "profile": data.profile[index].repeat_interleave(4, dim=0)[there[index].flatten()],
    }
    return {
        "match": has(data.dense[there], match[there]),
        "score": has(data.dense[there], scores[there]),
        **{name: any(torch.allclose(column[there[index].flatten()], value) for column in read)
           for name, value in wanted.items()},
    }


@probe
def holes():
    """Which candidates have no logit."""
    data, *_ = proposals(chosen=False)
    ranker = sums(data)
    return ranker(data).isfinite()


@probe
def losses_of_the_ranker():
    """Which loss each name gives."""
    data, *_ = proposals()
    data.items = data.items.clamp(min=0)
    found = {}
    for loss in ("listwise", "binary"):
        options = CONFIG["ranking"] | {"loss": loss, "fit": {**FIT, "lr": 1e-30, "batch_size": 99}}
        ranker, result = pipeline.train_ranker(data, options, seed=1)
        logits, labels = ranker(data), data.labels
        values = {
            "listwise": ranking_losses.listwise_loss(logits, labels),
            "binary": ranking_losses.binary_loss(logits.flatten(), labels.flatten()),
        }
        near = [name for name, v in values.items() if abs(float(v) - result.losses[0]) < 1e-3]
        found[loss] = " ".join(near) or "neither"
    return found


@probe
def compiling():
    """The report of a compiler that gains, and of one that fails."""
    data, *_ = proposals(chosen=False)
    data.items, data.dense = (part.repeat(5, *[1] * (part.dim() - 1))
                              for part in (data.items, data.dense))
    ranker = sums(data)
    sizes, runs = set(), []

    def count_graphs(function, inputs, **options):
        sizes.update(len(function(*each)) for each in inputs)
        return SimpleNamespace(graphs=2, graph_breaks=1, recompiles=0, reasons=())

    def compile_model(model, **options):
        return lambda *args: runs.append(1) or model(*args)

    def benchmark(functions, **options):
        found = {}
        for name, function in functions.items():
            before, _ = len(runs), function()
            median = 3.0 if len(runs) == before else 2.0
            found[name] = SimpleNamespace(median=median, low=1.0, high=9.0, first=7.0)
        return found

    def broken(function, inputs, **options):
        raise RuntimeError("no compiler")

    fakes = {"count_graphs": count_graphs, "compile_model": compile_model, "benchmark": benchmark}
    with replaced(compiled, **fakes, warm_up=lambda function, inputs, **options: 0.5):
        good = pipeline.measure_compile(ranker, data)
    try:
        with replaced(compiled, **fakes, warm_up=broken):
            bad = pipeline.measure_compile(ranker, data)
    except RuntimeError:
        bad = {"graphs": "raised"}
    names = ("graphs", "graph_breaks", "speedup", "compile_seconds")
    return {"good": [good.get(name) for name in names], "sizes": len(sizes),
            "bad": [str(bad.get(name)) for name in ("graphs", "speedup")]}


@probe(tolerance=1e-5)
def profiles():
    """Mean vectors of histories with padding."""
    vectors = torch.linspace(-1, 1, 15, device=device()).square().view(5, 3)
    history = torch.tensor([[3, 5, 0], [2, 0, 0], [4, 1, 2]], device=device())
    return pipeline.text_profile(vectors, history)


@probe(tolerance=1e-5)
def scales():
    """The dense columns of two requests of three."""
    dense = torch.arange(24.0, device=device()).sqrt().view(3, 4, 2)
    items = torch.arange(12, device=device()).view(3, 4)
    data = SimpleNamespace(dense=dense, items=items, text=None, profile=None)
    ranker = pipeline.Ranker(None, dense.mean((0, 1)) + 1.0, dense.std((0, 1)) * 2)
    return ranker.columns(data, torch.tensor([2, 0], device=device()))["dense"]


@probe(tolerance=1e-4)
def texts():
    """How alike the texts are to each other."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"encoder": str(encoders.TINY), "cache": folder}
        vectors = pipeline.text_vectors(world()[0], config, device())
    return {"lengths": vectors.norm(dim=1)[:5], "alike": (vectors[:6] @ vectors[:6].T)}


# --- training -------------------------------------------------------------------------------------


@probe(tolerance=1e-5)
def selection():
    """The validation metrics of a model that does not change."""
    dataset, split = world()
    data = columns()
    asked = pipeline.requests_after_all(dataset, data)
    users, target = (
        torch.as_tensor(column[split.validation], device=device())
        for column in (dataset.user, dataset.item)
    )
    module = sys.modules[pipeline.train_retrieval.__module__]
    still = RETRIEVAL | {"fit": FIT | {"lr": 1e-30}}
    with patch.object(module, "build_retrieval", lambda *_: Tables()):
        model, result = pipeline.train_retrieval(
            data, still, seed=1, device=device(), validation=(asked.of(users), target)
        )
    return {"metrics": result.metrics, "training": model.training}


@probe
def logs():
    """What is told of which epoch, and the figures of which result."""
    dataset, split = world()
    asked = pipeline.requests_after_all(dataset, columns())
    users, target = (
        torch.as_tensor(column[split.validation], device=device())
        for column in (dataset.user, dataset.item)
    )
    told, ranker = [], []
    pipeline.train_retrieval(
        columns(), RETRIEVAL, seed=1, device=device(), validation=(asked.of(users), target),
        log=lambda *said: told.append(said),
    )
    data, *_ = proposals()
    pipeline.train_ranker(data, CONFIG["ranking"], seed=1, log=lambda *said: ranker.append(said))
    return [[[tag, epoch] for tag, _, epoch in sorted(said, key=lambda each: each[::2])]
            for said in (told, ranker)]


@probe
def seeds():
    """Which of three trainings, two of them with one seed, end with the same weights."""
    data = columns()
    ends = []
    for seed in (3, 3, 4):
        model, _ = pipeline.train_retrieval(data, RETRIEVAL, seed=seed, device=device(), epochs=1)
        ends.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters()]))
    return {"same": torch.equal(ends[0], ends[1]), "other": torch.equal(ends[0], ends[2])}


# --- a whole run ----------------------------------------------------------------------------------


@functools.cache
def run():
    """A run with `selection`, and notes of what was made from which rows, in order."""
    dataset, split = world()
    notes = SimpleNamespace(models=[], statistics=[], validated=[], proposed=[], before=None)
    plain = {name: getattr(pipeline, name) for name in
             ("train_retrieval", "train_ranker", "retrieve", "build_recommender")}
    features, table = candidates.CandidateFeatures, pipeline.RetrievalData
    init, call, made = features.__init__, features.__call__, table.__init__
    module = sys.modules[plain["train_ranker"].__module__]
    signature = inspect.signature(plain["build_recommender"])

    def features_init(self, dataset, rows, *args, **options):
        self.probed = np.asarray(rows)
        init(self, dataset, rows, *args, **options)

    def features_call(self, *args, **options):
        notes.statistics.append(self.probed)
        return call(self, *args, **options)

    def table_init(self, dataset, rows, *args, **options):
        self.probed = np.asarray(rows)
        made(self, dataset, rows, *args, **options)

    def train_retrieval(data, *args, **options):
        model, result = plain["train_retrieval"](data, *args, **options)
        notes.models.append((model, data.probed))
        if options.get("validation") is not None:
            notes.validated.append(options["validation"][1].cpu().numpy())
        return model, result

    def retrieve(model, *args, **options):
        items, scores = plain["retrieve"](model, *args, **options)
        notes.proposed.append((model, items))
        return items, scores

    def train_ranker(data, *args, **options):
        notes.before = data, len(notes.models), len(notes.statistics)
        return plain["train_ranker"](data, *args, **options)

    def build_recommender(dataset, model, *args, **options):
        notes.indexed = model
        notes.served = signature.bind(dataset, model, *args, **options).arguments["ranker"]
        return plain["build_recommender"](dataset, model, *args, **options)

    with ExitStack() as stack:
        for owner, name, value in (
            *((features, "__init__", features_init), (features, "__call__", features_call)),
            *((table, "__init__", table_init), (module, "train_retrieval", train_retrieval)),
            *((module, "retrieve", retrieve), (module, "train_ranker", train_ranker)),
            (module, "build_recommender", build_recommender),
        ):
            stack.enter_context(patch.object(owner, name, value))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        config = CONFIG | {"text": {"encoder": str(encoders.TINY), "cache": folder}}
        notes.result = pipeline.run(dataset, split, config, seed=1, device=device(), log=silent)
    return notes


def targets():
    """The rows of each user that the ranker learns from."""
    dataset, split = world()
    rows = np.concatenate([split.train, split.validation])
    rows = rows[np.argsort(dataset.user[rows], kind="stable")]
    user, total = dataset.user[rows], np.bincount(dataset.user[rows])
    place = np.arange(len(rows)) - np.searchsorted(user, user)
    return rows[place >= (total - np.minimum(3, total // 3))[user]]


def holds(rows):
    """How many rows, and of which kind."""
    _, split = world()
    kinds = {"targets": targets(), "validation": split.validation, "test": split.test}
    return [len(rows), *(int(np.isin(kind, rows).sum()) for kind in kinds.values())]


def known_targets(held):
    return held[1]


@probe
def rows_of_statistics():
    """What the ranker's statistics know: while it is trained, and in the end."""
    notes = run()
    before = map(holds, notes.statistics[: notes.before[2]])
    return {"before": min(before, key=known_targets), "end": max(map(holds, notes.statistics))}


@probe
def rows_of_retrieval():
    """What the retrieval model knows: before the ranker, and in the end."""
    notes = run()
    before = [holds(rows) for _, rows in notes.models[: notes.before[1]]]
    every = [holds(rows) for _, rows in notes.models]
    return {"before": min(before, key=known_targets), "end": max(every)}


@probe
def validated_on():
    """Against which choices epochs were selected."""
    return run().validated[:1]


@probe
def lists_of_the_ranker():
    """Whether what it learns from was proposed, and holds every target."""
    notes = run()
    data = notes.before[0]
    proposed = {tuple(sorted(row)) for _, items in notes.proposed for row in items.tolist()}
    return {
        "proposed": all(tuple(sorted(row)) in proposed for row in data.items.tolist()),
        "all": len(data.items) == len(targets()),
    }


@probe
def final_lists():
    """Whether logits and final lists fit together."""
    result = run().result
    items, logits = result["retrieval"]["items"], result["ranking"]["logits"]
    order = np.argsort(-logits, axis=1, kind="stable")
    final = result["final"]["items"]
    return {
        "best first": np.array_equal(final, np.take_along_axis(items, order, 1)),
        "worst first": np.array_equal(final, np.take_along_axis(items, order[:, ::-1], 1)),
        "as retrieved": np.array_equal(final, items),
    }


@probe
def answers():
    """Which lists the service knows, and whether its index is of the model that made them."""
    notes = run()
    dataset, _ = world()
    asked = notes.result["recommender"].recommend_batch(dataset.user_ids.tolist(), [3] * 20)
    found = np.array([[item for item, *_ in answer] for answer in asked])
    lists = {stage: notes.result[stage]["items"][:, :3] for stage in ("retrieval", "final")}
    wanted = notes.result["retrieval"]["items"].tolist()
    listed = [model for model, items in notes.proposed if items.tolist() == wanted]
    return {
        **{stage: np.array_equal(found, dataset.item_ids[rows]) for stage, rows in lists.items()},
        "rows": np.array_equal(found, lists["final"]),
        "index": notes.indexed in listed,
    }


@probe
def other_lists():
    """Whether the served ranker knows the lists, shorter ones, and what else may come."""
    notes = run()
    items, scores = (notes.result["retrieval"][name][:3] for name in ("items", "scores"))
    logits, users = notes.result["ranking"]["logits"][:3], np.arange(3)

    def near(found, wanted):
        return found.shape == wanted.shape and np.allclose(found, wanted, rtol=1e-3, atol=1e-4)

    def ranked(items, scores):
        try:
            return np.asarray(notes.served(users, items, scores))
        except Exception:  # a fact, whatever the learner's parts say
            return np.zeros(0)

    other = items.copy()
    other[1, 2] = np.setdiff1d(np.arange(world()[0].num_items), items[1])[0]
    new, same = ranked(other, scores), np.ones(items.shape, dtype=bool)
    same[1, 2] = False
    return {
        "known": near(ranked(items, scores), logits),
        "shorter": near(ranked(items[:, :4], scores[:, :4]), logits[:, :4]),
        "stayed": new.shape == same.shape and near(new[same], logits[same]),
        "moved": new.shape == same.shape and bool(abs(new[1, 2] - logits[1, 2]) > 1e-4),
    }


@probe(tolerance=1e-3)
def cold_scores():
    """Scores of two parts, of a user without rows too, and seen items in the lists of all."""
    dataset, _ = world()
    split = splits.item_cold_start(dataset, fraction=0.3, seed=2)
    keep = np.ones(len(dataset.user), dtype=bool)
    keep[split.train[dataset.user[split.train] == 0]] = False
    rare = split.train[dataset.item[split.train] == dataset.item[split.train[-1]]]
    keep[rare[:-1]] = False  # one row is left of this item, and none of user 0
    rows = {name: getattr(dataset, name)[keep] for name in ("user", "item", "rating", "time")}
    dataset = dataclasses.replace(dataset, **rows)
    split = splits.item_cold_start(dataset, fraction=0.3, seed=2)
    weights = {"weights": {"text": 1.5, "tower": 0.0, "regression": 0.5}}
    with tempfile.TemporaryDirectory() as folder:
        config = CONFIG | {"text": {"encoder": str(encoders.TINY), "cache": folder}}
        config["cold_start"] = CONFIG["cold_start"] | weights
        found = pipeline.run_cold_start(dataset, config, seed=2, device=device(), log=silent)
    pairs = set(zip(dataset.user[split.train].tolist(), dataset.item[split.train].tolist(),
                    strict=True))
    listed = [(user, item) for user, some in enumerate(found["all_items"].tolist())
              for item in some]
    return {"scores": np.asarray(found["scores"])[:6], "seen": len(pairs & set(listed))}


@probe
def cold():
    """What a cold start knows of cold items, and whether it recommends them alone."""
    dataset, _ = world()
    known = []
    made = pipeline.RetrievalData.__init__

    def init(self, dataset, rows, *args, **options):
        known.append(np.asarray(rows))
        made(self, dataset, rows, *args, **options)

    items = splits.item_cold_start(dataset, fraction=0.3, seed=2).cold_items
    with tempfile.TemporaryDirectory() as folder:
        config = CONFIG | {"text": {"encoder": str(encoders.TINY), "cache": folder}}
        with patch.object(pipeline.RetrievalData, "__init__", init):
            found = pipeline.run_cold_start(dataset, config, seed=2, device=device(), log=silent)
    return {
        "rows": [int(np.isin(dataset.item[rows], items).sum()) for rows in known],
        "cold": bool(np.isin(found["items"], items).all()),
    }
