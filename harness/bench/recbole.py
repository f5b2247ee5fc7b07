"""RecBole's models on our rows, trained by its own loader and trainer."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

PAIRWISE = ("DSSM",)  # models of a user and an item with a label; the others are sequence models


@dataclass
class Built:
    """A model of RecBole with all that it needs; its ids are not ours: see `dataset.token2id`."""

    dataset: Any
    loader: Any
    model: Any
    trainer: Any

    def epoch(self) -> None:
        """Train for one epoch."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer._train_epoch(self.loader, 0, show_progress=False)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in `folder`, which is where RecBole leaves its logs."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def build(
    name: str,
    user: np.ndarray,
    item: np.ndarray,
    options: Mapping[str, Any],
    folder: Path,
    *,
    label: np.ndarray | None = None,
    device: str = "cpu",
) -> Built:
    """A model on rows of users and items that are in order of time, a row after the other.

    Args:
        options: of RecBole's configuration. folder: for its files.
        label: whether the user liked the item, for PAIRWISE.
    """
    import torch

    removed = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}
    for old, new in removed.items():  # RecBole 1.2.1 asks NumPy 2 for names that it dropped
        if old not in vars(np):
            setattr(np, old, new)
    with warnings.catch_warnings(), mock.patch.object(sys, "argv", ["kata"]), inside(folder):
        warnings.simplefilter("ignore")
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import get_model, get_trainer

        sequential = name not in PAIRWISE
        liked = np.ones(len(user)) if label is None else label
        lines = ["user_id:token\titem_id:token\tlabel:float\ttimestamp:float"]
        columns = (user, item, liked, range(len(user)))
        lines += [f"{u}\t{i}\t{int(good)}\t{n}" for u, i, good, n in zip(*columns, strict=True)]
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{name}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
        config = Config(
            model=name,
            dataset=name,
            config_dict={
                "data_path": str(folder),
                "checkpoint_dir": str(folder),
                "use_gpu": device != "cpu",
                "show_progress": False,
                "state": "ERROR",
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
        dataset = create_dataset(config)
        loader, _, _ = data_preparation(config, dataset)
        model = get_model(name)(config, loader.dataset)
        trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
    # importing its sequence models switches on a search for NaN, which makes everybody slow
    torch.autograd.set_detect_anomaly(False)
    return Built(dataset, loader, model, trainer)
