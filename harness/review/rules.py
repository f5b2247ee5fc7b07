"""Static rules on the syntax tree, for what is special to recommenders in PyTorch.

A rule is a function from a parsed file to the nodes that it minds and what it says of each. It has
to be sure: the reference and all alternates of all katas are without a finding, by a test.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard, TypeVar

from harness.review import Finding

Said = Iterator[tuple[ast.AST, str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LOOPS = (ast.For, ast.While)
Node = TypeVar("Node", bound=ast.AST)


@dataclass(frozen=True)
class Rule:
    """A rule's name, its reason in production, what to read, and how it finds."""

    name: str
    why: str
    read: str
    find: Callable[[Source], Said]


class Source:
    """A parsed file; every node knows its parent."""

    def __init__(self, text: str) -> None:
        self.tree = ast.parse(text)
        self.text = text
        self.parent: dict[ast.AST, ast.AST] = {}
        for node in ast.walk(self.tree):
            for child in ast.iter_child_nodes(node):
                self.parent[child] = node

    def all(self, *kinds: type[Node]) -> Iterator[Node]:
        """All nodes of some kinds."""
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))

    def calls(self, *names: str) -> Iterator[ast.Call]:
        """Calls whose function ends in one of `names`: "item", "torch.load"."""
        for node in self.all(ast.Call):
            if matches(dotted(node.func), names):
                yield node

    def calls_in(self, node: ast.AST) -> Iterator[ast.Call]:
        """All calls within a node."""
        return (each for each in ast.walk(node) if isinstance(each, ast.Call))

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        """What a node stands in, from the inside out."""
        while node in self.parent:
            node = self.parent[node]
            yield node

    def function(self, node: ast.AST) -> Function | None:
        """The innermost function that a node stands in."""
        return next((up for up in self.above(node) if isinstance(up, FUNCTIONS)), None)

    def own(self, scope: ast.AST, kind: type[Node]) -> Iterator[Node]:
        """The nodes of a kind in a function, without those of functions in it; or in the module."""
        inner = scope if isinstance(scope, FUNCTIONS) else None
        return (n for n in ast.walk(scope) if isinstance(n, kind) and self.function(n) is inner)

    def functions(self) -> Iterator[Function]:
        """All functions, methods and inner ones included."""
        return self.all(*FUNCTIONS)


RULES: list[Rule] = []


def rule(why: str, read: str) -> Callable[[Callable[[Source], Said]], Callable[[Source], Said]]:
    """Makes a function a rule that is called like it, with dashes."""

    def add(find: Callable[[Source], Said]) -> Callable[[Source], Said]:
        RULES.append(Rule(find.__name__.replace("_", "-"), why, read, find))
        return find

    return add


def findings(path: Path, name: str) -> Iterator[Finding]:
    """What the rules find in one file; nothing in one that cannot be parsed."""
    try:
        source = Source(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    for each in RULES:
        for node, what in each.find(source):
            yield Finding(name, getattr(node, "lineno", 1), each.name, what, each.why, each.read)


# --- helpers --------------------------------------------------------------------------------------


def dotted(node: ast.AST) -> str:
    """ "torch.nn.functional.softmax"; what is called on an expression begins with a dot."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def matches(name: str, names: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of `names` or ends in one."""
    return any(name == each or name.endswith(f".{each}") for each in names)


def called(node: ast.AST | None, *names: str) -> TypeGuard[ast.Call]:
    """Whether this is a call of one of `names`."""
    return isinstance(node, ast.Call) and matches(dotted(node.func), names)


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def takes_keywords(call: ast.Call) -> bool:
    return any(k.arg is None for k in call.keywords)


def inside(node: ast.AST, *names: str) -> bool:
    """Whether a call of one of `names` is anywhere within."""
    return any(called(each, *names) for each in ast.walk(node))


def text_of(node: ast.AST) -> str:
    """Its source in a line of at most 60 characters."""
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else text[:57] + "..."


def tensors(function: Function) -> set[str]:
    """Parameters annotated as tensors that are not given another value on the way."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    kinds = ("Tensor", "torch.Tensor", "Tensor | None", "torch.Tensor | None")
    names = {a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) in kinds}
    for node in ast.walk(function):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.For, ast.NamedExpr)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                stored = (n for n in ast.walk(target) if isinstance(n, ast.Name))
                names -= {n.id for n in stored if isinstance(n.ctx, ast.Store)}
    return names


def first_layer(loop: ast.AST) -> ast.Call | None:
    """A call of torch.nn.functional in a loop's body."""
    body = loop.body if isinstance(loop, ast.For) else [loop]
    calls = (n for part in body for n in ast.walk(part) if isinstance(n, ast.Call))
    layers = ("torch.nn.functional.", "F.")
    return next((call for call in calls if dotted(call.func).startswith(layers)), None)


def trains(loop: ast.AST) -> bool:
    return inside(loop, "backward") and inside(loop, "step")


# --- numbers --------------------------------------------------------------------------------------


@rule(
    "the softmax of a far-off score underflows to 0 and its logarithm is -inf: the loss is lost on "
    "the very rows that are most wrong",
    "torch.nn.functional.log_softmax, logsigmoid; Goodfellow et al., Deep Learning, section 4.1",
)
def log_of_softmax(source: Source) -> Said:
    """torch.log(softmax(x)), also through a name."""
    soft = ("softmax", "sigmoid")
    for function in [*source.functions(), source.tree]:
        named = {
            target.id
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and called(node.value, *soft)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and matches(dotted(node.func), ("log",)):
                of = node.args[0] if node.args else getattr(node.func, "value", None)
                if of is not None and (
                    called(of, *soft) or (isinstance(of, ast.Name) and of.id in named)
                ):
                    yield node, f"{text_of(node)}: use log_softmax or logsigmoid of the scores"


@rule(
    "a probability that rounds to 0 or 1 has an infinite or clamped loss and no gradient; the form "
    "on logits is exact",
    "torch.nn.functional.binary_cross_entropy_with_logits",
)
def loss_on_probabilities(source: Source) -> Said:
    """binary_cross_entropy or BCELoss on a sigmoid."""
    for call in source.calls("binary_cross_entropy", "BCELoss"):
        yield call, f"{text_of(call)} takes probabilities: give logits to the _with_logits form"


@rule(
    "a vector of zeros (an empty history, a dead unit) gives 0/0, and NaN spreads to all weights",
    "torch.nn.functional.normalize and its eps",
)
def norm_without_eps(source: Source) -> Said:
    """x / x.norm(...) without anything that keeps the norm from 0."""
    for node in source.all(ast.BinOp):
        if isinstance(node.op, ast.Div) and called(node.right, "norm", "vector_norm"):
            yield node, f"{text_of(node)}: the norm can be 0"


@rule(
    "NaN that is made invisible comes back as a wrong answer; it should be named where it arises",
    "torch.autograd.set_detect_anomaly",
)
def nan_hidden(source: Source) -> Said:
    """loss.nan_to_num(), torch.nan_to_num(loss): as a metric's stated rule it may be right."""
    for call in source.calls("nan_to_num", "nan_to_num_"):
        of = call.args[:1] + [getattr(call.func, "value", call.func)]
        names = {n.id for each in of for n in ast.walk(each) if isinstance(n, ast.Name)}
        if any("loss" in name or "grad" in name for name in names):
            yield call, f"{text_of(call)} hides what went wrong before"


@rule("the axis that is taken is deprecated and not the one you think of", "torch.softmax: dim")
def softmax_without_dim(source: Source) -> Said:
    """softmax(x) without dim."""
    for call in source.calls("softmax", "log_softmax"):
        function = isinstance(call.func, ast.Name) or dotted(call.func).startswith(("F.", "torch."))
        if keyword(call, "dim") is None and len(call.args) < (2 if function else 1):
            if not takes_keywords(call):
                yield call, f"{text_of(call)} does not say along which axis"


# --- ids and tables -------------------------------------------------------------------------------


@rule(
    "Python salts the hash of strings anew in each process: the model that is served looks up "
    "other rows than the one that was trained",
    "Python docs, PYTHONHASHSEED; Weinberger et al. 2009, Feature Hashing",
)
def python_hash(source: Source) -> Said:
    """hash(key) decides a bucket."""
    for call in source.calls("hash"):
        inner = source.function(call)
        numbers = bool(call.args) and isinstance(call.args[0], ast.Tuple)  # those are not salted
        plain = isinstance(call.func, ast.Name) and not numbers
        if plain and (inner is None or inner.name != "__hash__"):
            yield call, f"{text_of(call)}: take a hash of bytes, from hashlib or zlib"


@rule(
    "float32 has 24 bits for integers: ids above 16,777,216 fall together",
    "IEEE 754 single precision; keep ids in int64 from the file to the lookup",
)
def ids_as_floats(source: Source) -> Said:
    """ids.float(), ids.to(torch.float32)."""
    for call in source.all(ast.Call):
        if not isinstance(call.func, ast.Attribute) or not isinstance(call.func.value, ast.Name):
            continue
        name = call.func.value.id
        to = dotted(call.args[0]) if call.func.attr == "to" and call.args else ""
        floats = call.func.attr in ("float", "half") or to.startswith("torch.float")
        if floats and (name in ("id", "ids", "keys") or name.endswith(("_id", "_ids"))):
            yield call, f"{text_of(call)}: these are ids"


@rule(
    "a matrix with a column for each item is made for each batch: memory and time grow with the "
    "catalogue, where a lookup costs the rows that are asked for",
    "torch.nn.functional.embedding, embedding_bag",
)
def one_hot_product(source: Source) -> Said:
    """F.one_hot(ids) @ table, also through a name."""
    for function in [*source.functions(), source.tree]:
        named = {
            target.id
            for node in source.own(function, ast.Assign)
            if inside(node.value, "one_hot")
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in source.own(function, ast.BinOp):
            if isinstance(node.op, ast.MatMult):
                through = isinstance(node.left, ast.Name) and node.left.id in named
                if through or inside(node.left, "one_hot"):
                    yield node, f"{text_of(node)} is a lookup"


@rule(
    "the stored rows are rescaled in place by a mere forward pass, under no_grad and in evaluation "
    "too",
    "pytorch/pytorch#26596; normalise the output instead",
)
def max_norm(source: Source) -> Said:
    """An embedding with max_norm."""
    for call in source.calls("embedding", "embedding_bag", "Embedding", "EmbeddingBag"):
        if keyword(call, "max_norm") is not None:
            yield call, f"{text_of(call)}: max_norm writes into the table"


# --- modules --------------------------------------------------------------------------------------


@rule(
    "parameters in a plain list or dict are not the module's: no optimizer sees them, no state "
    "dict saves them, .to(device) leaves them",
    "torch.nn.ModuleList, ModuleDict, ParameterList",
)
def hidden_modules(source: Source) -> Said:
    """self.layers = [nn.Linear(...), ...]"""
    modules = {
        node.name
        for node in source.all(ast.ClassDef)
        if any(matches(dotted(base), ("Module",)) for base in node.bases)
    }
    found: list[ast.Assign | ast.AnnAssign] = [*source.all(ast.Assign), *source.all(ast.AnnAssign)]
    for node in found:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        own = any(dotted(t).startswith("self.") for t in targets)
        holder = isinstance(node.value, (ast.List, ast.ListComp, ast.Dict, ast.DictComp))
        if own and holder and node.value is not None:
            made = [dotted(each.func) for each in source.calls_in(node.value)]
            if any(name.startswith("nn.") or name in modules for name in made):
                yield node, f"{text_of(node)}: hold them in a ModuleList or ModuleDict"


@rule(
    "dropout goes on in evaluation: the same user gets another ranking at each request",
    "torch.nn.functional.dropout: training",
)
def dropout_without_mode(source: Source) -> Said:
    """F.dropout without training=self.training."""
    for call in source.calls("F.dropout", "functional.dropout"):
        if keyword(call, "training") is None and len(call.args) < 3 and not takes_keywords(call):
            yield call, f"{text_of(call)} is on in evaluation too"


@rule(
    "after the call the caller's model is silently in evaluation mode: training goes on without "
    "dropout",
    "torch.nn.Module.eval; restore what was there, in `finally`",
)
def mode_not_restored(source: Source) -> Said:
    """model.eval() in a function that never calls train(); self.eval() in a forward pass."""
    for function in source.functions():
        evals = [
            call
            for call in source.calls_in(function)
            if dotted(call.func).endswith(".eval")
            and not call.args
            and source.function(call) is function
        ]
        if function.name == "__init__":
            continue  # it is given the model to keep
        if evals and not inside(function, "train") and "training" not in ast.unparse(function):
            given = {a.arg for a in [*function.args.args, *function.args.kwonlyargs]} - {"self"}
            for node in evals:
                of = dotted(node.func).removesuffix(".eval")
                if of.partition(".")[0] in given or (of == "self" and function.name == "forward"):
                    yield node, f"{text_of(node)} is never undone"


@rule(
    "whoever calls it finds their own tensor changed afterwards",
    "PyTorch's convention: what changes its input ends in an underscore",
)
def input_changed(source: Source) -> Said:
    """x.clamp_(...), x[mask] = ..., x += ... of a tensor that the caller passed."""
    for function in source.functions():
        if function.name.endswith("_"):
            continue
        names = tensors(function)
        for node in ast.walk(function):
            if source.function(node) is not function:
                continue
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                if node.target.id in names:
                    yield node, f"{text_of(node)} writes into the caller's {node.target.id}"
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in names:
                    yield node, f"{text_of(node)} = ... writes into the caller's {node.value.id}"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                method, of = node.func.attr, node.func.value
                inplace = method.endswith("_") and not method.startswith("_")
                if inplace and isinstance(of, ast.Name) and of.id in names:
                    if method != "requires_grad_":
                        yield node, f"{text_of(node)} writes into the caller's {of.id}"


@rule(
    "assertions vanish under `python -O`, and name no type that a caller could handle",
    "Python docs, the assert statement; raise ValueError or TypeError with what was expected",
)
def assert_as_check(source: Source) -> Said:
    """assert x.dim() == 2"""
    for node in source.all(ast.Assert):
        if source.function(node) is not None and "isinstance" not in ast.unparse(node.test):
            yield node, f"{text_of(node)}: input is refused with an exception"


@rule(
    "everybody else's random numbers change with it: two parts that seed themselves draw the same",
    "torch.Generator",
)
def global_seed(source: Source) -> Said:
    """torch.manual_seed(0) in a function; a seed that the caller gives is the caller's wish."""
    for call in source.calls("torch.manual_seed", "random.seed"):
        fixed = bool(call.args) and isinstance(call.args[0], ast.Constant)
        if source.function(call) is not None and fixed:
            yield call, f"{text_of(call)} seeds the whole process: use a generator of your own"


# --- devices and speed ----------------------------------------------------------------------------


@rule(
    "it makes the host wait until the device has finished, in every step: the device idles while "
    "the next step is prepared",
    "PyTorch performance tuning guide, avoid unnecessary CPU-GPU synchronization",
)
def wait_in_step(source: Source) -> Said:
    """.item(), .tolist(), .cpu(), float(loss) in a loop that trains, or in a forward pass."""
    waits = ("item", "tolist", "cpu", "numpy")
    for node in source.all(ast.Call):
        attribute = isinstance(node.func, ast.Attribute) and node.func.attr in waits
        loss = (
            isinstance(node.func, ast.Name)
            and node.func.id in ("float", "int", "print")
            and any(isinstance(a, ast.Name) and "loss" in a.id for a in node.args)
        )
        if not (attribute or loss):
            continue
        function = source.function(node)
        step = (
            function is not None
            and function.name in ("forward", "train_step", "training_step")
            and "no_grad" not in ast.unparse(function)  # a frozen encoder trains nothing
        )
        loop = next((up for up in source.above(node) if isinstance(up, LOOPS)), None)
        if attribute and step or loop is not None and trains(loop):
            guarded = any(
                isinstance(up, (ast.If, ast.IfExp)) for up in source.above(node) if up is not loop
            )
            if not guarded:
                yield node, f"{text_of(node)} waits for the device in each step"


@rule(
    "on a GPU this tensor is on the CPU: an error at best, a copy in each call at worst",
    "torch.arange and the like: device=x.device",
)
def made_on_the_cpu(source: Source) -> Said:
    """torch.arange(n) in a forward pass or a function of tensors, without a device."""
    makers = ("arange", "zeros", "ones", "full", "eye", "empty", "rand", "randn", "randperm")
    for call in source.calls(*(f"torch.{maker}" for maker in makers)):
        function = source.function(call)
        if function is None or keyword(call, "device") is not None or takes_keywords(call):
            continue
        moved = any(called(up, "to", "type_as", "cuda") for up in source.above(call))
        if not moved and tensors(function) and function.name != "__init__":
            if keyword(call, "generator") is None:
                yield call, f"{text_of(call)} has no device"


@rule(
    "one small operation for each row: the overhead of a few microseconds times the batch, where "
    "one operation would do all rows",
    "torch.gather, scatter, index_add, einsum",
)
def loop_over_rows(source: Source) -> Said:
    """for i in range(len(x)) with x[i] in it, x a tensor; for n in lengths.tolist(): F.pool(...)"""
    loops: list[ast.For | ast.comprehension] = [*source.all(ast.For)]
    for loop in [*loops, *source.all(ast.comprehension)]:
        function = source.function(loop)
        names = tensors(function) if function is not None else set()
        over = loop.iter
        body = loop if isinstance(loop, ast.For) else source.parent[loop]
        if called(over, "range") and isinstance(loop.target, ast.Name):
            index = loop.target.id
            sizes = {n.id for n in ast.walk(over) if isinstance(n, ast.Name)} & names
            used = any(
                isinstance(node, ast.Subscript)
                and isinstance(node.value, ast.Name)
                and node.value.id in names
                and any(isinstance(n, ast.Name) and n.id == index for n in ast.walk(node.slice))
                for node in ast.walk(body)
            )
            if sizes and used:
                yield body, f"for {index} in {text_of(over)}: one row at a time"
        elif isinstance(over, ast.Name) and over.id in names:
            yield body, f"for {text_of(loop.target)} in {over.id}: one row at a time"
        elif inside(over, "tolist") and (small := first_layer(body)):
            yield body, f"{text_of(small)} for each {text_of(loop.target)}: one row at a time"


@rule(
    "on tensors of this size a loader that fetches single samples is 20 to 160 times slower than "
    "indexing a tensor with a permutation on the device",
    "docs/benchmarks/speed.md; torch.randperm",
)
def sample_loader(source: Source) -> Said:
    """DataLoader."""
    for call in source.calls("DataLoader"):
        yield call, f"{text_of(call)}: index batches of a tensor that lies on the device"


@rule(
    "sorting all scores to look at ten costs the whole list's n log n for each user",
    "torch.topk",
)
def sort_for_top_k(source: Source) -> Said:
    """x.argsort(...)[:, :k]"""
    for node in source.all(ast.Subscript):
        if not called(node.value, "argsort"):
            continue
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if any(isinstance(p, ast.Slice) and p.upper is not None and p.lower is None for p in parts):
            # topk promises no order among equals
            if keyword(node.value, "stable") is None and keyword(node.value, "kind") is None:
                yield node, f"{text_of(node)}: topk finds the first ones without sorting the rest"


@rule(
    "each call compiles anew, for seconds",
    "torch.compile; compile once, where the model is made",
)
def compiled_in_loop(source: Source) -> Said:
    """torch.compile in a loop or a forward pass, unless the file starts compilation anew itself."""
    if any(source.calls("torch.compiler.reset")):
        return  # it looks at what compilation does
    for call in source.calls("torch.compile"):
        function = source.function(call)
        loop = any(isinstance(up, LOOPS) for up in source.above(call))
        if loop or (function is not None and function.name == "forward"):
            yield call, f"{text_of(call)} is run again and again"


# --- training -------------------------------------------------------------------------------------


@rule(
    "gradients of all steps so far add up: the first steps look fine, then training diverges",
    "torch.optim.Optimizer.zero_grad",
)
def gradients_not_cleared(source: Source) -> Said:
    """A loop with backward() and step() whose file never calls zero_grad."""
    if "zero_grad" in source.text or ".grad = None" in source.text:
        return
    for loop in source.all(*LOOPS):
        if trains(loop) and not any(
            isinstance(up, LOOPS) and trains(up) for up in source.above(loop)
        ):
            yield loop, "this loop calls backward() and step(), and nothing clears the gradients"


@rule(
    "the sum keeps every step's graph alive: memory grows until it is gone",
    "PyTorch FAQ, My model reports cuda runtime error(2): out of memory",
)
def graph_kept(source: Source) -> Said:
    """total += loss, where loss.backward() is called."""
    for loop in source.all(*LOOPS):
        losses = {
            dotted(call.func).removesuffix(".backward")
            for call in source.calls_in(loop)
            if called(call, "backward")
        } - {""}
        for node in ast.walk(loop):
            if isinstance(node, ast.AugAssign) and isinstance(node.value, ast.Name):
                if node.value.id in losses:
                    yield node, f"{text_of(node)}: detach it first"


@rule(
    "unpickling runs code that the file brings along: a checkpoint from elsewhere owns the machine",
    "torch.load: weights_only; Python docs, pickle",
)
def unsafe_load(source: Source) -> Said:
    """torch.load(weights_only=False), pickle.load."""
    for call in source.calls("torch.load", "pickle.load", "pickle.loads"):
        only = keyword(call, "weights_only")
        unsafe = isinstance(only, ast.Constant) and only.value is False
        if dotted(call.func).startswith("pickle") or unsafe:
            yield call, f"{text_of(call)} runs what the file says"


@rule(
    "the graph of every intermediate is kept for nothing: several times the memory",
    "torch.no_grad, torch.inference_mode",
)
def graph_in_evaluation(source: Source) -> Said:
    """model.eval(), then model(...), in a function without no_grad."""
    for function in source.functions():
        own = [n for n in source.calls_in(function) if source.function(n) is function]
        first: dict[str, int] = {}
        for call in own:
            if dotted(call.func).endswith(".eval") and not call.args:
                first.setdefault(dotted(call.func).removesuffix(".eval"), call.lineno)
        later = any(call.lineno > first.get(dotted(call.func), 1 << 30) for call in own)
        whole = ast.unparse(function)
        if later and "grad" not in whole and "inference_mode" not in whole:
            yield function, f"{function.name} evaluates with gradients on"


# --- serving --------------------------------------------------------------------------------------


@rule(
    "one worker serves all requests on one loop: who blocks it stops everybody",
    "Python docs, asyncio, running blocking code",
)
def blocking_in_async(source: Source) -> Said:
    """time.sleep or requests in an async function."""
    for call in source.calls("time.sleep", "requests.get", "requests.post", "urlopen"):
        if isinstance(source.function(call), ast.AsyncFunctionDef):
            yield call, f"{text_of(call)} stops the event loop"


@rule(
    "a timer delays each lonely request by its whole length; a greedy drain of the queue costs "
    "nothing when there is nothing to wait for",
    "Crankshaw et al. 2017, Clipper, adaptive batching",
)
def batching_timer(source: Source) -> Said:
    """await asyncio.sleep(0.002) before a batch."""
    for call in source.calls("asyncio.sleep"):
        wait = call.args[0] if call.args else None
        if isinstance(wait, ast.Constant) and wait.value == 0:
            continue
        loop = next((up for up in source.above(call) if isinstance(up, LOOPS)), None)
        if loop is not None and len(loop.body) > 1:  # a loop that only sleeps waits for an end
            yield call, f"{text_of(call)} waits, though nothing may come"


@rule(
    "the device is asked for the time before it has done the work: an asynchronous call looks free",
    "torch.cuda.synchronize; torch.utils.benchmark",
)
def timed_without_synchronising(source: Source) -> Said:
    """Two readings of a clock around calls, and no synchronize in the file."""
    if "synchronize" in source.text or "Event(" in source.text:
        return
    for function in source.functions():
        arguments = [*function.args.args, *function.args.kwonlyargs]
        if not any("Callable" in ast.unparse(a.annotation) for a in arguments if a.annotation):
            continue  # it times something that it is given
        if (function.end_lineno or 0) - function.lineno > 30:
            continue  # and is about nothing else
        clocks = [
            node
            for node in ast.walk(function)
            if called(node, "time.time", "perf_counter", "perf_counter_ns", "time.monotonic")
        ]
        if len(clocks) >= 2:
            yield clocks[-1], f"{function.name} reads the clock without waiting for the device"
