"""Imported by warm runners before they fork: what dynamo does once a process, done beforehand."""

import torch
from torch import nn
from torch._dynamo.utils import counters


def traced(function, *rows):
    call = torch.compile(function, backend=lambda graph, example: graph.forward)
    for each in rows:
        with torch.no_grad():
            call(torch.ones(each, 3))


traced(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), 4, 5)
traced(lambda x: x.relu() if x.sum() > 0 else x, 4)
torch._dynamo.list_backends()
torch._dynamo.reset()
counters.clear()
