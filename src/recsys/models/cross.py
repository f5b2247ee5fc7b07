"""DCN-V2 cross layers: explicit products of features (kata 04)."""

from __future__ import annotations

from torch import Tensor, nn


class CrossLayer(nn.Module):
    """One cross layer of DCN-V2, with a full or a low-rank matrix.

    ::

        full:      out = x0 * (W xl + b) + xl
        low rank:  out = x0 * (U (V xl) + b) + xl

    ``*`` is element-wise, the residual is of ``xl``, and the bias is inside the product. There is
    no activation, also not between U and V. A stack of L layers from ``xl = x0`` gives polynomials
    of x0 up to degree L + 1. Cost: V comes first, so W = U V is never made, and neither is any
    other tensor that is larger than xl or a parameter.

    ``state_dict`` keys: ``weight`` (dim, dim) and ``bias`` (dim,); for low rank ``u`` (dim, rank),
    ``v`` (rank, dim) and ``bias``. The bias starts at 0, a matrix at Normal(0, 1 / sqrt(fan in)),
    with the number of its columns as fan in.

    Args:
        dim: width of x0 and xl, at least 1. rank: None for a full matrix, else 1 <= rank <= dim.

    Raises:
        ValueError: a dim or rank out of range.

    Example:
        >>> layer = CrossLayer(3)
        >>> x0 = torch.randn(2, 3)
        >>> layer(x0, x0).shape
        torch.Size([2, 3])

    Source: Wang et al. 2021, "DCN V2: Improved Deep & Cross Network", equations 1 and 2.
    """

    def __init__(self, dim: int, *, rank: int | None = None) -> None:
        raise NotImplementedError(
            "kata 04: write CrossLayer.__init__ in src/recsys/models/cross.py"
        )

    def forward(self, x0: Tensor, xl: Tensor) -> Tensor:
        """Cross the current state with the input.

        Args:
            x0: (..., dim), what entered the first layer. xl: (..., dim), what enters this one.
            Neither is changed.

        Returns:
            (..., dim), in the dtype of x0 and on its device.

        Raises:
            ValueError: shapes that differ.
        """
        raise NotImplementedError("kata 04: write CrossLayer.forward in src/recsys/models/cross.py")


class CrossNetwork(nn.Module):
    """A stack of cross layers: ``x = x0``, then ``x = layer(x0, x)`` for each of them.

    ``state_dict`` keys: those of :class:`CrossLayer` under ``layers.0.``, ``layers.1.``, ...
    With 0 layers it is the identity.

    Args:
        dim: width. num_layers: at least 0. rank: of every layer.

    Raises:
        ValueError: num_layers below 0.

    Source: Wang et al. 2021, section 3.2.
    """

    def __init__(self, dim: int, num_layers: int, *, rank: int | None = None) -> None:
        raise NotImplementedError(
            "kata 04: write CrossNetwork.__init__ in src/recsys/models/cross.py"
        )

    def forward(self, x0: Tensor) -> Tensor:
        """(..., dim) to (..., dim); x0 is not changed."""
        raise NotImplementedError(
            "kata 04: write CrossNetwork.forward in src/recsys/models/cross.py"
        )
