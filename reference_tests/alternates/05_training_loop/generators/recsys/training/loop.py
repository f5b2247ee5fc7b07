"""Epochs, groups and steps as generators; the best weights are kept on the CPU."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch


@dataclass(frozen=True)
class FitConfig:
    """Hyper-parameters of fit."""

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
    """What fit did."""

    losses: list[float] = field(default_factory=list)
    metrics: list[float] = field(default_factory=list)
    best_epoch: int = 0
    steps: int = 0
    examples: int = 0
    seconds: float = 0.0


AUTOCAST = {"none": None, "bfloat16": torch.bfloat16}


def make_optimizer(model, *, lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8):
    by_decay = {weight_decay: [], 0.0: []}
    for _, p in model.named_parameters():
        if p.requires_grad:
            by_decay[weight_decay if p.dim() >= 2 else 0.0].append(p)
    groups = [{"params": params, "weight_decay": d} for d, params in by_decay.items() if params]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def warmup_cosine(step, *, warmup_steps, total_steps):
    if step >= total_steps:
        return 0.0
    if step < warmup_steps:
        return float(np.interp(step, [-1, warmup_steps], [0.0, 1.0]))
    angle = np.pi * (step - warmup_steps) / (total_steps - warmup_steps)
    return float((np.cos(angle) + 1) / 2)


def train_step(model, loss_fn, optimizer, batches, *, max_grad_norm=0.0, autocast="none"):
    if autocast not in AUTOCAST:
        raise ValueError(f"autocast {autocast!r} is not one of {', '.join(AUTOCAST)}")
    counts = [column.shape[0] for batch in batches for column in [*batch.values()][:1]]
    if not counts:
        raise ValueError("no batches")
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for p in held:
        p.grad = None
    weights = np.array(counts) / np.sum(counts)
    parts = [one(model, loss_fn, batch, float(w), AUTOCAST[autocast])
             for batch, w in zip(batches, weights, strict=True)]
    if max_grad_norm > 0:
        norm = torch.nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(held, max_grad_norm, norm)
    optimizer.step()
    return sum(parts[1:], parts[0])


def one(model, loss_fn, batch, weight, dtype):
    device = [*batch.values()][0].device.type
    with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = loss_fn(model, batch)
    (weight * loss).backward()
    return weight * loss.detach()


def index_batches(num_examples, batch_size, *, seed, epoch, device="cpu"):
    generator = torch.Generator(device=device)
    generator.manual_seed(seed + epoch)
    shuffled = torch.arange(num_examples, device=device)[
        torch.randperm(num_examples, generator=generator, device=device)
    ]
    count = max(1, num_examples // batch_size)
    for i in range(count):
        yield shuffled[i * batch_size : (i + 1) * batch_size]


def evaluate(model, metric_fn):
    switched = []
    try:
        for module in model.modules():
            switched.append((module, module.training))
            module.training = False
        with torch.no_grad():
            return float(metric_fn(model))
    finally:
        while switched:
            module, module.training = switched[-1][0], switched.pop()[1]


class EarlyStopping:
    def __init__(self, patience):
        self.patience, self.best, self.best_epoch, self.best_state = patience, -math.inf, 0, None
        self.updates = self.best_update = 0

    def update(self, metric, epoch, model):
        self.updates += 1
        if metric > self.best:
            self.best_update, self.best, self.best_epoch = self.updates, metric, epoch
            self.best_state = {k: v.detach().to("cpu", copy=True) for k, v in
                               model.state_dict().items()}
        waited = self.updates - self.best_update
        return bool(self.patience) and waited >= self.patience

    def state_dict(self):
        return {**self.__dict__}

    def load_state_dict(self, state):
        self.__dict__ |= state


def save_checkpoint(path, state):
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    other = path.with_suffix(f".{uuid4().hex}")
    try:
        file = open(other, "xb")
        with file:
            torch.save(dict(state), file)
            file.flush()
            getattr(os, "fdatasync", os.fsync)(file.fileno())
        other.rename(path)
    finally:
        if other.exists():
            other.unlink()


def load_checkpoint(path, *, device="cpu"):
    return torch.load(path, map_location=lambda storage, _: storage, weights_only=True) \
        if str(device) == "cpu" else torch.load(path, map_location=device, weights_only=True)


def grouped(batches, size):
    batches = list(batches)
    for start in range(0, len(batches), size):
        yield batches[start : start + size]


def epochs(model, loss_fn, num_examples, make_batch, config, optimizer, state):
    """Train one epoch each time it is asked; yields losses and rows."""
    device = next(model.parameters()).device
    steps = math.ceil(max(1, num_examples // config.batch_size) / config.accumulate)
    total = steps * config.epochs
    warmup = round(config.warmup * total)
    while state["epoch"] < config.epochs:
        losses, rows = [], []
        indices = index_batches(num_examples, config.batch_size, seed=config.seed,
                                epoch=state["epoch"], device=device)
        for group in grouped(indices, config.accumulate):
            rate = config.lr * warmup_cosine(state["step"], warmup_steps=warmup, total_steps=total)
            for each in optimizer.param_groups:
                each.update(lr=rate)
            losses.append(train_step(model, loss_fn, optimizer, list(map(make_batch, group)),
                                     max_grad_norm=config.max_grad_norm, autocast=config.autocast))
            rows.append(sum(len(index) for index in group))
            state["step"] += 1
        state["epoch"] += 1
        yield torch.stack(losses), rows


def fit(model, loss_fn, num_examples, make_batch, config, *, metric_fn=None, checkpoint=None,
        on_epoch=None):
    if num_examples == 0:
        raise ValueError("num_examples is 0")
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    stopping, result = EarlyStopping(config.patience), FitResult()
    state = {"epoch": 0, "step": 0, "stop": False}
    if checkpoint is not None and Path(checkpoint).exists():
        saved = load_checkpoint(checkpoint, device=device)
        if saved["config"] != asdict(config):
            raise ValueError("another configuration wrote this checkpoint")
        state, result = saved["state"], FitResult(**saved["result"])
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["moments"])
        stopping.load_state_dict(saved["stopping"])
        torch.set_rng_state(saved["rng"].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda"].cpu(), device)
    model.train(True)
    trained = epochs(model, loss_fn, num_examples, make_batch, config, optimizer, state)
    while not state["stop"]:
        begin = time.perf_counter()
        item = next(trained, None)
        if item is None:
            break
        losses, rows = np.array(item[0].tolist()), np.array(item[1])
        result.seconds += time.perf_counter() - begin
        if not np.isfinite(losses).all():
            step = int(np.argmin(np.isfinite(losses))) + 1
            raise FloatingPointError(f"not finite: epoch {state['epoch']}, step {step}")
        result.losses.append(float(np.average(losses, weights=rows)))
        result.steps, result.examples = state["step"], result.examples + int(rows.sum())
        metric = None if metric_fn is None else evaluate(model, metric_fn)
        if metric is not None:
            result.metrics.append(metric)
            state["stop"] = stopping.update(metric, state["epoch"], model)
        result.best_epoch = stopping.best_epoch or state["epoch"]
        if on_epoch is not None:
            on_epoch(state["epoch"], result.losses[-1], metric)
        if checkpoint is not None:
            saved = {"config": asdict(config), "state": state, "result": asdict(result),
                     "weights": model.state_dict(), "moments": optimizer.state_dict(),
                     "stopping": stopping.state_dict(), "rng": torch.get_rng_state()}
            if device.type == "cuda":
                saved["cuda"] = torch.cuda.get_rng_state(device)
            save_checkpoint(checkpoint, saved)
    if stopping.best_state is not None:
        model.load_state_dict(stopping.best_state)
    return result
