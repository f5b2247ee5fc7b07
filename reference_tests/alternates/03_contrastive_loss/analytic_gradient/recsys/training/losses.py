"""Differs: an autograd.Function with the gradient written by hand, p - onehot."""

import torch
from torch.autograd.function import once_differentiable


class SoftmaxLoss(torch.autograd.Function):
    """Weighted mean of -log softmax(scores)[label]; what is not allowed has no part."""

    @staticmethod
    def forward(ctx, scores, label, allowed, weight):
        scores = scores.masked_fill(~allowed, -torch.inf)
        top = scores.amax(dim=1, keepdim=True)
        odds = (scores - top).exp()
        total = odds.sum(dim=1, keepdim=True)
        ctx.save_for_backward(odds / total, label, weight)
        own = scores.gather(1, label[:, None])
        return ((total.log() + top - own)[:, 0] * weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        probability, label, weight = ctx.saved_tensors
        ones = torch.ones_like(probability[:, :1])
        slope = probability.scatter_add(1, label[:, None], -ones)
        return upstream * slope * weight[:, None], None, None, None


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
    scores = _scores(user, item, temperature)
    label = torch.arange(len(user), device=user.device)
    allowed = label[:, None] == label
    allowed = allowed | (True if item_ids is None else item_ids[:, None] != item_ids)
    weight = _shares(scores, sample_weight)
    corrected = scores if log_q is None else scores - log_q
    loss = SoftmaxLoss.apply(corrected, label, allowed, weight)
    if symmetric:
        loss = (loss + SoftmaxLoss.apply(scores.T, label, allowed, weight)) / 2
    return loss


def full_softmax_loss(user, catalogue, target, *, temperature, sample_weight=None):
    _check(user, catalogue, temperature, False, target=target, sample_weight=sample_weight)
    scores = _scores(user, catalogue, temperature)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    return SoftmaxLoss.apply(scores, target, allowed, _shares(scores, sample_weight))


def _scores(user, item, temperature):
    dtype = torch.promote_types(user.dtype, torch.float32)
    with torch.autocast(user.device.type, enabled=False):
        return (user.to(dtype) @ item.to(dtype).mT) / temperature


def _shares(scores, weight):
    if weight is None:
        return torch.full_like(scores[:, 0], 1 / len(scores)).detach()
    total = weight.sum()
    return (weight / total.masked_fill(total == 0, torch.inf)).to(scores.dtype)


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
