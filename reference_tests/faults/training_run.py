"""A training run that somebody kills: kata 05's reference on a small problem, with a checkpoint.

Dropout, accumulation, clipping, early stopping and a schedule: all that a resumed run may forget.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from harness import overlay
from harness.paths import ROOT

ROWS, USERS, ITEMS, DIM, EPOCHS = 640, 1500, 900, 24, 8


def setting(**changes: Any) -> tuple[Any, ...]:
    """(model, loss_fn, rows, make_batch, config, metric_fn) for `fit`."""
    import torch
    from torch import nn

    from recsys.training.loop import FitConfig

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    user = torch.randint(USERS, (ROWS,), generator=generator)
    item = torch.randint(ITEMS, (ROWS,), generator=generator)
    label = (user + item) % 2 * 2.0 - 1

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.user, self.item = nn.Embedding(USERS, DIM), nn.Embedding(ITEMS, DIM)
            self.drop, self.out = nn.Dropout(0.2), nn.Linear(DIM, 1)

        def forward(self, batch: dict[str, Any]) -> Any:
            both = self.drop(self.user(batch["user"]) * self.item(batch["item"]))
            return self.out(both).squeeze(1)

    def make_batch(index: Any) -> dict[str, Any]:
        return {"user": user[index], "item": item[index], "label": label[index]}

    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> Any:
        return nn.functional.softplus(-batch["label"] * model(batch)).mean()

    def metric_fn(model: nn.Module) -> Any:
        everything = make_batch(torch.arange(ROWS))
        return -loss_fn(model, everything)

    options = {"epochs": EPOCHS, "batch_size": 40, "lr": 0.02, "accumulate": 3, "patience": 5}
    options |= {"max_grad_norm": 0.5, "weight_decay": 0.1} | changes
    return Model(), loss_fn, ROWS, make_batch, FitConfig(**options), metric_fn


def digest(model: Any) -> str:
    """Of every bit of the weights."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def main(folder: str, implementation: str = "reference") -> int:
    """Train, going on from the checkpoint in `folder`; what came out is in folder/done.json."""
    import torch

    torch.set_num_threads(1)
    overlay.install(overlay.resolve([implementation], ROOT))
    from recsys.training.loop import fit

    model, loss_fn, rows, make_batch, config, metric_fn = setting()
    result = fit(model, loss_fn, rows, make_batch, config, metric_fn=metric_fn,
                 checkpoint=Path(folder) / "run.pt")  # fmt: skip
    done = {"weights": digest(model), "losses": result.losses, "metrics": result.metrics,
            "best": result.best_epoch, "steps": result.steps}  # fmt: skip
    made = Path(folder) / "done.new"
    made.write_text(json.dumps(done))
    os.replace(made, Path(folder) / "done.json")
    return 0
