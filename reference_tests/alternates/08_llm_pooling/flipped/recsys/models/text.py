"""Ranks by flipping; an iterator of batches; tensors kept by torch.save, read as weights only.

The padding side of the tokenizer is set for the time of the call; Cholesky instead of solve.
"""

import contextlib
import hashlib
import itertools
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

POOLINGS = ("mean", "cls", "last")


def _first(hidden: Tensor, real: Tensor) -> Tensor:
    """Of each row the first marked token, or zeros."""
    first = real & (real.int().cumsum(1) == 1)
    return torch.where(first.unsqueeze(2), hidden, 0).sum(1)


def pool(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    if hidden.dim() != 3 or hidden.shape[:-1] != mask.shape:
        raise ValueError(f"hidden {list(hidden.shape)}, mask {list(mask.shape)}")
    ways = {
        "mean": lambda h, real: (
            torch.where(real.unsqueeze(2), h, 0).sum(1)
            / torch.where(real.any(1), real.sum(1), 1).unsqueeze(1)
        ),
        "cls": _first,
        "last": lambda h, real: _first(h.flip(1), real.flip(1)),
    }
    try:
        way = ways[mode]
    except KeyError:
        raise ValueError(f"unknown mode {mode}") from None
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    return way(wide, mask.bool())


def position_ids(mask: Tensor) -> Tensor:
    real = mask.bool()
    gap = (~real).long().cumsum(1)  # padding up to each column
    column = torch.arange(mask.shape[1], device=mask.device).unsqueeze(0)
    return torch.where(real, column - gap, 0)


class TextEncoder:
    def __init__(self, model, tokenizer, *, pooling: str, normalize: bool = True,
                 max_length: int = 128, device="cpu", name: str = "") -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling}")
        if max_length < 1:
            raise ValueError("max_length is below 1")
        if tokenizer.pad_token is None:
            raise ValueError("set a pad_token")
        self.model = model.eval().to(device)
        for each in self.model.parameters():
            each.requires_grad_(False)
        self.tokenizer, self.pooling = tokenizer, pooling
        self.normalize, self.name = normalize, name
        self.max_length = max_length
        if tokenizer.model_max_length < max_length:
            self.max_length = tokenizer.model_max_length
        self.device = torch.device(device)

    @property
    def dim(self) -> int:
        return self.model.config.hidden_size

    @contextlib.contextmanager
    def _ready(self):
        side, training = self.tokenizer.padding_side, self.model.training
        self.tokenizer.padding_side = "right"
        self.model.train(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self.tokenizer.padding_side = side
            self.model.train(training)

    def encode(self, texts, *, batch_size: int = 64) -> Tensor:
        if isinstance(texts, str):
            raise TypeError("one string: put it into a list")
        if [each for each in texts if not isinstance(each, str)]:
            raise TypeError("not all are strings")
        if batch_size < 1:
            raise ValueError("batch_size is below 1")
        with self._ready():
            found = dict(self._vectors(texts, batch_size))
        zeros = torch.zeros(self.dim)
        rows = [found.get(i, zeros) for i in range(len(texts))]
        return torch.stack(rows) if rows else torch.empty((0, self.dim))

    def _vectors(self, texts, batch_size):
        """(row, vector), in any order."""
        if not len(texts):
            return
        limit = {"truncation": "longest_first", "max_length": self.max_length}
        ids = self.tokenizer(list(texts), return_attention_mask=False, **limit)["input_ids"]
        queue = iter(sorted((len(row), i) for i, row in enumerate(ids) if len(row)))
        while batch := list(itertools.islice(queue, batch_size)):
            rows = [i for _, i in batch]
            padded = self.tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
            padded = {key: value.to(self.device) for key, value in padded.items()}
            mask = padded["attention_mask"]
            vectors = pool(self.model(**padded).last_hidden_state, mask, self.pooling).float()
            if self.normalize:
                norms = vectors.pow(2).sum(-1, keepdim=True).sqrt()
                vectors = vectors / torch.where(norms == 0, 1, norms)
            yield from zip(rows, vectors.cpu(), strict=False)

    def identity(self) -> str:
        head = "\n".join(map(repr, (self.name, self.pooling, self.normalize, self.max_length)))
        digest = hashlib.sha256(head.encode())
        for name, value in self.model.state_dict().items():
            value = value.cpu()
            digest.update(f"{name}{value.dtype}{value.shape}".encode())
            digest.update(value.reshape(-1).clone().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def cached_embeddings(encoder, texts, folder) -> Tensor:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"vectors-{encoder.identity()[:40]}.pt"
    known: dict[str, Tensor] = {}
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = dict(torch.load(path, weights_only=True))
    new = sorted(set(texts) - set(known))
    if new:
        known |= dict(zip(new, encoder.encode(new).clone(), strict=True))
        beside = path.with_suffix(".new")
        try:
            with open(beside, "wb") as out:
                torch.save(known, out)
            beside.replace(path)
        except (OSError, RuntimeError):
            beside.unlink(missing_ok=True)  # it is a cache: not kept, but known
    out = torch.zeros((len(texts), encoder.dim))
    for i, text in enumerate(texts):
        out[i] = known[text]
    return out


class TextProjection(nn.Module):
    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("map", torch.zeros(width + 1, dim, dtype=torch.float64))

    @classmethod
    def fit(cls, text, target, *, ridge, sample_weight=None):
        if not (text.dim() == target.dim() == 2 and len(text) == len(target) > 0):
            raise ValueError("shapes")
        if ridge <= 0:
            raise ValueError("ridge")
        with torch.no_grad():
            x, y = text.double(), target.double()
            w = x.new_ones(len(x), 1)
            if sample_weight is not None:
                if sample_weight.shape != (len(x),):
                    raise ValueError("sample_weight")
                w = sample_weight.double().reshape(-1, 1)
            if bool((w < 0).any()) or bool((w == 0).all()):
                raise ValueError("sample_weight")
            mean_x, mean_y = (w * x).sum(0) / w.sum(), (w * y).sum(0) / w.sum()
            x, y = x - mean_x, y - mean_y
            gram = x.T @ (w * x)
            gram.diagonal().add_(ridge)
            solution = torch.cholesky_solve(x.T @ (w * y), torch.linalg.cholesky(gram))
            made = cls(text.shape[1], target.shape[1]).to(text.device)
            made.map[:-1] = solution.float()
            made.map[-1] = mean_y - mean_x @ solution.float().double()
        return made

    def forward(self, text):
        if text.dim() != 2 or text.shape[1] + 1 != len(self.map):
            raise ValueError("text")
        return (text.double() @ self.map[:-1] + self.map[-1]).float()
