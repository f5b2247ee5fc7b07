"""Clipping by foreach kernels, gradients zeroed in place, checkpoints made in memory first."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import random
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

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


def make_optimizer(model, *, lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8):
    optimizer = None
    for keep, decay in ((lambda p: p.dim() > 1, weight_decay), (lambda p: p.dim() <= 1, 0.0)):
        params = [p for p in model.parameters() if p.requires_grad and keep(p)]
        if params and optimizer is None:
            optimizer = torch.optim.AdamW(
                params, lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True
            )
        elif params:
            optimizer.add_param_group({"params": params, "weight_decay": decay})
    return optimizer


def warmup_cosine(step, *, warmup_steps, total_steps):
    rising = (step + 1) / (warmup_steps + 1)
    length = max(total_steps - warmup_steps, 1)
    falling = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / length))
    return (rising if step < warmup_steps else falling) * (step < total_steps)


def train_step(model, loss_fn, optimizer, batches, *, max_grad_norm=0.0, autocast="none"):
    batches = list(batches)
    if not batches:
        raise ValueError("train_step: empty list of batches")
    if autocast not in {"none", "bfloat16"}:
        raise ValueError(f"autocast must be none or bfloat16, got {autocast}")
    optimizer.zero_grad(set_to_none=False)
    total_rows = sum(next(iter(batch.values())).size(0) for batch in batches)
    total = None
    for batch in batches:
        first = next(iter(batch.values()))
        with ExitStack() as stack:
            if autocast == "bfloat16":
                stack.enter_context(torch.autocast(first.device.type, dtype=torch.bfloat16))
            loss = loss_fn(model, batch)
        part = loss * first.size(0) / total_rows
        part.backward()
        total = part.detach() if total is None else total.add(part.detach())
        del loss, part
    if max_grad_norm:
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, torch.clamp(max_grad_norm / (norm + 1e-12), max=1.0))
    optimizer.step()
    return total


def index_batches(num_examples, batch_size, *, seed, epoch, device="cpu"):
    derived = random.Random(f"{seed}/{epoch}").getrandbits(60)
    generator = torch.Generator(device=device).manual_seed(derived)
    order = torch.randperm(num_examples, generator=generator, device=device)
    pieces = order.split(batch_size)
    if len(pieces) > 1 and len(pieces[-1]) < batch_size:
        pieces = pieces[:-1]
    return iter(pieces)


@torch.no_grad()
def evaluate(model, metric_fn):
    before = {name: module.training for name, module in model.named_modules()}
    try:
        return float(metric_fn(model.eval()))
    finally:
        for name, module in model.named_modules():
            module.training = before[name]


class EarlyStopping:
    def __init__(self, patience):
        self.patience = patience
        self.best = -float("inf")
        self.best_epoch = 0
        self.best_state = None
        self.left = patience

    def update(self, metric, epoch, model):
        if metric > self.best:
            self.best, self.best_epoch, self.left = metric, epoch, self.patience
            buffer = io.BytesIO()
            torch.save(model.state_dict(), buffer)
            buffer.seek(0)
            self.best_state = torch.load(buffer, weights_only=True)
        elif self.left > 0:
            self.left -= 1
        return self.patience != 0 and self.left == 0

    def state_dict(self):
        return {name: getattr(self, name) for name in ("best", "best_epoch", "best_state", "left")}

    def load_state_dict(self, state):
        for name, value in state.items():
            setattr(self, name, value)


def save_checkpoint(path, state):
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    path = Path(path)
    os.makedirs(path.parent, exist_ok=True)
    temporary = path.parent / (path.stem + ".part")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        left = memoryview(buffer.getvalue())
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    except BaseException:
        os.close(handle)
        os.remove(temporary)
        raise
    os.close(handle)
    os.replace(temporary, path)


def load_checkpoint(path, *, device="cpu"):
    content = io.BytesIO(Path(path).read_bytes())
    return torch.load(content, map_location=str(device), weights_only=True)


def fit(model, loss_fn, num_examples, make_batch, config, *, metric_fn=None, checkpoint=None,
        on_epoch=None):
    if num_examples < 1:
        raise ValueError("there are no training examples")
    device = next(iter(model.parameters())).device
    optimizer = make_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    stopping = EarlyStopping(config.patience)
    batches_per_epoch = max(num_examples // config.batch_size, 1)
    steps_per_epoch = (batches_per_epoch + config.accumulate - 1) // config.accumulate
    total_steps = config.epochs * steps_per_epoch
    warmup_steps = round(total_steps * config.warmup)
    done = {"epoch": 0, "stop": False}
    result = FitResult()
    if checkpoint is not None and Path(checkpoint).exists():
        saved = load_checkpoint(checkpoint, device=device)
        if saved["config"] != dataclasses.asdict(config):
            raise ValueError("configuration and checkpoint do not agree")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        stopping.load_state_dict(saved["stopping"])
        done = saved["done"]
        result = FitResult(**saved["result"])
        torch.random.set_rng_state(saved["rng"][0].cpu())
        if len(saved["rng"]) > 1:
            torch.cuda.set_rng_state(saved["rng"][1].cpu(), device)
    while done["epoch"] < config.epochs and not done["stop"]:
        model.train()
        began = time.time()
        order = list(index_batches(
            num_examples, config.batch_size, seed=config.seed, epoch=done["epoch"], device=device
        ))
        losses = torch.zeros(steps_per_epoch, dtype=torch.float64, device=device)
        rows = []
        for step in range(steps_per_epoch):
            mine = order[step * config.accumulate : (step + 1) * config.accumulate]
            now = done["epoch"] * steps_per_epoch + step
            factor = warmup_cosine(now, warmup_steps=warmup_steps, total_steps=total_steps)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * factor
            losses[step] = train_step(
                model, loss_fn, optimizer, [make_batch(index) for index in mine],
                max_grad_norm=config.max_grad_norm, autocast=config.autocast,
            )
            rows.append(sum(index.shape[0] for index in mine))
        values = losses.tolist()
        result.seconds += time.time() - began
        done["epoch"] += 1
        bad = [step for step, value in enumerate(values, 1) if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"step {bad[0]} of epoch {done['epoch']} has a broken loss")
        result.steps += steps_per_epoch
        result.examples += sum(rows)
        weighted = sum(value * n for value, n in zip(values, rows, strict=True))
        result.losses.append(weighted / sum(rows))
        metric = None
        if metric_fn is None:
            result.best_epoch = done["epoch"]
        else:
            metric = evaluate(model, metric_fn)
            result.metrics.append(metric)
            done["stop"] = stopping.update(metric, done["epoch"], model)
            result.best_epoch = stopping.best_epoch
        if checkpoint is not None:
            rng = [torch.random.get_rng_state()]
            if device.type == "cuda":
                rng.append(torch.cuda.get_rng_state(device))
            save_checkpoint(checkpoint, {
                "config": dataclasses.asdict(config), "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "stopping": stopping.state_dict(),
                "done": done, "result": dataclasses.asdict(result), "rng": rng,
            })
        if on_epoch is not None:
            on_epoch(done["epoch"], result.losses[-1], metric)
    if stopping.best_state is not None:
        model.load_state_dict(stopping.best_state)
    return result
