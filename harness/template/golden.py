"""Golden values of kata NN: rows less their mean."""

from __future__ import annotations

import numpy as np

SEED = 1


def golden():
    x = np.random.default_rng(SEED).standard_normal((4, 3)).round(3)
    return {"x": x, "centred": x - x.mean(axis=0)}
