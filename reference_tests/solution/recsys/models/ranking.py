"""The ranking model: DCN-V2 over features of a user and one candidate (kata 04)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.data.features import Feature
from recsys.models.cross import CrossNetwork
from recsys.models.embedding import EmbeddingTable


class RankingModel(nn.Module):
    """Score user-candidate pairs from mixed features, text vectors among them.

    Every feature becomes a vector, and x0 is all of them side by side:

    =============  ==================  =========================================================
    kind           column in a batch   vector
    =============  ==================  =========================================================
    ``dense``      (B, size) float     the numbers themselves, each after a learned scale and shift
    ``text``       (B, size) float     linear map to ``embedding_dim``, without bias
    ``id``         (B,) int64          row of a table of width ``embedding_dim``
    ``multi_hot``  (B, L) int64        mean of rows; padding (0) is left out, none gives zeros
    ``history``    (B, L) int64        mean of rows, as multi_hot
    =============  ==================  =========================================================

    A cross network and a deep part (Linear, ReLU, dropout for each of ``hidden_dims``) both read
    x0, *in parallel*, or the deep part reads what the cross network gives (*stacked*). A last
    Linear makes one number of what the parts give. It is a logit: no sigmoid.

    Features that name the same table share it (``feature.table or feature.name``); a table has
    ``feature.size`` rows, its own padding row among them.

    Contract: a row depends on its own features only; columns are found by name, whatever their
    order, and columns without a feature are ignored; every feature and every parameter has an
    influence; padding (index 0, of an ``id`` too) has none: its row of a table is zero and stays
    so; only dropout is random, and only in training mode; inputs are not changed. Cost: a batch is
    one pass, so neither B nor L has an influence on the number of operations.

    Args:
        features: at least one, with distinct names. embedding_dim: of tables and text.
        num_cross_layers, rank: of the :class:`CrossNetwork`. hidden_dims: units of each layer of
        the deep part; with none it is the identity. dropout: the probability that one of its units
        is left out in training (``nn.Dropout``). structure: "parallel" or "stacked".

    Raises:
        ValueError: no features, two of one name, two sizes for one table, an unknown kind or
            structure.

    Source: Wang et al. 2021, "DCN V2", section 3 and figure 1.
    """

    KINDS = ("dense", "text", "id", "multi_hot", "history")

    def __init__(
        self,
        features: Sequence[Feature],
        *,
        embedding_dim: int = 8,
        num_cross_layers: int = 2,
        rank: int | None = None,
        hidden_dims: Sequence[int] = (64, 32),
        dropout: float = 0.0,
        structure: str = "parallel",
    ) -> None:
        super().__init__()
        if structure not in ("parallel", "stacked"):
            raise ValueError(f"structure must be 'parallel' or 'stacked', not {structure!r}")
        names = [feature.name for feature in features]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"features must be at least one, with distinct names: {names}")
        self.features = features
        self.structure = structure
        self.encoders, self.tables = nn.ModuleDict(), nn.ModuleDict()
        width = 0
        for feature in self.features:
            if feature.kind not in self.KINDS:
                raise ValueError(
                    f"feature {feature.name!r} has kind {feature.kind!r}; known: {self.KINDS}"
                )
            if feature.kind == "dense":
                self.encoders[feature.name] = _Affine(feature.size)
                width += feature.size
                continue
            width += embedding_dim
            if feature.kind == "text":
                self.encoders[feature.name] = nn.Linear(feature.size, embedding_dim, bias=False)
                continue
            table = feature.table or feature.name
            if table not in self.tables:
                self.tables[table] = EmbeddingTable(feature.size, embedding_dim)
            if self.tables[table].num_embeddings != feature.size:
                raise ValueError(
                    f"feature {feature.name!r} has size {feature.size}, but its table {table!r} "
                    f"has {self.tables[table].num_embeddings} rows"
                )
        self.cross = CrossNetwork(width, num_cross_layers, rank=rank)
        layers: list[nn.Module] = []
        deep_width = width
        for hidden in hidden_dims:
            layers += [nn.Linear(deep_width, hidden), nn.ReLU(), nn.Dropout(dropout)]
            deep_width = hidden
        self.deep = nn.Sequential(*layers)
        self.head = nn.Linear(deep_width + (width if structure == "parallel" else 0), 1)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Named columns with B rows each to (B,) logits.

        Raises:
            KeyError: a feature has no column in the batch; the message names it.
        """
        x0 = torch.cat([self._encode(feature, batch) for feature in self.features], dim=-1)
        crossed = self.cross(x0)
        if self.structure == "stacked":
            return self.head(self.deep(crossed)).squeeze(-1)
        return self.head(torch.cat([crossed, self.deep(x0)], dim=-1)).squeeze(-1)

    def _encode(self, feature: Feature, batch: Mapping[str, Tensor]) -> Tensor:
        x = batch[feature.name]  # the KeyError of a missing column says its name
        if feature.kind in ("dense", "text"):
            return self.encoders[feature.name](x)
        table = self.tables[feature.table or feature.name]
        if feature.kind == "id":
            return table(x)
        offsets = torch.arange(len(x), device=x.device) * x.shape[1]
        return table.bag(x.reshape(-1), offsets, mode="mean")


def binary_loss(
    logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy of logits, stable for any size of them.

    ``loss[i] = log(1 + exp(z[i])) - y[i] z[i]``, computed without overflow (finite, with finite
    gradients, for ``|z|`` of 1e4 and more); the result is ``sum w loss / sum w``, w default 1 (only
    their ratios matter, however small they are), and 0 if the weights are all 0. Gradients flow
    into the logits. Cost: a fixed number of operations on B numbers, and none that has to wait for
    a GPU: no ``.item()``, no ``if`` on a value of a tensor, no boolean index. Inputs are not
    changed.

    Args:
        logits: (B,). labels: (B,), numbers from 0 to 1. sample_weight: (B,), at least 0. The last
        two may be of any dtype.

    Returns:
        A 0-dim tensor, in the dtype of the logits but in float32 at least.

    Raises:
        ValueError: shapes that differ (nothing is broadcast), or an empty batch.
    """
    _check_shapes(logits, labels, sample_weight)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.softplus(z) - labels.to(z.dtype) * z
    if sample_weight is None:
        return loss.mean()
    weight = sample_weight.to(z.dtype)
    total = weight.sum()
    return (loss * weight).sum() / total.masked_fill(total == 0, 1.0)


def listwise_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy over the candidates of each user: a positive against its own list.

    ``loss[b] = -sum_c p[b, c] log softmax(logits[b])[c]`` with ``p = labels / sum of labels``. A
    candidate whose logit is minus infinity is not there, and neither is its label. The mean is over
    the lists that have a positive; the others add nothing, and if none has one the loss is 0.
    Gradients are finite in all of these cases. Cost and inputs: as :func:`binary_loss`.

    Args:
        logits: (B, C), a row per user. labels: (B, C), at least 0, of any dtype.

    Returns:
        A 0-dim tensor, in the dtype of the logits but in float32 at least.

    Raises:
        ValueError: shapes that differ, or an empty batch.

    Source: Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise Approach"
    (ListNet, top one).
    """
    _check_shapes(logits, labels)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    y = labels.to(z.dtype).masked_fill(z == -torch.inf, 0.0)
    total = y.sum(1)
    z = z.masked_fill((total == 0).unsqueeze(1), 0.0)  # a list of minus infinities has no softmax
    log_p = z.log_softmax(1).masked_fill(y == 0, 0.0)  # minus infinity times 0 is not a number
    loss = -(y * log_p).sum(1) / total.masked_fill(total == 0, 1.0)
    return loss.sum() / (total > 0).sum().clamp(min=1)


class _Affine(nn.Module):
    """A learned scale and shift of each number."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.shift = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


def _check_shapes(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
    if logits.shape != labels.shape or logits.numel() == 0:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be of one shape "
            "and not empty"
        )
    if weight is not None and weight.shape != logits.shape:
        raise ValueError(
            f"sample_weight must have shape {tuple(logits.shape)}, not {tuple(weight.shape)}"
        )
