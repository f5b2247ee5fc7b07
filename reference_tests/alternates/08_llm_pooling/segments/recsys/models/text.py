"""Prefix sums and differences instead of masks; a cache of safetensors shards; QR.

Everything about one batch is a small dataclass; the decoder is always padded on its own side.
"""

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

POOLINGS = ("mean", "cls", "last")


def pool(hidden, mask, mode):
    if mode not in POOLINGS:
        raise ValueError(f"{mode} is not one of {POOLINGS}")
    if hidden.ndim != 3:
        raise ValueError("hidden must be (B, T, D)")
    if mask.shape != hidden.shape[:2]:
        raise ValueError("mask must be (B, T)")
    place = position_ids(mask)
    real = mask.bool()
    if mode == "cls":
        real = real & place.eq(0)
    if mode == "last" and mask.shape[1]:
        real = real & place.eq(place.masked_fill(~real, -1).amax(1, keepdim=True))
    at_least = torch.promote_types(hidden.dtype, torch.float32)
    clean = hidden.to(at_least).masked_fill(real[:, :, None].logical_not(), 0.0)
    count = real.count_nonzero(1).clamp(min=1)
    return clean.sum(dim=1).div(count[:, None])


def position_ids(mask):
    total = torch.nn.functional.pad(mask.bool().long().cumsum(1), (1, 0))  # before each token
    last = (total[:, -1:] - 1).clamp(min=0)
    return torch.minimum(total[:, :-1], last)


@dataclass
class Batch:
    rows: list
    ids: torch.Tensor
    mask: torch.Tensor


class TextEncoder:
    def __init__(self, model, tokenizer, *, pooling, normalize=True, max_length=128, device="cpu",
                 name=""):
        problems = []
        if pooling not in POOLINGS:
            problems.append("pooling")
        if max_length < 1:
            problems.append("max_length")
        if tokenizer.pad_token is None:
            problems.append("the tokenizer's pad_token")
        if problems:
            raise ValueError("cannot use this: " + ", ".join(problems))
        self.model, self.tokenizer, self.pooling = model, tokenizer, pooling
        self.normalize, self.name, self.device = normalize, name, torch.device(device)
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.freeze()

    def freeze(self):
        self.model = self.model.to(self.device)
        self.model.eval()
        self.model.requires_grad_(False)

    @property
    def dim(self):
        return self.model.config.hidden_size

    def batches(self, texts, batch_size):
        tokenize = functools.partial(
            self.tokenizer, truncation=True, max_length=self.max_length, add_special_tokens=True
        )
        length = [len(tokenize(text)["input_ids"]) for text in texts]
        order = [i for i in sorted(range(len(texts)), key=length.__getitem__) if length[i]]
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenize([texts[i] for i in rows], padding="longest", return_tensors="pt")
            yield Batch(rows, batch.input_ids.to(self.device), batch.attention_mask.to(self.device))

    def encode(self, texts, *, batch_size=64):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("list of strings")
        if batch_size < 1:
            raise ValueError("batch_size")
        self.freeze()
        result = [torch.zeros(self.dim)] * len(texts)
        with torch.no_grad():
            for batch in self.batches(texts, batch_size):
                out = self.model(
                    input_ids=batch.ids,
                    attention_mask=batch.mask,
                    position_ids=position_ids(batch.mask),
                )
                vectors = pool(out.last_hidden_state, batch.mask, self.pooling)
                vectors = vectors.to(dtype=torch.float32, device="cpu")
                for row, vector in zip(batch.rows, vectors, strict=False):
                    norm = vector.norm()
                    result[row] = vector / norm if self.normalize and norm > 0 else vector
        return torch.stack(result) if result else torch.zeros(0, self.dim)

    def identity(self):
        tensors = {k: v.detach().cpu().clone() for k, v in self.model.named_parameters()}
        settings = f"{self.name}\n{self.pooling}\n{self.normalize}\n{self.max_length}"
        return hashlib.sha256(settings.encode() + save(tensors)).hexdigest()


def cached_embeddings(encoder, texts, folder):
    """256 shards by the first byte of a text's digest, each written whole."""
    root = Path(folder).joinpath(encoder.identity())
    root.mkdir(parents=True, exist_ok=True)
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    shards = {digest[:2]: _shard(root / digest[:2], encoder.dim) for digest in digests}
    new = {d: text for d, text in zip(digests, texts, strict=False) if d not in shards[d[:2]]}
    if new:
        for digest, vector in zip(new, encoder.encode([*new.values()]), strict=False):
            shards[digest[:2]][digest] = vector.clone()
        for name in {digest[:2] for digest in new}:
            part = root / f"{name}.{os.getpid()}.part"
            try:
                part.write_bytes(save(shards[name]))
                part.replace(root / name)
            finally:
                if part.exists():
                    part.unlink()
    rows = [shards[digest[:2]][digest] for digest in digests]
    return torch.stack(rows) if rows else torch.zeros(0, encoder.dim)


def _shard(path, dim):
    try:
        found = load(path.read_bytes())
    except FileNotFoundError:
        return {}
    except Exception:
        return {}
    return {key: vector for key, vector in found.items() if vector.shape == (dim,)}


class TextProjection(nn.Module):
    def __init__(self, width, dim):
        super().__init__()
        self.width = width
        self.register_buffer("state", torch.zeros(width + 2, max(width, dim)))
        self.dim = dim

    @classmethod
    def fit(cls, text, target, *, ridge, sample_weight=None):
        if text.ndim != 2 or target.ndim != 2 or len(text) != len(target) or len(text) < 1:
            raise ValueError("shapes")
        if ridge <= 0:
            raise ValueError("ridge")
        x, y = text.detach().double(), target.detach().double()
        w = torch.ones_like(x[:, 0]) if sample_weight is None else sample_weight.double()
        w = w[..., None]
        if w.shape != (len(x), 1) or (w < 0).any() or (w == 0).all():
            raise ValueError("sample_weight")
        centre, goal = (w * x).sum(0) / w.sum(), (w * y).sum(0) / w.sum()
        eye = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
        left = torch.vstack([(x - centre) * w.sqrt(), eye * ridge**0.5])
        q, r = torch.linalg.qr(left)
        right = torch.vstack([(y - goal) * w.sqrt(), torch.zeros_like(eye[:, :1]) * goal])
        made = cls(x.shape[1], y.shape[1]).to(text.device)
        slope = torch.linalg.solve_triangular(r, q.T @ right, upper=True)
        made.state[: made.width, : made.dim] = slope
        made.state[-2, : made.width] = centre
        made.state[-1, : made.dim] = goal
        return made

    def forward(self, text):
        if text.ndim != 2 or text.shape[1] != self.width:
            raise ValueError("text")
        slope, centre = self.state[: self.width, : self.dim], self.state[-2, : self.width]
        return (text.float() - centre) @ slope + self.state[-1, : self.dim]
