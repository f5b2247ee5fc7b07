"""Every pooling is a product with weights (bmm, einsum); npz files; least squares with more rows.

The encoder tokenises twice: once for the lengths, once for each batch, longest first.
"""

import hashlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

POOLINGS = ("mean", "cls", "last")


def pool(hidden, mask, mode):
    if mode not in POOLINGS:
        raise ValueError(f"no such pooling: {mode}")
    if hidden.ndim != 3 or mask.ndim != 2 or hidden.shape[:2] != mask.shape:
        raise ValueError("hidden (B, T, D) and mask (B, T) expected")
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    real = mask > 0
    if mode == "mean":
        weight = real.to(dtype)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1.0)
        clean = torch.where(real[:, :, None], hidden, torch.zeros_like(hidden)).to(dtype)
        return torch.bmm(weight.unsqueeze(1), clean).squeeze(1)
    rank = real.long().cumsum(1)
    wanted = torch.ones_like(rank[:, :1]) if mode == "cls" else real.long().sum(1, keepdim=True)
    weight = (real & (rank == wanted)).to(dtype)
    clean = torch.where(real[:, :, None], hidden, torch.zeros_like(hidden)).to(dtype)
    return torch.einsum("btd,bt->bd", clean, weight)


def position_ids(mask):
    count = torch.cumsum((mask != 0).long(), dim=-1)
    return torch.where(count > 0, count - 1, count)


class TextEncoder:
    def __init__(self, model, tokenizer, *, pooling, normalize=True, max_length=128, device="cpu",
                 name=""):
        if pooling not in POOLINGS:
            raise ValueError(f"no such pooling: {pooling}")
        if max_length <= 0:
            raise ValueError("max_length must be above 0")
        if tokenizer.pad_token is None:
            raise ValueError("the tokenizer has no pad token")
        self.device = torch.device(device)
        model.to(self.device)
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad = False
        self.model, self.tokenizer, self.pooling = model, tokenizer, pooling
        self.normalize, self.name = normalize, name
        self.max_length = int(min(max_length, tokenizer.model_max_length))

    @property
    def dim(self):
        return self.model.config.hidden_size

    def encode(self, texts, *, batch_size=64):
        if isinstance(texts, str):
            raise TypeError("a list of strings, please")
        for each in texts:
            if not isinstance(each, str):
                raise TypeError(f"not a string: {each!r}")
        if batch_size < 1:
            raise ValueError("batch_size must be above 0")
        if not texts:
            return torch.zeros(0, self.dim)
        options = {"truncation": True, "max_length": self.max_length}
        lengths = np.array([len(ids) for ids in self.tokenizer(list(texts), **options).input_ids])
        order = np.argsort(-lengths, kind="stable")
        order = order[lengths[order] > 0]
        result = np.zeros((len(texts), self.dim), dtype=np.float32)
        for rows in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            batch = self.tokenizer(
                [texts[row] for row in rows], padding=True, return_tensors="pt", **options
            )
            result[rows] = self.forward(batch["input_ids"], batch["attention_mask"]).numpy()
        return torch.from_numpy(result)

    def forward(self, ids, mask):
        ids, mask = ids.to(self.device), mask.to(self.device)
        self.model.eval()
        with torch.no_grad():
            out = self.model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask))
            vector = pool(out.last_hidden_state, mask, self.pooling).to(torch.float32)
            if self.normalize:
                norm = vector.square().sum(1, keepdim=True).sqrt()
                vector = torch.where(norm > 0, vector / norm, vector)
        return vector.cpu()

    def identity(self):
        digest = hashlib.blake2b(digest_size=32)
        digest.update(f"{self.name!r} {self.pooling} {self.normalize} {self.max_length}".encode())
        for name, weight in self.model.named_parameters():
            digest.update(repr((name, str(weight.dtype), list(weight.shape))).encode())
            raw = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(bytes(raw.tolist()))
        return digest.hexdigest()


def cached_embeddings(encoder, texts, folder):
    folder = Path(folder)
    os.makedirs(folder, exist_ok=True)
    path = folder / (encoder.identity() + ".npz")
    try:
        with np.load(path, allow_pickle=False) as data:
            known = dict(zip(data["keys"].tolist(), data["vectors"], strict=False))
    except Exception:
        known = {}
    keys = [hashlib.sha1(each.encode()).hexdigest() for each in texts]
    new = {key: each for key, each in zip(keys, texts, strict=False) if key not in known}
    if new:
        vectors = encoder.encode(list(new.values())).numpy()
        known.update(zip(new, vectors, strict=False))
        buffer = io.BytesIO()
        np.savez(buffer, keys=np.array(list(known)), vectors=np.stack(list(known.values())))
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as out:
            out.write(buffer.getvalue())
        os.replace(out.name, path)
    found = [torch.from_numpy(np.array(known[key])) for key in keys]
    return torch.stack(found) if found else torch.empty(0, encoder.dim)


class TextProjection(nn.Module):
    def __init__(self, width, dim):
        super().__init__()
        self.register_buffer("slope", torch.zeros(dim, width))
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("offset", torch.zeros(dim))

    @classmethod
    @torch.no_grad()
    def fit(cls, text, target, *, ridge, sample_weight=None):
        if text.ndim != 2 or target.ndim != 2:
            raise ValueError("two matrices expected")
        n, width = text.shape
        if n < 1 or target.shape[0] != n:
            raise ValueError("as many targets as texts, at least one")
        if ridge <= 0:
            raise ValueError("ridge must be above 0")
        w = torch.ones(n) if sample_weight is None else sample_weight
        w = w.to(text.device, torch.float64)
        if w.shape != (n,) or bool((w < 0).any()) or not bool((w > 0).any()):
            raise ValueError("one weight an item, none below 0 and some above")
        x, y = text.to(torch.float64), target.to(torch.float64)
        share = (w / w.sum()).unsqueeze(1)
        x_mean, y_mean = (x * share).sum(0), (y * share).sum(0)
        root = w.sqrt().unsqueeze(1)
        eye = torch.eye(width, dtype=torch.float64, device=x.device) * ridge**0.5
        left = torch.cat([(x - x_mean) * root, eye])
        right = torch.cat([(y - y_mean) * root, eye.new_zeros(width, y.shape[1])])
        made = cls(width, target.shape[1]).to(text.device)
        made.slope.copy_(torch.linalg.lstsq(left, right).solution.T)
        made.centre.copy_(x_mean)
        made.offset.copy_(y_mean)
        return made

    def forward(self, text):
        if text.ndim != 2 or text.shape[1] != self.centre.shape[0]:
            raise ValueError("(n, width) expected")
        return nn.functional.linear(text.float() - self.centre, self.slope, self.offset)
