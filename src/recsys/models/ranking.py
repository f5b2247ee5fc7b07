"""The ranking model: DCN-V2 over features of a user and one candidate (kata 04)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from recsys.data.features import Feature


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
        raise NotImplementedError(
            "kata 04: write RankingModel.__init__ in src/recsys/models/ranking.py"
        )

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Named columns with B rows each to (B,) logits.

        Raises:
            KeyError: a feature has no column in the batch; the message names it.
        """
        raise NotImplementedError(
            "kata 04: write RankingModel.forward in src/recsys/models/ranking.py"
        )


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
    raise NotImplementedError("kata 04: write binary_loss in src/recsys/models/ranking.py")


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
    raise NotImplementedError("kata 04: write listwise_loss in src/recsys/models/ranking.py")
