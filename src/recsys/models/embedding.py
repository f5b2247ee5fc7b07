"""Embedding tables: a row of learned numbers for each id (kata 01)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
        raise NotImplementedError(
            "kata 01: write EmbeddingTable.__init__ in src/recsys/models/embedding.py"
        )

    def reset_parameters(self) -> None:
        """Draw every row from Normal(0, init_std) in place, then set the padding row to zero.

        The draw comes from torch's own generator, which is not seeded here: two tables differ.
        """
        raise NotImplementedError(
            "kata 01: write EmbeddingTable.reset_parameters in src/recsys/models/embedding.py"
        )

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
        raise NotImplementedError(
            "kata 01: write EmbeddingTable.forward in src/recsys/models/embedding.py"
        )

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
        raise NotImplementedError(
            "kata 01: write EmbeddingTable.bag in src/recsys/models/embedding.py"
        )


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
    raise NotImplementedError("kata 01: write hash_ids in src/recsys/models/embedding.py")
