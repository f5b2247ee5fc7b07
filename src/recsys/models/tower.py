"""Towers: a user or an item, described by mixed features, as one unit vector (kata 02)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from recsys.data.features import Feature
from recsys.models.embedding import EmbeddingTable


class Tower(nn.Module):
    """Map a batch of mixed features to unit vectors of width ``dim``.

    Each feature becomes one or two vectors of width ``dim``, its *parts*, by its kind:

    =============  ==================  =======================================================
    kind           column in a batch   parts
    =============  ==================  =======================================================
    ``id``         (B,) int64          its row of the table
    ``multi_hot``  (B, L) int64        mean of the rows, an id that occurs twice counting twice;
                                       padding (0) is left out, none gives zeros
    ``history``    (B, L) int64        two: the recency-weighted mean of the rows, with one learned
                                       non-negative weight for each place (0 = most recent, padding
                                       left out, none gives zeros), and the row of the last item
                                       (column 0; zeros if there is none)
    ``dense``      (B, size) float     linear map with a bias
    ``text``       (B, size) float     linear map of the frozen text vector, without bias: no text
                                       (all zeros) adds nothing
    =============  ==================  =======================================================

    The output is ``normalize(sum(parts) + mlp(concat(parts)))``: a residual, so that the MLP only
    has to learn what is missing from the plain sum. The MLP has a Linear, ReLU and dropout for each
    of ``hidden_dims`` and ends in a Linear without activation; with ``hidden_dims=()`` it is that
    last Linear alone. Each Linear has a bias. Dropout also acts on what enters the MLP, and nowhere
    else: the sum of the parts is never dropped.

    Contract:
        - every row of the output has Euclidean norm 1, be it of length 1e-5 or 1e5 before; a zero
          vector stays zero, and its gradients are finite;
        - a row depends on nothing but its own features: not on the rest of the batch;
        - columns are found by name; their order in the mapping means nothing, nor do their
          strides; columns that the tower has no feature for are ignored, whatever they hold;
        - padding has no influence, and neither has how much of it there is; a history of fewer
          places than ``max_history``, of none even, is fine, a longer one is cut there;
        - the order inside ``multi_hot`` means nothing; the order of a history does;
        - features share nothing but tables: each has its own linear map or weights of places;
        - all that is learned is a parameter from the start, has a gradient and is in
          ``state_dict``; how it is called and initialised is free;
        - the output has the dtype of the parameters (``tower.double()`` computes in float64);
          float columns of another dtype are converted to it, at once;
        - ``eval()`` makes it deterministic; inputs and the mode are not changed;
        - cost: a forward pass takes as many operations for many rows as for few, and no memory
          that grows with the size of a table.

    Args:
        features: at least one, with distinct names (``recsys.data.features.Feature``).
        dim: width of every part and of the output.
        hidden_dims: widths of the MLP's hidden layers.
        dropout: probability, 0 <= dropout < 1.
        max_history: places of a history that have a weight of their own.
        tables: embedding tables to use, by table name (``feature.table or feature.name``); those
            not given are made, those that no feature names are left alone. Features that name
            the same table share it.

    Raises:
        ValueError: no features, two of one name, an unknown kind, two sizes for one table, a
            given table that does not fit: it needs ``size`` rows of width ``dim``.

    Source: Covington et al. 2016, "Deep Neural Networks for YouTube Recommendations", section 3;
    Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling", section 3.
    """

    KINDS = ("id", "multi_hot", "history", "dense", "text")

    def __init__(
        self,
        features: Sequence[Feature],
        dim: int,
        *,
        hidden_dims: Sequence[int] = (),
        dropout: float = 0.0,
        max_history: int = 50,
        tables: Mapping[str, EmbeddingTable] | None = None,
    ) -> None:
        raise NotImplementedError("kata 02: write Tower.__init__ in src/recsys/models/tower.py")

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Encode a batch: named columns with B rows each to (B, dim) unit vectors.

        Raises:
            KeyError: a feature has no column in the batch; the message names it.
            ValueError: a column of the wrong number of dimensions or width.
        """
        raise NotImplementedError("kata 02: write Tower.forward in src/recsys/models/tower.py")


class TwoTower(nn.Module):
    """A user tower and an item tower whose dot product is the score.

    ``score(u, i) = <user_tower(u), item_tower(i)>``, a cosine. Features that name the same table
    (``feature.table or feature.name``) share it, across the towers too (a history of items and the
    item's own id, say). Nothing else is shared: linear maps of features of one name are two. Index
    0 of every table is padding.

    Args:
        user_features, item_features: as for :class:`Tower`.
        dim, hidden_dims, dropout, max_history: of both towers.
        temperature: start value of the learned softmax temperature, above 0.

    Raises:
        ValueError: a temperature that is not above 0; what :class:`Tower` refuses, a table that
            the two sides want in two sizes included.

    Attributes:
        user_tower, item_tower: the two :class:`Tower` modules.

    Source: Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
    Recommendations", section 3; learned temperature: Radford et al. 2021 (CLIP), section 2.5.
    """

    def __init__(
        self,
        user_features: Sequence[Feature],
        item_features: Sequence[Feature],
        dim: int,
        *,
        hidden_dims: Sequence[int] = (),
        dropout: float = 0.0,
        max_history: int = 50,
        temperature: float = 0.07,
    ) -> None:
        raise NotImplementedError("kata 02: write TwoTower.__init__ in src/recsys/models/tower.py")

    @property
    def temperature(self) -> Tensor:
        """The learned temperature, a 0-dim tensor: ``exp`` of a parameter, hence above 0."""
        raise NotImplementedError(
            "kata 02: write TwoTower.temperature in src/recsys/models/tower.py"
        )

    def forward(
        self, user_batch: Mapping[str, Tensor], item_batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Encode users and items: (B, dim) and (C, dim) unit vectors; B and C may differ."""
        raise NotImplementedError("kata 02: write TwoTower.forward in src/recsys/models/tower.py")
