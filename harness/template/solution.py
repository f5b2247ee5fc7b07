"""TITLE (kata NN)."""

from __future__ import annotations

from torch import Tensor


def centre(x: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Subtract from each row the mean of all rows: ``x - mean(x, dim=0)``.

    Args:
        x: (N, D) floating point, N at least 1; not changed.
        weights: (N,) weight of each row in the mean, in the dtype of ``x``; default: all alike.

    Returns:
        (N, D), in the dtype and on the device of ``x``.

    Raises:
        ValueError: ``x`` that is not 2-D or has no rows; weights of another shape than (N,).

    Source: the paper, its section and equation.
    """
    if x.dim() != 2 or len(x) == 0:
        raise ValueError(f"x must be 2-D with at least one row, not of shape {tuple(x.shape)}")
    if weights is None:
        return x - x.mean(dim=0)
    if weights.shape != x.shape[:1]:
        raise ValueError(f"weights must be of shape {(len(x),)}, not {tuple(weights.shape)}")
    return x - weights @ x / weights.sum()
