"""An SQLite database as the cache; pooling by index_add; the encoder is a module; eigenvectors.

Texts are encoded once each within a call, too, and spread over the rows afterwards.
"""

import hashlib
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

POOLINGS = ("mean", "cls", "last")


def pool(hidden, mask, mode):
    if hidden.dim() != 3 or mask.dim() != 2 or mask.size(0) != hidden.size(0):
        raise ValueError("shapes")
    if mask.size(1) != hidden.size(1):
        raise ValueError("shapes")
    if mode not in POOLINGS:
        raise ValueError("mode")
    batch, length, width = hidden.shape
    real = mask.bool()
    before = real.long().cumsum(1) - real.long()
    after = real.long().flip(1).cumsum(1).flip(1) - real.long()
    if mode == "cls":
        real = real & before.eq(0)
    elif mode == "last":
        real = real & after.eq(0)
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    flat = wide.masked_fill(real.logical_not().unsqueeze(-1), 0).reshape(batch * length, width)
    row = torch.arange(batch, device=hidden.device).repeat_interleave(length)
    total = torch.zeros(batch, width, dtype=wide.dtype, device=hidden.device)
    total = total.index_add(0, row, flat)
    return total / real.sum(1, keepdim=True).add(real.any(1, keepdim=True).logical_not())


def position_ids(mask):
    real = mask.bool().long()
    return torch.relu(real.cumsum(dim=1) - 1)


class TextEncoder(nn.Module):
    def __init__(
        self, model, tokenizer, *, pooling, normalize=True, max_length=128, device="cpu", name=""
    ):
        super().__init__()
        if pooling not in POOLINGS or max_length < 1:
            raise ValueError("pooling, max_length")
        if not tokenizer.pad_token:
            raise ValueError("no padding token")
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.normalize = normalize
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.device = torch.device(device)
        self.name = name
        self.requires_grad_(False)
        self.to(self.device)
        self.eval()

    @property
    def dim(self):
        return self.model.config.hidden_size

    @torch.no_grad()
    def encode(self, texts, *, batch_size=64):
        if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
            raise TypeError("a list of strings")
        if batch_size <= 0:
            raise ValueError("batch_size")
        result = torch.zeros(len(texts), self.dim)
        if len(texts) == 0:
            return result
        self.eval()
        once = list(set(texts))
        ids = self.tokenizer(once, max_length=self.max_length, truncation=True).input_ids
        pairs = sorted(zip(ids, once, strict=False), key=lambda pair: -len(pair[0]))
        pairs = [pair for pair in pairs if pair[0]]
        found = {}
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            vectors = self.forward([row for row, _ in batch]).cpu()
            found.update({text: vector for (_, text), vector in zip(batch, vectors, strict=False)})
        for i, each in enumerate(texts):
            if each in found:
                result[i] = found[each]
        return result

    def forward(self, rows):
        longest = max(map(len, rows))
        fill = self.tokenizer.pad_token_id
        ids = torch.tensor([[fill] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        ids, mask = ids.to(self.device), mask.to(self.device)
        out = self.model(ids, attention_mask=mask, position_ids=position_ids(mask))
        vector = pool(out[0], mask, self.pooling).float()
        if not self.normalize:
            return vector
        return vector / vector.norm(dim=1, keepdim=True).clamp(min=1e-12)

    def identity(self):
        digest = hashlib.sha3_256()
        for part in (self.name, self.pooling, int(self.normalize), self.max_length):
            digest.update(f"{len(str(part))}:{part};".encode())
        for name, weight in self.model.state_dict().items():
            digest.update(f"{name}|{weight.dtype}|{tuple(weight.shape)}|".encode())
            digest.update(memoryview(weight.cpu().contiguous().view(-1).view(torch.int8).numpy()))
        return digest.hexdigest()


TABLE = "create table if not exists vectors (key blob primary key, vector blob, check_ blob)"


def cached_embeddings(encoder, texts, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{encoder.identity()}.sqlite"
    known = _known(path, encoder.dim)
    missing = [each for each in dict.fromkeys(texts) if _key(each) not in known]
    if missing:
        rows = [
            (_key(text), struct.pack(f"<{encoder.dim}f", *vector.tolist()))
            for text, vector in zip(missing, encoder.encode(missing), strict=False)
        ]
        rows = [(key, blob, hashlib.sha256(blob).digest()) for key, blob in rows]
        with closing(sqlite3.connect(path)) as database, database:
            database.execute(TABLE)
            database.executemany("insert or replace into vectors values (?, ?, ?)", rows)
        known.update({key: blob for key, blob, _ in rows})
    out = torch.zeros(len(texts), encoder.dim)
    for i, each in enumerate(texts):
        out[i] = torch.tensor(struct.unpack(f"<{encoder.dim}f", known[_key(each)]))
    return out


def _known(path, dim):
    """All that the database holds; one that is broken is removed."""
    if not path.exists():
        return {}
    try:
        with closing(sqlite3.connect(path)) as database, database:
            if database.execute("pragma integrity_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("broken")
            database.execute(TABLE)
            rows = database.execute("select key, vector, check_ from vectors").fetchall()
    except sqlite3.DatabaseError:
        path.unlink()
        return {}
    whole = [row for row in rows if hashlib.sha256(row[1]).digest() == row[2]]
    return {key: blob for key, blob, _ in whole if len(blob) == 4 * dim}


def _key(text):
    return hashlib.sha256(text.encode()).digest()


class TextProjection(nn.Module):
    def __init__(self, width, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dim), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(1, dim, dtype=torch.float64), requires_grad=False)

    @classmethod
    def fit(cls, text, target, *, ridge, sample_weight=None):
        n = len(text)
        if text.dim() != 2 or target.dim() != 2 or len(target) != n or n == 0:
            raise ValueError("shapes")
        if ridge <= 0.0:
            raise ValueError("ridge")
        x, y = text.detach().double(), target.detach().double()
        w = torch.full((n,), 1.0, dtype=torch.float64, device=x.device)
        if sample_weight is not None:
            if tuple(sample_weight.shape) != (n,):
                raise ValueError("sample_weight")
            w = sample_weight.detach().double()
        if (w < 0).any() or w.sum() <= 0:
            raise ValueError("sample_weight")
        total = w.sum()
        x_mean = torch.einsum("n,nd->d", w, x) / total
        y_mean = torch.einsum("n,nd->d", w, y) / total
        x, y = x - x_mean, y - y_mean
        values, vectors = torch.linalg.eigh(torch.einsum("n,ni,nj->ij", w, x, x))
        right = vectors.T @ torch.einsum("n,ni,nj->ij", w, x, y)
        solution = vectors @ (right / (values.unsqueeze(1) + ridge))
        made = cls(x.shape[1], y.shape[1]).to(text.device)
        made.weight.copy_(solution)
        made.bias.copy_((y_mean - x_mean @ made.weight.double()).unsqueeze(0))
        return made

    def forward(self, text):
        if text.dim() != 2 or text.size(1) != self.weight.size(0):
            raise ValueError("text (n, width)")
        return (text.double() @ self.weight.double() + self.bias).float()
