"""Towers: a user or an item, described by mixed features, as one unit vector (kata 02)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
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
        super().__init__()
        _check_features(features)
        self.features = tuple(features)
        self.dim = dim
        self.max_history = max_history
        self.tables = nn.ModuleDict()
        self.linears = nn.ModuleDict()
        self.recency = nn.ParameterDict()
        num_parts = 0
        for feature in self.features:
            num_parts += 2 if feature.kind == "history" else 1
            if feature.kind in ("dense", "text"):
                self.linears[feature.name] = nn.Linear(
                    feature.size, dim, bias=feature.kind == "dense"
                )
                continue
            name = feature.table or feature.name
            if name not in self.tables:
                given = (tables or {}).get(name)
                self.tables[name] = EmbeddingTable(feature.size, dim) if given is None else given
            if self.tables[name].weight.shape != (feature.size, dim):
                raise ValueError(
                    f"table {name!r} has shape {tuple(self.tables[name].weight.shape)}, "
                    f"feature {feature.name!r} needs ({feature.size}, {dim})"
                )
            if feature.kind == "history":
                # exp of a gentle slope: recent places count more from the start
                self.recency[feature.name] = nn.Parameter(torch.linspace(0.0, -2.0, max_history))
        layers: list[nn.Module] = [nn.Dropout(dropout)]
        width = num_parts * dim
        for hidden in hidden_dims:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout)]
            width = hidden
        layers.append(nn.Linear(width, dim))
        self.mlp = nn.Sequential(*layers)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Encode a batch: named columns with B rows each to (B, dim) unit vectors.

        Raises:
            KeyError: a feature has no column in the batch; the message names it.
            ValueError: a column of the wrong number of dimensions or width.
        """
        parts = [part for feature in self.features for part in self._parts(feature, batch)]
        out = torch.stack(parts).sum(0) + self.mlp(torch.cat(parts, dim=-1))
        return F.normalize(out, dim=-1)

    def _parts(self, feature: Feature, batch: Mapping[str, Tensor]) -> list[Tensor]:
        if feature.name not in batch:
            raise KeyError(f"the batch has no column {feature.name!r}, only {sorted(batch)}")
        x = batch[feature.name]
        if x.dim() != (1 if feature.kind == "id" else 2):
            raise ValueError(f"column {feature.name!r} ({feature.kind}) has shape {tuple(x.shape)}")
        if feature.kind in ("dense", "text"):
            if x.shape[1] != feature.size:
                raise ValueError(
                    f"column {feature.name!r} must be {feature.size} wide, not {x.shape[1]}"
                )
            linear = self.linears[feature.name]
            return [linear(x.to(linear.weight.dtype))]
        table = self.tables[feature.table or feature.name]
        if feature.kind == "id":
            return [table(x)]
        if feature.kind == "multi_hot":
            return [_pool(table, x)]
        x = x[:, : self.max_history]
        weights = self.recency[feature.name][: x.shape[1]].exp().expand(len(x), -1)
        last = x[:, 0] if x.shape[1] else x.new_zeros(len(x))  # row 0 is padding: zeros
        return [_pool(table, x, weights), table(last)]


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
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        options = {"hidden_dims": hidden_dims, "dropout": dropout, "max_history": max_history}
        self.item_tower = Tower(item_features, dim, **options)
        # handing over the item tower's tables makes the sharing explicit, and only by name
        shared = {
            name: self.item_tower.tables[name]
            for name in {f.table or f.name for f in user_features} & set(self.item_tower.tables)
        }
        self.user_tower = Tower(user_features, dim, tables=shared, **options)
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    @property
    def temperature(self) -> Tensor:
        """The learned temperature, a 0-dim tensor: ``exp`` of a parameter, hence above 0."""
        return self.log_temperature.exp()

    def forward(
        self, user_batch: Mapping[str, Tensor], item_batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Encode users and items: (B, dim) and (C, dim) unit vectors; B and C may differ."""
        return self.user_tower(user_batch), self.item_tower(item_batch)


def _pool(table: EmbeddingTable, ids: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of each row of (B, L) ids, weighted by (B, L); padding left out."""
    rows, width = ids.shape
    offsets = torch.arange(rows, device=ids.device) * width
    flat = None if weights is None else weights.reshape(-1)
    return table.bag(ids.reshape(-1), offsets, mode="mean", weights=flat)


def _check_features(features: Sequence[Feature]) -> None:
    names = [feature.name for feature in features]
    if not names:
        raise ValueError("a tower needs at least one feature")
    if len(set(names)) < len(names):
        raise ValueError(f"feature names must be distinct: {names}")
    for feature in features:
        if feature.kind not in Tower.KINDS:
            raise ValueError(
                f"feature {feature.name!r} has kind {feature.kind!r}; known: {Tower.KINDS}"
            )
