"""A user tower that attends to the user's history, trained at every place of it (kata 11)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.data.features import Feature
from recsys.models.embedding import EmbeddingTable
from recsys.models.tower import Tower


def training_pairs(window: Tensor) -> tuple[Tensor, Tensor]:
    """Split windows of histories into what is known and what comes next, at every place.

    A window, like every history here, has the most recent item first and is padded with 0 behind.
    The target of a place is the item chosen next, one place nearer to the front. A place without
    an item has no target (0): nothing is known there yet.

    Args:
        window: (B, L + 1) integers, item index + 1, L >= 1; not changed.

    Returns:
        history (B, L) and target (B, L), of the dtype of the window.

    Raises:
        ValueError: a window that is not two-dimensional or narrower than 2.

    Example:
        >>> training_pairs(torch.tensor([[7, 5, 9, 0]]))
        (tensor([[5, 9, 0]]), tensor([[7, 5, 0]]))
    """
    if window.dim() != 2 or window.shape[1] < 2:
        raise ValueError(f"a window must be (B, L + 1) with L >= 1, not {tuple(window.shape)}")
    history = window[:, 1:]
    return history, torch.where(history == 0, 0, window[:, :-1])


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a place sees itself and what was before it.

    Place 0 is the most recent one, so "before" means a place further back, with a larger number.
    With q, k, v the three parts (in this order, ``dim`` wide each) of a linear map of x, a head h
    of width ``d = dim / num_heads`` that owns the h-th ``d`` columns of each part, places i and j::

        s[i, j] = <q[i], k[j]> / sqrt(d) + recency[h, j - i]
        out[i]  = sum_j softmax_j(s[i, :])[j] v[j]     over the j that i sees

    ``recency`` says what it means that something is ``j - i`` steps ago: positions are distances,
    so that a place gives the same whatever comes after it. Place i sees itself, always, and every
    ``j > i`` that holds an item. The heads side by side, h-th at the h-th ``d`` columns, go through
    a second linear map.

    ``state_dict``, so that values can be put in: ``qkv.weight`` (3 dim, dim), ``qkv.bias``,
    ``out.weight`` (dim, dim), ``out.bias`` and ``recency`` (num_heads, max_history). The start
    values of the linear maps are free, ``recency`` starts at zero.

    Contract:
        - what a place does not see has no influence, neither on the result nor by a gradient, be
          it as large as it may; nor has the rest of the batch;
        - every number is finite where the inputs are, in a row without any item too;
        - the result has the dtype of x; bfloat16 and float16 work as well;
        - cost, of everything in this file: as many operations for many rows, places and heads as
          for few, and nothing made on another device than that of the inputs; nothing here larger
          than the scores (B, num_heads, L, L) or q, k and v together.

    Args:
        dim: width, a multiple of ``num_heads``. max_history: the most places, at least 1.

    Raises:
        ValueError: a size below 1; a ``dim`` that is no multiple of ``num_heads``.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2; distances: Raffel et al.
    2020 (T5), section 2.1, here one for each distance.
    """

    def __init__(self, dim: int, num_heads: int, *, max_history: int) -> None:
        super().__init__()
        if min(dim, num_heads, max_history) < 1 or dim % num_heads:
            raise ValueError(
                "dim, num_heads and max_history must be at least 1 and dim a multiple of "
                f"num_heads, not {dim}, {num_heads} and {max_history}"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.recency = nn.Parameter(torch.zeros(num_heads, max_history))

    def forward(self, x: Tensor, is_item: Tensor) -> Tensor:
        """Let every place of (B, L, dim) look back; ``L <= max_history``.

        Args:
            is_item: (B, L) bool, whether a place holds an item.

        Returns:
            (B, L, dim).
        """
        batch, length, dim = x.shape
        heads = (batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = self.qkv(x).view(heads).permute(2, 0, 3, 1, 4)  # (B, H, L, d) each
        place = torch.arange(length, device=x.device)
        ago = place - place[:, None]  # steps from query i back to key j
        seen = (ago > 0) & is_item[:, None, :] | (ago == 0)  # (B, L, L)
        bias = self.recency[:, ago.clamp(min=0)].to(q.dtype)
        mask = bias.masked_fill(~seen[:, None], float("-inf"))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """Attention, then a small network at each place by itself, each added to what came in::

        x = x + dropout(attention(norm1(x)))
        x = x + dropout(down(gelu(up(norm2(x)))))

    The norms come first (pre-norm), so there is a straight way from the loss to the items. GELU is
    the exact one. Dropout acts on what is added, nowhere else.

    ``state_dict``: ``norm1`` and ``norm2`` (each ``weight``, ``bias``, a LayerNorm with eps 1e-5),
    ``attention`` (:class:`CausalAttention`), ``up.weight`` (hidden_dim, dim), ``up.bias``,
    ``down.weight`` (dim, hidden_dim), ``down.bias``.

    Args:
        hidden_dim: width of the small network. dropout: probability, 0 <= dropout < 1.

    Source: Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", figure 1b.
    """

    def __init__(
        self, dim: int, num_heads: int, *, hidden_dim: int, max_history: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = CausalAttention(dim, num_heads, max_history=max_history)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, is_item: Tensor) -> Tensor:
        """(B, L, dim) and which places hold an item, (B, L) bool, to (B, L, dim)."""
        x = x + self.dropout(self.attention(self.norm1(x), is_item))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class SequenceTower(nn.Module):
    """A user as the unit vector that their history, read by attention, ends in.

    The rows of the history, times ``sqrt(dim)`` (rows of the table have a length of about 1, what
    a block adds has one of about ``sqrt(dim)``) and with dropout, go through the blocks; the last
    norm and a division by the length make a unit vector of each place.

    ``state_dict``: ``table.weight``, ``blocks.0.norm1.weight`` and so on, ``norm.weight``,
    ``norm.bias`` (a LayerNorm with eps 1e-5).

    Contract:
        - the vector of a place is what the user was when its item was the last one: cut away all
          that came after, and place 0 gives the same. Thus what is trained at every place is what
          is served;
        - how much padding there is means nothing; a place of padding gives zeros, so does a user
          without any item; no gradient is ever NaN;
        - the table is the one that is given, its rows are shared and learn from here too;
        - a history longer than ``max_history`` is cut there: the oldest items go;
        - ``eval()`` makes it deterministic; inputs and the mode are not changed.

    Args:
        table: of the items, row 0 is padding.
        num_blocks: at least 1. num_heads: divides the width of the table.
        hidden_dim: of the blocks. max_history: the most places.
        dropout: of the rows and in the blocks, 0 <= dropout < 1.
        column: the name of the history in a batch.

    Source: Kang and McAuley 2018, "Self-Attentive Sequential Recommendation" (SASRec), section 3.
    """

    def __init__(
        self,
        table: EmbeddingTable,
        *,
        num_blocks: int,
        num_heads: int,
        hidden_dim: int,
        max_history: int,
        dropout: float = 0.0,
        column: str = "history",
    ) -> None:
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
        dim = table.weight.shape[1]
        self.table = table
        self.max_history = max_history
        self.column = column
        self.scale = math.sqrt(dim)
        options = {"hidden_dim": hidden_dim, "max_history": max_history, "dropout": dropout}
        self.blocks = nn.ModuleList(Block(dim, num_heads, **options) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def states(self, history: Tensor) -> Tensor:
        """A unit vector for each place, most recent first: (B, L) item index + 1 to (B, L, dim).

        Raises:
            ValueError: a history that is not two-dimensional.
        """
        if history.dim() != 2:
            raise ValueError(f"a history must be (B, L), not {tuple(history.shape)}")
        history = history[:, : self.max_history]
        is_item = history != 0
        x = self.dropout(self.table(history) * self.scale)
        for block in self.blocks:
            x = block(x, is_item)
        x = F.normalize(self.norm(x), dim=-1)
        return x.masked_fill(~is_item[:, :, None], 0.0)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Users as they are now, (B, dim): the vector of the most recent place.

        Columns but the history are ignored; a history of no places gives zeros.

        Raises:
            KeyError: the batch has no history; the message names the column.
            ValueError: a history that is not two-dimensional.
        """
        history = batch[self.column]
        states = self.states(history)
        if states.shape[1] == 0:
            return self.norm.weight.new_zeros(len(history), len(self.norm.weight))
        return states[:, 0]


def next_item_loss(
    states: Tensor,
    target: Tensor,
    catalogue: Tensor,
    *,
    temperature: float | Tensor,
    sample: Tensor | None = None,
    log_q: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy of the next item, at every place that has one.

    For a place with the vector u and the target item t (index ``target - 1``)::

        s[j] = <u, catalogue[j]> / temperature - log_q[j]
        loss = -s[t] + log sum_{j in C} exp(s[j])

    and the result is the mean over all places of the batch that have a target: each place counts
    the same, not each user. Without any such place it is 0, with zero gradients.

    - **Full** (no ``sample``): C is the whole catalogue. Nothing was sampled, so there is no
      ``log_q``.
    - **Sampled**: C is the target and the items drawn, ``sample``, the same ones for every place.
      An item that was drawn twice counts twice; the target is there once, and drawn copies of it
      are left out at the places whose target it is. ``log_q`` is the logarithm of the probability
      of an item to be drawn, subtracted after the division by the temperature from all of C, the
      target included; without it nothing is subtracted.

    Computed in float32 at least, whatever the inputs are and whatever autocast says (float64
    stays), and exact at small temperatures. Inputs are not changed.

    Cost: one number for each pair of place and candidate is kept for the backward pass, not two
    (full: places x N; sampled: places x (S + 1)), no one tensor is larger, apart from the inputs
    and their gradients, and nothing is read back to the host.

    Args:
        states: (B, L, D) vectors, none of the sizes 0. target: (B, L) integers, item index + 1, or
            0 for none.
        catalogue: (N, D) vectors of all items.
        temperature: above 0; a 0-dim tensor gets a gradient.
        sample: (S,) item indices, S >= 1, drawn with replacement. log_q: (N,).

    Returns:
        A 0-dim tensor.

    Raises:
        ValueError: shapes that do not fit; a temperature given as a number that is not above 0;
            ``log_q`` without ``sample``.

    Source: Kang and McAuley 2018, section 3.6; full softmax: Klenitskiy and Vasilev 2023, "Turning
    Dross Into Gold Loss"; sampled: Bengio and Senecal 2008; logQ: Yi et al. 2019, section 3.2.
    """
    _check_loss(states, target, catalogue, temperature, sample, log_q)
    with torch.autocast(states.device.type, enabled=False):
        wide = torch.promote_types(states.dtype, torch.float32)
        catalogue = catalogue.to(wide)
        states = states.to(wide).flatten(0, 1) / temperature  # smaller than the scores
        label = target.flatten() - 1
        count = (label >= 0).sum().clamp(min=1)
        if sample is None:
            scores = states @ catalogue.T
        else:
            own = label.clamp(min=0)
            positive = (states * catalogue[own]).sum(1)
            negative = states @ catalogue[sample].T
            if log_q is not None:
                positive = positive - log_q[own]
                negative = negative - log_q[sample]
            negative = negative.masked_fill(sample == own[:, None], float("-inf"))
            scores = torch.cat([positive[:, None], negative], dim=1)
            label = torch.where(label >= 0, 0, -1)
        return F.cross_entropy(scores, label, ignore_index=-1, reduction="sum") / count


def _check_loss(
    states: Tensor,
    target: Tensor,
    catalogue: Tensor,
    temperature: float | Tensor,
    sample: Tensor | None,
    log_q: Tensor | None,
) -> None:
    if states.dim() != 3 or target.shape != states.shape[:2]:
        raise ValueError(
            "states must be (B, L, D) and target (B, L), "
            f"not {tuple(states.shape)} and {tuple(target.shape)}"
        )
    if catalogue.dim() != 2 or catalogue.shape[1] != states.shape[2]:
        raise ValueError(f"catalogue must be (N, {states.shape[2]}), not {tuple(catalogue.shape)}")
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if sample is not None and (sample.dim() != 1 or len(sample) == 0):
        raise ValueError(f"sample must be (S,) with S >= 1, not {tuple(sample.shape)}")
    if log_q is not None and (sample is None or log_q.shape != (len(catalogue),)):
        raise ValueError(
            f"log_q must be ({len(catalogue)},) and come with a sample, not {tuple(log_q.shape)}"
        )


class SequenceModel(nn.Module):
    """A sequence tower for users and a :class:`Tower` for items, in place of ``TwoTower``.

    The items of the histories and the items themselves share one table; scores are cosines.

    Args:
        item_features: as for :class:`Tower`; ``table`` names the table of the items in them.
        num_rows: of that table, items + 1.
        dim, hidden_dims, dropout, max_history, temperature: as for ``TwoTower``.
        num_blocks, num_heads: of the sequence tower, whose blocks have ``2 * dim`` hidden units.
    """

    def __init__(
        self,
        item_features: Sequence[Feature],
        num_rows: int,
        dim: int,
        *,
        table: str = "item",
        num_blocks: int,
        num_heads: int,
        hidden_dims: Sequence[int] = (),
        dropout: float = 0.0,
        max_history: int = 50,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        rows = EmbeddingTable(num_rows, dim)
        self.item_tower = Tower(
            item_features, dim, hidden_dims=hidden_dims, dropout=dropout, tables={table: rows}
        )
        self.user_tower = SequenceTower(
            rows,
            num_blocks=num_blocks,
            num_heads=num_heads,
            hidden_dim=2 * dim,
            max_history=max_history,
            dropout=dropout,
        )
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    @property
    def temperature(self) -> Tensor:
        """The learned temperature, a 0-dim tensor."""
        return self.log_temperature.exp()

    def forward(
        self, user_batch: Mapping[str, Tensor], item_batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Encode users and items: (B, dim) and (C, dim) unit vectors."""
        return self.user_tower(user_batch), self.item_tower(item_batch)
