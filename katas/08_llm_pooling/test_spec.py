"""What text encoders, their cache and their projection to items must do (kata 08).

The oracle encodes one sentence at a time, without any padding, in float64.
"""

import builtins
import copy
import functools
import os
import pickle
import shutil
import sys
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch

from harness.message import is_learner_file
from harness.spec import (
    assert_close,
    assert_device_safe,
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


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The Hugging Face libraries ask nobody, and say nothing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@functools.cache
def pretrained(which):
    from transformers import AutoModel

    folder = str(fixture(which))
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    if which == "encoder":
        model.pooler = None  # a head that is not used, and random
    return model


@functools.cache
def own_tokenizer(which):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(fixture(which)), local_files_only=True)


def make_model(which):
    """A copy of the tiny "encoder" (BERT) or "decoder" (GPT-2, causal)."""
    return copy.deepcopy(pretrained(which))


def make_tokenizer(which, side=None, special=True):
    """Its tokenizer; `side` of the padding if not its own, `special` tokens or none."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(own_tokenizer(which))
    tokenizer.padding_side = side or tokenizer.padding_side
    if not special:
        plain = TemplateProcessing(single="$A", special_tokens=[])
        tokenizer.backend_tokenizer.post_processor = plain
    return tokenizer


def make_encoder(which="encoder", *, side=None, special=True, model=None, pooling="mean", **more):
    """The learner's encoder of a tiny model."""
    model = make_model(which) if model is None else model
    tokenizer = make_tokenizer(which, side, special)
    return text.TextEncoder(model, tokenizer, pooling=pooling, **{"device": device(), **more})


@functools.cache
def exact_model(which):
    return make_model(which).double()


@functools.cache
def exact_hidden(which, ids):
    """The hidden states of one text, alone: (T, D) float64."""
    return hidden_of(exact_model(which), ids)


def hidden_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def expected_of(which, texts, *, special=True, pooling="mean", normalize=True, max_length=128,
                model=None):  # fmt: skip
    """The oracle: (n, D) float64, one text after the other."""
    tokenizer = make_tokenizer(which, special=special)
    length = min(max_length, tokenizer.model_max_length)
    exact = None if model is None else copy.deepcopy(model).cpu().double().eval()
    rows = []
    for each in texts:
        ids = tuple(tokenizer(each, truncation=True, max_length=length)["input_ids"])
        vector = torch.zeros(exact_model(which).config.hidden_size, dtype=torch.float64)
        if ids:
            hidden = exact_hidden(which, ids) if exact is None else hidden_of(exact, ids)
            vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
            vector = vector / vector.norm() if normalize else vector
        rows.append(vector)
    return torch.stack(rows)


def watched(model, change=None):
    """The model, its hidden states gone through `change`, and the shapes it will be called with."""
    shapes, forward = [], model.forward

    @functools.wraps(forward)
    def noted(*args, **kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        shapes.append(tuple(ids.shape))
        out = forward(*args, **kwargs)
        if change is not None:
            out.last_hidden_state = change(out.last_hidden_state)
        return out

    model.forward = noted
    return model, shapes


@contextmanager
def another_process():
    """As far as hash() is concerned: in each process that of a string is another one."""
    original = builtins.hash

    def salted(value):
        mine = is_learner_file(sys._getframe(1).f_code.co_filename)
        return original(("salt", value)) if mine else original(value)

    with mock.patch.object(builtins, "hash", salted):
        yield


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
    """Pooling takes the mean, the first or the last of the real tokens, gradients too."""
    table = golden("golden.json")["pool"]
    hidden, mask = tensor(table["hidden"]), tensor(table["mask"], torch.int64)
    for row, what in enumerate(["right", "left", "no", "two-sided", "holes of", "only"]):
        for mode in ("mean", "cls", "last"):
            vector = text.pool(hidden[row : row + 1], mask[row : row + 1], mode)
            wanted = tensor(table["modes"][mode]["value"][row : row + 1])
            assert_close(vector, wanted, rtol=1e-7, what=f"{what} padding: {mask[row].tolist()}",
                         call=f"pool(hidden[1, 5, 3], mask[1, 5], {mode!r})")  # fmt: skip
    cotangent = tensor(table["cotangent"])
    for mode in ("mean", "cls", "last"):
        leaf = hidden.clone().requires_grad_()
        vector = text.pool(leaf, mask, mode)
        call = f"pool(hidden[6, 5, 3], mask[6, 5], {mode!r})"
        assert_close(vector, tensor(table["modes"][mode]["value"]), rtol=1e-7, call=call,
                     what="all rows at once")  # fmt: skip
        check(vector.requires_grad, "a result that gradients flow through", call=call)
        (gradient,) = torch.autograd.grad(vector, leaf, cotangent)
        assert_close(gradient, tensor(table["modes"][mode]["gradient"]), rtol=1e-7, call=call,
                     what="gradient of hidden")  # fmt: skip
    square = torch.arange(16.0, device=device()).reshape(1, 4, 4) + 1
    few = tensor([[1, 1, 0, 0]], torch.int64)
    vector = text.pool(square, few, "mean")
    assert_close(vector, square[:, :2].mean(1), what="as many tokens as dimensions: mask 1 1 0 0",
                 call="pool(hidden[1, 4, 4], mask[1, 4], 'mean')")  # fmt: skip
    for mode in ("mean", "cls", "last"):
        vector = text.pool(square[:, :0], few[:, :0], mode)
        assert_close(vector, square[:, 0] * 0, what="texts without any column, T = 0",
                     call=f"pool(hidden[1, 0, 4], mask[1, 0], {mode!r})")  # fmt: skip
    long = torch.arange(600.0, device=device()).reshape(1, 300, 2)
    for kind in (torch.bool, torch.uint8, torch.int8, torch.int32):
        many = torch.ones(1, 300, dtype=kind, device=device())
        many[0, :2] = 0
        ends = {"cls": long[:, 2], "last": long[:, 299], "mean": long[:, 2:].mean(1)}
        for mode, wanted in ends.items():
            vector = text.pool(long, many, mode)
            assert_close(vector, wanted, call=f"pool(hidden[1, 300, 2], mask[1, 300], {mode!r})",
                         what=f"298 tokens, mask of {str(kind)[6:]}")  # fmt: skip
    for refused, call in [
        (lambda: text.pool(hidden, mask, "max"), "pool with mode 'max'"),
        (lambda: text.pool(hidden, mask[:, 1:], "mean"), "pool(hidden[6, 5, 3], mask[6, 4])"),
        (lambda: text.pool(hidden, mask[:1], "mean"), "pool(hidden[6, 5, 3], mask[1, 5])"),
        (lambda: text.pool(hidden, mask[:, :1], "mean"), "pool(hidden[6, 5, 3], mask[6, 1])"),
        (lambda: text.pool(hidden, mask[0], "mean"), "pool(hidden[6, 5, 3], mask[5])"),
        (lambda: text.pool(hidden[0], mask, "mean"), "pool(hidden[5, 3], mask[6, 5])"),
        (lambda: text.pool(hidden[0], mask[0], "cls"), "pool(hidden[5, 3], mask[5])"),
    ]:
        expect_error(refused, ValueError, call=call)


@rung(
    hints=[
        "At which position does a model expect the first word of a text?",
        "Count the real tokens from the left; the first one has number 0, and nothing is below 0.",
        "mask.cumsum(1) - 1, clamped at 0.",
    ]
)
def test_position_ids():
    """The real tokens of a text are numbered from 0, and padding stays within their range."""
    table = golden("golden.json")["positions"]
    wanted = tensor(table["expected"], torch.int64)
    for kind in (torch.int64, torch.bool, torch.uint8, torch.int32):
        mask = tensor(table["mask"], kind)
        before = mask.clone()
        place = text.position_ids(mask)
        check(isinstance(place, torch.Tensor) and place.shape == mask.shape,
              f"a tensor of shape {list(mask.shape)}", came_back=place)  # fmt: skip
        real = mask.bool()
        assert_close(torch.where(real, place, -1), wanted, what="-1 put in for padding",
                     call="position_ids(mask[6, 5])")  # fmt: skip
        most = real.sum(1, keepdim=True).clamp(min=1) - 1
        check(bool(((place >= 0) & (place <= most)).all()),
              "padding numbered like a real token of its row, or 0", came_back=place)  # fmt: skip
        check(torch.equal(mask, before), "a mask that is not changed")
    long = torch.ones(1, 300, dtype=torch.int8, device=device())
    long[0, :3] = 0
    place = text.position_ids(long)
    assert_close(place[:, 3:], torch.arange(297).unsqueeze(0), call="position_ids(mask[1, 300])",
                 what="an int8 mask of 297 tokens after 3 of padding")  # fmt: skip


# --- the encoder ----------------------------------------------------------------------------------


@rung(
    hints=[
        "tokenizer(texts, ...) gives ids and a mask; the model takes both and gives "
        "last_hidden_state; pool does the rest.",
        "Normalise what comes out of the pooling, not the tokens that go in, and in float32: "
        "F.normalize leaves zeros alone.",
        "F.normalize(pool(hidden, mask, self.pooling), dim=-1), then .float().cpu().",
    ]
)
def test_one_text():
    """A text alone is pooled as asked, then normalised if asked, to float32 on the CPU."""
    for pooling in ("mean", "cls", "last"):
        for normalize in (True, False):
            encoder = make_encoder(pooling=pooling, normalize=normalize)
            for each in TITLES[:2]:
                vector = encoder.encode([each])
                wanted = expected_of("encoder", [each], pooling=pooling, normalize=normalize)
                assert_close(vector, wanted, dtype=torch.float32, **CLOSE,
                             call=f"encode([{each!r}])",
                             what=f"pooling {pooling}, normalize {normalize}")  # fmt: skip
                check(vector.device.type == "cpu", "a tensor on the CPU", came_back=vector.device)

    def on_a_gpu(place):
        encoder = make_encoder("decoder", pooling="last", device=place)
        vectors = encoder.encode(TITLES[:3], batch_size=2) + torch.zeros(1)  # both on the CPU
        return list(encoder.model.parameters()) if vectors.shape == (3, 32) else vectors

    assert_device_safe(on_a_gpu, call="TextEncoder(..., device='cuda').encode(texts[3])")
    for scale in (1e-3, 0.0):  # a model with small vectors, and one that gives nothing
        encoder = make_encoder(model=watched(make_model("encoder"), lambda h, s=scale: h * s)[0])
        wanted = expected_of("encoder", TITLES[:1]) * (scale > 0)
        assert_close(encoder.encode(TITLES[:1]), wanted, dtype=torch.float32, **CLOSE,
                     call="encode([text])", what=f"hidden states times {scale:g}")  # fmt: skip
    seen = []

    def half(hidden):
        seen.append(hidden.to(torch.bfloat16))
        return seen[-1]

    encoder = make_encoder(model=watched(make_model("encoder"), half)[0])
    vector = encoder.encode(TITLES[4:5])
    exact = seen[-1].detach().cpu().double().mean(1)
    assert_close(vector, exact / exact.norm(), dtype=torch.float32, rtol=1e-4, atol=1e-6,
                 call="encode([text])", what="a model that computes in bfloat16")  # fmt: skip


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
    wanted = expected_of("encoder", TITLES)
    encoder = make_encoder()
    turned = [4, 0, 7, 7, 2, 8, 1, 6, 3, 5, 0]
    for batch_size in (1, 2, 4, 100):
        vectors = encoder.encode(TITLES, batch_size=batch_size)
        assert_close(vectors, wanted, dtype=torch.float32, **CLOSE,
                     call=f"encode(texts[9], batch_size={batch_size})")  # fmt: skip
    vectors = encoder.encode(tuple(TITLES[i] for i in turned), batch_size=3)
    assert_close(vectors, wanted[turned], dtype=torch.float32, **CLOSE,
                 call="encode(texts[11], batch_size=3)",
                 what="in another order, two texts twice, as a tuple")  # fmt: skip


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
        for side in ("left", "right"):
            for pooling in ("last", "mean", "cls"):
                wanted = expected_of(which, TITLES, pooling=pooling, normalize=False, max_length=40)
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
        "Give only texts with at least one token to the model; the others stay rows of zeros. Keep "
        "what __init__ is given as attributes of the same names, and refuse what makes no sense.",
    ]
)
def test_edges():
    """Empty and long texts, no texts, what an encoder keeps and what it refuses."""
    long = " ".join(TITLES * 9)
    texts = ["", long, "War", " ", long[40:], ""]
    call = "encode(['', long, 'War', ' ', long, ''])"
    for which, lengths in (("encoder", (3, 10**6)), ("decoder", (7, 10**6))):
        for length in lengths:
            encoder = make_encoder(which, max_length=length)
            wanted = expected_of(which, texts, max_length=length)
            assert_close(encoder.encode(texts, batch_size=4), wanted, dtype=torch.float32, **CLOSE,
                         call=call, what=f"{which}, max_length={length}")  # fmt: skip
        model, shapes = watched(make_model(which))
        encoder = make_encoder(which, special=False, model=model, pooling="last", max_length=20)
        wanted = expected_of(which, texts, special=False, pooling="last", max_length=20)
        assert_close(encoder.encode(texts), wanted, dtype=torch.float32, **CLOSE, call=call,
                     what="no special tokens, so '' has no token at all: zeros")  # fmt: skip
        shapes.clear()
        vectors = encoder.encode(["", ""])
        assert_close(vectors, torch.zeros(2, encoder.dim), call="encode(['', ''])",
                     what="two texts without a token")  # fmt: skip
        assert_equal(shapes, [], call="encode(['', ''])", what="calls of the model")
        assert_close(encoder.encode([]), torch.zeros(0, encoder.dim), call="encode([])")
    model, tokenizer = make_model("encoder"), make_tokenizer("encoder")
    where = str(device())
    encoder = text.TextEncoder(model, tokenizer, pooling="cls", max_length=77, device=where,
                               normalize=False, name="tiny")  # fmt: skip
    made = "TextEncoder(model, tokenizer, pooling='cls', max_length=77, normalize=False, ...)"
    settings = (encoder.pooling, encoder.normalize, encoder.max_length, encoder.name, encoder.dim)
    assert_equal(settings, ("cls", False, 77, "tiny", 64), call=made,
                 what="pooling, normalize, max_length, name, dim")  # fmt: skip
    assert_equal(encoder.device, torch.device(where), call=made, what="device")
    check(encoder.tokenizer is tokenizer and encoder.model is model,
          "the model and the tokenizer as attributes", call=made)  # fmt: skip
    usual = text.TextEncoder(make_model("decoder"), make_tokenizer("decoder"), pooling="last")
    settings = (usual.normalize, usual.max_length, usual.device, usual.name, usual.dim)
    assert_equal(settings, (True, 64, torch.device("cpu"), "", 32),
                 call="TextEncoder(decoder, tokenizer, pooling='last')",
                 what="normalize, max_length (tokenizer's: 64), device, name, dim")  # fmt: skip
    shortest = make_encoder(max_length=1).max_length
    assert_equal(shortest, 1, call="TextEncoder(..., max_length=1)", what="max_length")
    for refused, call in [
        (lambda: encoder.encode("War"), "encode('War'), a single string"),
        (lambda: encoder.encode(["War", None]), "encode(['War', None])"),
        (lambda: encoder.encode([3, "War"]), "encode([3, 'War'])"),
    ]:
        expect_error(refused, TypeError, call=call)
    for refused, call in [
        (lambda: encoder.encode(["War"], batch_size=0), "encode(['War'], batch_size=0)"),
        (lambda: encoder.encode(["War"], batch_size=-2), "encode(['War'], batch_size=-2)"),
        (lambda: make_encoder(pooling="max"), "TextEncoder(model, tokenizer, pooling='max')"),
        (lambda: make_encoder(max_length=0), "TextEncoder(..., pooling='mean', max_length=0)"),
    ]:
        expect_error(refused, ValueError, call=call)
    tokenizer.pad_token = None
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
    wanted = expected_of("encoder", TITLES)
    encoder = make_encoder(model=make_model("encoder").train())
    made = "TextEncoder(model, tokenizer, pooling='mean')"
    check(not any(module.training for module in encoder.model.modules()), "a model in eval mode",
          call=made)  # fmt: skip
    check(not any(each.requires_grad for each in encoder.model.parameters()),
          "no parameter that requires a gradient", call=made)  # fmt: skip
    encoder.model.train().requires_grad_(True)  # what a careless caller may do later
    with torch.enable_grad():
        vectors = encoder.encode(TITLES)
        check(torch.is_grad_enabled(), "gradients that are on again afterwards", call="encode")
    assert_close(vectors, wanted, dtype=torch.float32, **CLOSE, call="encode(texts[9])",
                 what="after model.train(): is dropout on?")  # fmt: skip
    check(not vectors.requires_grad, "a result without a graph", came_back=vectors.grad_fn,
          call="encode(texts[9])", what="after model.requires_grad_(True)")  # fmt: skip
    check(torch.equal(encoder.encode(TITLES), vectors), "the same vectors the second time")
    encoder.model.eval()
    for module in encoder.model.modules():
        module.training = isinstance(module, torch.nn.Dropout)
    assert_close(encoder.encode(TITLES), wanted, dtype=torch.float32, **CLOSE,
                 call="encode(texts[9])", what="after dropout.train() of the dropout layers "
                 "alone, the model itself in eval mode")  # fmt: skip
    layer = torch.nn.Linear(64, 3)
    try:
        layer(vectors).sum().backward()
    except RuntimeError as error:
        check(False, "vectors that a layer can be trained on", came_back=str(error)[:90],
              call="layer(encode(texts[9])).sum().backward()")  # fmt: skip


@rung(
    hints=[
        "Padding to max_length, or batching texts as they come, computes over places that mean "
        "nothing.",
        "Sort by number of tokens, cut into batches, and pad each batch to its own longest text.",
        "Letters are not tokens: the tokenizer has to come before the sort. ids = "
        "tokenizer(texts, ...)['input_ids']; order = sorted(range(n), key=lambda i: len(ids[i]))",
    ]
)
def test_few_padded_places():
    """The model is called at most ceil(n / batch_size) times, over few places of padding."""
    lengths = [(37 * i) % 61 + 1 for i in range(83)]
    # few letters, many tokens and the other way round
    texts = ["haunted " * n if i % 2 else "!" * n for i, n in enumerate(lengths)]
    count = [len(ids) for ids in make_tokenizer("encoder")(texts)["input_ids"]]
    for batch_size in (8, 20, 200):
        model, shapes = watched(make_model("encoder"))
        vectors = make_encoder(model=model).encode(texts, batch_size=batch_size)
        call = f"encode(texts[83], batch_size={batch_size})"
        calls = -(-len(texts) // batch_size)
        check(len(shapes) <= calls, f"at most {calls} calls of the model",
              came_back=len(shapes), call=call)  # fmt: skip
        check(max(rows for rows, _ in shapes) <= batch_size, f"at most {batch_size} rows a call",
              came_back=shapes, call=call)  # fmt: skip
        places, most = sum(a * b for a, b in shapes), sum(count) + batch_size * max(count)
        check(places <= most, f"at most {most} places, {sum(count)} of them tokens",
              came_back=f"{places} places, padding included", call=call)  # fmt: skip
        check(vectors.shape == (83, 64), "shape [83, 64]", came_back=vectors, call=call)


# --- the cache ------------------------------------------------------------------------------------


@rung(
    hints=[
        "What would give another vector for the same text: another model, pooling, "
        "normalisation or length. All of it belongs into the key.",
        "Digest the weights themselves (hashlib.sha256 over each tensor's bytes): neither a name "
        "nor a sum tells two models apart. And hash() of a string is another one in each process.",
        "For each name and tensor of the state_dict, sorted: update with name, dtype and shape, "
        "then with tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(). view(uint8) "
        "needs a dimension, and numpy knows no bfloat16.",
    ]
)
def test_identity():
    """Encoders that give other vectors have another identity; the same one, loaded again, not."""
    base = {"name": "tiny", "pooling": "mean", "max_length": 50}
    mine = make_encoder(**base).identity()
    call = "encoder.identity()"
    check(isinstance(mine, str) and len(mine) == 64 and set(mine) <= set("0123456789abcdef"),
          "64 hexadecimal digits", came_back=mine, call=call)  # fmt: skip
    place = "cpu:0" if device().type == "cpu" else "cpu"
    for what, options in [("made anew", {}), (f"on the device {place}", {"device": place})]:
        again = make_encoder(**base, **options).identity()
        assert_equal(again, mine, call=call, what=f"the same model, {what}")
    with another_process():
        assert_equal(make_encoder(**base).identity(), mine, call=call,
                     what="the same model in another process")  # fmt: skip

    def table(model):
        return model.get_input_embeddings().weight

    def more(name, shape):
        def add(model):
            model.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))

        return add

    def rows_swapped(model):  # the same values, so the same sums, in other places
        table(model)[5:7] = table(model)[5:7].flip(0).clone()

    def layers_swapped(model):
        first, second = model.encoder.layer
        model.encoder.layer[0], model.encoder.layer[1] = second, first

    changes = {
        "one weight of the last layer": lambda m: list(m.parameters())[-1].data[-1].add_(1e-3),
        "two rows of a table swapped": rows_swapped,
        "two layers swapped": layers_swapped,
        "a further weight": more("more", (2, 3)),
        "a further weight, transposed": more("more", (3, 2)),
        "a further weight, of another name": more("most", (2, 3)),
        "a further weight, without dimensions": more("more", ()),
        "weights rounded to bfloat16": lambda m: m.bfloat16().float(),
        "weights in bfloat16": lambda m: m.bfloat16(),
    }
    seen = {mine: "the first encoder"}
    for what, change in changes.items():
        model = make_model("encoder")
        with torch.no_grad():
            change(model)
        other = make_encoder(**base, model=model).identity()
        check(other not in seen, f"another identity than that of {seen.get(other)}",
              came_back=other, call=call, what=what)  # fmt: skip
        seen[other] = what
    for options in ({"pooling": "cls"}, {"pooling": "last"}, {"normalize": False},
                    {"max_length": 5}, {"name": "other"}):  # fmt: skip
        what = ", ".join(f"{key}={value!r}" for key, value in options.items())
        other = make_encoder(**{**base, **options}).identity()
        check(other not in seen, f"another identity than that of {seen.get(other)}",
              came_back=other, call=call, what=what)  # fmt: skip
        seen[other] = what
    encoder = make_encoder(**base)
    encoder.identity()
    with torch.no_grad():
        next(iter(encoder.model.parameters())).add_(1e-3)
    check(encoder.identity() != mine, "another identity after a weight was changed in place",
          came_back=mine, call="encoder.identity(), a second time")  # fmt: skip


@rung(
    hints=[
        "Which texts does the model see the second time? Those that are not in the folder yet.",
        "What is asked twice in one call is encoded once, and the rows come back in the order of "
        "the texts, whatever was known before.",
        "Keep a dict from a digest of the exact text to its vector; missing = {key: text ...}; "
        "encode its values; put together at the end: [known[key] for key in keys].",
    ]
)
def test_cache(tmp_path):
    """A text is encoded once and for all, and never found under another encoder."""
    folder = tmp_path / "not" / "there yet"
    model, shapes = watched(make_model("encoder"))
    encoder = make_encoder(model=model, name="a/tiny one")
    stem = "a long beginning " * 5
    texts = [*TITLES[:3], stem + "war", stem + "moon", "AC/DC: ../up", "", "x" * 700]
    texts += ["Two lines", 'Two\nlines, "Am\u00e9lie" \U0001f3ac', TITLES[0]]
    more = [texts[4], "Ghost!", *texts[::-1], "ghost!", "Ghost! "]
    for what, asked, new in [
        ("first", texts, 10), ("again", texts, 0), ("three more", more, 3), ("again", more[:2], 0),
        ("one of the first", texts[5:6], 0),
    ]:  # fmt: skip
        shapes.clear()
        with another_process():
            vectors = text.cached_embeddings(encoder, asked, folder)
        call = f"cached_embeddings(encoder, texts[{len(asked)}], folder), {what}"
        assert_close(vectors, expected_of("encoder", asked), dtype=torch.float32, **CLOSE,
                     call=call)  # fmt: skip
        rows = sum(rows for rows, _ in shapes)
        check(rows == new, f"{new} texts given to the model", came_back=rows, call=call)
    model, shapes = watched(make_model("encoder"))
    same = make_encoder(model=model, name="a/tiny one")
    vectors = text.cached_embeddings(same, texts, str(folder))
    call = "cached_embeddings(the same model loaded again, texts[11], folder)"
    assert_close(vectors, expected_of("encoder", texts), dtype=torch.float32, **CLOSE, call=call)
    assert_equal(shapes, [], call=call, what="calls of the model")
    check(vectors.device.type == "cpu" and not vectors.requires_grad,
          "an ordinary tensor on the CPU", came_back=vectors, call=call)  # fmt: skip
    none = text.cached_embeddings(encoder, [], tmp_path / "none")
    assert_close(none, torch.zeros(0, 64), call="cached_embeddings(encoder, [], folder)")

    swapped = make_model("encoder")
    with torch.no_grad():
        table = swapped.get_input_embeddings().weight
        table.copy_(table.flip(0))  # the same values in other places
    for what, options in [
        ("other weights", {"model": swapped}),
        ("pooling 'cls'", {"pooling": "cls"}),
        ("normalize=False", {"normalize": False}),
        ("max_length=5", {"max_length": 5}),
    ]:
        other = make_encoder(**{"name": "a/tiny one", **options})
        vectors = text.cached_embeddings(other, texts[:4], folder)
        assert_close(vectors, expected_of("encoder", texts[:4], **options), dtype=torch.float32,
                     **CLOSE, what=f"{what}, same folder",
                     call="cached_embeddings(other, texts[4], folder)")  # fmt: skip
    shapes.clear()
    text.cached_embeddings(same, texts, folder)
    assert_equal(shapes, [], call=call, what="calls of the model, after others used the folder")
    file = tmp_path / "file"
    file.write_bytes(b"no folder")
    expect_error(lambda: text.cached_embeddings(encoder, texts[:2], file / "below"), OSError,
                 call="cached_embeddings with a folder that cannot be made")  # fmt: skip


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@contextmanager
def full_disk(most):
    """No file can grow beyond `most` bytes, as if the disk were full in the middle of a write."""
    try:
        import resource
    except ImportError:  # Windows: only kills and broken files are tried there
        yield
        return
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


class Killed(BaseException):
    """The process is dead."""


class Kill:
    """From the n-th time on that a file of a folder is opened for writing, moved or removed, no
    file can be touched at all: a process that was killed there does nothing any more."""

    hook = None
    events = ("open", "os.rename", "os.remove", "os.truncate", "sqlite3.connect")

    def __init__(self, folder, n):
        self.folder, self.left, self.dead, self.on = os.path.realpath(folder), n, False, False

    def heard(self, event, given):
        if not self.on or event not in Kill.events:
            return
        if event == "open" and not self.dead and not given[2] & (os.O_WRONLY | os.O_RDWR):
            return
        paths = [os.fspath(each) for each in given[:2] if isinstance(each, (str, os.PathLike))]
        if any(os.path.realpath(path).startswith(self.folder) for path in paths):
            self.dead = self.dead or self.left == 0
            self.left -= 1
            if self.dead:
                raise Killed

    def __enter__(self):
        if Kill.hook is None:  # they cannot be taken away again: one for all
            sys.addaudithook(lambda event, given: Kill.hook.heard(event, given))
        Kill.hook, self.on = self, True
        return self

    def __exit__(self, *error):
        self.on = False


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
    """A kill or a full disk costs nothing that was kept; a broken file is as good as none."""
    model, shapes = watched(make_model("encoder"))
    encoder = make_encoder(model=model)
    texts = TITLES[:7]
    wanted = expected_of("encoder", texts)
    kept = tmp_path / "kept"
    text.cached_embeddings(encoder, texts[:5], kept)
    call = "cached_embeddings(encoder, texts[7], folder)"

    def interrupted(what, trouble, folder):
        shutil.copytree(kept, folder)
        with trouble:
            try:
                text.cached_embeddings(encoder, texts, folder)
            except Killed:
                pass
            except Exception as error:  # whatever the writer makes of a full disk
                check(not isinstance(error, NotImplementedError), "cached_embeddings to be written")
        shapes.clear()
        try:
            vectors = text.cached_embeddings(encoder, texts, folder)
        except Exception as error:
            check(False, "what was kept before, and the rest encoded anew", call=call, what=what,
                  came_back=f"{type(error).__name__}: {error}"[:100])  # fmt: skip
        assert_close(vectors, wanted, dtype=torch.float32, **CLOSE, call=call, what=what)
        rows = sum(rows for rows, _ in shapes)
        check(rows <= 2, "at most 2 texts given to the model: 5 were kept before", what=what,
              came_back=rows, call=call)  # fmt: skip

    for most in (0, 100, 400, 1600):
        what = f"after a disk that was full at {most} bytes of a file"
        interrupted(what, full_disk(most), tmp_path / f"full{most}")
    for n in range(12):
        kill = Kill(tmp_path / f"killed{n}", n)
        what = f"after a kill when {n} files had been opened to write, moved or removed"
        interrupted(what, kill, tmp_path / f"killed{n}")
        if not kill.dead:
            break

    trap = tmp_path / "unpickled"
    for what, damage in [
        ("cut in half", lambda data: data[: len(data) // 2]),
        ("one byte short", lambda data: data[:-1]),
        ("empty", lambda data: b""),
        ("not a file of ours", lambda data: b"something else " * 9),
        ("a pickle", lambda data: pickle.dumps(Bomb(trap))),
    ]:
        for file in [path for path in kept.rglob("*") if path.is_file()]:
            file.write_bytes(damage(file.read_bytes()))
        try:
            vectors = text.cached_embeddings(encoder, texts[:3], kept)
        except Exception as error:
            check(False, f"a broken file that is encoded anew ({what})", call=call,
                  came_back=f"{type(error).__name__}: {error}"[:100])  # fmt: skip
        assert_close(vectors, wanted[:3], dtype=torch.float32, **CLOSE, what=f"file {what}",
                     call="cached_embeddings(encoder, texts[3], folder)")  # fmt: skip
        check(not trap.exists(), "a file that is read without running code (a pickle was run)",
              call=call)  # fmt: skip
        shapes.clear()
        text.cached_embeddings(encoder, texts[:3], kept)
        check(not shapes, f"a whole cache again, after files were {what}", came_back=shapes,
              call=call)  # fmt: skip


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
    check(isinstance(projection, text.TextProjection), "a TextProjection", came_back=projection,
          call="TextProjection.fit(...)")  # fmt: skip
    fresh = text.TextProjection(4, 2).to(device())
    assert_close(fresh(new), torch.zeros(3, 2), like=new, call="TextProjection(4, 2)(new[3, 4])")
    fresh.load_state_dict(projection.state_dict())
    assert_close(fresh(new), out, what="after load_state_dict into a new one")
    assert_close(fresh(new.double()), out, dtype=torch.float32, rtol=1e-4, atol=1e-5,
                 call="projection(new[3, 4])", what="of float64 texts")  # fmt: skip
    one = text.TextProjection.fit(x[:1], y[:1], ridge=0.3)
    assert_close(one(new), y[:1].expand(3, 2), rtol=1e-5, call="TextProjection.fit(...)(new[3, 4])",
                 what="fitted on one item: its target, whatever the text")  # fmt: skip
    w = torch.ones(7, device=device())
    for what, function in [
        ("6 texts and 7 targets", lambda: text.TextProjection.fit(x[1:], y, ridge=1.0)),
        ("1 text and 7 targets", lambda: text.TextProjection.fit(x[:1], y, ridge=1.0)),
        ("a 1-D target", lambda: text.TextProjection.fit(x, y[:, 0], ridge=1.0)),
        ("no items", lambda: text.TextProjection.fit(x[:0], y[:0], ridge=1.0)),
        ("ridge=0", lambda: text.TextProjection.fit(x, y, ridge=0.0)),
        ("ridge=-1", lambda: text.TextProjection.fit(x, y, ridge=-1.0)),
        ("a weight below 0",
         lambda: text.TextProjection.fit(x, y, ridge=1.0, sample_weight=w - 2 * (y[:, 0] > 0))),
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
        (70, 7, 6, 0.0, 3.0),
        (71, 7, 6, 0.0, 1e-6),
    ]:
        g = generator(items)
        x = torch.randn(items + 20, width, generator=g) + offset
        planted = torch.randn(width, dim, generator=g)
        if ridge < 1e-4:  # a column that is nearly another one, and the difference matters
            x[:, -1] = x[:, 0] + 1e-3 * x[:, -1]
            planted[-1], planted[0] = planted[-1] * 1e3, planted[0] - planted[-1] * 1e3
        y = (x - offset) @ planted + 0.1 * torch.randn(items + 20, dim, generator=g) + 7
        w = torch.rand(items, generator=g) * 5
        if items == 60:
            x, y = x.double(), y.double()
        if items == 70:  # numbers of views, and half precision
            w, x, y = (w * 9).long(), x.half(), y.bfloat16()
        predict = ridge_of(x[:items].double(), y[:items].double(), ridge, w.double())
        x, y, w = x.to(device()), y.to(device()), w.to(device())
        warm, target = x[:items].requires_grad_(), y[:items].requires_grad_()
        before = warm.detach().clone(), target.detach().clone()
        projection = text.TextProjection.fit(warm, target, ridge=ridge, sample_weight=w)
        same = torch.equal(warm, before[0]) and torch.equal(target, before[1])
        check(same, "inputs that are not changed", call="TextProjection.fit(text, target)")
        cold = x[items:].detach().requires_grad_()
        places = projection(cold)
        assert_close(places, predict(cold.detach().cpu().double()), dtype=torch.float32, rtol=1e-3,
                     atol=1e-3, call=f"TextProjection.fit(text[{items}, {width}], ...)(new)",
                     what=f"20 held-out items, offset {offset}, ridge {ridge}")  # fmt: skip
        (gradient,) = torch.autograd.grad(places[0].sum(), cold)
        slope = (predict(np.eye(width)) - predict(np.zeros((1, width)))).sum(1)
        assert_close(gradient[0], slope, dtype=cold.dtype, rtol=1e-3 if items != 70 else 3e-3,
                     atol=1e-3, call="TextProjection.fit(...)(new)[0].sum().backward()",
                     what="gradient of new[0]")  # fmt: skip
        fit = "TextProjection.fit(text, target), both with gradients"
        state = projection.state_dict(keep_vars=True).values()
        check(not any(each.requires_grad for each in state),
              "a state without a graph, that no optimizer trains", call=fit)  # fmt: skip
