"""What the diagnosis asks: one option at a time, so that each mistake shows where it is made."""

import math

import torch

from harness.cost import count
from harness.devices import other_device_findings
from harness.probe import probe
from harness.spec import learner

losses = learner("training.losses")

USER = [[0.7, -1.1], [0.4, 0.9], [-1.3, 0.2], [0.6, 1.7], [-0.5, -0.8]]
ITEM = [[1.2, 0.3], [-0.6, 1.4], [-0.9, -0.5], [0.8, 0.1], [-0.2, -1.5]]
CATALOGUE = [*ITEM[:4], [-0.4, -1.3], [0.1, 0.8], [-0.8, 1.5]]
IDS = [6, 3, 6, 8, 3]
LOG_Q = [-0.9, -3.1, -2.2, -4.6, -1.4]
WEIGHT = [0.5, 2.0, 0.0, 1.25, 3.0]
TARGET = [6, 0, 3, 0, 2]


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def ran(loss, first, second, **options):
    """The loss, and its gradients under an upstream gradient of 1.7."""
    first, second = first.requires_grad_(), second.requires_grad_()
    value = loss(first, second, **options)
    return graded(value, {"user": first, "item": second})


def graded(value, leaves):
    if not isinstance(value, torch.Tensor):
        return {"loss": value, "gradient": "not a tensor"}
    told = {"loss": value.detach()}
    if value.dim() or not value.requires_grad:
        return {**told, "gradient": "no scalar with a graph"}
    grads = torch.autograd.grad(1.7 * value, list(leaves.values()), allow_unused=True)
    return {**told, **{name: seen(grad) for name, grad in zip(leaves, grads, strict=True)}}


def seen(grad):
    """A number for each row of a gradient, which keeps what is stored small."""
    if grad is None or grad.dim() < 2:
        return grad
    return grad @ torch.tensor([1.0, 0.37, 0.59], dtype=grad.dtype)[: grad.shape[1]]


def in_batch(user=USER, item=ITEM, *, temperature=0.7, **options):
    user, item = tensor(user), tensor(item)
    return ran(losses.in_batch_softmax_loss, user, item, temperature=temperature, **options)


def full(*, temperature=0.7, **options):
    user, catalogue = tensor(USER), tensor(CATALOGUE)
    options |= {"target": torch.tensor(TARGET), "temperature": temperature}
    return ran(losses.full_softmax_loss, user, catalogue, **options)


# --- in the batch ---------------------------------------------------------------------------------


@probe
def plain():
    """No options."""
    return in_batch()


@probe
def learned_temperature():
    """The gradient of the temperature alone."""
    temperature = tensor(0.6).requires_grad_()
    value = losses.in_batch_softmax_loss(tensor(USER), tensor(ITEM), temperature=temperature)
    return graded(value, {"temperature": temperature})


@probe
def log_q():
    return in_batch(log_q=tensor(LOG_Q))


@probe
def log_q_of_distinct_items():
    """Nothing to mask; what was counted in the batch would be the same for all."""
    return in_batch(log_q=tensor(LOG_Q), item_ids=torch.tensor([4, 9, 1, 7, 5]))


@probe
def hits():
    return in_batch(item_ids=torch.tensor(IDS))


@probe
def hits_far_below():
    """All scores are very low."""
    user, item = [[-30000.0, *row] for row in USER], [[1.0, *row] for row in ITEM]
    return in_batch(user=user, item=item, temperature=1.0, item_ids=torch.tensor(IDS))


@probe
def hits_far_ahead():
    """A hit whose score is so high that all others vanish beside it."""
    user = [[*row, float(i == 2)] for i, row in enumerate(USER)]
    item = [[*row, 2000.0 * (j == 0)] for j, row in enumerate(ITEM)]
    return in_batch(user=user, item=item, temperature=1.0, item_ids=torch.tensor(IDS))


@probe
def equal_vectors():
    """Two items with one vector, and one item with two."""
    item = [*ITEM[:4], ITEM[0]]
    return in_batch(item=item, item_ids=torch.tensor([6, 3, 6, 8, 1]))


@probe
def id_zero():
    return in_batch(item_ids=torch.tensor([0, 2, 0, -1, -1]))


@probe
def large_ids():
    """Beyond float32, beyond int32, beyond float64: one loss each."""
    found = {}
    for name, ids in (
        ("float32", [16777216, 16777217, 5, 6, 7]),
        ("int32", [5, 6, 2**32 + 5, 7, 8]),
        ("float64", [5, 6, 2**53, 7, 2**53 + 1]),
    ):
        ids, user, item = torch.tensor(ids), tensor(USER), tensor(ITEM)
        found[name] = losses.in_batch_softmax_loss(user, item, temperature=0.7, item_ids=ids)
    return found


@probe
def weights():
    return in_batch(sample_weight=tensor(WEIGHT))


@probe
def small_weights():
    return in_batch(sample_weight=2e-8 * tensor(WEIGHT))


@probe
def zero_weights():
    return in_batch(sample_weight=tensor([0.0] * 5))


@probe
def symmetric():
    return in_batch(symmetric=True)


@probe
def symmetric_log_q():
    return in_batch(symmetric=True, log_q=tensor(LOG_Q))


@probe
def symmetric_hits():
    return in_batch(symmetric=True, item_ids=torch.tensor(IDS))


@probe
def symmetric_weights():
    return in_batch(symmetric=True, sample_weight=tensor(WEIGHT))


@probe
def one_pair():
    return in_batch(user=USER[:1], item=ITEM[:1], symmetric=True)


@probe
def small_temperature():
    return in_batch(temperature=0.001)


# --- the full softmax -----------------------------------------------------------------------------


@probe
def full_plain():
    return full()


@probe
def full_learned_temperature():
    temperature = tensor(0.6).requires_grad_()
    user, catalogue, target = tensor(USER), tensor(CATALOGUE), torch.tensor(TARGET)
    value = losses.full_softmax_loss(user, catalogue, target, temperature=temperature)
    return graded(value, {"temperature": temperature})


@probe
def full_weights():
    return full(sample_weight=tensor(WEIGHT))


@probe
def full_small_weights():
    return full(sample_weight=2e-8 * tensor(WEIGHT))


@probe
def full_zero_weights():
    return full(sample_weight=tensor([0.0] * 5))


@probe
def full_small_temperature():
    return full(temperature=0.001)


# --- precision ------------------------------------------------------------------------------------

# integers whose products bfloat16 rounds, whatever the order of the operations
WHOLE = [[16.0, 1.0], [16.0, 3.0], [1.0, 17.0], [2.0, 16.0]]


def in_batch_of_two(dtype):
    user = tensor(WHOLE, dtype)
    found = [losses.in_batch_softmax_loss(user, user.flip(i), temperature=1.0) for i in (0, 1)]
    return [float(loss) for loss in found]


def full_of_two(dtype):
    user, target = tensor(WHOLE, dtype), torch.tensor([0, 2, 2, 1])
    catalogues = (user.flip(0), user.flip(1))
    return [float(losses.full_softmax_loss(user, c, target, temperature=1.0)) for c in catalogues]


@probe(tolerance=1e-4)
def from_bfloat16():
    return in_batch_of_two(torch.bfloat16)


@probe(tolerance=1e-4)
def full_from_bfloat16():
    return full_of_two(torch.bfloat16)


@probe(tolerance=1e-4)
def under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return in_batch_of_two(torch.float32)


@probe(tolerance=1e-4)
def full_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return full_of_two(torch.float32)


# differences that only float64 can tell
FINE, COARSE = [[1.0, 1e-9], [1.0, -1e-9]], [[1.0, 1.0], [1.0, -2.0]]


@probe(tolerance=1e-4)
def from_float64():
    loss = losses.in_batch_softmax_loss(tensor(FINE), tensor(COARSE), temperature=1.0)
    return 1e9 * (loss - math.log(2))


@probe(tolerance=1e-4)
def full_from_float64():
    label = torch.tensor([0, 1])
    loss = losses.full_softmax_loss(tensor(FINE), tensor(COARSE), label, temperature=1.0)
    return 1e9 * (loss - math.log(2))


# --- what the caller hands in ---------------------------------------------------------------------


@probe
def inputs_unchanged():
    given = {
        "user": tensor(USER),
        "item": tensor(ITEM),
        "item_ids": torch.tensor(IDS),
        "log_q": tensor(LOG_Q),
        "sample_weight": tensor(WEIGHT),
    }
    before = {name: x.clone() for name, x in given.items()}
    losses.in_batch_softmax_loss(**given, temperature=0.7, symmetric=True)
    return {name: torch.equal(x, before[name]) for name, x in given.items()}


def outcome(function, *args, **options):
    """ "refused" as the contract has it, or what happened instead."""
    try:
        function(*args, **options)
    except ValueError:
        return "refused"
    except Exception:
        return "another error"
    return "accepted"


@probe
def bad_pairs():
    user, item = tensor(USER), tensor(ITEM)
    pairs = [(user, item[:3]), (user, item[:, :1]), (user[0], item[0]), (user[None], item[None])]
    return [outcome(losses.in_batch_softmax_loss, *each, temperature=0.7) for each in pairs]


@probe
def empty_batch():
    nothing = tensor(USER)[:0]
    return outcome(losses.in_batch_softmax_loss, nothing, nothing, temperature=0.7)


@probe
def bad_temperatures():
    user, item = tensor(USER), tensor(ITEM)
    return [outcome(losses.in_batch_softmax_loss, user, item, temperature=t) for t in (0.0, -1)]


@probe
def bad_options():
    user, item = tensor(USER), tensor(ITEM)
    options = {"item_ids": torch.tensor(IDS), "log_q": tensor(LOG_Q)}
    options["sample_weight"] = tensor(WEIGHT)
    call = losses.in_batch_softmax_loss
    return {
        f"{name} {what}": outcome(call, user, item, temperature=0.7, **{name: bad})
        for name, good in options.items()
        for what, bad in (("column", good[:, None]), ("short", good[:1]))
    }


def full_outcome(**changes):
    given = {"user": tensor(USER), "catalogue": tensor(CATALOGUE), "target": torch.tensor(TARGET)}
    return outcome(losses.full_softmax_loss, **{**given, "temperature": 0.7, **changes})


@probe
def bad_full_shapes():
    user, target = tensor(USER), torch.tensor(TARGET)
    narrow, column = user[:, :1], target[:, None]
    return [full_outcome(user=narrow), full_outcome(user=user[0]), full_outcome(target=column)]


@probe
def bad_full_weights():
    weight = tensor(WEIGHT)
    return [full_outcome(sample_weight=bad) for bad in (weight[:1], weight[:, None])]


@probe
def empty_full_batch():
    return full_outcome(user=tensor(USER)[:0], target=torch.tensor(TARGET)[:0])


@probe
def bad_full_temperatures():
    return [full_outcome(temperature=temperature) for temperature in (0.0, -1)]


@probe
def on_another_device():
    """Whether anything is made on the CPU when all inputs are elsewhere."""

    def scenario(place):
        user, item = tensor(USER).to(place), tensor(ITEM).to(place)
        options = {"log_q": tensor(LOG_Q).to(place), "sample_weight": tensor(WEIGHT).to(place)}
        options |= {"item_ids": torch.tensor(IDS).to(place), "symmetric": True}
        return losses.in_batch_softmax_loss(user, item, temperature=0.7, **options)

    return bool(other_device_findings(scenario).findings)


# --- cost -----------------------------------------------------------------------------------------


def spent(rows):
    """What the in-batch loss costs with all options, for so many rows."""
    user = torch.linspace(-1, 1, rows * 16, dtype=torch.float64).reshape(rows, 16)
    ids = torch.arange(rows) % (rows - 2)
    options = {"item_ids": ids, "log_q": user[:, 0], "sample_weight": user[:, 1].abs()}
    options |= {"temperature": 0.7, "symmetric": True}
    item = user.flip(0)
    return count(lambda: losses.in_batch_softmax_loss(user, item, **options))


@probe
def loops():
    return spent(48).operations > spent(16).operations + 16


@probe
def too_large():
    return spent(48).largest_bytes > 3 * 48 * 48 * 8


@probe
def waits():
    """Whether the host waits for a GPU, and with which options."""
    given = {
        "plain": {},
        "item_ids": {"item_ids": torch.tensor(IDS)},
        "sample_weight": {"sample_weight": tensor(WEIGHT)},
    }

    def syncs(options):
        def scenario(place):
            user = tensor(USER).to(place)
            there = {name: x.to(place) for name, x in options.items()}
            call = losses.in_batch_softmax_loss
            return lambda: call(user, user, temperature=0.7, **there)

        return other_device_findings(scenario).cost.syncs

    return {name: bool(syncs(options)) for name, options in given.items()}
