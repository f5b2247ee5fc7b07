"""In-batch softmax over the rows of all processes, for `DistributedDataParallel`.

Provided, not a kata: docs/distributed.md says how it is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def own_rows(index: Tensor) -> Tensor:
    """This process's part of a global batch of example indices, in the order of ranks.

    Every process draws the same batches (`index_batches` depends on seed and epoch alone), so that
    nothing has to be sent around.

    Args:
        index: (B,), the same in every process.

    Raises:
        ValueError: B is not a multiple of the number of processes.
    """
    world = dist.get_world_size()
    if len(index) % world:
        raise ValueError(f"a batch of {len(index)} rows cannot be shared by {world} processes")
    return index.chunk(world)[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """The rows of all processes in the order of ranks, (b, ...) to (world * b, ...).

    Differentiable: a row's gradient is the sum of what all processes have for it.
    `torch.distributed.all_gather` alone gives tensors without a gradient: each row would
    learn from its own process only.
    """
    return _Gather.apply(x)


def distributed_softmax_loss(
    user: Tensor,
    item: Tensor,
    *,
    temperature: float | Tensor,
    item_ids: Tensor | None = None,
    log_q: Tensor | None = None,
    sample_weight: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """`in_batch_softmax_loss` (kata 03) of the rows of all processes together.

    Each process has b rows of the batch of B = world * b, the same number everywhere. It scores
    its users against the items of all, (b, B), with accidental hits and logQ across processes.

    The value is that of the whole batch, the same in every process. Its gradient is this process's
    share times the number of processes, so that the mean over processes, which is what
    `DistributedDataParallel` takes, is the gradient of the whole batch.

    Args:
        user, item: (b, D) of this process. The others: of its rows, as in kata 03.
    """
    rows, first = len(user), len(user) * dist.get_rank()
    own = torch.arange(first, first + rows, device=user.device)
    dtype = torch.promote_types(user.dtype, torch.float32)
    bias = torch.zeros(rows, rows * dist.get_world_size(), dtype=dtype, device=user.device)
    if item_ids is not None:
        hit = item_ids[:, None] == gather(item_ids)
        bias.masked_fill_(hit.scatter_(1, own[:, None], False), float("-inf"))
    corrected = bias if log_q is None else bias - gather(log_q).to(dtype)

    def one_way(row: Tensor, candidate: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(row.device.type, enabled=False):
            scores = torch.addmm(bias, row.to(dtype) / temperature, gather(candidate.to(dtype)).T)
        return F.cross_entropy(scores, own, reduction="none")

    loss = one_way(user, item, corrected)
    if symmetric:
        loss = (loss + one_way(item, user, bias)) / 2
    weight = torch.ones_like(loss) if sample_weight is None else sample_weight.to(loss.dtype)
    total = weight.sum()
    dist.all_reduce(total)
    share = (loss * weight).sum() / total.masked_fill(total == 0, 1.0)
    whole = share.detach().clone()
    dist.all_reduce(whole)
    world = dist.get_world_size()
    return share * world + (whole - share.detach() * world)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # it may belong to others
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]
