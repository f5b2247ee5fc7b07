"""Gradients cleared before and after the step, inference mode, train(False), other keys."""


from __future__ import annotations

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
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
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
    if not batches:
        raise ValueError("train_step needs at least one batch")
    rows = [len(next(iter(batch.values()))) for batch in batches]
    optimizer.zero_grad()
    total: Tensor | None = None
    for batch, n in zip(batches, rows, strict=True):
        device = next(iter(batch.values())).device.type
        with _autocast(device, autocast):
            loss = loss_fn(model, batch)
        loss = loss / (sum(rows) / n)
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    if max_grad_norm > 0:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total


def index_batches(
    num_examples: int, batch_size: int, *, seed: int, epoch: int, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    generator = torch.Generator(device=device)
    generator.manual_seed(seed + 1000 * epoch)
    order = torch.randperm(num_examples, generator=generator, device=device)
    if num_examples < batch_size:
        return iter([order])
    return iter(order[: num_examples // batch_size * batch_size].split(batch_size))


def evaluate(model: nn.Module, metric_fn: Callable[[nn.Module], float]) -> float:
    modes = {module: module.training for module in model.modules()}
    model.train(False)
    try:
        with torch.inference_mode():
            return float(metric_fn(model))
    finally:
        for module, mode in modes.items():
            module.training = mode


class EarlyStopping:

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best = -math.inf
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] | None = None
        self.bad = 0

    def update(self, metric: float, epoch: int, model: nn.Module) -> bool:
        if metric > self.best:
            self.best, self.best_epoch, self.bad = metric, epoch, 0
            self.best_state = {name: value.clone() for name, value in model.state_dict().items()}
        else:
            self.bad += 1
        return 0 < self.patience <= self.bad

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
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
    epoch, stopped = 0, False
    if checkpoint is not None and Path(checkpoint).exists():
        state = load_checkpoint(checkpoint, device=device)
        if state["config"] != asdict(config):
            raise ValueError(f"{checkpoint} was written with {state['config']}, not {config}")
        model.load_state_dict(state["net"])
        optimizer.load_state_dict(state["opt"])
        stopping.load_state_dict(state["stopping"])
        vars(result).update(state["result"])
        epoch, stopped = state["epoch"], state["stopped"]
        _set_rng_state(state["rng"], device)
    model.train()
    while epoch < config.epochs and not stopped:
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
        epoch_losses = torch.stack(losses).tolist()  # the one wait for the device in an epoch
        result.seconds += time.perf_counter() - started
        _check_finite(epoch_losses, epoch + 1)
        epoch += 1
        result.examples += sum(rows)
        weighted = (x * n for x, n in zip(epoch_losses, rows, strict=True))
        result.losses.append(sum(weighted) / sum(rows))
        metric = None
        if metric_fn is not None:
            metric = evaluate(model, metric_fn)
            result.metrics.append(metric)
            stopped = stopping.update(metric, epoch, model)
        result.best_epoch = stopping.best_epoch or epoch
        if on_epoch is not None:
            on_epoch(epoch, result.losses[-1], metric)
        if checkpoint is not None:
            state = {
                "config": asdict(config),
                "net": model.state_dict(),
                "opt": optimizer.state_dict(),
                "stopping": stopping.state_dict(),
                "result": asdict(result),
                "epoch": epoch,
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


def _check_finite(losses: list[float], epoch: int) -> None:
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in epoch {epoch}, step {step}")


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())  # generators take their state from the CPU
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
