"""Differs: softplus of the log-sum-exp of the negatives relative to the positive."""

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
    own = torch.eye(len(user), dtype=torch.bool, device=user.device)
    out = own if item_ids is None else own | (item_ids[:, None] == item_ids[None, :])
    scores = _scores(user, item, temperature)
    corrected = scores if log_q is None else scores - log_q
    loss = _against(corrected, corrected.diagonal(), out)
    if symmetric:
        loss = (loss + _against(scores.T, scores.diagonal(), out)) / 2
    return _mean(loss, sample_weight)


def full_softmax_loss(user, catalogue, target, *, temperature, sample_weight=None):
    _check(user, catalogue, temperature, False, target=target, sample_weight=sample_weight)
    scores = _scores(user, catalogue, temperature)
    own = torch.arange(len(catalogue), device=user.device) == target[:, None]
    return _mean(_against(scores, scores.gather(1, target[:, None])[:, 0], own), sample_weight)


def _against(scores, positive, out):
    """log(1 + sum of exp(negative - positive)); without a negative that is 0."""
    lowest = torch.finfo(scores.dtype).min
    margin = (scores - positive[:, None]).masked_fill(out, lowest)
    return F.softplus(margin.logsumexp(dim=1), threshold=40)


def _scores(rows, columns, temperature):
    dtype = torch.promote_types(rows.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        return rows.to(dtype) @ columns.to(dtype).transpose(0, 1) / temperature


def _mean(loss, weight):
    if weight is None:
        return torch.mean(loss)
    total = torch.sum(weight)
    return torch.where(total == 0, 0.0, 1 / total.where(total != 0, 1.0)) * (weight * loss).sum()


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
