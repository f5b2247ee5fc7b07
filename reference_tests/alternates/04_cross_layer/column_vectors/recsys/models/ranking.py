"""x0 in another order, lists first; a padded table is a table with a zero row put in front."""

import torch
from torch import nn
from torch.nn import functional as F

from recsys.models.cross import CrossNetwork

ORDER = ["history", "multi_hot", "id", "text", "dense"]


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
        if not features:
            raise ValueError("no features")
        if structure != "parallel" and structure != "stacked":
            raise ValueError("structure is parallel or stacked")
        self.sizes, self.weights, self.dims = {}, nn.ParameterDict(), 0
        names = set()
        for feature in features:
            if feature.name in names:
                raise ValueError(f"twice: {feature.name}")
            names.add(feature.name)
            if feature.kind not in ORDER:
                raise ValueError(f"kind {feature.kind} is unknown")
            if feature.kind == "dense":
                self.weights[f"{feature.name} scale"] = nn.Parameter(torch.rand(feature.size) + 0.5)
                self.weights[f"{feature.name} shift"] = nn.Parameter(torch.zeros(feature.size))
                self.dims += feature.size
                continue
            self.dims += embedding_dim
            if feature.kind == "text":
                matrix = torch.randn(feature.size, embedding_dim) * feature.size**-0.5
                self.weights[f"{feature.name} map"] = nn.Parameter(matrix)
                continue
            table = feature.table or feature.name
            if self.sizes.setdefault(table, feature.size) != feature.size:
                raise ValueError(f"sizes of {table}: {self.sizes[table]} and {feature.size}")
            if f"table {table}" not in self.weights:
                rows = torch.randn(feature.size, embedding_dim) * embedding_dim**-0.5
                self.weights[f"table {table}"] = nn.Parameter(rows)
                with torch.no_grad():
                    rows[0] = 0.0
        self.features = sorted(features, key=lambda feature: ORDER.index(feature.kind))
        self.cross = CrossNetwork(self.dims, num_cross_layers, rank=rank)
        self.linears = nn.ModuleList()
        wide = self.dims
        for units in hidden_dims:
            self.linears.append(nn.Linear(wide, units))
            wide = units
        self.structure, self.dropout = structure, dropout
        self.last = nn.Linear(wide + self.dims * (structure == "parallel"), 1)

    def vector(self, feature, column):
        if feature.kind == "dense":
            return column * self.weights[f"{feature.name} scale"] + self.weights[
                f"{feature.name} shift"
            ]
        if feature.kind == "text":
            return column @ self.weights[f"{feature.name} map"]
        table = self.weights[f"table {feature.table or feature.name}"]
        rows = torch.cat([torch.zeros_like(table[:1]), table[1:]])[column]
        if feature.kind == "id":
            return rows
        return rows.sum(-2) / (column > 0).sum(-1, keepdim=True).clamp(min=1)

    def deep(self, x):
        for linear in self.linears:
            x = F.dropout(F.relu(linear(x)), self.dropout, training=self.training)
        return x

    def forward(self, batch):
        for feature in self.features:
            if feature.name not in batch:
                raise KeyError(feature.name)
        x0 = torch.cat([self.vector(f, batch[f.name]) for f in self.features], 1)
        if self.structure == "stacked":
            parts = self.deep(self.cross(x0))
        else:
            parts = torch.cat([self.deep(x0), self.cross(x0)], 1)
        return self.last(parts).reshape(-1)


def _least(z):
    return z if z.dtype == torch.float64 else z.float()


def binary_loss(logits, labels, *, sample_weight=None):
    weight = torch.ones_like(logits) if sample_weight is None else sample_weight
    if not logits.shape == labels.shape == weight.shape:
        raise ValueError("shapes")
    if not logits.numel():
        raise ValueError("nothing in the batch")
    z = _least(logits)
    y, w = labels.to(z), weight.to(z)
    loss = -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z))
    return torch.dot(loss, w) / (w.sum() + (w.sum() == 0))


def listwise_loss(logits, labels):
    if logits.shape != labels.shape:
        raise ValueError("shapes")
    if not logits.numel():
        raise ValueError("nothing in the batch")
    z = _least(logits)
    gone = z == float("-inf")
    y = labels.to(z) * ~gone
    total = y.sum(1)
    lists = total > 0
    safe = torch.where(gone & lists[:, None], z, torch.where(gone, 0.0, z))
    # -sum p log softmax(z) = logsumexp(z) - sum p z
    chosen = (y * torch.where(gone, 0.0, z)).sum(1) / torch.where(lists, total, 1.0)
    loss = (safe.logsumexp(1) - chosen) * lists
    return loss.sum() / lists.sum().clamp(min=1)
