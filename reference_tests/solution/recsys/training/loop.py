"""The training loop: step, schedule, accumulation, early stopping, exact resume (kata 05)."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Factor of the learning rate at optimizer step ``step`` = 0, 1, 2, ...

    Linear warm-up, ``(step + 1) / (warmup_steps + 1)`` while ``step < warmup_steps``, so that the
    first step already moves; then half a cosine from 1 down to 0::

        (1 + cos(pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2

    From ``total_steps`` on it is 0. ``warmup_steps`` is 0 to ``total_steps``.

    Source: Loshchilov and Hutter 2017, "SGDR", equation 5 with one cycle; warm-up: Goyal et al.
    2017, section 2.2.
    """
    if step >= total_steps:
        return 0.0
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2


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
    if not batches:
        raise ValueError("train_step needs at least one batch")
    rows = [len(next(iter(batch.values()))) for batch in batches]
    optimizer.zero_grad()
    total: Tensor | None = None
    for batch, n in zip(batches, rows, strict=True):
        device = next(iter(batch.values())).device.type
        with _autocast(device, autocast):
            loss = loss_fn(model, batch) * (n / sum(rows))
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    if max_grad_norm > 0:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
    optimizer.step()
    return total


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
    generator = torch.Generator(device=device)
    generator.manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num_examples, generator=generator, device=device)
    if num_examples < batch_size:
        return iter([order])
    return iter(order[: num_examples // batch_size * batch_size].split(batch_size))


def evaluate(model: nn.Module, metric_fn: Callable[[nn.Module], float]) -> float:
    """``metric_fn(model)`` as a Python float, in evaluation mode and without gradients.

    ``metric_fn`` may give a 0-dim tensor.

    Every module is in evaluation mode meanwhile (dropout off). Afterwards each is back in the mode
    it was in, and gradients are on or off as they were, also when ``metric_fn`` raises.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return float(metric_fn(model))
    finally:
        for module, mode in modes.items():
            module.training = mode


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
        self.patience = patience
        self.best = -math.inf
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] | None = None
        self.bad = 0

    def update(self, metric: float, epoch: int, model: nn.Module) -> bool:
        """Take the metric of an epoch; True when it is time to stop.

        An equal metric is not better, and NaN never is.
        """
        if metric > self.best:
            self.best, self.best_epoch, self.bad = metric, epoch, 0
            self.best_state = copy.deepcopy(model.state_dict())
        else:
            self.bad += 1
        return 0 < self.patience <= self.bad

    def state_dict(self) -> dict[str, Any]:
        """Everything that the following updates depend on (patience apart or not), as tensors and
        plain values.

        Later updates do not change what was returned.
        """
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        vars(self).update(state)


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a nested dictionary of tensors and plain values so that ``path`` is never half-written.

    The file appears under its name only when it is complete and on disk (fsync: after a power cut
    a renamed file may be empty otherwise). Whoever kills the process at any moment finds either the
    new checkpoint or the one before it; so it is written beside it, on the same file system, and
    then renamed. Missing folders are made. No other file is left behind, not
    even when writing fails: that raises, and the checkpoint before stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # atomic on one file system
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, its tensors placed on ``device``.

    Code in the file is never executed: a file that holds any is an error.
    """
    return torch.load(path, map_location=device, weights_only=True)


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
    if num_examples == 0:
        raise ValueError("fit needs at least one training example")
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    micro = max(1, num_examples // config.batch_size)
    steps_per_epoch = math.ceil(micro / config.accumulate)
    total_steps = steps_per_epoch * config.epochs
    warmup_steps = round(config.warmup * total_steps)
    stopping = EarlyStopping(config.patience)
    result = FitResult()
    done, stopped = 0, False  # epochs that are trained; whether patience is over
    if checkpoint is not None and Path(checkpoint).exists():
        state = load_checkpoint(checkpoint, device=device)
        _check_same_run(checkpoint, state, model, config)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        stopping.load_state_dict(state["stopping"])
        vars(result).update(state["result"])
        done, stopped = state["epochs"], state["stopped"]
        _set_rng_state(state["rng"], device)
    model.train()
    for epoch in range(done, config.epochs):
        if stopped:
            break
        started = time.perf_counter()
        indices = index_batches(
            num_examples, config.batch_size, seed=config.seed, epoch=epoch, device=device
        )
        losses, rows = [], []
        for group in _groups(indices, config.accumulate):
            factor = warmup_cosine(
                result.steps, warmup_steps=warmup_steps, total_steps=total_steps
            )
            for param_group in optimizer.param_groups:
                param_group["lr"] = config.lr * factor
            loss = train_step(
                model,
                loss_fn,
                optimizer,
                [make_batch(index) for index in group],
                max_grad_norm=config.max_grad_norm,
                autocast=config.autocast,
            )
            losses.append(loss)
            rows.append(sum(len(index) for index in group))
            result.steps += 1
        epoch_losses, odd = _read(losses, model)  # the one wait for the device in an epoch
        result.seconds += time.perf_counter() - started
        done = epoch + 1
        _check_finite(epoch_losses, odd, done)
        result.examples += sum(rows)
        weighted = (x * n for x, n in zip(epoch_losses, rows, strict=True))
        result.losses.append(sum(weighted) / sum(rows))
        metric = None
        if metric_fn is not None:
            metric = evaluate(model, metric_fn)
            result.metrics.append(metric)
            stopped = stopping.update(metric, done, model)
        result.best_epoch = stopping.best_epoch or done
        if on_epoch is not None:
            on_epoch(done, result.losses[-1], metric)
        if checkpoint is not None:
            state = {
                "config": asdict(config),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "stopping": stopping.state_dict(),
                "result": asdict(result),
                "epochs": done,
                "stopped": stopped,
                "rng": _rng_state(device),
            }
            save_checkpoint(checkpoint, state)
    if stopping.best_state is not None:
        model.load_state_dict(stopping.best_state)
    return result


def _autocast(device: str, mode: str) -> torch.autocast:
    if mode not in ("none", "bfloat16"):
        raise ValueError(f"autocast must be 'none' or 'bfloat16', not {mode!r}")
    return torch.autocast(device, dtype=torch.bfloat16, enabled=mode == "bfloat16")


def _groups(batches: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _read(losses: list[Tensor], model: nn.Module) -> tuple[list[float], list[str]]:
    """The losses, and which trained weights are not finite, in one transfer."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    finite = [weight.isfinite().all() for weight in weights.values()]
    read = torch.stack([*losses, *finite]).tolist()
    flags = zip(weights, read[len(losses) :], strict=True)
    return read[: len(losses)], [name for name, good in flags if not good]


def _check_finite(losses: list[float], odd: list[str], epoch: int) -> None:
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} in epoch {epoch}, step {step}: by its batch (index_batches "
                "gives it again), or by a gradient of the step before"
            )
    if odd:  # by the last gradient, or in a row that no later loss has read
        raise FloatingPointError(
            f"after epoch {epoch} not all weights are finite: {', '.join(odd)}; every loss was, so "
            "it was a gradient"
        )


_SAVED = {"config", "model", "optimizer", "stopping", "result", "epochs", "stopped", "rng"}


def _check_same_run(path: str | Path, state: Any, model: nn.Module, config: FitConfig) -> None:
    """Raise ValueError if it is no checkpoint of this model and config; says what differs."""
    if not isinstance(state, dict) or state.keys() != _SAVED:
        odd = sorted(map(str, _SAVED ^ state.keys() if isinstance(state, dict) else _SAVED))
        raise ValueError(f"{path} is no checkpoint of this version of fit: see {', '.join(odd)}")
    saved, sizes = _sizes(state["model"]), _sizes(model.state_dict())
    for what, old, new in (("config", state["config"], asdict(config)), ("model", saved, sizes)):
        odd = [f"{name}: {old.get(name, 'not there')}, now {new.get(name, 'not there')}"
               for name in old | new if old.get(name) != new.get(name)]  # fmt: skip
        if odd:
            raise ValueError(f"{path} is of another {what}: {'; '.join(odd)}. Remove it to start "
                             "anew")  # fmt: skip


def _sizes(state: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{value.dtype} {list(value.shape)}" for name, value in state.items()
            if isinstance(value, Tensor)}  # fmt: skip


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())  # generators take their state from the CPU
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
