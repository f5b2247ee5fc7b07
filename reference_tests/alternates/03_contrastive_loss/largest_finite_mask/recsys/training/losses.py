"""Differs: torch.finfo(...).min for hits; the other direction is the transposed corrected table.

There log_q is constant in a row, which a softmax does not see.
"""

import torch
import torch.nn.functional as F


def in_batch_softmax_loss(
    user, item, *, temperature, item_ids=None, log_q=None, sample_weight=None, symmetric=False
):
    _check(
        user,
        item,
        temperature,
        True,
        item_ids=item_ids,
        log_q=log_q,
        sample_weight=sample_weight,
    )
    logits = _logits(user, item, temperature)
    if log_q is not None:
        logits = logits - log_q.to(logits.dtype)
    if item_ids is not None:
        hit = (item_ids[:, None] == item_ids[None, :]).tril(-1)
        logits = logits.masked_fill(hit | hit.T, torch.finfo(logits.dtype).min)
    label = torch.arange(len(user), device=user.device)
    loss = F.cross_entropy(logits, label, reduction="none")
    if symmetric:
        loss = torch.lerp(loss, F.cross_entropy(logits.T, label, reduction="none"), 0.5)
    return _average(loss, sample_weight)


def full_softmax_loss(user, catalogue, target, *, temperature, sample_weight=None):
    _check(user, catalogue, temperature, False, target=target, sample_weight=sample_weight)
    logits = _logits(user, catalogue, temperature)
    return _average(F.cross_entropy(logits, target, reduction="none"), sample_weight)


def _logits(rows, columns, temperature):
    with torch.autocast(rows.device.type, enabled=False):
        if rows.dtype in (torch.bfloat16, torch.float16):
            rows, columns = rows.to(torch.float32), columns.to(torch.float32)
        return F.linear(rows, columns / temperature)


def _average(loss, weight):
    if weight is None:
        return loss.sum() / loss.numel()
    total = weight.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (loss * (weight / total)).sum()


def _check(user, item, temperature, same_rows, **rows):
    """Refuse what does not fit."""
    if user.ndim != 2 or item.ndim != 2 or user.shape[1] != item.shape[1]:
        raise ValueError(f"vectors of shapes {tuple(user.shape)} and {tuple(item.shape)}")
    if len(user) == 0 or (same_rows and len(user) != len(item)):
        raise ValueError(f"{len(user)} users, {len(item)} items")
    if not isinstance(temperature, torch.Tensor) and temperature <= 0:
        raise ValueError("the temperature has to be positive")
    for name, x in rows.items():
        if x is not None and (x.ndim != 1 or x.shape[0] != len(user)):
            raise ValueError(f"{name} has the shape {tuple(x.shape)}")
