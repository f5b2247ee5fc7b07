"""One in-batch softmax training step beside the least that this machine needs for it.

The step is run once under a dispatch mode that counts, for each operation, the bytes that it has to
read and write (each tensor once; of a table that is looked up, the rows) and the FLOPs of its
matrix products. An operation takes at least the longer of bytes / copy rate and FLOPs / matmul
rate, and the bound is the sum over the step. Both rates are measured in the same rounds: the copy
of a (B, B) table, the largest that a step makes, and a product of 1024 x 1024 matrices. What costs
arithmetic other than products (exponentials, the random numbers of dropout) counts as bytes only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from harness.bench.speed import in_turns, ratios, retrieval_data, spread, table
from harness.cost import is_view

BATCH_SIZES = (1024, 2048)
SIDE = 1024  # of the matrices whose product gives the rate
LOOKUPS = {"embedding", "index", "index_select", "gather"}


class Work(NamedTuple):
    """What one operation has to do."""

    operation: str
    bytes: int
    flops: int


class Counter(TorchDispatchMode):
    """Lists the work of every operation that computes or moves something."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "aten" and not is_view(func):
            packet = func.overloadpacket
            flops = (
                flop_registry[packet](*args, **kwargs, out_val=out)
                if packet in flop_registry
                else 0
            )
            name = func._schema.name.partition("::")[2]
            self.done.append(Work(name, moved(name, func, args, kwargs, out), flops))
        return out


def moved(name: str, func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Bytes that an operation reads and writes, each tensor once."""
    given = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    made = {id(x): x for x in tree_leaves(out) if isinstance(x, Tensor)}
    fresh = sum(size(x) for key, x in made.items() if key not in given)
    if name in LOOKUPS:  # as many bytes are read as come out
        index = sum(size(x) for x in given.values() if x.dtype == torch.int64)
        return 2 * fresh + min(index, fresh)
    if name == "_embedding_bag":  # weight, indices, ...: a row for each index
        weight, indices = args[0], args[1]
        return fresh + size(indices) + indices.numel() * weight.shape[1] * weight.element_size()
    written = 0
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += sum(size(x) for x in tree_leaves(value) if isinstance(x, Tensor))
    return sum(size(x) for x in given.values()) + fresh + written


def size(x: Tensor) -> int:
    """Bytes of what a tensor shows; an expanded one is as large as its storage."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def count(step: Callable[[], Any]) -> list[Work]:
    """What a step does, operation by operation."""
    with Counter() as counter:
        step()
    return counter.done


def bound(work: list[Work], copy_rate: float, matmul_rate: float) -> float:
    """Seconds: the sum of what each operation needs at least."""
    return sum(max(each.bytes / copy_rate, each.flops / matmul_rate) for each in work)


def launches(x: Tensor) -> None:
    """A thousand operations with nothing to compute."""
    for _ in range(1000):
        x.add_(1)


def measure(args: argparse.Namespace) -> list[str]:
    """A line for each batch size; on a GPU for each way to run the step."""
    from recsys import pipeline
    from recsys.training import loop

    device = args.device
    dataset, _, settings, data = retrieval_data(args)
    fit = loop.FitConfig(**settings["fit"])
    rows, notes = [], []
    for batch_size in BATCH_SIZES:
        if len(data.positions) < batch_size:
            notes.append(f"{dataset.name} has fewer than {batch_size:,} examples.")
            continue
        index = next(loop.index_batches(len(data.positions), batch_size, seed=0, epoch=0,
                                        device=device))  # fmt: skip

        def stepper(wrap: Callable[[Any], Any], index: Tensor = index) -> Callable[[], Any]:
            torch.manual_seed(0)
            model = pipeline.build_retrieval(data, settings).to(device).train()
            optimizer = loop.make_optimizer(model, lr=fit.lr, weight_decay=fit.weight_decay)
            loss = wrap(pipeline.retrieval_loss(data, settings))

            def step() -> None:
                batch = data.example_batch(index)
                loop.train_step(model, loss, optimizer, [batch], max_grad_norm=fit.max_grad_norm)

            return step

        contestants = {"eager": stepper(lambda loss: loss)}
        if device.type == "cuda":
            contestants["compiled"] = stepper(torch.compile)
            contestants["CUDA graph"] = stepper(
                lambda loss: torch.compile(loss, mode="reduce-overhead")
            )
        work = count(contestants["eager"])
        table_, target = torch.randn(2, batch_size, batch_size, device=device)
        left, right, product = torch.randn(3, SIDE, SIDE, device=device)
        tiny = torch.zeros(1, device=device)
        yardsticks: dict[str, Callable[[], Any]] = {
            "copy": partial(target.copy_, table_),
            "matmul": partial(torch.mm, left, right, out=product),
            "launches": partial(launches, tiny),
        }
        times = in_turns(contestants | yardsticks, args.rounds, device)
        copied = 2 * size(table_)
        least, copies, products = [], [], []
        rates = (times[name].own(device) for name in yardsticks)
        for copy, matmul, launch in zip(*rates, strict=True):
            copies.append(copied / copy / 1e9)
            products.append(2 * SIDE**3 / matmul / 1e9)
            seconds = bound(work, copied / copy, 2 * SIDE**3 / matmul)
            waiting = len(work) * launch / 1000 if device.type == "cuda" else 0.0
            least.append(max(seconds, waiting))
        for name in contestants:
            rows.append([
                f"B = {batch_size:,}, {name}",
                spread(times[name].wall, 1e3),
                spread(times[name].cpu, 1e3),
                spread(least, 1e3),
                spread(ratios(times[name].own(device), least), digits=2),
                f"{len(work)}",
                f"{sum(each.bytes for each in work) / 1e6:,.0f}",
                f"{sum(each.flops for each in work) / 1e6:,.0f}",
                spread(copies),
                spread(products),
            ])  # fmt: skip
    if device.type != "cuda":
        notes.append("No GPU: with `--device cuda` compiled and CUDA graph stand beside eager, "
                     "and the bound is not below the time of as many launches.")  # fmt: skip
    head = ["", "ms", "CPU ms", "bound, ms", "x the bound", "operations", "MB", "MFLOP",
            "copy, GB/s", "matmul, GFLOP/s"]  # fmt: skip
    about = (
        f"{dataset.name}, dim {settings['dim']}, history {settings['max_history']}, dropout "
        f"{settings['dropout']}; batch, forward, backward, clipping, fused AdamW."
    )
    return [about, "", *table(head, rows), "", *notes]
