"""What stands in for other parts while kata 10 is asked: used by its spec and its probes."""

import contextlib
import sys
from unittest.mock import patch

import torch

from harness.spec import learner

pipeline = learner("pipeline")

# Attention is kata 11, which comes later: what the pipeline needs of it stands in here.
ATTENTION = {
    "user_tower": "attention",
    "attention": {"num_blocks": 1, "num_heads": 2, "sampled": 0},
}


@contextlib.contextmanager
def replaced(source, **fakes):
    """`fakes` instead of what a module provides, where the pipeline got the name from it too."""
    pipe = sys.modules[pipeline.run.__module__]
    with contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            plain = getattr(source, name)
            for module in (sys.modules[plain.__module__], pipe):
                for key, value in list(vars(module).items()):
                    if value is plain:
                        stack.enter_context(patch.object(module, key, fake))
        yield


def pairs(window):
    """Histories of windows, and the next item at each of their places."""
    return window[:, 1:], window[:, :-1] * (window[:, 1:] > 0)


def next_item(states, target, catalogue, *, temperature, sample=None, log_q=None):
    """The mean loss over all places with a target, written out."""
    own = target[target > 0] - 1
    scores = states[target > 0] @ catalogue.T / temperature - (0 if log_q is None else log_q)
    chosen = scores.gather(1, own[:, None])
    if sample is not None:
        drawn = scores[:, sample].masked_fill(sample == own[:, None], -torch.inf)
        scores = torch.cat([chosen, drawn], dim=1)
    return (scores.logsumexp(1) - chosen[:, 0]).mean()
