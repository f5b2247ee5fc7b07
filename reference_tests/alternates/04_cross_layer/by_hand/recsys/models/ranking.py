"""The losses by the maximum taken out, forward written out without helpers, a dict of closures."""

import math

import torch
from torch import nn

from recsys.models.cross import CrossNetwork
from recsys.models.embedding import EmbeddingTable


class RankingModel(nn.Module):
    def __init__(
        self,
        features,
        *,
        embedding_dim=8,
        num_cross_layers=2,
        rank=None,
        hidden_dims=(64, 32),
        dropout=0.0,
        structure="parallel",
    ):
        super().__init__()
        names = [f.name for f in features]
        if names == [] or sorted(names) != sorted(set(names)):
            raise ValueError(f"bad names: {names}")
        if structure not in ("parallel", "stacked"):
            raise ValueError(f"structure: {structure}")
        sizes = {}
        for f in features:
            if f.kind not in ("dense", "text", "id", "multi_hot", "history"):
                raise ValueError(f"kind: {f.kind}")
            if f.kind in ("id", "multi_hot", "history"):
                sizes.setdefault(f.table or f.name, set()).add(f.size)
        if any(len(each) > 1 for each in sizes.values()):
            raise ValueError(f"tables with several sizes: {sizes}")
        self.specs, self.structure, self.p = list(features), structure, dropout
        keys = sorted(sizes)
        self.slot = {key: i for i, key in enumerate(keys)}
        self.tables = nn.ModuleList(EmbeddingTable(*sizes[k], embedding_dim) for k in keys)
        dense = [f for f in features if f.kind == "dense"]
        text = [f for f in features if f.kind == "text"]
        self.scales = nn.ParameterList(torch.ones(f.size) for f in dense)
        self.shifts = nn.ParameterList(torch.zeros(f.size) for f in dense)
        self.maps = nn.ParameterList(
            torch.randn(embedding_dim, f.size) / math.sqrt(f.size) for f in text
        )
        width = sum(f.size for f in dense) + embedding_dim * (len(features) - len(dense))
        self.cross = CrossNetwork(width, num_cross_layers, rank=rank)
        wide = [width, *hidden_dims]
        self.w = nn.ParameterList(
            torch.randn(a, b) * math.sqrt(2 / a) for a, b in zip(wide[:-1], wide[1:], strict=True)
        )
        self.b = nn.ParameterList(torch.zeros(b) for b in wide[1:])
        out = wide[-1] + (width if structure == "parallel" else 0)
        self.last = nn.Parameter(torch.randn(out, 1) / math.sqrt(out))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        x0, dense, text = [], 0, 0
        for f in self.specs:
            if f.name not in batch.keys():
                raise KeyError(f"column {f.name} is missing")
            x = batch[f.name]
            if f.kind == "dense":
                x0.append(self.scales[dense] * x + self.shifts[dense])
                dense += 1
            elif f.kind == "text":
                x0.append(x @ self.maps[text].T)
                text += 1
            elif f.kind == "id":
                x0.append(self.tables[self.slot[f.table or f.name]](x))
            else:
                entries = (x > 0).unsqueeze(2)
                rows = self.tables[self.slot[f.table or f.name]](x) * entries
                number = entries.sum(1)
                x0.append(rows.sum(1) / torch.maximum(number, torch.ones_like(number)))
        x0 = torch.cat(x0, dim=1)
        crossed = self.cross(x0)
        h = crossed if self.structure == "stacked" else x0
        for w, b in zip(self.w, self.b, strict=False):
            h = (h @ w + b).clamp(min=0)
            if self.training and self.p > 0:
                kept = torch.rand(h.shape, device=h.device) >= self.p
                h = h * kept / (1 - self.p)
        if self.structure == "parallel":
            h = torch.cat((h, crossed), dim=1)
        return (h @ self.last + self.bias).squeeze(1)


def binary_loss(logits, labels, *, sample_weight=None):
    if logits.shape != labels.shape:
        raise ValueError("labels")
    if sample_weight is not None and sample_weight.shape != logits.shape:
        raise ValueError("sample_weight")
    if logits.shape[0] == 0:
        raise ValueError("empty")
    z = logits.double() if logits.dtype == torch.float64 else logits.float()
    y = labels.to(z.dtype)
    # max(z, 0) + log(1 + exp(-|z|)), with the slope of max at 0 taken as a half
    positive = (z + z.abs()) / 2
    rows = positive + torch.log1p(torch.exp(-z.abs())) - y * z
    if sample_weight is None:
        return rows.sum() / len(rows)
    w = sample_weight.to(z.dtype)
    none = (w.sum() == 0).to(z.dtype)
    return (rows * w).sum() * (1 - none) / (w.sum() + none)


def listwise_loss(logits, labels):
    if logits.shape != labels.shape:
        raise ValueError("labels")
    if logits.shape[0] == 0:
        raise ValueError("empty")
    z = logits.double() if logits.dtype == torch.float64 else logits.float()
    zero = torch.zeros_like(z)
    here = z != -math.inf
    y = torch.where(here, labels.to(z.dtype), zero)
    z = torch.where(here, z, zero)
    top = torch.where(here, z, zero - math.inf).max(1, keepdim=True)[0]
    top = torch.where(top == -math.inf, torch.zeros_like(top), top).detach()
    share = torch.where(here, torch.exp(torch.where(here, z - top, zero)), zero)
    norm = share.sum(1, keepdim=True)
    log_p = z - top - torch.log(torch.where(norm > 0, norm, torch.ones_like(norm)))
    total = y.sum(1)
    lists = (total > 0).to(z.dtype)
    loss = -(y * log_p).sum(1) / (total + (1 - lists))
    return (loss * lists).sum() / torch.clamp(lists.sum(), min=1)
