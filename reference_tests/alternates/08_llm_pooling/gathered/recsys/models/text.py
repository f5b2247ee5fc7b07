"""The place of a token by arange and gather; own padding on the right; a file for each text.

With padding on the right, whatever the tokenizer prefers, no positions have to be passed.
"""

import hashlib
import os
import uuid
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

POOLINGS = ("mean", "cls", "last")


def _at(hidden, column):
    index = column[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, index)[:, 0]


def pool(hidden, mask, mode):
    if mode not in ("mean", "cls", "last"):
        raise ValueError(mode)
    if hidden.dim() != 3 or tuple(mask.shape) != tuple(hidden.shape[:2]):
        raise ValueError(f"{tuple(hidden.shape)} and {tuple(mask.shape)}")
    if hidden.dtype in (torch.bfloat16, torch.float16):
        hidden = hidden.float()
    length = hidden.shape[1]
    if length == 0:
        return hidden.sum(1)
    number = torch.arange(1, length + 1, device=hidden.device)
    some = (mask != 0).any(1)
    if mode == "mean":
        real = (mask != 0)[..., None]
        return torch.where(real, hidden, 0.0).sum(1) / real.sum(1).clamp_min(1)
    if mode == "last":
        column = torch.where(mask != 0, number, 0).argmax(1)
    else:
        column = torch.where(mask != 0, number.flip(0), 0).argmax(1)
    return torch.where(some[:, None], _at(hidden, column), 0.0)


def position_ids(mask):
    real = mask.ne(0)
    place = torch.cumsum(real.to(torch.int64), 1).sub(1)
    return place.masked_fill(~real, 0)


class TextEncoder:
    def __init__(
        self, model, tokenizer, *, pooling, normalize=True, max_length=128, device="cpu", name=""
    ):
        if pooling not in POOLINGS:
            raise ValueError(f"{pooling} is none of {POOLINGS}")
        if not max_length >= 1:
            raise ValueError("max_length")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer cannot pad")
        self.device = torch.device(device)
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.tokenizer = tokenizer
        self.pooling, self.normalize, self.name = pooling, normalize, name
        self.max_length = min(tokenizer.model_max_length, max_length)

    @property
    def dim(self):
        return self.model.config.hidden_size

    def encode(self, texts, *, batch_size=64):
        if isinstance(texts, str) or any(not isinstance(each, str) for each in texts):
            raise TypeError("texts: a list of strings")
        if batch_size < 1:
            raise ValueError("batch_size")
        cut = {"truncation": True, "max_length": self.max_length}
        tokens = [torch.tensor(self.tokenizer(each, **cut)["input_ids"]) for each in texts]
        ranked = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
        pieces, places = [], []
        while ranked:
            rows, ranked = ranked[:batch_size], ranked[batch_size:]
            places += rows
            pieces.append(self._batch([tokens[i] for i in rows]))
        if not pieces:
            return torch.zeros(0, self.dim)
        inverse = torch.empty(len(places), dtype=torch.long)
        inverse[torch.tensor(places)] = torch.arange(len(places))
        return torch.cat(pieces)[inverse]

    def _batch(self, rows):
        lengths = torch.tensor([len(row) for row in rows])
        if lengths.max() == 0:
            return torch.zeros(len(rows), self.dim)
        ids = torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True)
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        ids, mask = ids.to(self.device), mask.long().to(self.device)
        was = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        try:
            self.model.eval()
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            vector = pool(hidden, mask, self.pooling).float()
            if self.normalize:
                vector = F.normalize(vector)
            return vector.to("cpu")
        finally:
            torch.set_grad_enabled(was)

    def identity(self):
        parts = [self.name, self.pooling, str(self.normalize), str(self.max_length)]
        state = self.model.state_dict()
        for key in sorted(state):
            value = state[key].detach().to("cpu").contiguous()
            raw = value.flatten().view(torch.uint8).numpy().tobytes()
            parts += [key, str(value.dtype), str(list(value.shape)), hashlib.md5(raw).hexdigest()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def cached_embeddings(encoder, texts, folder):
    home = Path(folder) / encoder.identity()
    home.mkdir(parents=True, exist_ok=True)
    vectors, missing = {}, []
    for each in dict.fromkeys(texts):
        try:
            vector = np.load(home / _file(each), allow_pickle=False)
            if vector.shape != (encoder.dim,) or vector.dtype != np.float32:
                raise ValueError("not ours")
            vectors[each] = torch.from_numpy(vector)
        except (OSError, ValueError, EOFError):
            missing.append(each)
    if missing:
        for each, vector in zip(missing, encoder.encode(missing), strict=False):
            vectors[each] = vector
            temporary = home / uuid.uuid4().hex
            with open(temporary, "wb") as out:
                np.save(out, vector.numpy())
            os.replace(temporary, home / _file(each))
    if not texts:
        return torch.zeros((0, encoder.dim))
    return torch.stack([vectors[each] for each in texts])


def _file(text):
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest() + ".npy"


class TextProjection(torch.nn.Module):
    def __init__(self, width, dim):
        super().__init__()
        self.linear = torch.nn.Linear(width, dim)
        for parameter in self.linear.parameters():
            parameter.requires_grad_(False).zero_()
        self.register_buffer("mean", torch.zeros(width))

    @classmethod
    def fit(cls, text, target, *, ridge, sample_weight=None):
        if text.dim() != 2 or target.dim() != 2 or text.shape[0] != target.shape[0]:
            raise ValueError("text (n, width), target (n, dim)")
        if text.shape[0] == 0 or ridge <= 0:
            raise ValueError("items, and a ridge above 0")
        x, y = text.detach().to(torch.float64), target.detach().to(torch.float64)
        w = torch.ones_like(x[:, 0]) if sample_weight is None else sample_weight.double()
        if w.shape != x[:, 0].shape or w.min() < 0 or w.max() <= 0:
            raise ValueError("sample_weight")
        w = w.unsqueeze(1)
        mx, my = (w * x).sum(0) / w.sum(), (w * y).sum(0) / w.sum()
        u, s, vh = torch.linalg.svd((x - mx) * w.sqrt(), full_matrices=False)
        solution = vh.T @ ((s / (s**2 + ridge)).unsqueeze(1) * (u.T @ ((y - my) * w.sqrt())))
        made = cls(x.shape[1], y.shape[1]).to(text.device)
        made.linear.weight.copy_(solution.T)
        made.linear.bias.copy_(my)
        made.mean.copy_(mx)
        return made

    def forward(self, text):
        if text.dim() != 2 or text.shape[-1] != self.linear.in_features:
            raise ValueError(f"expected (n, {self.linear.in_features})")
        return self.linear(text.float() - self.mean)
