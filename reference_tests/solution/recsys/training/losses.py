"""Contrastive losses for retrieval: softmax over the batch, and over everything (kata 03)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def in_batch_softmax_loss(
    user: Tensor,
    item: Tensor,
    *,
    temperature: float | Tensor,
    item_ids: Tensor | None = None,
    log_q: Tensor | None = None,
    sample_weight: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """Softmax cross-entropy in which the other items of the batch are the negatives.

    Row i is a user and the item they chose; the candidates of row i are all items of the batch::

        s[i, j] = <user[i], item[j]> / temperature - log_q[j]
        loss[i] = -s[i, i] + log sum_{j in C(i)} exp(s[i, j])
        result  = sum_i w[i] * loss[i] / sum_i w[i]

    - **logQ correction**: popular items are in the batch more often than a uniform sample would
      have them. ``log_q[j]`` is the logarithm of the probability that item j is in the batch, of
      the stream and not of this batch. It is subtracted AFTER the division by the temperature,
      from every candidate, the positive included. At serving time nothing is sampled and nothing
      is subtracted.
    - **Accidental hits**: with ``item_ids``, ``C(i) = {i} | {j : item_ids[j] != item_ids[i]}``. The
      same item in another row is no negative, so it leaves the denominator; it is not counted as
      a second positive either. Every row keeps its own term. Identity is a matter of ids, never
      of vectors, and no id is special. Without ``item_ids`` all rows are candidates.
    - **Weights**: ``sample_weight`` is w, default 1 for each row. Only their ratios matter, however
      small they all are (down to sums of 1e-10); if they add up to 0 the result is 0 (with
      zero gradients). A row of weight 0 is still a candidate of the others.
    - **Symmetric form**: the mean of the above and of the same loss with users as the candidates
      of an item: ``s'[j, i] = <user[i], item[j]> / temperature`` over the same C, with the same
      weights. There the candidates are users, so logQ, a property of items, has no part in it.

    The loss is computed in float32 at least (bfloat16 and float16 inputs are converted first,
    float64 stays, and autocast has no effect on it) and is exact at small temperatures too, where
    exp overflows and a probability rounds to 0 (log-sum-exp, never exp alone). Inputs are not
    changed.

    Cost, of both losses: the number of tensor operations does not grow with B (no Python loop over
    rows; chunks of a hundred rows are fine), no tensor is larger than the scores or the inputs
    (nothing of (B, B, D)), and nothing is read back to the host, which would wait for the GPU: no
    ``.item()``, no ``if`` on a tensor's value, no result whose shape depends on values (an index by
    a boolean mask, ``unique``). What is made inside is made on the device of the inputs.

    Args:
        user, item: (B, D) floating point, B >= 1; row i of one belongs to row i of the other.
        temperature: above 0; a 0-dim tensor gets a gradient.
        item_ids: (B,) integers. log_q: (B,) float32 or float64. sample_weight: the same, none
            below 0.
        symmetric: whether to average both directions.

    Returns:
        A 0-dim tensor that can be differentiated; 0 for B = 1.

    Raises:
        ValueError: shapes that do not fit, an empty batch, a temperature (a number) of 0 or less.

    Source: Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
    Recommendations", equations 3 to 5; symmetric form: Radford et al. 2021 (CLIP), figure 3.
    """
    _check_pair(user, item)
    _check_temperature(temperature)
    rows = (len(user),)
    for name, x in (("item_ids", item_ids), ("log_q", log_q), ("sample_weight", sample_weight)):
        if x is not None and x.shape != rows:
            raise ValueError(f"{name} must have shape {rows}, not {tuple(x.shape)}")
    # whatever does not depend on the model is gathered in one (B, B) table, added within the matmul
    bias = user.new_zeros(rows * 2)
    if item_ids is not None:
        hit = item_ids[:, None] == item_ids[None, :]
        bias.masked_fill_(hit.fill_diagonal_(False), float("-inf"))
    corrected = bias if log_q is None else bias - log_q
    loss = _softmax_loss(_scores(user, item, temperature, corrected))
    if symmetric:  # the table of hits is its own transpose
        loss = (loss + _softmax_loss(_scores(item, user, temperature, bias))) / 2
    return _weighted_mean(loss, sample_weight)


def full_softmax_loss(
    user: Tensor,
    catalogue: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy over the whole catalogue: what the in-batch form approximates.

    ``loss[i] = -s[i, target[i]] + log sum_n exp(s[i, n])`` with
    ``s = user @ catalogue.T / temperature``; nothing is sampled, so there is neither logQ nor an
    accidental hit. Where the batch holds each item of the catalogue once,
    :func:`in_batch_softmax_loss` gives the same.

    Args:
        user: (B, D). catalogue: (N, D), all items. target: (B,) int64 in ``0 .. N - 1``.
        temperature, sample_weight: as for :func:`in_batch_softmax_loss`.

    Returns:
        A 0-dim tensor; precision, gradients and cost as for :func:`in_batch_softmax_loss`.

    Raises:
        ValueError: shapes that do not fit, an empty batch, a temperature (a number) of 0 or less.
    """
    if user.dim() != 2 or catalogue.dim() != 2 or user.shape[1] != catalogue.shape[1]:
        raise ValueError(
            "user and catalogue must be (B, D) and (N, D), "
            f"not {tuple(user.shape)} and {tuple(catalogue.shape)}"
        )
    rows = (len(user),)
    if rows == (0,) or target.shape != rows:
        raise ValueError(f"target must have shape {rows} with B >= 1, not {tuple(target.shape)}")
    if sample_weight is not None and sample_weight.shape != rows:
        raise ValueError(f"sample_weight must have shape {rows}, not {tuple(sample_weight.shape)}")
    _check_temperature(temperature)
    logits = _scores(user, catalogue, temperature)
    return _weighted_mean(_softmax_loss(logits, target), sample_weight)


def _scores(
    row: Tensor, candidate: Tensor, temperature: float | Tensor, bias: Tensor | None = None
) -> Tensor:
    """``row @ candidate.T / temperature + bias``, (B, N), in float32 at least (autocast too)."""
    dtype = torch.promote_types(row.dtype, torch.float32)
    with torch.autocast(row.device.type, enabled=False):
        row = row.to(dtype) / temperature  # of (B, D): much smaller than the (B, N) scores
        candidate = candidate.to(dtype)
        if bias is None:
            return row @ candidate.T
        return torch.addmm(bias.to(dtype), row, candidate.T)


def _softmax_loss(logits: Tensor, label: Tensor | None = None) -> Tensor:
    """Cross-entropy of each row, by default with its diagonal entry as the label."""
    if label is None:
        label = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, label, reduction="none")


def _weighted_mean(loss: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return loss.mean()
    total = weight.sum()
    return (loss * weight).sum() / total.masked_fill(total == 0, 1.0)


def _check_pair(user: Tensor, item: Tensor) -> None:
    if user.dim() != 2 or user.shape != item.shape or len(user) == 0:
        raise ValueError(
            "user and item must both be (B, D) with B >= 1, "
            f"not {tuple(user.shape)} and {tuple(item.shape)}"
        )


def _check_temperature(temperature: float | Tensor) -> None:
    # a tensor's value is left alone: looking at it would synchronise with the GPU
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
