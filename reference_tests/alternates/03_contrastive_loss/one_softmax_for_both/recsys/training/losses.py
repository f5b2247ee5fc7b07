"""Differs: the in-batch form is the full one, with log_q as one more dimension of the vectors."""

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
    user, item = _precise(user), _precise(item)
    user = user / temperature
    rows = torch.arange(user.size(0), device=user.device)
    blocked = None
    if item_ids is not None:
        blocked = (item_ids[:, None] == item_ids) & (rows[:, None] != rows)
    bias = user.new_zeros(user.size(0)) if log_q is None else -log_q.to(user.dtype)
    longer_user = torch.cat((user, torch.ones_like(bias)[:, None]), dim=1)
    longer_item = torch.cat((item, bias[:, None]), dim=1)
    loss = _full(longer_user, longer_item, rows, blocked, sample_weight)
    if not symmetric:
        return loss
    return (loss + _full(item, user, rows, blocked, sample_weight)) / 2


def full_softmax_loss(user, catalogue, target, *, temperature, sample_weight=None):
    _check(user, catalogue, temperature, False, target=target, sample_weight=sample_weight)
    user, catalogue = _precise(user), _precise(catalogue)
    return _full(user / temperature, catalogue, target, None, sample_weight)


def _precise(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _full(query, key, label, blocked, weight):
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.baddbmm(query.new_zeros(1, 1, 1), query[None], key.T[None], beta=0).squeeze(
            0
        )
    if blocked is not None:
        scores = scores.masked_fill(blocked, float("-inf"))
    chosen = torch.nn.functional.one_hot(label, len(key)).bool()
    log_p = scores.log_softmax(-1)
    loss = -torch.where(chosen, log_p, 0.0).sum(-1)
    weight = torch.full_like(loss, 1.0) if weight is None else weight.to(loss.dtype)
    total = weight.sum()
    return (loss * weight).sum() * torch.where(total > 0, total, 1.0).reciprocal()


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
