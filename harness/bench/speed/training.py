"""Training: columns on the device beside a `DataLoader` of the same model, and beside RecBole."""

from __future__ import annotations

import argparse
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from harness.bench.recbole import PAIRWISE, build
from harness.bench.speed import in_turns, ratios, retrieval_data, spread, table

STEPS = 8  # of a batch, in a round
RECBOLE = {  # a model, its options, and how many batches: SASRec takes its time
    "DSSM": ({}, STEPS),
    "CORE": ({"dnn_type": "ave"}, STEPS),
    "SASRec": ({}, 1),
}


class Examples(Dataset):
    """The training examples as one would write them for a `DataLoader`, one at a time.

    From NumPy arrays, which are sliced faster than tensors.
    """

    def __init__(self, data: Any) -> None:
        sequences = data.sequences
        self.length = data.max_history
        self.positions = data.positions.cpu().numpy()
        self.items, self.user = sequences.items.cpu().numpy(), sequences.user.cpu().numpy()
        self.start = sequences.start.cpu().numpy()
        self.columns = {name: column.cpu().numpy() for name, column in data.users.items()}

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self.positions[index]
        user = self.user[place]
        recent = self.items[max(self.start[user], place - self.length) : place][::-1]
        history = np.zeros(self.length, dtype=np.int64)
        history[: len(recent)] = recent
        example = {name: column[user] for name, column in self.columns.items()}
        return {**example, "history": history, "target": self.items[place] - 1}


class TensorExamples(Examples):
    """The same from tensors, as most tutorials have it."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        for name in ("positions", "items", "user", "start"):
            setattr(self, name, torch.from_numpy(getattr(self, name)))
        self.columns = {name: column.cpu() for name, column in data.users.items()}

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self.positions[index]
        user = self.user[place]
        recent = self.items[max(self.start[user], place - self.length) : place].flip(0)
        history = torch.zeros(self.length, dtype=torch.int64)
        history[: len(recent)] = recent
        example = {name: column[user] for name, column in self.columns.items()}
        return {**example, "history": history, "target": self.items[place] - 1}


class Batches(Dataset):
    """The same by whole batches of indices: the best that a `DataLoader` can be given."""

    def __init__(self, make_batch: Callable[[Tensor], Mapping[str, Tensor]]) -> None:
        self.make_batch = make_batch

    def __getitem__(self, index: list[int]) -> Mapping[str, Tensor]:
        return self.make_batch(torch.tensor(index))


def loaders(data: Any, examples: int, batch_size: int) -> dict[str, DataLoader]:
    """Each kind of `DataLoader` over the first `examples`, shuffled."""
    order = range(examples)
    sampler = BatchSampler(RandomSampler(order), batch_size, drop_last=True)
    return {
        "DataLoader, batch sampler, tensors": DataLoader(
            TensorExamples(data), batch_sampler=sampler
        ),
        "DataLoader, batch sampler, NumPy": DataLoader(Examples(data), batch_sampler=sampler),
        "DataLoader, a batch at a time": DataLoader(
            Batches(data.example_batch), sampler=sampler, batch_size=None
        ),
    }


class Contestants:
    """Ways to train the same model on the first `examples`; each call of one is an epoch.

    Args:
        settings: of retrieval. data: what the pipeline makes of the training rows for them.
    """

    def __init__(self, settings: Mapping[str, Any], data: Any, device: torch.device) -> None:
        from recsys import pipeline
        from recsys.training import loop

        self.pipeline, self.loop = pipeline, loop
        self.settings, self.data, self.device = settings, data, device
        self.fit = loop.FitConfig(**settings["fit"] | {"epochs": 1})
        self.steps = min(STEPS, len(data.positions) // self.fit.batch_size)
        self.examples = self.steps * self.fit.batch_size

    def model(self) -> tuple[Any, Any]:
        """A fresh one, and its loss."""
        torch.manual_seed(0)
        network = self.pipeline.build_retrieval(self.data, self.settings).to(self.device).train()
        return network, self.pipeline.retrieval_loss(self.data, self.settings)

    def ours(self) -> Callable[[], Any]:
        """`fit`, which slices columns."""
        network, loss = self.model()
        make = self.data.example_batch
        return lambda: self.loop.fit(network, loss, self.examples, make, self.fit)

    def with_loader(self, loader: DataLoader) -> Callable[[], Any]:
        """The same steps on what a `DataLoader` gives."""
        network, loss = self.model()
        fit, train_step = self.fit, self.loop.train_step
        optimizer = self.loop.make_optimizer(network, lr=fit.lr, weight_decay=fit.weight_decay)

        def run() -> None:
            for batch in loader:
                batch = {name: column.to(self.device) for name, column in batch.items()}
                train_step(network, loss, optimizer, [batch], max_grad_norm=fit.max_grad_norm)

        return run

    def slicing(self) -> None:
        """Our batches alone."""
        size = self.fit.batch_size
        order = self.loop.index_batches(self.examples, size, seed=0, epoch=0, device=self.device)
        for index in order:
            self.data.example_batch(index)


def measure(args: argparse.Namespace) -> list[str]:
    """A line for each way to feed the same model, and for RecBole's where it is installed."""
    dataset, split, settings, data = retrieval_data(args)
    made = Contestants(settings, data, args.device)
    examples, steps, batch_size = made.examples, made.steps, made.fit.batch_size
    fed = loaders(data, examples, batch_size)
    first = "ours, `fit` on columns"
    contestants = {first: made.ours()}
    contestants |= {name: made.with_loader(loader) for name, loader in fed.items()}
    sizes = dict.fromkeys(contestants, examples)
    with tempfile.TemporaryDirectory() as folder:
        for name, (options, number) in RECBOLE.items() if find_spec("recbole") else ():
            label = f"RecBole {name}" + "".join(f" ({v})" for v in options.values())
            size = min(steps, number) * batch_size
            contestants[label], sizes[label] = recbole(
                name, options, dataset, split, settings, size, Path(folder), args.device
            )
        times = in_turns(contestants, args.rounds, args.device)
    alone: dict[str, Callable[[], Any]] = {first: made.slicing}
    alone |= {name: partial(deque, loader, 0) for name, loader in fed.items()}
    batches = in_turns(alone, args.rounds, args.device)
    rows = []
    for name, each in times.items():
        compared = ratios(each.own(args.device), times[first].own(args.device))
        rows.append([
            name,
            spread([sizes[name] / seconds for seconds in each.cpu], digits=0),
            spread([sizes[name] / seconds for seconds in each.wall], digits=0),
            spread(compared, examples / sizes[name], 2),
            spread(batches[name].cpu, 1e3 / steps, 2) if name in batches else "",
        ])  # fmt: skip
    head = ["", "examples per CPU second", "per second", "time an example, x ours",
            "batches alone, ms"]  # fmt: skip
    about = (
        f"{examples:,} examples of {dataset.name} in batches of {batch_size:,}, dim "
        f"{settings['dim']}, history {settings['max_history']}."
    )
    absent = [] if find_spec("recbole") else ["", "RecBole is not installed."]
    return [about, "", *table(head, rows), *absent]


def recbole(
    name: str,
    options: dict[str, Any],
    dataset: Any,
    split: Any,
    settings: Mapping[str, Any],
    examples: int,
    folder: Path,
    device: torch.device,
) -> tuple[Callable[[], Any], int]:
    """An epoch of a RecBole model of the size of ours, and how many examples it has."""
    rows = split.train
    # a user's first row is no target of a sequence model
    place = np.cumsum(np.r_[True, np.diff(dataset.user[rows]) != 0])
    count = np.searchsorted(np.arange(1, len(rows) + 1) - place, examples) + 1
    rows = rows[: examples if name in PAIRWISE else count]
    built = build(
        name,
        dataset.user[rows],
        dataset.item[rows],
        {
            "embedding_size": settings["dim"],
            "hidden_size": settings["dim"],
            "inner_size": 4 * settings["dim"],
            "mlp_hidden_size": [*settings["hidden_dims"], settings["dim"]],
            "MAX_ITEM_LIST_LENGTH": settings["max_history"],
            "train_batch_size": settings["fit"]["batch_size"],
            **options,
        },
        folder,
        label=dataset.rating[rows] >= 4,
        device=device.type,
    )
    return built.epoch, len(built.loader.dataset)  # augmented: a row for each target
