"""Differs: torch.nn's module, with the rows' weights as its class weights; a mask that is added."""

import torch
from torch import nn


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
    batch, device = user.shape[0], user.device
    kind = torch.float64 if user.dtype == torch.float64 else torch.float32
    with torch.autocast(device.type, enabled=False):
        scores = torch.einsum("id,jd->ij", user.to(kind), item.to(kind)) / temperature
    if item_ids is not None:
        copies = item_ids.eq(item_ids.reshape(-1, 1)).to(kind) - torch.eye(batch, device=device)
        scores = scores + torch.zeros_like(scores).masked_fill(copies > 0, -1e30)
    label = torch.arange(0, batch, device=device)
    # class i is the label of row i alone, so a class weight is a row weight
    weight = torch.ones(batch, device=device) if sample_weight is None else sample_weight
    some = weight.sum() > 0
    criterion = nn.CrossEntropyLoss(weight=torch.where(some, weight, 1.0).to(kind))
    loss = criterion(scores if log_q is None else scores - log_q, label)
    if symmetric:
        loss = torch.stack([loss, criterion(scores.T, label)]).mean()
    return loss * some


def full_softmax_loss(user, catalogue, target, *, temperature, sample_weight=None):
    _check(user, catalogue, temperature, False, target=target, sample_weight=sample_weight)
    kind = torch.float64 if user.dtype == torch.float64 else torch.float32
    with torch.autocast(user.device.type, enabled=False):
        scores = torch.einsum("id,nd->in", user.to(kind), catalogue.to(kind)) / temperature
    loss = nn.CrossEntropyLoss(reduction="none")(scores, target)
    weight = torch.ones_like(loss) if sample_weight is None else sample_weight.to(kind)
    some = weight.sum() > 0
    weight = torch.where(some, weight, 1.0)
    return some * (loss * weight).sum() / weight.sum()


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
