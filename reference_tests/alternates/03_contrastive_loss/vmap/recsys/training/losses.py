"""Differs: the loss of one row, written for vectors, and torch.func.vmap over the rows."""

import torch
from torch.func import vmap


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
    index = torch.arange(len(user), device=user.device)
    ids = index if item_ids is None else item_ids
    wide = torch.promote_types(user.dtype, torch.float32)
    user, item = user.to(wide), item.to(wide)
    lower = torch.zeros(len(user), dtype=wide, device=user.device) if log_q is None else log_q

    def row(i, query, my_id, own, keys, correction):
        scores = (keys * 1.0) @ query / temperature - correction
        scores = torch.where((ids == my_id) & (index != i), -torch.inf, scores)
        return torch.logsumexp(scores, 0) - (query @ own / temperature - correction[i])

    over_rows = vmap(row, in_dims=(0, 0, 0, 0, None, None))
    with torch.autocast(user.device.type, enabled=False):
        loss = over_rows(index, user, ids, item, item, lower)
        if symmetric:
            back = over_rows(index, item, ids, user, user, torch.zeros_like(lower))
            loss = (loss + back) / 2
    return _mean(loss, sample_weight)


def full_softmax_loss(user, catalogue, target, *, temperature, sample_weight=None):
    _check(user, catalogue, temperature, False, target=target, sample_weight=sample_weight)
    wide = torch.promote_types(user.dtype, torch.float32)
    user, catalogue = user.to(wide), catalogue.to(wide)

    def row(query, chosen):
        scores = catalogue @ query / temperature
        onehot = torch.arange(len(catalogue), device=user.device) == chosen
        return torch.logsumexp(scores, 0) - torch.where(onehot, scores, 0).sum()

    with torch.autocast(user.device.type, enabled=False):
        return _mean(vmap(row)(user, target), sample_weight)


def _mean(loss, weight):
    if weight is None:
        return loss.mean()
    total = weight.sum()
    return (weight * loss).sum() / torch.where(total == 0, torch.ones_like(total), total)


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
