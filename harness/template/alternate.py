"""A projection: the identity less the matrix that takes the mean."""

import torch


def centre(x, *, weights=None):
    if x.ndim != 2 or not x.numel():
        raise ValueError("expected a matrix with rows")
    weights = torch.ones_like(x[:, 0]) if weights is None else weights
    if weights.ndim != 1 or len(weights) != len(x):
        raise ValueError("expected a weight for each row")
    mean = (weights / weights.sum()).expand(len(x), len(x))
    return (torch.eye(len(x), dtype=x.dtype, device=x.device) - mean) @ x
