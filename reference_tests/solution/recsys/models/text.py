"""Text encoders: sentences to vectors by a frozen language model, and those to items (kata 08)."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOLINGS = ("mean", "cls", "last")


def pool(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    """One vector a text from the vectors of its tokens.

    A row of ``mask`` marks the real tokens of a text; the others are padding, which may lie on the
    right, on the left or anywhere. ``hidden`` holds something at padding too, and it must not
    have any influence, not even if it is NaN or infinite::

        "mean"   the mean over the real tokens
        "cls"    the first real token
        "last"   the last real token: where a causal model has read everything

    Contract:
        - a row without a real token gives zeros, and so do all rows if T = 0;
        - the result and every sum are float32 at least: bfloat16 and float16 are converted first,
          float64 stays;
        - gradients flow to ``hidden``, zeros to its padding; inputs are not changed;
        - cost: operations on the whole batch, no loop over texts or tokens; nothing larger than
          ``hidden`` in float64; nothing makes the host wait for the device (no ``.item()``, no
          boolean indexing).

    Args:
        hidden: (B, T, D) floating point, B above 0. mask: (B, T), bool or of any integer type,
            1 = real, on the device of ``hidden``.
        mode: one of ``POOLINGS``.

    Returns:
        (B, D), on the device of ``hidden``.

    Raises:
        ValueError: an unknown mode, shapes that do not fit.

    Source: Reimers and Gurevych 2019, "Sentence-BERT", section 3 (mean, cls); Neelakantan et al.
    2022, "Text and Code Embeddings by Contrastive Pre-Training", section 2 (last).
    """
    if mode not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, not {mode!r}")
    if hidden.dim() != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(
            "hidden and mask must be (B, T, D) and (B, T), "
            f"not {tuple(hidden.shape)} and {tuple(mask.shape)}"
        )
    real = mask.bool()
    if mode != "mean":  # the k-th real token of a row has count k, wherever the padding lies
        count = real.cumsum(1)
        real = real & (count == (1 if mode == "cls" else count[:, -1:]))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # filled, not multiplied: attention leaves NaN where a row could see nothing, and NaN * 0 is NaN
    total = hidden.masked_fill(~real.unsqueeze(-1), 0.0).sum(1, dtype=dtype)
    return total / real.sum(1, keepdim=True).clamp(min=1)


def position_ids(mask: Tensor) -> Tensor:
    """The place of each token in its own text: the first real token of a row is at 0.

    A model that is told nothing numbers the columns, and so takes the first word of a left-padded
    text for a later one. Real tokens are numbered 0, 1, 2, ...; padding gets any number that a real
    token of the row could have, 0 if there is none (no embedding is looked up out of range).
    The cost is as of :func:`pool`.

    Args:
        mask: (B, T), bool or of any integer type, 1 = real. Not changed.

    Returns:
        (B, T) int64, on the device of ``mask``.
    """
    return (mask.bool().cumsum(1) - 1).clamp(min=0)


class TextEncoder:
    """A frozen language model that turns texts into vectors.

    Args:
        model: a transformers model: ``model(input_ids=, attention_mask=)``, or with
            ``position_ids=`` too, gives an object with ``last_hidden_state`` (B, T, D),
            ``model.config.hidden_size`` is D. It is moved to ``device``, put into eval mode, and
            none of its parameters requires a gradient any more.
        tokenizer: its tokenizer; it decides about special tokens and the side of the padding.
        pooling: one of ``POOLINGS``.
        normalize: whether vectors are scaled to Euclidean norm 1, after pooling. Zero stays zero.
        max_length: most tokens of a text, special tokens included; above 0. Never more than
            ``tokenizer.model_max_length``.
        device: where the model runs.
        name: of the model, for the cache.

    Attributes:
        model, tokenizer, pooling, normalize, max_length (the smaller of the two), device (a
        ``torch.device``), name.

    Raises:
        ValueError: an unknown pooling, ``max_length`` below 1, a tokenizer without a padding token.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        pooling: str,
        normalize: bool = True,
        max_length: int = 128,
        device: str | torch.device = "cpu",
        name: str = "",
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        if tokenizer.pad_token is None:
            raise ValueError(
                "the tokenizer needs a padding token: set tokenizer.pad_token, to its end-of-text "
                "token for example; the attention mask tells them apart"
            )
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.normalize = normalize
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.name = name

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.model.config.hidden_size

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Encode texts: row i is the vector of ``texts[i]``, as if it had been encoded alone.

        The vector is ``pool`` of the model's last hidden states, computed in float32 at least and
        normalised if the encoder is told to.

        Contract:
            - a row depends on nothing but its text, up to rounding: not on the other texts, their
              order, the batch size or the side of the padding. What is real is said by the
              tokenizer's attention mask, never by a token's id (the padding token may be the
              end-of-text token, which a text ends in), and positions count from a text's first
              token (:func:`position_ids`);
            - a text that is too long is cut as the tokenizer cuts it, special tokens kept;
            - a text without any token is zeros, without the model being asked; ``""`` is a text
              like any other where the tokenizer adds special tokens;
            - no texts give (0, dim);
            - cost: at most ``ceil(n / batch_size)`` calls of the model for n texts, each of at most
              ``batch_size`` rows; all of them together compute over at most ``(tokens of all
              texts) + batch_size * (tokens of the longest)`` places, padding included. So texts of
              like length go together;
            - the same twice gives the same: no dropout, even if someone has put the model into
              training mode since;
            - no graph is built, and the result is an ordinary tensor: it can be the input of a
              model that is trained.

        Args:
            texts: a list of strings, not a single string.
            batch_size: most texts in a call of the model.

        Returns:
            (n, dim) float32 on the CPU.

        Raises:
            TypeError: a single string, or something in the list that is none.
            ValueError: ``batch_size`` below 1.

        Limits: models that do not count positions from 0 (RoBERTa) need a tokenizer that pads on
        the right, and an encoder that passes ``position_ids`` only where it pads on the left.
        """
        _check_texts(texts)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        vectors = torch.zeros(len(texts), self.dim)
        if len(texts) == 0:  # tokenizers refuse an empty list
            return vectors
        ids = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        # an order of rows and not of texts: results are written to where their text stands
        order = sorted((row for row in range(len(ids)) if ids[row]), key=lambda row: len(ids[row]))
        self.model.eval()
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            vectors[rows] = self._encode_batch([ids[row] for row in rows])
        return vectors

    @torch.no_grad()  # not inference_mode: its tensors cannot be the input of a trained model
    def _encode_batch(self, ids: list[list[int]]) -> Tensor:
        """Token ids of some texts, none empty, to (B, dim) float32 on the CPU."""
        # of lists without a mask, pad makes one from their lengths
        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.device)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        accepted = inspect.signature(self.model.forward).parameters
        if self.tokenizer.padding_side == "left" and "position_ids" in accepted:
            inputs["position_ids"] = position_ids(inputs["attention_mask"])
        hidden = self.model(**inputs).last_hidden_state
        vector = pool(hidden, inputs["attention_mask"], self.pooling).float()
        return (F.normalize(vector, dim=-1) if self.normalize else vector).cpu()

    def identity(self) -> str:
        """A digest of all that a vector depends on but the text: encoders that share it agree.

        Of the name, every weight of the model (names, shapes, values, and types: bfloat16 may be
        among them, and converted weights are others; so may a weight without dimensions), the
        pooling, ``normalize`` and ``max_length``; of nothing that differs in another process
        (``hash`` of a string does) or on another device. The tokenizer is taken to belong to the
        weights.

        Returns:
            64 hexadecimal digits.
        """
        settings = (self.name, self.pooling, self.normalize, self.max_length)
        digest = hashlib.sha256(repr(settings).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def load_encoder(
    name_or_path: str | Path, *, device: str | torch.device = "cpu", pooling: str | None = None
) -> TextEncoder:
    """Load a pretrained encoder with the pooling that it was trained with.

    Pooling, normalisation and length are read from the files that sentence-transformers keeps
    beside a model (``modules.json``, ``1_Pooling/config.json``, ``sentence_bert_config.json``);
    without them: mean, normalised, 128 tokens. Weights are read from safetensors only, and no code
    that comes with a model is run. A folder is read without any use of the network.

    Args:
        name_or_path: a folder, or a name on the Hugging Face hub.
        pooling: one of ``POOLINGS`` instead of the model's own.

    Raises:
        OSError: nothing there, or not a text encoder; the message says what was expected.
        ValueError: the model wants a pooling or a further layer that is not supported here.
    """
    from transformers import AutoModel, AutoTokenizer  # seconds: paid by those who load a model

    name = str(name_or_path)
    options = {"local_files_only": Path(name).is_dir(), "trust_remote_code": False}
    try:
        if os.path.isabs(name) and not Path(name).is_dir():
            raise OSError("there is no such folder")
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            model, info = AutoModel.from_pretrained(
                name, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
            )
        modules, own, length = (
            _optional_json(name, file, options["local_files_only"])
            for file in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # a head that is not used here, and random if the file has none
        absent = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
        if absent:
            raise OSError(f"the file lacks weights: {', '.join(sorted(absent)[:3])}")
    except Exception as error:  # whatever transformers raises for whatever the files hold
        reason = str(error).strip().partition("\n")[0]
        raise OSError(
            f"cannot load a text encoder from {name!r}: expected a folder with config.json, "
            "model.safetensors and a tokenizer, or the name of such a model on the Hugging Face "
            f"hub ({type(error).__name__}: {reason})"
        ) from error
    return TextEncoder(
        model,
        tokenizer,
        pooling=pooling or _own_pooling(name, own),
        normalize=_own_normalize(name, modules),
        max_length=(length or {}).get("max_seq_length") or 128,
        device=device,
        name=Path(name).name if options["local_files_only"] else name,
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bar for a second's work, no report of missing weights: those are looked at here."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _optional_json(name: str, file: str, local: bool) -> Any:
    """What a JSON file of a model holds, None if there is no such file."""
    from transformers.utils import cached_file

    path = cached_file(
        name, file, local_files_only=local, _raise_exceptions_for_missing_entries=False
    )
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _own_pooling(name: str, config: dict[str, Any] | None) -> str:
    """The pooling that 1_Pooling/config.json asks for."""
    names = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
    config = config or {"pooling_mode_mean_tokens": True}
    prefix = "pooling_mode_"
    wanted = [key[len(prefix) :] for key in config if key.startswith(prefix) and config[key]]
    if len(wanted) != 1 or wanted[0] not in names:
        raise ValueError(f"{name} wants the pooling {wanted}; supported is one of {list(names)}")
    return names[wanted[0]]


def _own_normalize(name: str, modules: list[dict[str, Any]] | None) -> bool:
    """Whether modules.json ends in a normalisation."""
    kinds = [module["type"].rpartition(".")[2] for module in modules or []]
    extra = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if extra:
        raise ValueError(f"{name} has further layers that are not supported: {sorted(extra)}")
    return "Normalize" in kinds or not kinds


def cached_embeddings(encoder: TextEncoder, texts: Sequence[str], folder: str | Path) -> Tensor:
    """``encoder.encode(texts)``, each text encoded only once and for all.

    Vectors are kept in files under ``folder`` (made if it is not there).

    Contract:
        - a vector is found again by ``encoder.identity()`` and the exact text, and by nothing else:
          another model, pooling, normalisation or length never gets it, whatever the folder, the
          order or the other texts;
        - only texts that are not there yet are given to the encoder, each of them once;
        - a file is written whole or not at all: a process that is killed, or a disk that is full,
          costs nothing of what was kept before;
        - a file that cannot be read (cut short, not ours) is as good as none, and replaced;
        - reading a file never runs code (no pickle).

    Returns:
        (n, encoder.dim) float32 on the CPU, row i for ``texts[i]``.

    Raises:
        TypeError: as of ``encode``, which may not be called if all texts are known.
        OSError: the folder cannot be made or written to.
    """
    file = Path(folder) / f"{encoder.identity()}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = _read_vectors(file)
    keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if missing:
        vectors = encoder.encode(list(missing.values()))
        known |= dict(zip(missing, vectors, strict=True))
        _write_vectors(file, known)
    return torch.stack([known[key] for key in keys]) if keys else torch.zeros(0, encoder.dim)


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError("texts must be a list of strings (for one text: [text])")


def _read_vectors(file: Path) -> dict[bytes, Tensor]:
    """Digest of a text -> its vector; nothing if the file is not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = load(file.read_bytes())
        keys, vectors = data["keys"], data["vectors"]
        return dict(zip(map(bytes, keys.numpy()), vectors, strict=True))
    except (FileNotFoundError, SafetensorError, KeyError):
        return {}


def _write_vectors(file: Path, known: dict[bytes, Tensor]) -> None:
    """Write beside the file and move over it: a reader sees the old one or the new one."""
    from safetensors.torch import save

    keys = torch.frombuffer(bytearray(b"".join(known)), dtype=torch.uint8).view(len(known), -1)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as out:
            out.write(save({"keys": keys, "vectors": torch.stack(list(known.values()))}))
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


class TextProjection(nn.Module):
    """A linear map from text vectors to item vectors, so that an item is known before its users.

    ``forward(x) = target_mean + (x - text_mean) @ weight``, fitted on items that have both.

    Args:
        width: of text vectors. dim: of item vectors.

    A new one gives zeros. All that it knows is in the ``state_dict``, and loading that into a new
    ``TextProjection(width, dim)`` gives the same map. Nothing of it is trained by an optimizer.

    Source: Hoerl and Kennard 1970, "Ridge Regression"; for cold start: van den Oord et al. 2013,
    "Deep content-based music recommendation", section 4.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(width, dim))
        self.register_buffer("text_mean", torch.zeros(width))
        self.register_buffer("target_mean", torch.zeros(dim))

    @classmethod
    def fit(
        cls, text: Tensor, target: Tensor, *, ridge: float, sample_weight: Tensor | None = None
    ) -> TextProjection:
        """The ridge regression of ``target`` on ``text``, in closed form.

        With ``m(.)`` the mean over items, weighted with w, the weight matrix A minimises::

            sum_i w[i] * |target[i] - m(target) - (text[i] - m(text)) @ A|^2 + ridge * |A|^2

        - the means are not penalised: both sides are centred first, so a large ``ridge`` leads to
          ``m(target)`` and not to zeros, and an offset of the text vectors changes nothing;
        - everything is computed in float64; the result is stored in float32;
        - no graph is built; inputs are not changed;
        - cost: no tensor of (n, n): a catalogue has 100,000 items and more.

        Args:
            text: (n, width) of any floating type. target: (n, dim) likewise, same device. n >= 1.
            ridge: above 0.
            sample_weight: (n,) w of any floating or integer type, none below 0, some above;
                default 1 each. How often an item was seen, for example: frequent items have
                better vectors.

        Returns:
            The fitted module, on the device of ``text``.

        Raises:
            ValueError: shapes that do not fit, no items, ``ridge`` not above 0, weights that are
                negative or all 0.
        """
        if text.dim() != 2 or target.dim() != 2 or len(text) != len(target) or len(text) == 0:
            raise ValueError(
                "text and target must be (n, width) and (n, dim) with n >= 1, "
                f"not {tuple(text.shape)} and {tuple(target.shape)}"
            )
        if ridge <= 0:
            raise ValueError(f"ridge must be above 0, not {ridge}")
        x, y = text.detach().double(), target.detach().double()
        w = x.new_ones(len(x)) if sample_weight is None else sample_weight.detach().double()
        if w.shape != (len(x),) or (w < 0).any() or w.sum() == 0:
            raise ValueError(f"sample_weight must be ({len(x)},) with none below 0 and some above")
        text_mean, target_mean = w @ x / w.sum(), w @ y / w.sum()
        x, y = x - text_mean, y - target_mean
        weighted = (x * w[:, None]).T
        penalty = ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        fitted = cls(text.shape[1], target.shape[1]).to(text.device)
        fitted.weight.copy_(torch.linalg.solve(weighted @ x + penalty, weighted @ y))
        fitted.text_mean.copy_(text_mean)
        fitted.target_mean.copy_(target_mean)
        return fitted

    def forward(self, text: Tensor) -> Tensor:
        """Map (n, width) texts of any floating type to (n, dim) float32, with gradients to them.

        Raises:
            ValueError: not (n, width).
        """
        if text.dim() != 2 or text.shape[1] != len(self.weight):
            raise ValueError(f"text must be (n, {len(self.weight)}), not {tuple(text.shape)}")
        return self.target_mean + (text.to(self.weight.dtype) - self.text_mean) @ self.weight
