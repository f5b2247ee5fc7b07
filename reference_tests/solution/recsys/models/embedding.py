"""Embedding tables: a row of learned numbers for each id (kata 01)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EmbeddingTable(nn.Module):
    """A table of learned vectors, one row per id, with a padding row and pooled bags.

    The table is a single parameter; ``state_dict`` has exactly one key, ``weight``. Its gradient is
    dense, which every optimizer takes.

    Cost: a call makes the same number of tensor operations however many ids and bags there are and
    however long a bag is (no Python loop over them), and nothing as large as the table, ids x rows
    or ids x bags, the gradient apart: a table has far more rows than a batch has ids.

    Args:
        num_embeddings: rows of the table, at least 1; legal ids are ``0 .. num_embeddings - 1``.
        embedding_dim: width D of a row, at least 1.
        padding_idx: the row that stands for "no id"; ``None`` for a table without one.
        init_std: standard deviation of the initial rows; default ``1 / sqrt(embedding_dim)``, so
            that a row has an expected squared norm of 1 whatever its width.
        device, dtype: of the parameter, as for any ``torch.nn`` module (``None``: torch's default).

    Attributes:
        weight: ``nn.Parameter`` of shape (num_embeddings, embedding_dim).

    Raises:
        ValueError: a size below 1, a padding row outside the table, a negative ``init_std``.

    Example:
        >>> table = EmbeddingTable(10, 4)
        >>> table(torch.tensor([[1, 2, 0]])).shape
        torch.Size([1, 3, 4])

    Source: Mikolov et al. 2013, "Distributed Representations of Words and Phrases"; the interface
    follows ``torch.nn.Embedding`` and ``torch.nn.EmbeddingBag``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = 0,
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(
                "num_embeddings and embedding_dim must be at least 1, "
                f"not {num_embeddings} and {embedding_dim}"
            )
        if padding_idx is not None and not 0 <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx must be None or a row of the table (0 .. {num_embeddings - 1}), "
                f"not {padding_idx}"
            )
        if init_std is not None and init_std < 0:
            raise ValueError(f"init_std must be at least 0, not {init_std}")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.init_std = 1 / math.sqrt(embedding_dim) if init_std is None else init_std
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every row from Normal(0, init_std) in place, then set the padding row to zero.

        The draw comes from torch's own generator, which is not seeded here: two tables differ.
        """
        with torch.no_grad():
            self.weight.normal_(0.0, self.init_std)
            if self.padding_idx is not None:
                self.weight[self.padding_idx] = 0.0

    def forward(self, ids: Tensor) -> Tensor:
        """Look up one row per id: ``out[..., :] = weight[ids[...], :]``.

        An id that occurs m times gets m times its gradient. The padding row is read like any
        other (it is zero until somebody writes to it) but gets no gradient, so it stays as it is.

        Args:
            ids: int64 or int32 of any shape (...), an empty one included; not changed.

        Returns:
            (..., D), in the dtype and on the device of ``weight``.

        Raises:
            TypeError: ids that are not integers (a float has lost ids above 2**24; a bool is none).
            IndexError: an id outside ``0 .. num_embeddings - 1``; negative ids do not count
                from the end. (On a GPU the check is the device's own assertion.)
        """
        _check_integer("ids", ids)
        return F.embedding(ids, self.weight, padding_idx=self.padding_idx)

    def bag(
        self,
        values: Tensor,
        offsets: Tensor,
        *,
        mode: str = "mean",
        weights: Tensor | None = None,
    ) -> Tensor:
        """Pool variable-length bags of ids, each into one row.

        Bag b holds ``values[offsets[b] : offsets[b + 1]]``, the last bag the rest: offsets are
        where bags START. Entries equal to ``padding_idx`` are not there: they count neither in
        the sum nor in the number of entries nor in the maximum. An id may occur more than once in
        a bag and then counts each time. With e_i the row of the i-th entry and w_i its weight:

        - ``"sum"``: sum_i w_i e_i
        - ``"mean"``: sum_i w_i e_i / sum_i w_i (w_i = 1 without weights: the plain mean)
        - ``"max"``: element-wise maximum over the entries, with the gradient to the row that has
          it, once however often it is there (rows that tie may share it); takes no weights

        A bag without entries gives zeros and no gradient, and so does a mean whose weights add up
        to 0 exactly; by a small sum is divided. A bag depends on its own entries only. Sums over a
        bag are taken in float32 at least: in bfloat16, 256 + 1 is 256.

        Args:
            values: (N,) int64 or int32 ids, bag after bag; not changed.
            offsets: (B,) of the same dtype, starting at 0 and never falling; not changed.
            mode: "sum", "mean" or "max".
            weights: (N,) weight of each entry, of any floating dtype and any sign; gradients flow
                into them (none into those of padding); not changed.

        Returns:
            (B, D), in the dtype and on the device of ``weight``.

        Raises:
            TypeError: values or offsets that are not integers (a bool is none).
            ValueError: an unknown mode; weights with "max" or of another shape than values;
                values or offsets that are not 1-D; on the CPU also offsets that do not start at 0,
                that fall, or that end beyond N (to look at them on a GPU is to wait for it).
            IndexError or RuntimeError: an id outside the table, below 0 too (on a GPU: the device's
                own assertion).
        """
        _check_integer("values", values)
        _check_integer("offsets", offsets)
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f"mode must be 'sum', 'mean' or 'max', not {mode!r}")
        if values.dim() != 1 or offsets.dim() != 1:
            raise ValueError(
                "values and offsets must be 1-D, "
                f"not of shape {tuple(values.shape)} and {tuple(offsets.shape)}"
            )
        if weights is not None and mode == "max":
            raise ValueError("mode 'max' takes no weights")
        if weights is not None and weights.shape != values.shape:
            raise ValueError(
                f"weights must have the shape of values {tuple(values.shape)}, "
                f"not {tuple(weights.shape)}"
            )
        _check_offsets(offsets, len(values))
        if len(offsets) == 0:  # embedding_bag would crash the process if there are values
            return self.weight.new_zeros(0, self.embedding_dim)
        if weights is not None:
            if mode == "mean":  # embedding_bag takes weights for sums only
                weights = self._shares(weights, values, offsets)
            weights, mode = weights.to(self.weight.dtype), "sum"
        return F.embedding_bag(
            values,
            self.weight,
            offsets,
            mode=mode,
            per_sample_weights=weights,
            padding_idx=self.padding_idx,
        )

    def _shares(self, weights: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        """Weights that add up to 1 over the entries of each bag; 0 where they added up to 0."""
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        entries = weights
        if self.padding_idx is not None:
            entries = weights.masked_fill(values == self.padding_idx, 0.0)
        place = torch.arange(len(values), device=values.device)
        bag = torch.searchsorted(offsets, place, right=True) - 1
        total = weights.new_zeros(len(offsets)).index_add(0, bag, entries)
        return weights / total.masked_fill(total == 0, math.inf)[bag]


def hash_ids(keys: Sequence[str | int], num_buckets: int, *, salt: str = "") -> Tensor:
    """Give ids that a table has no row for a bucket, the same one in every process for ever.

    The bucket of a key depends on ``str(key)``, ``salt`` and ``num_buckets`` only: not on the
    process, the machine, ``PYTHONHASHSEED``, a random generator or the other keys. Keys of any
    kind, numbers in a row or in steps too, spread evenly over all buckets, the first and the last
    included; two salts give independent buckets, so two tables with different salts separate keys
    that collide in one of them. Any stable, well-spread hash is right: the numbers themselves mean
    nothing. No random generator is seeded or used up.

    Args:
        keys: strings or integers, n of them; 7 and "7" are the same key; not changed.
        num_buckets: at least 1; beyond 2**32 too, though a hash of 32 bits does not reach all then.
        salt: chooses another, independent hash function.

    Returns:
        (n,) int64 on the CPU, each in ``0 .. num_buckets - 1``.

    Raises:
        ValueError: ``num_buckets`` below 1.

    Source: Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning".
    """
    if num_buckets < 1:
        raise ValueError(f"num_buckets must be at least 1, not {num_buckets}")
    digests = (hashlib.blake2b(f"{salt}/{key}".encode()).digest() for key in keys)
    return torch.tensor(
        [int.from_bytes(d, "little") % num_buckets for d in digests], dtype=torch.int64
    )


def _check_integer(name: str, ids: Tensor) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, not {ids.dtype}")


def _check_offsets(offsets: Tensor, num_values: int) -> None:
    """Refuse offsets that are no starts of bags, where looking at them costs no waiting."""
    if len(offsets) == 0 or offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, last = offsets[0], offsets[-1]
    if first != 0:
        raise ValueError(f"offsets are where bags start, so the first is 0, not {first}")
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError("offsets are where bags start, so they never fall")
    if last > num_values:
        raise ValueError(f"offsets end at {last}, beyond the {num_values} values")
