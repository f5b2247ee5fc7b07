"""Differs: both directions as one batch of 2 tables, logaddexp of the positive and the rest."""

import torch


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
    if user.dtype.itemsize < 4:
        user, item = user.float(), item.float()
    with torch.autocast(user.device.type, enabled=False):
        scores = torch.inner(user / temperature, item)
    lowered = scores if log_q is None else scores - log_q.expand_as(scores)
    tables = torch.stack([lowered, scores.T]) if symmetric else lowered[None]
    positive = tables.diagonal(dim1=1, dim2=2)
    rival = ~torch.eye(len(user), dtype=torch.bool, device=user.device)
    if item_ids is not None:
        rival = item_ids.view(-1, 1).ne(item_ids.view(1, -1))
    # a finite floor: logsumexp of nothing but infinities has no gradient
    floor = torch.finfo(tables.dtype).min
    rest = torch.where(rival, tables, floor).logsumexp(dim=2)
    loss = torch.logaddexp(positive, rest) - positive
    weight = torch.ones(len(user), device=user.device) if sample_weight is None else sample_weight
    weight = weight.to(loss.dtype).expand_as(loss)
    total = weight.sum()
    return torch.sum(loss * weight) / (total + total.eq(0).to(total.dtype))


def full_softmax_loss(user, catalogue, target, *, temperature, sample_weight=None):
    _check(user, catalogue, temperature, False, target=target, sample_weight=sample_weight)
    if user.dtype.itemsize < 4:
        user, catalogue = user.float(), catalogue.float()
    with torch.autocast(user.device.type, enabled=False):
        scores = torch.inner(user / temperature, catalogue)
        own = (user / temperature * catalogue.index_select(0, target)).sum(dim=1)
    loss = scores.logsumexp(dim=1) - own
    weight = torch.ones(len(user), device=user.device) if sample_weight is None else sample_weight
    total = weight.sum()
    return torch.sum(loss * weight) / (total + total.eq(0).to(total.dtype))


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
