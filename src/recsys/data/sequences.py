"""The users' sequences as flat tensors on a device, and windows of them by index arithmetic."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recsys.data.dataset import Dataset


class Sequences:
    """Each user's items in chronological order, one user after the other.

    rows: row indices of the data set sorted by (user, time), for example `Split.train`.
    Nothing is copied to the host after construction, nothing loops: histories are gathers.

    items: (n,) int64, item index + 1 (0 is padding).
    user:  (n,) int64.
    start: (U + 1,) int64, the items of user u lie in start[u] ... start[u + 1] - 1.
    """

    def __init__(self, dataset: Dataset, rows: np.ndarray, *, device: str | torch.device = "cpu"):
        user, time = dataset.user[rows], dataset.time[rows]
        same = user[1:] == user[:-1]
        if (user[1:] < user[:-1]).any() or (same & (time[1:] < time[:-1])).any():
            raise ValueError("rows must be sorted by user, and within a user by time.")
        start = np.zeros(dataset.num_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(user, minlength=dataset.num_users), out=start[1:])
        self.items = torch.from_numpy(dataset.item[rows] + 1).to(device)
        self.user = torch.from_numpy(user).to(device)
        self.start = torch.from_numpy(start).to(device)

    def __len__(self) -> int:
        return len(self.items)

    def history(self, position: Tensor, length: int) -> Tensor:
        """(B,) positions in `items` -> (B, length) int64: what their user had before them.

        Most recent first, padded with 0; the item at the position itself is not in it.
        """
        return self.until(self.user[position], position, length)

    def user_history(self, user: Tensor, length: int) -> Tensor:
        """(B,) users -> (B, length) int64: their last items, most recent first, padded with 0."""
        return self.until(user, self.start[user + 1], length)

    def window_ends(self, stride: int) -> Tensor:
        """Every stride-th place of each user, counted back from the last one, (num_windows,).

        The first place of a user is none: nothing comes before it.
        """
        place = torch.arange(len(self), device=self.items.device)
        back = self.start[self.user + 1] - 1 - place
        return place[(back % stride == 0) & (place > self.start[self.user])]

    def windows(self, end: Tensor, length: int) -> Tensor:
        """(B,) places, as of window_ends(length - 1), to (B, length) int64: items up to them.

        Most recent first, padded with 0. Each window but a user's last one is moved towards the
        present by a random number of places, so that its borders differ from epoch to epoch;
        the generator of torch decides.
        """
        user = self.user[end]
        moved = end + torch.randint(length - 1, end.shape, device=end.device)
        return self.until(user, torch.minimum(moved + 1, self.start[user + 1]), length)

    def seen(self) -> tuple[Tensor, Tensor]:
        """All items of all users: values (n,), item index from 0, and offsets (U + 1,)."""
        return self.items - 1, self.start

    def until(self, user: Tensor, end: Tensor, length: int) -> Tensor:
        """(B,) users and (B,) places in `items` -> (B, length) int64: the user's items before end.

        Most recent first, padded with 0.
        """
        back = torch.arange(1, length + 1, device=self.items.device)
        index = end[:, None] - back
        inside = index >= self.start[user][:, None]
        if len(self) == 0:  # nothing to gather from
            return torch.zeros_like(index)
        return self.items[index.clamp(min=0)] * inside

    def seen_until(self, user: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """All of the users' items before end: values (item index from 0), offsets (B + 1,)."""
        length = end - self.start[user]
        offsets = torch.cat([length.new_zeros(1), length.cumsum(0)])
        shift = torch.repeat_interleave(self.start[user] - offsets[:-1], length)
        return self.items[shift + torch.arange(len(shift), device=shift.device)] - 1, offsets
