"""Training: columns on the device beside a `DataLoader` of the same model, and beside RecBole."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

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


def measure(args: argparse.Namespace) -> list[str]:
    """A line for each way to feed the same model, and for RecBole's where it is installed."""
    from recsys import pipeline
    from recsys.training import loop

    dataset, split, settings, data = retrieval_data(args)
    batch_size = settings["fit"]["batch_size"]
    steps = min(STEPS, len(data.positions) // batch_size)
    examples = steps * batch_size
    fit = loop.FitConfig(**settings["fit"] | {"epochs": 1})

    def model() -> tuple[Any, Any]:
        torch.manual_seed(0)
        network = pipeline.build_retrieval(data, settings).to(args.device).train()
        return network, pipeline.retrieval_loss(data, settings)

    def ours() -> Callable[[], Any]:
        network, loss = model()
        return lambda: loop.fit(network, loss, examples, data.example_batch, fit)

    def with_loader(loader: DataLoader) -> Callable[[], Any]:
        network, loss = model()
        optimizer = loop.make_optimizer(network, lr=fit.lr, weight_decay=fit.weight_decay)

        def run() -> None:
            for batch in loader:
                batch = {name: column.to(args.device) for name, column in batch.items()}
                loop.train_step(network, loss, optimizer, [batch],
                                max_grad_norm=fit.max_grad_norm)  # fmt: skip

        return run

    def loading(loader: DataLoader) -> Callable[[], Any]:
        return lambda: [None for _ in loader]

    def slicing() -> None:
        for index in loop.index_batches(examples, batch_size, seed=0, epoch=0, device=args.device):
            data.example_batch(index)

    fed = loaders(data, examples, batch_size)
    contestants = {"ours, `fit` on columns": ours()}
    contestants |= {name: with_loader(loader) for name, loader in fed.items()}
    sizes = dict.fromkeys(contestants, examples)
    absent = []
    with tempfile.TemporaryDirectory() as folder:
        if find_spec("recbole") is None:
            absent.append("RecBole is not installed.")
        else:
            for name, (options, number) in RECBOLE.items():
                label = f"RecBole {name}" + "".join(f" ({v})" for v in options.values())
                epoch = recbole(
                    name,
                    options,
                    dataset,
                    split,
                    settings,
                    min(steps, number) * batch_size,
                    Path(folder),
                    args.device,
                )
                contestants[label], sizes[label] = epoch
        times = in_turns(contestants, args.rounds, args.device)
    batches = in_turns(
        {"ours": slicing} | {name: loading(loader) for name, loader in fed.items()},
        args.rounds,
        args.device,
    )
    first = next(iter(times))
    rows = []
    for name, each in times.items():
        alone = batches.get("ours" if name == first else name)
        share = sizes[name] / examples
        compared = ratios(each.own(args.device), times[first].own(args.device))
        rows.append([
            name,
            spread([sizes[name] / seconds for seconds in each.cpu], digits=0),
            spread([sizes[name] / seconds for seconds in each.wall], digits=0),
            spread(compared, 1 / share, 2),
            spread(alone.cpu, 1e3 / steps, 2) if alone else "",
        ])  # fmt: skip
    head = [
        "",
        "examples per CPU second",
        "per second",
        "time an example, x ours",
        "batches alone, ms",
    ]
    return [
        f"{examples:,} examples of {dataset.name} in batches of {batch_size:,}, dim "
        f"{settings['dim']}, history {settings['max_history']}.",
        "",
        *table(head, rows),
        *([""] if absent else []),
        *absent,
    ]


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in `folder`, which is where RecBole leaves its logs."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


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
    """An epoch of a RecBole model by its own loader and trainer, and how many examples it has."""
    removed = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}
    for old, new in removed.items():  # RecBole 1.2.1 asks NumPy 2 for names that it dropped
        if old not in vars(np):
            setattr(np, old, new)
    with warnings.catch_warnings(), mock.patch.object(sys, "argv", ["kata"]), inside(folder):
        warnings.simplefilter("ignore")
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import get_model, get_trainer

        sequential = name != "DSSM"
        rows = split.train
        # a user's first row is no target of a sequence model
        place = np.cumsum(np.r_[True, np.diff(dataset.user[rows]) != 0])
        count = np.searchsorted(np.arange(1, len(rows) + 1) - place, examples) + 1
        rows = rows[: count if sequential else examples]
        (folder / name).mkdir(exist_ok=True)
        lines = ["user_id:token\titem_id:token\tlabel:float\ttimestamp:float"]
        columns = (dataset.user[rows], dataset.item[rows], dataset.rating[rows] >= 4, rows)
        lines += [f"{u}\t{i}\t{int(good)}\t{n}" for u, i, good, n in zip(*columns, strict=True)]
        (folder / name / f"{name}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
        config = Config(
            model=name,
            dataset=name,
            config_dict={
                "data_path": str(folder),
                "checkpoint_dir": str(folder),
                "use_gpu": device.type == "cuda",
                "show_progress": False,
                "state": "ERROR",
                "embedding_size": settings["dim"],
                "hidden_size": settings["dim"],
                "inner_size": 4 * settings["dim"],
                "mlp_hidden_size": [*settings["hidden_dims"], settings["dim"]],
                "MAX_ITEM_LIST_LENGTH": settings["max_history"],
                "train_batch_size": settings["fit"]["batch_size"],
                "train_neg_sample_args": None,
                "LABEL_FIELD": "label",
                "load_col": {"inter": ["user_id", "item_id", "label", "timestamp"]},
                "eval_args": {
                    "split": {"RS": [1, 0, 0]},
                    "group_by": None,
                    "order": "TO" if sequential else "RO",
                    "mode": "full" if sequential else "labeled",
                },
                **({} if sequential else {"metrics": ["AUC"], "valid_metric": "AUC"}),
                **options,
            },
        )
        loader, _, _ = data_preparation(config, create_dataset(config))
        model = get_model(name)(config, loader.dataset)
        trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer._train_epoch(loader, 0, show_progress=False)

    return run, len(loader.dataset)  # augmented: a row for each target
