"""Golden values of kata 02 in float64 NumPy: towers whose learned numbers are all the same.

With one number for all weights and biases of the linear maps, neither their names nor the order of
the parts matters: what a tower gives is known exactly. Histories here hold one item, once or
several times, so that the weights of places, whose formula is free, cancel.
"""

from __future__ import annotations

import numpy as np

SEED = 202
WIDTH = 3
ROWS = {"age": 4, "genres": 5, "item": 6}


def unit(vector):
    length = np.sqrt((vector**2).sum())
    return vector / length if length > 0 else vector


def mean_of(table, ids):
    rows = [table[i] for i in ids if i != 0]
    return np.mean(rows, axis=0) if rows else np.zeros(WIDTH)


def parts_of(tables, row, fill):
    """The parts of one row: a dict of columns, of which some may be missing."""
    parts = []
    if "age" in row:
        parts.append(tables["age"][row["age"]])
    if "genres" in row:
        parts.append(mean_of(tables["genres"], row["genres"]))
    if "history" in row:
        parts.append(mean_of(tables["item"], row["history"]))
        parts.append(tables["item"][row["history"][0]])
    if "year" in row:
        parts.append(np.full(WIDTH, fill * np.sum(row["year"]) + fill))
    if "plot" in row:
        parts.append(np.full(WIDTH, fill * np.sum(row["plot"])))
    return parts


def tower(tables, row, hidden_dims, fill):
    parts = parts_of(tables, row, fill)
    x = np.concatenate(parts)
    for width in hidden_dims:
        x = np.maximum(np.full((width, len(x)), fill) @ x + fill, 0)
    return unit(np.sum(parts, axis=0) + np.full((WIDTH, len(x)), fill) @ x + fill)


def case(tables, what, columns, hidden_dims=(), fill=0.0):
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    out = [tower(tables, row, hidden_dims, fill) for row in rows]
    return {"what": what, "hidden_dims": hidden_dims, "fill": fill, "batch": columns, "out": out}


def golden():
    rng = np.random.default_rng(SEED)
    tables = {name: rng.standard_normal((rows, WIDTH)).round(3) for name, rows in ROWS.items()}
    for table in tables.values():
        table[0] = 0
    year = rng.standard_normal((3, 2)).round(2)
    plot = rng.standard_normal((3, 4)).round(2)

    def some(what, columns, **how):
        return case(tables, what, columns, **how)

    sums = [
        some("an id and one genre", {"age": [1, 3, 2], "genres": [[2], [4], [1]]}),
        some("several genres", {"age": [3, 1], "genres": [[1, 4, 2], [3, 2, 4]]}),
        some("padding among genres", {"age": [2, 2, 1], "genres": [[3, 0, 0], [4, 1, 0], [0] * 3]}),
        some("a genre twice", {"age": [3, 1], "genres": [[1, 1, 4, 0], [2, 2, 2, 3]]}),
        some("twelve genres", {"age": [2], "genres": [[1, 4, 3, 3, 1, 2, 4, 4, 1, 1, 2, 3]]}),
        some("an id that is padding", {"age": [0, 0], "genres": [[1, 3], [0, 0]]}),
        some("one item in the history", {"age": [1, 2], "history": [[4], [5]]}),
        some("an item twice, padding", {"age": [3, 1], "history": [[2, 2, 0], [3, 0, 0]]}),
        some("no history", {"age": [3, 1], "history": [[0, 0], [1, 1]]}),
    ]
    ids = {"age": [1, 3, 2]}
    none = np.zeros((3, 4))
    linear = [
        some("dense numbers", {**ids, "year": year}, fill=0.3),
        some("dense numbers of 0: the bias", {**ids, "year": np.zeros((3, 2))}, fill=0.3),
        some("texts", {**ids, "plot": plot}, fill=0.3),
        some("texts of 0: nothing", {**ids, "plot": none}, fill=0.3),
        some("both", {**ids, "year": 9 * year, "plot": plot}, fill=-0.2),
    ]
    both = {"genres": [[4, 1, 0], [0, 0, 0], [2, 0, 0]], "history": [[5, 5, 0], [2, 0, 0], [0] * 3]}
    everything = {"age": [1, 0, 3], **both, "year": year, "plot": plot}
    mlp = [
        some(f"hidden_dims={hidden}", everything, hidden_dims=hidden, fill=fill)
        for hidden in ((), (4,), (5, 4), (7, 5, 4))
        for fill in (0.3, -0.2)
    ]
    return {"tables": tables, "sums": sums, "linear": linear, "mlp": mlp}
