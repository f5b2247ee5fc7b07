"""The training loop: step, schedule, accumulation, early stopping, exact resume (kata 05)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]  # columns with the same number of rows each
LossFn = Callable[[nn.Module, Batch], Tensor]  # mean loss over the rows of a batch, 0-dim


@dataclass(frozen=True)
class FitConfig:
    """Hyper-parameters of :func:`fit`; the values come from a YAML file, not from code.

    Attributes:
        epochs: passes over the examples. batch_size: rows of a micro-batch.
        accumulate: micro-batches in one optimizer step.
        lr, weight_decay: of AdamW. warmup: share of all steps with a rising rate, 0 to 1.
        max_grad_norm: limit of the global gradient norm; 0 for none.
        autocast: "none" or "bfloat16".
        patience: epochs without a better validation metric before stopping; 0 for never.
        seed: of the order of the examples.
    """

    epochs: int
    batch_size: int
    lr: float
    accumulate: int = 1
    weight_decay: float = 0.0
    warmup: float = 0.1
    max_grad_norm: float = 0.0
    autocast: str = "none"
    patience: int = 0
    seed: int = 0


@dataclass
class FitResult:
    """What :func:`fit` did.

    Attributes:
        losses: training loss of each epoch, the mean over the rows trained on.
        metrics: validation metric of each epoch.
        best_epoch: epochs trained when the metric was best (all of them without validation).
        steps: optimizer steps. examples: rows trained on. seconds: wall time of training alone,
        validation excluded.
    """

    losses: list[float] = field(default_factory=list)
    metrics: list[float] = field(default_factory=list)
    best_epoch: int = 0
    steps: int = 0
    examples: int = 0
    seconds: float = 0.0


def make_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """AdamW over all parameters of the model that require a gradient.

    Weight decay acts on parameters with two or more dimensions (tables, matrices) only: biases,
    gains and temperatures have fewer and are left alone. It is ``fused=True``: a step is one
    kernel for many parameters instead of a dozen small ones for each.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
    """
    raise NotImplementedError("kata 05: write make_optimizer in src/recsys/training/loop.py")


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Factor of the learning rate at optimizer step ``step`` = 0, 1, 2, ...

    Linear warm-up, ``(step + 1) / (warmup_steps + 1)`` while ``step < warmup_steps``, so that the
    first step already moves; then half a cosine from 1 down to 0::

        (1 + cos(pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2

    From ``total_steps`` on it is 0. ``warmup_steps`` is 0 to ``total_steps``.

    Source: Loshchilov and Hutter 2017, "SGDR", equation 5 with one cycle; warm-up: Goyal et al.
    2017, section 2.2.
    """
    raise NotImplementedError("kata 05: write warmup_cosine in src/recsys/training/loop.py")


def train_step(
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    max_grad_norm: float = 0.0,
    autocast: str = "none",
) -> Tensor:
    """One optimizer step on one or more micro-batches, as if they were one batch.

    The gradient is that of ``sum_m rows_m * loss_m / sum_m rows_m``, so that every ROW counts the
    same, also where the micro-batches differ in size. (For a loss whose rows see each other, as
    in-batch softmax, this is not the loss of the large batch: each row only competes with its own
    micro-batch.) Each micro-batch goes through ``loss_fn`` by itself, and backward before the next
    one goes forward: the activations of two may not fit together.

    - Gradients left over from before have no influence.
    - If ``max_grad_norm`` is above 0, the norm of the whole gradient is clipped to it: ONE norm
      over all parameters that the optimizer holds, and over no others (a frozen part of the model
      may carry an old gradient), once all micro-batches are in and before the optimizer reads it.
    - With ``autocast="bfloat16"`` the forward pass and the loss run under ``torch.autocast``;
      parameters and their gradients keep their dtype.
    - The model stays in the mode, training or evaluation, that it is in.
    - Nothing in the step waits for the device: no number is read from it, nothing decided on one.

    Args:
        loss_fn: ``loss_fn(model, batch)`` gives the mean over the rows of the batch, 0-dim.
        batches: the micro-batches, at least one; the rows of a batch are the length of its columns.

    Returns:
        The weighted mean loss, a detached 0-dim tensor on the model's device.

    Raises:
        ValueError: no batches, or an unknown ``autocast``.
    """
    raise NotImplementedError("kata 05: write train_step in src/recsys/training/loop.py")


def index_batches(
    num_examples: int, batch_size: int, *, seed: int, epoch: int, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Shuffled batches of example indices, made on the device.

    A permutation of ``0 .. num_examples - 1`` that depends on ``seed`` and ``epoch`` alone, so that
    a resumed run, in another process, sees the same batches, cut into pieces of ``batch_size``. The
    last, shorter piece is dropped (fixed shapes; the next epoch drops others), unless it is the
    only one. Torch's global random state is neither read nor changed.

    Returns:
        An iterator over (batch_size,) int64 tensors on ``device``.
    """
    raise NotImplementedError("kata 05: write index_batches in src/recsys/training/loop.py")


def evaluate(model: nn.Module, metric_fn: Callable[[nn.Module], float]) -> float:
    """``metric_fn(model)`` as a Python float, in evaluation mode and without gradients.

    ``metric_fn`` may give a 0-dim tensor.

    Every module is in evaluation mode meanwhile (dropout off). Afterwards each is back in the mode
    it was in, and gradients are on or off as they were, also when ``metric_fn`` raises.
    """
    raise NotImplementedError("kata 05: write evaluate in src/recsys/training/loop.py")


class EarlyStopping:
    """Remember the best metric (higher is better) and a copy of the weights that gave it.

    Args:
        patience: stop after this many updates in a row without a better metric; 0 for never.

    Attributes:
        best: best metric so far, ``-inf`` before the first. best_epoch: its epoch, 0 before the
        first. best_state: a copy of the model's ``state_dict()`` then, independent of later
        training; ``None`` before the first.
    """

    def __init__(self, patience: int) -> None:
        raise NotImplementedError(
            "kata 05: write EarlyStopping.__init__ in src/recsys/training/loop.py"
        )

    def update(self, metric: float, epoch: int, model: nn.Module) -> bool:
        """Take the metric of an epoch; True when it is time to stop.

        An equal metric is not better, and NaN never is.
        """
        raise NotImplementedError(
            "kata 05: write EarlyStopping.update in src/recsys/training/loop.py"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the following updates depend on (patience apart or not), as tensors and
        plain values.

        Later updates do not change what was returned.
        """
        raise NotImplementedError(
            "kata 05: write EarlyStopping.state_dict in src/recsys/training/loop.py"
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        raise NotImplementedError(
            "kata 05: write EarlyStopping.load_state_dict in src/recsys/training/loop.py"
        )


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a nested dictionary of tensors and plain values so that ``path`` is never half-written.

    The file appears under its name only when it is complete and on disk (fsync: after a power cut
    a renamed file may be empty otherwise). Whoever kills the process at any moment finds either the
    new checkpoint or the one before it; so it is written beside it, on the same file system, and
    then renamed. Missing folders are made. No other file is left behind, not
    even when writing fails: that raises, and the checkpoint before stays.
    """
    raise NotImplementedError("kata 05: write save_checkpoint in src/recsys/training/loop.py")


def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, its tensors placed on ``device``.

    Code in the file is never executed: a file that holds any is an error.
    """
    raise NotImplementedError("kata 05: write load_checkpoint in src/recsys/training/loop.py")


def fit(
    model: nn.Module,
    loss_fn: LossFn,
    num_examples: int,
    make_batch: Callable[[Tensor], Batch],
    config: FitConfig,
    *,
    metric_fn: Callable[[nn.Module], float] | None = None,
    checkpoint: str | Path | None = None,
    on_epoch: Callable[[int, float, float | None], None] | None = None,
) -> FitResult:
    """Train a model; the data stay on its device and are addressed by index.

    The model trains in training mode with :func:`make_optimizer`. Each epoch takes
    :func:`index_batches`, turns every index tensor into a batch by
    ``make_batch(index)`` and groups ``accumulate`` of them, fewer at the end of the epoch, into one
    :func:`train_step`, with the rate ``config.lr * warmup_cosine(step)``: ``step`` counts the steps
    of all epochs from 0, ``total_steps`` are those of ``config.epochs`` epochs, and the warm-up
    takes ``round(config.warmup * total_steps)``. A batch is made when its step needs it, so that
    memory holds those of one step, not of an epoch. Losses are read from the device once an epoch.
    With ``metric_fn`` each epoch ends in :func:`evaluate`, :class:`EarlyStopping` decides when to
    stop, and at the end the model holds the weights of the best epoch.

    With ``checkpoint``, everything that the rest of the run depends on is saved there after each
    epoch, validation included: weights, optimizer, place in the schedule, torch's random state
    (dropout), early stopping, what the result holds so far. If the file exists, training goes on
    from it, and model and result (its seconds apart) equal those of an uninterrupted run to the
    bit. Remove the file to start anew.

    Args:
        num_examples: rows in the training set. make_batch: (B,) indices to a batch of B rows.
        metric_fn: validation metric of a model, higher is better.
        on_epoch: called as ``on_epoch(epoch, loss, metric)``, epochs from 1, after the validation;
        before or after the epoch's checkpoint.

    Raises:
        ValueError: no examples, or a checkpoint of another ``config``.
        FloatingPointError: a loss that is not finite; says the epoch and the step in it, both from
            1. The checkpoint stays that of the epoch before.
    """
    raise NotImplementedError("kata 05: write fit in src/recsys/training/loop.py")
