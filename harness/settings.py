"""What the pytest options mean for the kata tests of this process."""

from __future__ import annotations

collecting = False  # learner code must not be used yet
requested_device = "cpu"
red: BaseException | None = None  # why the first red rung of this run was
transcript = False  # messages call the first --impl folder src


def device() -> str:
    """ "cpu" or "cuda", as --device says; torch is imported only for `auto`."""
    if requested_device != "auto":
        return requested_device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
