"""A trainer object with a LambdaLR, whose whole state is one dictionary."""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import nn


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
    params = list(filter(lambda p: p.requires_grad, model.parameters()))
    return torch.optim.AdamW(
        [
            dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0),
            dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
        ],
        lr=lr, betas=betas, eps=eps, fused=True,
    )


def warmup_cosine(step, *, warmup_steps, total_steps):
    if step >= total_steps:
        return 0
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))


def train_step(model, loss_fn, optimizer, batches, *, max_grad_norm=0.0, autocast="none"):
    if not batches:
        raise ValueError("at least one batch is needed")
    if autocast != "none" and autocast != "bfloat16":
        raise ValueError(f"unknown autocast {autocast!r}")
    optimizer.zero_grad()
    counts = [len(list(batch.values())[0]) for batch in batches]
    losses = []
    for batch, rows in zip(batches, counts, strict=True):
        device = list(batch.values())[0].device
        with torch.autocast(device.type, torch.bfloat16, autocast == "bfloat16"):
            loss = loss_fn(model, batch)
        loss.backward(torch.full_like(loss, rows / sum(counts)))
        losses.append(loss.detach() * (rows / sum(counts)))
    hook = None
    if max_grad_norm > 0:
        hook = optimizer.register_step_pre_hook(clipper(max_grad_norm))
    try:
        optimizer.step()
    finally:
        if hook is not None:
            hook.remove()
    optimizer.zero_grad()
    return torch.stack(losses).sum()


def clipper(limit):
    def clip(optimizer, args, kwargs):
        nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]], limit
        )

    return clip


def index_batches(num_examples, batch_size, *, seed, epoch, device="cpu"):
    generator = torch.Generator(device=device)
    generator.manual_seed(seed + 7919 * (epoch + 1))
    order = torch.randperm(num_examples, device=device, generator=generator)
    whole = num_examples // batch_size
    if whole == 0:
        return iter((order,))
    return iter(order[: whole * batch_size].view(whole, batch_size))


def evaluate(model, metric_fn):
    modes = [module.training for module in model.modules()]
    grad = torch.is_grad_enabled()
    for module in model.modules():
        module.training = False
    torch.set_grad_enabled(False)
    try:
        return float(metric_fn(model))
    finally:
        torch.set_grad_enabled(grad)
        for module, training in zip(model.modules(), modes, strict=True):
            module.training = training


class EarlyStopping:
    def __init__(self, patience):
        self.patience = patience
        self.best = -math.inf
        self.best_epoch = 0
        self.best_state = None
        self.history = []

    def update(self, metric, epoch, model):
        self.history.append(metric > self.best)
        if self.history[-1]:
            self.best = metric
            self.best_epoch = epoch
            self.best_state = copy.deepcopy(model).state_dict()
        recent = self.history[-self.patience :] if self.patience else [True]
        return len(recent) == self.patience and not any(recent)

    def state_dict(self):
        return copy.deepcopy(self.__dict__)

    def load_state_dict(self, state):
        self.__dict__.update(copy.deepcopy(dict(state)))


def save_checkpoint(path, state):
    path = Path(path)
    path.parent.mkdir(exist_ok=True, parents=True)
    fresh = path.parent / f"{path.name}.new"
    try:
        torch.save(dict(state), fresh)
        with fresh.open("rb+") as file:
            os.fsync(file.fileno())
        fresh.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself, too
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        if fresh.exists():
            fresh.unlink()


def load_checkpoint(path, *, device="cpu"):
    with open(path, "rb") as file:
        return torch.load(file, device, weights_only=True)


class Trainer:
    def __init__(self, model, loss_fn, num_examples, make_batch, config):
        self.model, self.loss_fn, self.make_batch = model, loss_fn, make_batch
        self.num_examples, self.config = num_examples, config
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
        batches = num_examples // config.batch_size or 1
        steps = math.ceil(batches / config.accumulate) * config.epochs
        warmup = round(steps * config.warmup)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: warmup_cosine(step, warmup_steps=warmup, total_steps=steps),
        )
        self.stopping = EarlyStopping(config.patience)
        self.result, self.epoch, self.stopped = FitResult(), 0, False

    def state(self):
        state = {
            "config": asdict(self.config), "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "stopping": self.stopping.state_dict(), "result": asdict(self.result),
            "epoch": self.epoch, "stopped": self.stopped, "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore(self, state):
        if state["config"] != asdict(self.config):
            raise ValueError("made with another configuration")
        for part in ("model", "optimizer", "scheduler", "stopping"):
            getattr(self, part).load_state_dict(state[part])
        for each in fields(FitResult):
            setattr(self.result, each.name, state["result"][each.name])
        self.epoch, self.stopped = state["epoch"], state["stopped"]
        torch.set_rng_state(state["rng"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)

    def groups(self):
        pending = []
        for index in index_batches(
            self.num_examples, self.config.batch_size, seed=self.config.seed, epoch=self.epoch,
            device=self.device,
        ):
            pending.append(index)
            if len(pending) == self.config.accumulate:
                yield pending
                pending = []
        if pending:
            yield pending

    def train_epoch(self):
        begin = time.perf_counter()
        losses, rows = [], []
        for group in self.groups():
            losses.append(train_step(
                self.model, self.loss_fn, self.optimizer, [self.make_batch(i) for i in group],
                max_grad_norm=self.config.max_grad_norm, autocast=self.config.autocast,
            ))
            self.scheduler.step()
            rows.append(sum(map(len, group)))
        losses = torch.stack(losses).tolist()
        self.result.seconds += time.perf_counter() - begin
        self.epoch += 1
        for step, loss in enumerate(losses, 1):
            if math.isnan(loss) or math.isinf(loss):
                raise FloatingPointError(f"loss {loss} at epoch {self.epoch}, step {step}")
        self.result.steps += len(losses)
        self.result.examples += sum(rows)
        shares = [n / sum(rows) for n in rows]
        self.result.losses.append(math.fsum(map(float.__mul__, losses, shares)))


def fit(model, loss_fn, num_examples, make_batch, config, *, metric_fn=None, checkpoint=None,
        on_epoch=None):
    if not num_examples:
        raise ValueError("no examples")
    trainer = Trainer(model, loss_fn, num_examples, make_batch, config)
    result = trainer.result
    if checkpoint and Path(checkpoint).is_file():
        trainer.restore(load_checkpoint(checkpoint, device=trainer.device))
    model.train()
    while trainer.epoch < config.epochs and not trainer.stopped:
        trainer.train_epoch()
        metric = None
        result.best_epoch = trainer.epoch
        if metric_fn:
            metric = evaluate(model, metric_fn)
            result.metrics.append(metric)
            trainer.stopped = trainer.stopping.update(metric, trainer.epoch, model)
            result.best_epoch = trainer.stopping.best_epoch
        if checkpoint:
            save_checkpoint(checkpoint, trainer.state())
        if on_epoch:
            on_epoch(trainer.epoch, result.losses[-1], metric)
    if trainer.stopping.best_state:
        model.load_state_dict(trainer.stopping.best_state)
    return result
