"""Contrastive losses for retrieval: softmax over the batch, and over everything (kata 03)."""

from __future__ import annotations

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
    raise NotImplementedError(
        "kata 03: write in_batch_softmax_loss in src/recsys/training/losses.py"
    )


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
    raise NotImplementedError("kata 03: write full_softmax_loss in src/recsys/training/losses.py")
