"""Nested steps of plain functions; a JSON file for each call that brought something new.

Pooling by weighted sums of clean tokens in one expression; ridge by Gauss-Newton on features.
"""

import base64
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

POOLINGS = ("mean", "cls", "last")


def weights(mask, mode):
    """(B, T) int64: 1 where a token counts."""
    real = (mask != 0).to(torch.int64)
    left = real.cumsum(1)
    right = left[:, -1:] - left + real if mask.shape[1] else left
    return {"mean": real, "cls": real * (left == 1), "last": real * (right == 1)}[mode]


def pool(hidden, mask, mode):
    if mode not in POOLINGS:
        raise ValueError(f"mode {mode!r}")
    if hidden.dim() != 3 or mask.dim() != 2 or mask.shape != hidden.shape[:2]:
        raise ValueError("hidden (B, T, D), mask (B, T)")
    weight = weights(mask, mode).unsqueeze(-1)
    total = torch.where(weight > 0, hidden, hidden.new_zeros(()))
    total = total.to(torch.promote_types(total.dtype, torch.float32)).sum(1)
    return total / weight.sum(1).clamp(min=1).to(total.dtype)


def position_ids(mask):
    real = (mask != 0).to(torch.int64)
    return (real.cumsum(1) - 1) * real


class TextEncoder:
    def __init__(self, model, tokenizer, *, pooling, **options):
        settings = {"normalize": True, "max_length": 128, "device": "cpu", "name": "", **options}
        if pooling not in POOLINGS:
            raise ValueError("pooling")
        if settings["max_length"] < 1:
            raise ValueError("max_length")
        if tokenizer.pad_token_id is None:
            raise ValueError("pad_token")
        self.__dict__.update(settings)
        self.pooling = pooling
        self.device = torch.device(settings["device"])
        self.max_length = min(self.max_length, tokenizer.model_max_length)
        self.model, self.tokenizer = model, tokenizer
        model.to(self.device).requires_grad_(False)
        model.train(False)

    dim = property(lambda self: self.model.config.hidden_size)

    def encode(self, texts, *, batch_size=64):
        check_texts(texts, batch_size)
        rows = [
            SimpleNamespace(place=place, ids=self.tokenizer.encode(
                text, truncation=True, max_length=self.max_length))
            for place, text in enumerate(texts)
        ]
        rows = sorted((row for row in rows if row.ids), key=lambda row: len(row.ids), reverse=True)
        vectors = torch.zeros(len(texts), self.dim, dtype=torch.float32)
        self.model.train(False)
        for batch in np.array_split(np.arange(len(rows)), -(-len(rows) // batch_size) or 1):
            if len(batch):
                chosen = [rows[i] for i in batch]
                places = torch.tensor([row.place for row in chosen])
                vectors.index_copy_(0, places, self.of_ids([row.ids for row in chosen]))
        return vectors

    def of_ids(self, ids):
        left = self.tokenizer.padding_side == "left"
        longest = len(max(ids, key=len))
        table = np.full((len(ids), longest), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(ids), longest), dtype=np.int64)
        for row, each in enumerate(ids):
            place = slice(longest - len(each), None) if left else slice(0, len(each))
            table[row, place], mask[row, place] = each, 1
        table = torch.as_tensor(table, device=self.device)
        mask = torch.as_tensor(mask, device=self.device)
        with torch.no_grad():
            hidden = self.model(
                input_ids=table, attention_mask=mask, position_ids=position_ids(mask)
            ).last_hidden_state
            vector = pool(hidden, mask, self.pooling).to("cpu", torch.float64)
            if self.normalize:
                vector = torch.nn.functional.normalize(vector, dim=1)
        return vector.float()

    def identity(self):
        settings = [self.name, self.pooling, self.normalize, self.max_length]
        lines = [json.dumps(settings)]
        for name, weight in sorted(self.model.named_parameters()):
            data = weight.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
            lines += [f"{name} {weight.dtype} {list(weight.shape)}", data.tobytes().hex()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_texts(texts, batch_size):
    if isinstance(texts, (str, bytes)) or any(type(text) is not str for text in texts):
        raise TypeError("texts must be a list of strings")
    if batch_size < 1:
        raise ValueError("batch_size must be above 0")


def cached_embeddings(encoder, texts, folder):
    mine = Path(folder, encoder.identity()[:32])
    mine.mkdir(parents=True, exist_ok=True)
    known = {}
    for file in sorted(mine.glob("*.json")):
        try:
            part = json.loads(file.read_text("utf-8"))
            part = {text: base64.b64decode(vector) for text, vector in part.items()}
        except (ValueError, AttributeError, TypeError):
            file.unlink()
            continue
        known.update({k: v for k, v in part.items() if len(v) == 4 * encoder.dim})
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
        arrays = encoder.encode(new).numpy()
        part = {text: array.tobytes() for text, array in zip(new, arrays, strict=False)}
        known.update(part)
        data = json.dumps({text: base64.b64encode(raw).decode() for text, raw in part.items()})
        number = sum(1 for _ in mine.glob("*.json"))
        while (mine / f"{number}.json").exists():
            number += 1
        temporary = mine / f"{number}.part"
        temporary.write_text(data, "utf-8")
        temporary.rename(mine / f"{number}.json")
    rows = [np.frombuffer(known[text], dtype=np.float32).copy() for text in texts]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, encoder.dim)


class TextProjection(torch.nn.Module):
    def __init__(self, width, dim):
        super().__init__()
        for name, shape in (("a", (width, dim)), ("from_", (1, width)), ("to_", (1, dim))):
            self.register_buffer(name, torch.zeros(shape))

    @classmethod
    def fit(cls, text, target, *, ridge, sample_weight=None):
        if text.dim() != 2 or target.dim() != 2 or len(text) != len(target) or not len(text):
            raise ValueError("shapes")
        if not ridge > 0:
            raise ValueError("ridge")
        x = text.detach().cpu().double().numpy()
        y = target.detach().cpu().double().numpy()
        w = np.ones(len(x))
        if sample_weight is not None:
            w = sample_weight.detach().cpu().double().numpy()
        if w.shape != (len(x),) or (w < 0).any() or w.sum() == 0:
            raise ValueError("sample_weight")
        x_mean, y_mean = np.average(x, 0, weights=w), np.average(y, 0, weights=w)
        xw = (x - x_mean).T * w
        a = np.linalg.solve(xw @ (x - x_mean) + ridge * np.identity(x.shape[1]), xw @ (y - y_mean))
        made = cls(*a.shape)
        state = {"a": a, "from_": x_mean[None], "to_": y_mean[None]}
        made.load_state_dict({k: torch.tensor(v, dtype=torch.float32) for k, v in state.items()})
        return made.to(text.device)

    def forward(self, text):
        if text.dim() != 2 or text.shape[1] != self.a.shape[0]:
            raise ValueError("text")
        return torch.addmm(self.to_, text.to(self.a.dtype) - self.from_, self.a)
