"""Differs: everything in float64, the result too; negative log-likelihood of a log-softmax."""

import torch
from torch.nn.functional import log_softmax, nll_loss


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
    with torch.autocast(user.device.type, enabled=False):
        scores = user.double().div(temperature).mm(item.double().T)
    rows = torch.arange(len(user), device=user.device)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if item_ids is not None:
        allowed = (item_ids[None] != item_ids[:, None]) | (rows[None] == rows[:, None])
    nothing = torch.zeros((), dtype=scores.dtype, device=user.device)
    correction = nothing if log_q is None else log_q.double()
    loss = _rows(torch.where(allowed, scores - correction, -torch.inf), rows)
    if symmetric:
        loss = (loss + _rows(torch.where(allowed, scores, -torch.inf).T, rows)) / 2
    return _mean(loss, sample_weight)


def full_softmax_loss(user, catalogue, target, *, temperature, sample_weight=None):
    _check(user, catalogue, temperature, False, target=target, sample_weight=sample_weight)
    with torch.autocast(user.device.type, enabled=False):
        scores = user.double().div(temperature).mm(catalogue.double().T)
    return _mean(_rows(scores, target), sample_weight)


def _rows(scores, label):
    return nll_loss(log_softmax(scores, dim=-1), label, reduction="none")


def _mean(loss, weight):
    weight = torch.ones_like(loss) if weight is None else weight.double()
    total = weight.sum()
    return (loss * weight).sum() / (total + (total == 0))


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
