"""Kata 11, a sequence tower: what `models/sequence.py` must do, the simplest first."""

import math

import numpy as np
import torch

from harness.spec import (
    assert_close,
    assert_equal,
    assert_scalar,
    check,
    device,
    expect_error,
    fail,
    generator,
    golden,
    learner,
    rung,
)

sequence = learner("models.sequence")
embedding = learner("models.embedding")

FLOAT32 = {"rtol": 1e-4, "atol": 2e-5}  # ten times what float32 differs by from the oracle
MOST = 7  # max_history, more places than any input here has


# --- inputs, values put in, gradients -------------------------------------------------------------


def tensor(values, dtype=torch.float32):
    """A float tensor on the device that gets a gradient."""
    return torch.as_tensor(values).to(device(), dtype).clone().requires_grad_()


def constant(values, dtype=torch.float32):
    return torch.as_tensor(values).to(device(), dtype)


def integers(values):
    return torch.tensor(values, dtype=torch.int64, device=device())


def flags(values):
    return torch.tensor(values, dtype=torch.bool, device=device())


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(device(), dtype)


def load(module, state, dtype=torch.float32):
    """Put `state` into a module whose `state_dict` must have just these names and shapes."""
    found = {name: list(value.shape) for name, value in sorted(module.state_dict().items())}
    wanted = {name: list(np.shape(value)) for name, value in sorted(state.items())}
    for name in wanted.keys() | found.keys():
        what = f"shape of {name} in state_dict()"
        missing, own = f"no {name}", found.get(name, "not there")
        assert_equal(own, wanted.get(name, missing), what=what, call=f"{type(module).__name__}()")
    module.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})
    return module.to(device(), dtype)


def attention_of(dim, heads, state=None, dtype=torch.float32):
    """An attention with values that differ, the same ones each time."""
    module = sequence.CausalAttention(dim, heads, max_history=MOST)
    return load(module, drawn(module, 5) if state is None else state, dtype)


def block_of(dim=6, heads=2, hidden=5, dropout=0.0, state=None, dtype=torch.float32):
    module = sequence.Block(dim, heads, hidden_dim=hidden, max_history=MOST, dropout=dropout)
    return load(module, drawn(module, 6) if state is None else state, dtype)


def tower_of(rows=9, dim=6, state=None, dtype=torch.float32, **options):
    table = embedding.EmbeddingTable(rows, dim)
    options = {"num_blocks": 2, "num_heads": 2, "hidden_dim": 5, "max_history": MOST} | options
    module = sequence.SequenceTower(table, **options)
    return load(module, drawn(module, 7) if state is None else state, dtype).eval()


def drawn(module, seed):
    """A value for everything in a module's state_dict; row 0 of a table is zero."""
    state = {}
    for n, (name, value) in enumerate(sorted(module.state_dict().items())):
        number = torch.randn(value.shape, generator=generator(100 * seed + n), dtype=torch.float64)
        spread = 0.5 if value.dim() == 2 else 0.3
        state[name] = number * spread + ("norm" in name and name.endswith("weight"))
        if name == "table.weight":
            state[name][0] = 0
    return state


def assert_gradients(scalar, expected, inputs, *, call=None, **tolerance):
    """The gradients of `scalar` with respect to those of `inputs` that `expected` names."""
    check(
        isinstance(scalar, torch.Tensor) and scalar.requires_grad,
        "a tensor that can be differentiated (no .item(), no detach, no no_grad)",
        came_back=scalar,
        call=call,
    )
    leaves = {name: inputs[name] for name in expected}
    found = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True)
    for (name, value), grad in zip(leaves.items(), found, strict=True):
        what = f"gradient of {name}"
        if grad is None:
            fail(expected="a gradient", came_back="none at all", call=call, what=what)
        assert_close(grad, expected[name], like=value, call=call, what=what, **tolerance)


def run_golden(module, case):
    """A module with a golden case's values: output and every gradient."""
    x, is_item = tensor(case["x"]), flags(case["is_item"])
    out = module(x, is_item)
    call = f"{type(module).__name__}(...)(x, is_item)"
    assert_close(out, case["out"], like=x, what="golden values", call=call, **FLOAT32)
    inputs = {"x": x, **dict(module.named_parameters())}
    scalar = (out * constant(case["cotangent"])).sum()
    assert_gradients(scalar, case["gradients"], inputs, call=call, rtol=1e-3, atol=1e-4)


# --- what is learned from -------------------------------------------------------------------------


@rung(
    hints=[
        "Histories have the most recent item FIRST. What was chosen after the item at place 2?",
        "The history is what lies behind the first column, the target what lies before the last; "
        "then: does a place without an item have anything to learn from?",
        "history = window[:, 1:]; target = torch.where(history == 0, 0, window[:, :-1])",
    ]
)
def test_training_pairs():
    """The target of a place is the item one place nearer to the front; padding has none."""
    window = integers([[7, 5, 9, 4], [3, 8, 0, 0], [6, 0, 0, 0], [2, 2, 1, 2]])
    before = window.clone()
    pairs = sequence.training_pairs(window)
    check(isinstance(pairs, tuple) and len(pairs) == 2, "a pair", came_back=pairs)
    history, target = pairs
    expected = integers([[5, 9, 4], [8, 0, 0], [0, 0, 0], [2, 1, 2]])
    assert_close(history, expected, like=window, what="history")
    expected = integers([[7, 5, 9], [3, 0, 0], [0, 0, 0], [2, 2, 1]])
    assert_close(target, expected, like=window, what="target")
    assert_close(window, before, what="window, after the call")
    short = sequence.training_pairs(window[:, :2].to(torch.int32))
    expected = constant([[7], [3], [0], [2]], torch.int32)
    assert_close(short[1], expected, what="target of a window of two places, int32")
    for shape in ((4,), (4, 1), (4, 0), (2, 3, 4)):
        bad = torch.ones(shape, dtype=torch.int64, device=device())
        expect_error(
            lambda w=bad: sequence.training_pairs(w),
            ValueError,
            call=f"training_pairs(window of shape {list(shape)})",
        )


# --- attention ------------------------------------------------------------------------------------


@rung(
    hints=[
        "With qkv.weight = 0 all scores are equal: a place is the mean of what it sees.",
        "recency[h, j - i] is added to the score of query i and key j: its first column is for "
        "the place itself. It goes into attn_mask, which is added after the division by sqrt(d).",
        "self.recency[:, (place - place[:, None]).clamp(min=0)] is (H, L, L)",
    ]
)
def test_one_head():
    """One head: the mean of what a place sees, then recency, then golden values with gradients."""
    names = {"qkv.weight": (6, 2), "qkv.bias": (6,), "out.weight": (2, 2), "out.bias": (2,)}
    state = {name: np.zeros(shape) for name, shape in (names | {"recency": (1, MOST)}).items()}
    state["qkv.weight"][4:] = np.eye(2)  # v is x
    state["out.weight"] = np.eye(2)
    attention = attention_of(2, 1, state)
    x, is_item = constant([[[6.0, 1.0], [3.0, 2.0], [0.0, 6.0]]]), flags([[True] * 3])
    out = attention(x, is_item)
    expected = [[[3.0, 3.0], [1.5, 4.0], [0.0, 6.0]]]
    assert_close(out, expected, like=x, what="q = k = 0, v = x: means of what is seen", **FLOAT32)
    state["recency"] = np.log([[1.0, 2.0, 3.0, 9.0, 9.0, 9.0, 9.0]])
    attention = attention_of(2, 1, state)
    out = attention(x, is_item)
    expected = [[[2.0, 23 / 6], [1.0, 14 / 3], [0.0, 6.0]]]
    what = "q = k = 0, v = x, recency = log [1, 2, 3, ...]"
    assert_close(out, expected, like=x, what=what, **FLOAT32)
    case = golden("golden.json")["one_head"]
    run_golden(attention_of(4, 1, case["state"]), case)


@rung(
    hints=[
        "Each head owns its own columns of q, of k and of v. What is the scale of a head?",
        "(B, L, 3 * dim) is (B, L, 3, heads, d) as it lies in memory, not (B, L, heads, 3, d). "
        "And on the way back: heads next to each other before they are flattened.",
        "qkv.view(B, L, 3, H, d).permute(2, 0, 3, 1, 4); mixed.transpose(1, 2).reshape(B, L, D)",
    ]
)
def test_heads():
    """Heads own columns of q, k and v in turn, with a recency each: golden values, gradients."""
    case = golden("golden.json")["heads"]
    run_golden(attention_of(6, 2, case["state"]), case)
    whole = attention_of(6, 3, dtype=torch.float64)
    x, is_item = draw(3, 1, 5, 6, dtype=torch.float64), flags([[True] * 5])
    wide = torch.stack([x, x + 1], -1)[..., 0]  # not contiguous
    out = whole(x, is_item)
    assert_close(whole(wide, is_item), out.detach(), what="x that is not contiguous")
    start = sequence.CausalAttention(6, 3, max_history=4).state_dict()["recency"]
    assert_close(start, torch.zeros(3, 4), what="recency at the start")
    for dim, heads, most in ((6, 4, 3), (0, 1, 3), (6, 0, 3), (6, 2, 0), (6, -2, 3)):
        expect_error(
            lambda d=dim, h=heads, m=most: sequence.CausalAttention(d, h, max_history=m),
            ValueError,
            call=f"CausalAttention({dim}, {heads}, max_history={most})",
        )


@rung(
    hints=[
        "Place 0 is now. May place 2 see it?",
        "The most recent item comes first, so what a place may see has LARGER numbers, and itself. "
        "is_causal=True means the other direction.",
        "A hidden score is minus infinity, not a low number: mask.masked_fill(~seen, -inf)",
    ]
)
def test_causal():
    """What came after a place has no influence on it, however large, and gets no gradient."""
    for heads in (1, 3):
        attention = attention_of(6, heads, dtype=torch.float64)
        x, is_item = draw(4, 2, 5, 6, dtype=torch.float64), flags([[True] * 5] * 2)
        out = attention(x, is_item).detach()
        for place in range(5):
            other = x.clone()
            other[:, :place] *= -1e12
            moved = attention(other, is_item)
            what = f"places {place} to 4 after places before {place} were multiplied by -1e12"
            assert_close(moved[:, place:], out[:, place:], what=what, rtol=1e-9, atol=1e-9)
            leaf = x.clone().requires_grad_()
            grad = torch.autograd.grad(attention(leaf, is_item)[:, place].sum(), leaf)[0]
            what = f"gradient of what came after place {place}, from its result"
            assert_close(grad[:, :place], torch.zeros_like(grad[:, :place]), what=what)
            sees = grad[:, place:].abs().amax(2) > 1e-6
            words = "a gradient to itself and to every place further back"
            check(bool(sees.all()), words, came_back=sees.tolist(), what=f"place {place}")
        row = attention(x[1:], is_item[1:])
        assert_close(row, out[1:], what="the second row alone", rtol=1e-9)
        state = attention.state_dict()
        query, _, value = state["qkv.weight"].chunk(3)
        state["qkv.weight"] = torch.cat([query, -query, value])
        attention, far = attention_of(6, heads, state, torch.float64), 1e7 * x
        out = attention(far, is_item).detach()
        other = far.clone()
        other[:, :3] *= -2
        moved = attention(other, is_item)
        what = "places 3 and 4, whose scores are far below 0, after those before were doubled"
        assert_close(moved[:, 3:], out[:, 3:], what=what, rtol=1e-9)


@rung(
    hints=[
        "is_item says which KEYS may be seen; a query that is padding is thrown away later.",
        "What does a softmax over nothing but minus infinity give, and its gradient? Let each "
        "place see itself, whatever it holds.",
        "seen = (ago > 0) & is_item[:, None, :] | (ago == 0)",
    ]
)
def test_padding():
    """Padding is seen by nobody but itself, and a row without any item gives finite numbers."""
    attention = attention_of(6, 2, dtype=torch.float64)
    x = draw(5, 3, 5, 6, dtype=torch.float64)
    is_item = flags([[True] * 5, [True, True, False, False, False], [False] * 5])
    leaf = x.clone().requires_grad_()
    out = attention(leaf, is_item)
    check(bool(out.isfinite().all()), "finite numbers everywhere", came_back=out[2, 0].tolist())
    grads = torch.autograd.grad(out[:2, :2].sum(), [leaf, *attention.parameters()])
    fine = all(bool(grad.isfinite().all()) for grad in grads)
    check(fine, "finite gradients, although one row has no item", came_back=grads[0][2, 0].tolist())
    gone = grads[0][1, 2:]
    assert_close(gone, torch.zeros_like(gone), what="gradient of padding, from places with items")
    short = attention(x[1:2, :2], is_item[1:2, :2])
    assert_close(out[1:2, :2], short.detach(), what="2 items, 3 places of padding behind them")
    other = x.clone()
    other[1, 2:] *= 1000
    moved = attention(other, is_item)
    assert_close(moved[1, :2], out[1, :2].detach(), what="items, after padding was multiplied")
    hole = flags([[True, False, True, False, True]])
    left = attention(x[:1, ::2], hole[:, ::2])
    holed = attention(x[:1], hole)
    check(
        not torch.allclose(holed[:, 0], left[:, 0]),
        "distances that count places, padding among them too",
        came_back="the same as with padding taken out",
        call="attention(x, is_item=[[True, False, True, False, True]])",
    )
    own = attention(x[2:, :1], is_item[2:, :1])
    assert_close(out[2:, :1].detach(), own.detach(), what="a place of padding sees itself alone")
    for dtype, tolerance in ((torch.float16, 2e-2), (torch.bfloat16, 1e-1)):
        half = attention_of(6, 2, dtype=dtype)
        low = half(x.to(dtype), is_item)
        assert_close(low, out.detach(), dtype=dtype, rtol=tolerance, atol=tolerance)


# --- blocks and the tower -------------------------------------------------------------------------


@rung(
    hints=[
        "Norms come first here; what is added is what comes out of attention and of the network.",
        "x + attention(norm1(x)), then the same with the small network. Attention reads the norm "
        "for q, k AND v. GELU without approximation.",
        "x = x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))",
    ]
)
def test_block():
    """A block adds attention, then a network, each behind its norm: golden values, dropout."""
    case = golden("golden.json")["block"]
    run_golden(block_of(state=case["state"]), case)
    state = {name: torch.zeros_like(value) for name, value in block_of().state_dict().items()}
    x, is_item = draw(8, 40, 5, 6), flags([[True] * 5] * 40)
    block = block_of(state=state, dropout=0.5).train()
    out = block(x, is_item)
    assert_close(out, x, what="all values 0: x comes back, in training mode too")
    for name, other in (("attention.out.bias", "down.bias"), ("down.bias", "attention.out.bias")):
        more = {**state, name: torch.full((6,), 4.0), other: torch.zeros(6)}
        block = block_of(state=more, dropout=0.2).train()
        added = (block(x, is_item) - x).round(decimals=3)
        share = float((added == 0).double().mean())
        what = f"only {name} = 4: what is added in training mode, dropout=0.2"
        values = sorted(added.unique().tolist())
        check(values == [0.0, 5.0], "0 or 4 / (1 - 0.2)", came_back=values, what=what)
        assert_scalar(share, 0.2, atol=0.06, rtol=0, what=f"{what}: share that is 0")
        block.eval()
        assert_close(block(x, is_item), x + 4, what=f"only {name} = 4, eval()", rtol=1e-5)
    more = {**state, "up.bias": torch.ones(5), "down.weight": torch.ones(6, 5)}
    block = block_of(state=more, dropout=0.2).train()
    seen = (block(x, is_item) - x).div(5 * 0.8413447 / 0.8).round(decimals=3)
    values = sorted(seen.unique().tolist())
    words = "all of the network's sum or nothing: dropout acts on what is added, nowhere else"
    check(values == [0.0, 1.0], words, came_back=values[:6], what="only the network, dropout=0.2")


@rung(
    hints=[
        "Rows times sqrt(dim), blocks, the last norm, unit length, zeros where there is no item.",
        "A row of the table has a length of about 1, a norm's output one of about sqrt(dim): "
        "without the factor the item itself drowns in what the first block adds.",
        "F.normalize(self.norm(x), dim=-1).masked_fill(~is_item[:, :, None], 0.0)",
    ]
)
def test_states():
    """A unit vector for each place, zeros for padding: golden values with gradients."""
    case = golden("golden.json")["tower"]
    tower = tower_of(state=case["state"])
    history = integers(case["history"])
    before = history.clone()
    states = tower.states(history)
    call = "tower.states(history)"
    assert_close(states, case["out"], what="golden values", dtype=torch.float32, **FLOAT32)
    assert_close(history, before, what="history, after the call", call=call)
    scalar = (states * constant(case["cotangent"])).sum()
    inputs = dict(tower.named_parameters())
    assert_gradients(scalar, case["gradients"], inputs, call=call, rtol=2e-3, atol=2e-4)
    state = tower.state_dict()
    state["table.weight"] = torch.cat([torch.full((1, 6), 2.0), state["table.weight"][1:]])
    again = tower_of(state=state).states(history)
    what = "golden values again, where row 0 of the table is not zero"
    assert_close(again, case["out"], what=what, call=call, dtype=torch.float32, **FLOAT32)
    state["table.weight"] = torch.zeros(9, 6)
    lengths = tower_of(state=state).states(integers([[3, 0]])).double().square().sum(2)
    what = "squared lengths where all rows are zero, an item and padding"
    assert_close(lengths, [[1.0, 0.0]], what=what, call=call, dtype=torch.float64, rtol=1e-5)
    tower = tower_of(dropout=0.5)
    states = tower.states(history)
    assert_close(tower.states(history), states.detach(), what="eval(): twice the same", call=call)
    tower.train()
    differ = not torch.allclose(tower.states(history), states)
    check(differ, "another result in training mode with dropout=0.5", call=call)
    check(tower.training, "the mode is not changed", call=call)
    state = {name: torch.zeros_like(value) for name, value in tower.state_dict().items()}
    state |= {"table.weight": torch.ones(9, 6), "norm.weight": torch.ones(6)}
    state["norm.weight"] *= 3
    state["norm.bias"] = torch.tensor([0.0, 0, 0, 0, 0, 1e-4])
    tower = tower_of(state=state, dropout=0.5).train()
    rows = tower.states(integers([[1, 2, 3, 4, 5, 6, 7]] * 30))[..., :5]
    zero = float((rows.abs() < 1e-3).all(2).double().mean())
    words = "dropout of single numbers of the rows, before the blocks"
    check(zero < 0.2, words, came_back=f"{zero:.0%} of the places have no trace of it", call=call)


@rung(
    hints=[
        "What a place gives may only depend on what lies behind it, and on how far behind.",
        "Positions are distances between places, not places counted from one end: cutting the "
        "front off, or adding padding behind, changes neither.",
        "states(history[:, p:])[:, 0] equals states(history)[:, p], for every p",
    ]
)
def test_trained_is_served():
    """The vector of a place is what the tower gives when that place is the last one."""
    tower = tower_of(dtype=torch.float64)
    history = integers([[3, 8, 3, 5, 1, 7], [7, 2, 6, 0, 0, 0]])
    states = tower.states(history).detach()
    for place in range(1, 6):
        cut = history[:, place:]
        now = tower({"history": cut})
        what = f"the user at place {place} against states(history)[:, {place}]"
        assert_close(now, states[:, place], what=what, rtol=1e-8)
    padded = torch.cat([history, torch.zeros_like(history)], 1)[:, :MOST]
    what = "one more place of padding"
    assert_close(tower.states(padded)[:, :6], states, what=what, rtol=1e-8)
    short = tower.states(history[1:, :3])
    assert_close(short, states[1:, :3], what="less padding", rtol=1e-8)
    alone = tower.states(history[1:])
    assert_close(alone, states[1:], what="a row alone", rtol=1e-8)
    long = torch.cat([history, integers([[4, 2, 6], [4, 2, 6]])], 1)
    for places in (MOST, 3):
        tower = tower_of(max_history=places, dtype=torch.float64)
        kept = tower.states(long)
        expected = tower.states(long[:, :places].clone())
        what = f"9 places where max_history is {places}: the oldest are cut off"
        assert_close(kept, expected.detach(), what=what, rtol=1e-8)
        now = tower({"history": long})
        assert_close(now, expected[:, 0].detach(), what=what, rtol=1e-8)


@rung(
    hints=[
        "A user is the vector of the most recent place: the first one, not the last and no mean.",
        "A user without any item has no direction: zeros, and no division by zero on the way back.",
        "batch[self.column], and states[:, 0]; a history of no places has none",
    ]
)
def test_users():
    """A user is the most recent place; without an item zeros; the table is shared."""
    tower = tower_of()
    history = integers([[3, 8, 5, 1], [7, 2, 0, 0], [0, 0, 0, 0]])
    states = tower.states(history).detach()
    out = tower({"zzz": "x", "history": history, "age": integers([1, 2])})
    assert_close(out, states[:, 0], what="the most recent place", rtol=1e-5)
    assert_close(out[2], torch.zeros(6), what="a user without any item")
    lengths = out[:2].detach().double().square().sum(1)
    assert_close(lengths, [1.0, 1.0], rtol=1e-5, dtype=torch.float64, what="squared lengths")
    grads = torch.autograd.grad((out * draw(9, 3, 6)).sum(), list(tower.parameters()))
    fine = all(bool(grad.isfinite().all()) for grad in grads)
    check(fine, "finite gradients, although one user has no item", call="tower(batch)")
    nothing = tower({"history": history[:, :0]})
    assert_close(nothing, torch.zeros(3, 6), what="a history of no places")
    empty = tower({"history": history[2:]})
    call = "tower(a batch of one user without items)"
    assert_close(empty, torch.zeros(1, 6), call=call)
    if empty.requires_grad:
        grads = torch.autograd.grad(empty.sum(), list(tower.parameters()), allow_unused=True)
        grads = [grad for grad in grads if grad is not None]
        fine = all(bool((grad == 0).all()) for grad in grads)
        check(fine, "gradients of zero", call=call)
    table = embedding.EmbeddingTable(9, 6)
    options = {"num_blocks": 1, "num_heads": 2, "hidden_dim": 5, "max_history": 4}
    tower = sequence.SequenceTower(table, column="films", **options).to(device())
    mine = [p for p in tower.parameters() if p.shape == (9, 6)]
    used = len(mine) == 1 and mine[0] is table.weight
    check(used, "the given table itself, and no other", came_back=len(mine))
    tower.train()
    tower({"films": history}).square().sum().backward()
    mode = "training" if tower.training else "eval"
    assert_equal(mode, "training", what="mode after the call", call="tower(batch)")
    (tower({"films": history})[:, 0]).sum().backward()
    learned = table.weight.grad is not None and table.weight.grad.abs().sum(1) > 0
    words = "a gradient for the rows of the items in the history, and no others"
    rows = [False, True, True, True, False, True, False, True, True]
    check(
        isinstance(learned, torch.Tensor) and learned.tolist() == rows,
        words,
        came_back=learned.tolist() if isinstance(learned, torch.Tensor) else None,
        call="tower(batch)[:, 0].sum().backward()",
    )
    untrained = [name for name, p in tower.named_parameters() if p.grad is None]
    check(not untrained, "a gradient for every parameter", came_back=untrained)
    expect_error(lambda: tower({"history": history}), KeyError, about="films")
    for bad in (history[0], history[None]):
        call = f"tower(a history of shape {list(bad.shape)})"
        expect_error(lambda h=bad: tower({"films": h}), ValueError, call=call)
        call = f"tower.states(a history of shape {list(bad.shape)})"
        expect_error(lambda h=bad: tower.states(h), ValueError, call=call)
    for wrong in ({"num_blocks": 0}, {"num_heads": 4}, {"max_history": 0}):
        expect_error(
            lambda w=wrong: sequence.SequenceTower(table, **{**options, **w}),
            ValueError,
            call=f"SequenceTower(table of width 6, {wrong})",
        )


# --- the loss -------------------------------------------------------------------------------------


def run_loss(name, dtype=torch.float32, **more):
    """The loss of a golden case, and its gradients."""
    case = golden("golden.json")["loss"]
    chosen = case["cases"][name]
    states, catalogue = tensor(case["states"], dtype), tensor(case["catalogue"], dtype)
    temperature = tensor(chosen["options"]["temperature"], dtype)
    options = {}
    if "sample" in chosen["options"]:
        options["sample"] = integers(chosen["options"]["sample"])
    if "log_q" in chosen["options"]:
        options["log_q"] = constant(chosen["options"]["log_q"])
    target = integers(case["target"])
    loss = sequence.next_item_loss(
        states, target, catalogue, temperature=temperature, **options, **more
    )
    call = f"next_item_loss(states, target, catalogue, {', '.join(['temperature', *options])})"
    assert_scalar(loss, chosen["loss"], what="golden value", call=call, rtol=1e-5)
    inputs = {"states": states, "catalogue": catalogue, "temperature": temperature}
    assert_gradients(loss, chosen["gradients"], inputs, call=call, rtol=1e-4, atol=1e-5)


def assert_loss(expected, states, target, catalogue, *, what, atol=1e-6, **options):
    """The loss of plain lists, in float32, is `expected`."""
    given = [f"{name}={np.round(value, 2).tolist()}" for name, value in options.items()]
    made = {
        name: integers(value) if name == "sample" else constant(value) if name == "log_q" else value
        for name, value in options.items()
    }
    loss = sequence.next_item_loss(constant(states), integers(target), constant(catalogue), **made)
    call = f"next_item_loss(states, target, catalogue, {', '.join(given)})"
    assert_scalar(loss, expected, what=what, call=call, rtol=1e-5, atol=atol)


@rung(
    hints=[
        "The target of a place is an index into the catalogue, plus one: 0 is no target.",
        "Mean over the places that have a target, of all users together. Divide the states by the "
        "temperature, not the scores: they are smaller.",
        "F.cross_entropy(scores, target - 1, ignore_index=-1, reduction='sum') / number of targets",
    ]
)
def test_full_softmax():
    """Cross-entropy over the catalogue at every place with a target, all places alike."""
    same = [[[0.0, 0.0]] * 3] * 2
    target, catalogue = [[1, 4, 2], [3, 0, 0]], [[1.0, 2.0]] * 4
    assert_loss(math.log(4), same, target, catalogue, temperature=0.3, what="equal scores: log N")
    states = [[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [9.0, 9.0], [9.0, 9.0]]]
    catalogue = [[2.0, 0.0], [0.0, 1.0]]
    rows = [math.log1p(math.exp(x)) for x in (-2, 1, 2, -1)]
    target, what = [[1, 1, 2], [2, 0, 0]], "three places of one user, one of the other"
    assert_loss(sum(rows) / 4, states, target, catalogue, temperature=1.0, what=what)
    run_loss("full")
    states = tensor(states)
    loss = sequence.next_item_loss(
        states, integers([[0] * 3] * 2), constant(catalogue), temperature=0.5
    )
    assert_scalar(loss, 0.0, what="no place has a target")
    check(loss.requires_grad, "a zero that can be differentiated", came_back=loss)
    grad = torch.autograd.grad(loss, states)[0]
    assert_close(grad, torch.zeros_like(states), what="gradient of states, no target anywhere")


@rung(
    hints=[
        "The target, once, and what was drawn, each as often as it was drawn.",
        "Drawn copies of a place's own target leave its race. Popular items are drawn more often: "
        "log_q is taken off all of them and off the target, after the temperature.",
        "negative.masked_fill(sample == own[:, None], -inf), and the target's score in front",
    ]
)
def test_sampled_softmax():
    """Cross-entropy over the target and the items drawn, corrected by logQ."""
    states, catalogue = [[[0.0, 0.0]]], [[1.0, 2.0]] * 4
    for expected, target, sample, what in (
        (math.log(4), 3, [0, 1, 1], "equal scores, three others drawn"),
        (math.log(2), 2, [0, 1, 1], "equal scores, the target drawn twice"),
        (0.0, 2, [1, 1], "nothing but the target drawn"),
    ):
        options = {"temperature": 0.3, "sample": sample, "what": what}
        assert_loss(expected, states, [[target]], catalogue, **options)
    chance = np.log([0.4, 0.1, 0.3, 0.2])
    expected, what = math.log(1 + 0.3 / 0.4 + 0.3 / 0.1), "equal scores, q = 0.4, 0.1, 0.3, 0.2"
    options = {"temperature": 0.1, "sample": [0, 1], "log_q": chance, "what": what}
    assert_loss(expected, states, [[3]], catalogue, **options)
    run_loss("sampled")
    run_loss("log_q")
    states = tensor([[[1.0, 2.0]]])
    loss = sequence.next_item_loss(
        states, integers([[0]]), constant(catalogue), temperature=0.5, sample=integers([0])
    )
    assert_scalar(loss, 0.0, what="no place has a target")
    grad = torch.autograd.grad(loss, states)[0]
    assert_close(grad, torch.zeros_like(states), what="gradient of states, no target anywhere")


@rung(
    hints=[
        "What would bfloat16 make of a score of 300.4, and autocast of your matrix product?",
        "Convert what comes in, and switch autocast off around the product; float64 stays.",
        "with torch.autocast(states.device.type, enabled=False): ..., "
        "torch.promote_types(states.dtype, torch.float32)",
    ]
)
def test_precision():
    """Scores are float32 at least and exact where exp overflows; bad input is refused."""
    run_loss("full", torch.float64)
    run_loss("log_q", torch.float64)
    states, catalogue = draw(1, 2, 3, 4), draw(2, 6, 4)
    target = integers([[1, 4, 6], [2, 0, 0]])
    for sample in (None, integers([4, 1, 5])):
        options = {"temperature": 0.05, "sample": sample}
        what = "full" if sample is None else "sampled"
        whole = sequence.next_item_loss(states, target, catalogue, **options)
        with torch.autocast(device().type, dtype=torch.bfloat16):
            mixed = sequence.next_item_loss(states, target, catalogue, **options)
        assert_close(mixed, whole, what=f"{what}, under autocast", rtol=1e-5)
        low, small = states.bfloat16(), catalogue.bfloat16()
        loss = sequence.next_item_loss(low, target, small, **options)
        wide = sequence.next_item_loss(low.float(), target, small.float(), **options)
        assert_close(loss, wide, what=f"{what}, of bfloat16", rtol=1e-5)
        sharp = sequence.next_item_loss(
            100 * states.double(), target, catalogue.double(), temperature=0.001, sample=sample
        )
        scores = 1e5 * states.double() @ catalogue.double().T
        own = (target - 1).clamp(min=0)
        kept = scores if sample is None else scores[..., torch.tensor([4, 1, 5])]
        if sample is not None:
            kept = kept.masked_fill(sample == own[..., None], -math.inf)
        mine = scores.gather(2, own[..., None])[..., 0]
        rows = torch.maximum(kept.amax(2), mine) - mine
        assert_close(sharp, rows[target > 0].mean(), what=f"{what}, temperature=0.001", rtol=1e-6)
    good = {"states": states, "target": target, "catalogue": catalogue, "temperature": 0.5}
    given = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in good.items()}
    sequence.next_item_loss(**given)
    for name in ("states", "target", "catalogue"):
        assert_close(given[name], good[name], what=f"{name}, after the call", rtol=0, atol=0)
    sample, log_q = integers([1, 2]), torch.zeros(6, device=device())
    for what, wrong in {
        "states (B, D)": {"states": states[0], "target": target[0]},
        "target (B, L - 1)": {"target": target[:, 1:]},
        "target (B,)": {"target": target[:, 0]},
        "catalogue (N, D - 1)": {"catalogue": catalogue[:, 1:]},
        "catalogue (D,)": {"catalogue": catalogue[0]},
        "catalogue (1, N, D)": {"catalogue": catalogue[None]},
        "temperature=0": {"temperature": 0},
        "temperature=-1.0": {"temperature": -1.0},
        "log_q without a sample": {"log_q": log_q},
        "log_q (S,)": {"sample": sample, "log_q": log_q[:2]},
        "log_q (N, 1)": {"sample": sample, "log_q": log_q[:, None]},
        "sample (S, 1)": {"sample": sample[:, None]},
        "an empty sample": {"sample": sample[:0]},
    }.items():
        call = f"next_item_loss({what})"
        expect_error(
            lambda w=wrong: sequence.next_item_loss(**{**good, **w}), ValueError, call=call
        )
