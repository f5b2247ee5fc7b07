"""Differs: 128 rows at a time, in a class; (B, B) never exists whole."""

import torch

CHUNK = 128


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
    rows = torch.arange(len(user), device=user.device)
    loss = Rows(user, item, temperature, rows, item_ids, log_q).losses()
    if symmetric:
        loss = (loss + Rows(item, user, temperature, rows, item_ids, None).losses()) / 2
    return mean(loss, sample_weight)


def full_softmax_loss(user, catalogue, target, *, temperature, sample_weight=None):
    _check(user, catalogue, temperature, False, target=target, sample_weight=sample_weight)
    return mean(Rows(user, catalogue, temperature, target, None, None).losses(), sample_weight)


class Rows:
    def __init__(self, query, key, temperature, label, ids, log_q):
        self.wide = torch.float64 if query.dtype is torch.float64 else torch.float32
        self.query, self.key = query.type(self.wide), key.type(self.wide)
        self.temperature, self.label, self.ids, self.log_q = temperature, label, ids, log_q

    def losses(self):
        starts = range(0, len(self.query), CHUNK)
        with torch.autocast(self.query.device.type, enabled=False):
            return torch.cat([self.part(slice(start, start + CHUNK)) for start in starts])

    def part(self, rows):
        scores = self.query[rows] @ self.key.T
        scores = scores / self.temperature
        if self.log_q is not None:
            scores = scores.sub(self.log_q)
        label = self.label[rows, None]
        own = scores.gather(1, label)
        if self.ids is not None:
            scores = torch.where(self.ids[rows, None] == self.ids, -torch.inf, scores)
            scores = scores.scatter(1, label, own)
        return (scores.logsumexp(1, keepdim=True) - own).flatten()


def mean(loss, weight):
    if weight is None:
        return loss.mean()
    norm = weight.norm(p=1)
    return loss.mul(weight).sum().div(norm.masked_fill(norm.eq(0), 1))


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
