"""What the diagnosis asks of kata 10: see harness/probe.py.

Weights are drawn, so nothing that depends on them is asked: models are tables of fixed vectors, and
of a whole run only what was made from which rows.
"""

import functools
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
from harness.spec import device, learner

pipeline = learner("pipeline")
synthetic = learner("data.synthetic")
splits = learner("data.splits")
candidates = learner("data.candidates")

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
    return {"items": items, "scores": scores}


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
        return plain["build_recommender"](dataset, model, *args, **options)

    with ExitStack() as stack:
        for owner, name, value in (
            *((features, "__init__", features_init), (features, "__call__", features_call)),
            *((table, "__init__", table_init), (module, "train_retrieval", train_retrieval)),
            *((module, "retrieve", retrieve), (module, "train_ranker", train_ranker)),
            (module, "build_recommender", build_recommender),
        ):
            stack.enter_context(patch.object(owner, name, value))
        notes.result = pipeline.run(dataset, split, CONFIG, seed=1, device=device(), log=silent)
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
