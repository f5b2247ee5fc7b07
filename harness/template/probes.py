"""What the diagnosis of kata NN asks the learner's code."""

import torch

from harness.probe import probe
from harness.spec import learner

part = learner("MODULE")


@probe
def centred():
    """Values and gradients with and without weights, under an irregular cotangent."""
    x = torch.tensor([[0.3, -1.7], [2.9, 0.4], [-0.6, 5.1]], dtype=torch.float64)
    x.requires_grad_()
    weights = torch.tensor([0.5, 2.0, 0.7], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[0.9, -0.2], [0.1, 1.3], [-0.8, 0.6]], dtype=torch.float64)
    plain, weighted = part.centre(x), part.centre(x, weights=weights)
    gradients = torch.autograd.grad(((plain + 3 * weighted) * upstream).sum(), [x, weights])
    return {"plain": plain, "weighted": weighted, "gradients": list(gradients)}
