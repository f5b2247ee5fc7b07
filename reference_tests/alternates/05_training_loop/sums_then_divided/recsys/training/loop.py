"""Gradients of sums, divided at the end; rates in a table; permutations by multinomial."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import time
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

import torch
from torch.nn.utils import parameters_to_vector


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


def make_optimizer(model, *, lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8):
    trained = [p for p in model.parameters() if p.requires_grad]
    few = {id(p) for p in trained if p.dim() <= 1}
    return torch.optim.AdamW(
        [{"params": [p for p in trained if id(p) not in few]},
         {"params": [p for p in trained if id(p) in few], "weight_decay": 0.0}],
        lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True,
    )


def warmup_cosine(step, *, warmup_steps, total_steps):
    step = torch.as_tensor(step, dtype=torch.float64)
    rising = (step + 1) / (warmup_steps + 1)
    falling = (1 + torch.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
    factor = torch.where(step < warmup_steps, rising, falling / 2)
    return torch.where(step < total_steps, factor, 0.0).item()


def train_step(model, loss_fn, optimizer, batches, *, max_grad_norm=0.0, autocast="none"):
    if not len(batches):
        raise ValueError("train_step was given nothing")
    if autocast not in ("bfloat16", "none"):
        raise ValueError("autocast must be 'bfloat16' or 'none'")
    held = []
    for group in optimizer.param_groups:
        held.extend(group["params"])
    for p in held:
        p.grad = None
    rows, total = 0, 0
    for batch in batches:
        column = next(iter(batch.values()))
        enabled = autocast == "bfloat16"
        with torch.autocast(column.device.type, dtype=torch.bfloat16, enabled=enabled):
            loss = loss_fn(model, batch)
            summed = loss * len(column)
            summed.backward()
        total = total + summed.detach()
        rows += len(column)
    reached = [p for p in held if p.grad is not None]
    for p in reached:
        p.grad /= rows
    if max_grad_norm > 0:
        length = parameters_to_vector([p.grad for p in reached]).norm()
        for p in reached:
            p.grad *= torch.minimum(max_grad_norm / length, torch.ones_like(length))
    optimizer.step()
    return total / rows


def index_batches(num_examples, batch_size, *, seed, epoch, device="cpu"):
    digest = hashlib.sha256(f"{seed},{epoch}".encode()).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest[:7], "little"))
    alike = torch.ones(num_examples, device=device)
    order = torch.multinomial(alike, num_examples, replacement=False, generator=generator)
    if batch_size >= num_examples:
        return iter([order])
    return iter(order.unfold(0, batch_size, batch_size))


def evaluate(model, metric_fn):
    modules = list(model.modules())
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.train(False)
        with torch.set_grad_enabled(False):
            value = metric_fn(model)
            return value.item() if isinstance(value, torch.Tensor) else float(value)
    finally:
        [module.train(mode) for module, mode in zip(modules, modes, strict=True)]


class EarlyStopping:
    def __init__(self, patience):
        self.patience = patience
        self.best, self.best_epoch, self.best_state = -math.inf, 0, None
        self.worse = []

    def update(self, metric, epoch, model):
        if math.isnan(metric) or metric <= self.best:
            self.worse.append(epoch)
        else:
            self.worse.clear()
            self.best, self.best_epoch = metric, epoch
            self.best_state = type(model.state_dict())(
                (name, torch.empty_like(value).copy_(value))
                for name, value in model.state_dict().items()
            )
        return len(self.worse) >= (self.patience or math.inf)

    def state_dict(self):
        return dict(best=self.best, best_epoch=self.best_epoch, best_state=self.best_state,
                    worse=list(self.worse), patience=self.patience)

    def load_state_dict(self, state):
        for name in ("best", "best_epoch", "best_state", "patience"):
            setattr(self, name, state[name])
        self.worse = list(state["worse"])


def save_checkpoint(path, state):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(dir=path.parent))  # on the same file system
    try:
        torch.save(dict(state), workshop / "state")
        handle = os.open(workshop / "state", os.O_RDWR)
        os.fsync(handle)
        os.close(handle)
        shutil.move(workshop / "state", path)
    finally:
        shutil.rmtree(workshop)


def load_checkpoint(path, *, device="cpu"):
    return torch.load(f=path, weights_only=True, map_location=device)


def fit(model, loss_fn, num_examples, make_batch, config, *, metric_fn=None, checkpoint=None,
        on_epoch=None):
    if num_examples == 0:
        raise ValueError("nothing to train on")
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    micro = num_examples // config.batch_size if num_examples >= config.batch_size else 1
    per_epoch = len(range(0, micro, config.accumulate))
    total = per_epoch * config.epochs
    warmup = round(config.warmup * total)
    rates = [config.lr * warmup_cosine(s, warmup_steps=warmup, total_steps=total)
             for s in range(total)]
    stopping, result = EarlyStopping(config.patience), FitResult()
    first, over = 0, False
    if checkpoint is not None and Path(checkpoint).exists():
        saved = load_checkpoint(checkpoint, device=device)
        if tuple(saved["config"]) != astuple(config):
            raise ValueError("not the configuration of the checkpoint")
        for name, value in model.state_dict().items():
            value.copy_(saved["model"][name])
        optimizer.load_state_dict(saved["optimizer"])
        stopping.load_state_dict(saved["stopping"])
        for name, value in saved["result"].items():
            setattr(result, name, value)
        first, over = saved["epochs"], saved["over"]
        torch.set_rng_state(saved["rng"].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda"].cpu(), device)
    for epoch in range(first, config.epochs if not over else first):
        model.train()
        began = time.perf_counter()
        indices = index_batches(
            num_examples, config.batch_size, seed=config.seed, epoch=epoch, device=device
        )
        waiting, losses, rows = [], [], []
        for number, index in enumerate(indices, start=1):
            waiting.append(make_batch(index))
            rows.append(len(index))
            if len(waiting) == config.accumulate or number == micro:
                for group in optimizer.param_groups:
                    group["lr"] = rates[result.steps]
                losses.append(train_step(
                    model, loss_fn, optimizer, waiting, max_grad_norm=config.max_grad_norm,
                    autocast=config.autocast,
                ))
                result.steps += 1
                waiting = []
        losses = torch.stack(losses).cpu()
        result.seconds += time.perf_counter() - began
        if not losses.isfinite().all():
            where = int((~losses.isfinite()).nonzero()[0]) + 1
            raise FloatingPointError(f"epoch {epoch + 1} step {where}: {losses[where - 1]:g}")
        sizes = torch.tensor([sum(rows[i : i + config.accumulate])
                              for i in range(0, micro, config.accumulate)])
        result.losses.append(float((losses.double() * sizes).sum() / sizes.sum()))
        result.examples += sum(rows)
        result.best_epoch = epoch + 1
        metric = None
        if metric_fn is not None:
            metric = evaluate(model, metric_fn)
            result.metrics.append(metric)
            over = stopping.update(metric, epoch + 1, model)
            result.best_epoch = stopping.best_epoch
        if on_epoch is not None:
            on_epoch(epoch + 1, result.losses[-1], metric)
        if checkpoint is not None:
            cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            save_checkpoint(checkpoint, {
                "config": list(astuple(config)), "model": dict(model.state_dict()),
                "optimizer": optimizer.state_dict(), "stopping": stopping.state_dict(),
                "result": asdict(result), "epochs": epoch + 1, "over": over,
                "rng": torch.get_rng_state(), "cuda": cuda,
            })
        if over:
            break
    if stopping.best_state is not None:
        model.load_state_dict(stopping.best_state)
    return result
