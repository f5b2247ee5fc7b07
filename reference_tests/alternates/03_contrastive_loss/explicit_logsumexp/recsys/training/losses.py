"""Differs: log-sum-exp minus the diagonal, one (B, B) table, hits filled, all written out twice."""

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
    if user.dtype != torch.float64:
        user, item = user.float(), item.float()
    with torch.autocast(user.device.type, enabled=False):
        similarity = torch.matmul(user, item.t()) / temperature
        scores = similarity
        if log_q is not None:
            scores = scores - log_q.unsqueeze(0)
        if item_ids is not None:
            eye = torch.eye(len(user), dtype=torch.bool, device=user.device)
            out = torch.eq(item_ids.unsqueeze(0), item_ids.unsqueeze(1)) & ~eye
            scores = scores.masked_fill(out, -torch.inf)
            similarity = similarity.masked_fill(out, -torch.inf)
        loss = torch.logsumexp(scores, dim=1) - torch.diagonal(scores)
        if symmetric:
            back = torch.logsumexp(similarity, dim=0) - torch.diagonal(similarity)
            loss = 0.5 * loss + 0.5 * back
    if sample_weight is None:
        return loss.mean()
    total = sample_weight.sum()
    share = sample_weight / torch.where(total > 0, total, torch.ones_like(total))
    return torch.dot(share.to(loss.dtype), loss)


def full_softmax_loss(user, catalogue, target, *, temperature, sample_weight=None):
    _check(user, catalogue, temperature, False, target=target, sample_weight=sample_weight)
    if user.dtype != torch.float64:
        user, catalogue = user.float(), catalogue.float()
    with torch.autocast(user.device.type, enabled=False):
        scores = torch.matmul(user, catalogue.t()) / temperature
    own = torch.take_along_dim(scores, target[:, None], dim=1)[:, 0]
    loss = torch.logsumexp(scores, dim=1) - own
    if sample_weight is None:
        return loss.mean()
    total = sample_weight.sum()
    share = sample_weight / torch.where(total > 0, total, torch.ones_like(total))
    return torch.dot(share.to(loss.dtype), loss)


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
