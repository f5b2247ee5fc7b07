"""Gradients by autograd.grad and summed by hand; index order by sorting random keys."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import islice
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
    small, large = [], []
    for p in model.parameters():
        if p.requires_grad:
            (large if p.ndim > 1 else small).append(p)
    groups = []
    if small:
        groups.append({"params": small, "weight_decay": 0})
    if large:
        groups.append({"params": large})
    return torch.optim.AdamW(
        groups, lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
    )


def warmup_cosine(step, *, warmup_steps, total_steps):
    if step < warmup_steps:
        return (1 + step) / (1 + warmup_steps)
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return math.cos(min(done, 1.0) * math.pi / 2) ** 2 if step < total_steps else 0.0


def train_step(model, loss_fn, optimizer, batches, *, max_grad_norm=0.0, autocast="none"):
    if len(batches) == 0:
        raise ValueError("no micro-batches: nothing to step on")
    contexts = {
        "none": lambda device: contextlib.nullcontext(),
        "bfloat16": lambda device: torch.autocast(device, dtype=torch.bfloat16),
    }
    if autocast not in contexts:
        raise ValueError(f"autocast={autocast}")
    held = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = [next(iter(batch.values())).shape[0] for batch in batches]
    sums = [None] * len(held)
    mean = 0.0
    for batch, size in zip(batches, sizes, strict=True):
        column = next(iter(batch.values()))
        with contexts[autocast](column.device.type):
            loss = loss_fn(model, batch)
        share = size / sum(sizes)
        for i, grad in enumerate(torch.autograd.grad(loss, held, allow_unused=True)):
            if grad is not None:
                sums[i] = grad * share if sums[i] is None else sums[i].add_(grad, alpha=share)
        mean = mean + loss.detach() * share
    if max_grad_norm > 0:
        squares = [grad.pow(2).sum() for grad in sums if grad is not None]
        norm = torch.stack(squares).sum().sqrt()
        scale = torch.clamp(max_grad_norm / norm, max=1.0)
        sums = [None if grad is None else grad * scale for grad in sums]
    for p, grad in zip(held, sums, strict=True):
        p.grad = grad
    optimizer.step()
    return mean


def index_batches(num_examples, batch_size, *, seed, epoch, device="cpu"):
    generator = torch.Generator(device).manual_seed(hash((seed, epoch)) % 2**62)
    keys = torch.rand(num_examples, generator=generator, device=device, dtype=torch.float64)
    order = keys.argsort()
    if num_examples <= batch_size:
        yield order
        return
    for begin in range(0, num_examples - batch_size + 1, batch_size):
        yield order[begin : begin + batch_size]


@contextlib.contextmanager
def evaluating(model):
    training = [module for module in model.modules() if module.training]
    model.train(False)
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def evaluate(model, metric_fn):
    with evaluating(model):
        return float(metric_fn(model))


class EarlyStopping:
    def __init__(self, patience):
        self.patience = patience
        self.best, self.best_epoch, self.best_state = float("-inf"), 0, None
        self.since = 0

    def update(self, metric, epoch, model):
        better = metric > self.best
        if better:
            self.best, self.best_epoch = metric, epoch
            self.best_state = {name: x.detach().clone() for name, x in model.state_dict().items()}
        self.since = 0 if better else self.since + 1
        return self.patience > 0 and self.since >= self.patience

    def state_dict(self):
        return {
            "best": self.best, "epoch": self.best_epoch, "state": self.best_state,
            "since": self.since,
        }

    def load_state_dict(self, state):
        self.best, self.best_epoch = state["best"], state["epoch"]
        self.best_state, self.since = state["state"], state["since"]


def save_checkpoint(path, state):
    folder = Path(path).parent
    os.makedirs(folder, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".saving-")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({**state}, file)
            file.flush()
            os.fsync(handle)
        os.rename(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load_checkpoint(path, *, device="cpu"):
    return torch.load(str(path), map_location=torch.device(device), weights_only=True)


def fit(model, loss_fn, num_examples, make_batch, config, *, metric_fn=None, checkpoint=None,
        on_epoch=None):
    if num_examples <= 0:
        raise ValueError(f"{num_examples} examples")
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    per_epoch = max(1, num_examples // config.batch_size)
    per_epoch = -(-per_epoch // config.accumulate)
    total = per_epoch * config.epochs
    schedule = {"warmup_steps": round(config.warmup * total), "total_steps": total}
    stopping, result, begin, over = EarlyStopping(config.patience), FitResult(), 0, False
    if checkpoint is not None and os.path.exists(checkpoint):
        saved = load_checkpoint(checkpoint, device=device)
        if FitConfig(**saved["made with"]) != config:
            raise ValueError("the checkpoint belongs to another configuration")
        model.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["opt"])
        stopping.load_state_dict(saved["stop"])
        result = FitResult(**saved["result"])
        begin, over = saved["epochs done"], saved["over"]
        torch.set_rng_state(saved["random"].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda random"].cpu(), device)
    model.train()
    for epoch in range(begin, config.epochs):
        if over:
            break
        clock = time.monotonic()
        batches = index_batches(
            num_examples, config.batch_size, seed=config.seed, epoch=epoch, device=device
        )
        losses, sizes = [], []
        while group := list(islice(batches, config.accumulate)):
            rate = config.lr * warmup_cosine(result.steps, **schedule)
            for each in optimizer.param_groups:
                each["lr"] = rate
            losses.append(train_step(
                model, loss_fn, optimizer, [make_batch(index) for index in group],
                max_grad_norm=config.max_grad_norm, autocast=config.autocast,
            ))
            sizes.append(sum(index.numel() for index in group))
            result.steps += 1
        numbers = torch.stack(losses).double().cpu().numpy()
        result.seconds += time.monotonic() - clock
        for step, number in enumerate(numbers):
            if not math.isfinite(number):
                raise FloatingPointError(f"epoch {epoch + 1}, step {step + 1}: {number}")
        weighted = sum(x * n for x, n in zip(numbers, sizes, strict=True))
        result.losses.append(float(weighted / sum(sizes)))
        result.examples += sum(sizes)
        metric = None
        if metric_fn is not None:
            metric = evaluate(model, metric_fn)
            result.metrics.append(metric)
            over = stopping.update(metric, epoch + 1, model)
        result.best_epoch = stopping.best_epoch if metric_fn is not None else epoch + 1
        if on_epoch is not None:
            on_epoch(epoch + 1, result.losses[-1], metric)
        if checkpoint is not None:
            save_checkpoint(checkpoint, {
                "made with": asdict(config), "net": model.state_dict(),
                "opt": optimizer.state_dict(), "stop": stopping.state_dict(),
                "result": asdict(result), "epochs done": epoch + 1, "over": over,
                "random": torch.get_rng_state(),
                "cuda random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            })
    if metric_fn is not None and stopping.best_state is not None:
        model.load_state_dict(stopping.best_state)
    return result
