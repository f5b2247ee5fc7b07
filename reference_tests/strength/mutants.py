"""Automatic mutants of a reference file: small wrong edits that the specs have to notice.

Each is one span of the text replaced, made by one of a few fixed operators, and only where the
learner writes: in bodies that the stub empties, and in helpers and constants that it lacks. What
nobody could tell from outside (messages, annotations, the device on a CPU, the API's documentation)
is left alone, and so is most of what could only crash: it is always noticed, and flatters a spec.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from operator import itemgetter

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider

COMPARISON = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "is": "is not", "is not": "is", "in": "not in", "not in": "in",
}  # fmt: skip
# no @: a product of matrices has no neighbour that fits the shapes
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "%", "%": "//", "**": "*"}
BOOLEAN = {"and": "or", "or": "and", "&": "|", "|": "&"}  # of masks too
AXES = {"0": "1", "1": "0", "-1": "0", "2": "1", "-2": "-1"}

# Where a method takes its axis; a function of a module takes the tensor first, so one place later.
AXIS_PLACE = dict.fromkeys(
    "all amax amin any argmax argmin argsort cat concatenate cumsum gather index_add index_add_ "
    "log_softmax logsumexp max mean median min prod size softmax sort squeeze stack std sum unbind "
    "unsqueeze var".split(),
    0,
) | dict.fromkeys("chunk norm repeat_interleave split take_along_axis topk".split(), 1)

SHAPES = {"expand", "reshape", "view"}

# Keywords that are left alone with their values.
UNSEEN = {
    "device",  # a CPU has one: nothing to tell apart
    "log", "stacklevel", "thread_name_prefix",  # for whoever reads logs
    "response_model", "responses", "title",  # only shown in the API's documentation
    "timeout",  # of something that does not hang in a test
}  # fmt: skip
LOGGING = {"log", "logger", "logging", "print"}

# Calls that are not replaced by their argument or receiver. Of these an iterator, a type or a
# number would be left where something else is needed, so nearly all could only crash; factories
# (`torch.zeros(n)`) would leave a size for a tensor.
NOT_UNWRAPPED = set(
    "arange dim empty enumerate eye full getattr hasattr isinstance items iter len linspace next "
    "numel ones rand randn randperm range size tensor to_thread type vars zeros zip".split()
) | {
    "bool",  # a condition takes the truth value anyway
    "cpu", "cuda",  # no effect on a CPU
}  # fmt: skip
UNWRAPPED_CLASSES = {"Parameter", "Path"}  # other classes: an argument is no substitute

# What is of no help around a constant in an id.
BETWEEN = (
    cst.Arg, cst.ComparisonTarget, cst.Element, cst.Index, cst.Slice, cst.SubscriptElement,
    cst.Tuple, cst.UnaryOperation,
)  # fmt: skip

# Decorators that change what a name is: without them every use crashes.
NOT_DROPPED = {
    "asynccontextmanager", "cached_property", "classmethod", "contextmanager", "dataclass",
    "property", "staticmethod",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One wrong edit of a learner file.

    Attributes:
        id: ``"<name>: <operator>: `<old>` -> `<new>`"``, with `` #2`` and so on where the same
            occurs again in the function; an edit elsewhere does not change it.
        file: relative to recsys, "models/embedding.py".
        name: qualified name of the function, inner functions included ("create_app.answer").
        text: the whole mutated file.
    """

    id: str
    file: str
    name: str
    operator: str
    line: int
    text: str


def mutants_of(file: str, source: str, stub: str) -> list[Mutant]:
    """All mutants of a reference file, in the order of the text.

    Args:
        file: what the mutants say. source: of the reference. stub: what learners start from.
    """
    wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    finder = Finder(wrapper, source, stub)
    wrapper.module.visit(finder)
    found, texts, times = [], {source}, Counter()
    for edit in sorted(finder.edits, key=lambda edit: (edit.start, edit.end)):
        text = source[: edit.start] + edit.text + source[edit.end :]
        if text in texts or not changes(source, text, edit.chunk):
            continue
        texts.add(text)
        said = f"{edit.name}: {edit.operator}: `{edit.old}` -> `{edit.new}`"
        times[said] += 1
        number = f" #{times[said]}" if times[said] > 1 else ""
        line = source.count("\n", 0, edit.start) + 1
        found.append(Mutant(said + number, file, edit.name, edit.operator, line, text))
    return found


def select(mutants: list[Mutant], most: int) -> list[Mutant]:
    """At most `most` of them, the same each time, from all functions and operators.

    Functions take turns, and within a function operators do; whose turn comes first is decided by
    the hash of an id, so that an edit of one function hardly changes what is taken of the others.
    """
    ranked = sorted(mutants, key=lambda mutant: hashlib.sha256(mutant.id.encode()).digest())
    ranked = in_turn(ranked, lambda mutant: (mutant.file, mutant.name, mutant.operator))
    ranked = in_turn(ranked, lambda mutant: (mutant.file, mutant.name))
    taken = {(mutant.file, mutant.id) for mutant in ranked[: max(most, 0)]}
    return [mutant for mutant in mutants if (mutant.file, mutant.id) in taken]


def in_turn(mutants: list[Mutant], group: Callable[[Mutant], Hashable]) -> list[Mutant]:
    """The first of each group, then the second of each, and so on."""
    seen: Counter[Hashable] = Counter()
    turns = []
    for mutant in mutants:
        seen[group(mutant)] += 1
        turns.append(seen[group(mutant)])
    return [mutant for _, mutant in sorted(zip(turns, mutants, strict=True), key=itemgetter(0))]


# --- finding --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """`source[start:end]` becomes `text`, inside `chunk`; old and new are for the id."""

    name: str
    operator: str
    start: int
    end: int
    text: str
    old: str
    new: str
    chunk: tuple[int, int]


class Finder(cst.CSTVisitor):
    """Collects the edits. What a visit method returns False for is not looked into."""

    def __init__(self, wrapper: MetadataWrapper, source: str, stub: str) -> None:
        super().__init__()
        self.source = source
        self.positions = wrapper.resolve(PositionProvider)
        self.parents = wrapper.resolve(ParentNodeProvider)
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        tree = ast.parse(source)
        given = dict(definitions(ast.parse(stub)))
        self.shown = set(given)
        self.mine = {name for name, body in definitions(tree) if given.get(name) != body}
        self.modules = {
            alias.asname or alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        self.required = required(tree)
        self.scope: list[str] = []
        self.bound: list[set[str]] = []  # what has a value so far, of each function around
        self.chunk: cst.CSTNode | None = None  # what the learner writes, as a whole
        self.skipped: set[cst.CSTNode] = set()
        self.edits: list[Edit] = []

    # text

    def span(self, node: cst.CSTNode) -> tuple[int, int]:
        """Where a node is, without parentheses around it."""
        where = self.positions[node]
        return (
            self.starts[where.start.line - 1] + where.start.column,
            self.starts[where.end.line - 1] + where.end.column,
        )

    def code(self, node: cst.CSTNode) -> str:
        start, end = self.span(node)
        return self.source[start:end]

    def whole(self, node: cst.BaseExpression) -> tuple[int, int]:
        """Where an expression is, with parentheses around it."""
        start, end = self.span(node)
        if node.lpar:
            start, end = self.span(node.lpar[0])[0], self.span(node.rpar[-1])[1]
        return start, end

    def replace(
        self, operator: str, node: cst.CSTNode, text: str, context: cst.CSTNode | None = None
    ) -> None:
        """An edit of a node, shown in the id with its `context` around it."""
        self.put(operator, self.span(node), text, context or node)

    def put(self, operator: str, span: tuple[int, int], text: str, context: cst.CSTNode) -> None:
        left, right = self.span(context)
        new = self.source[left : span[0]] + text + self.source[span[1] : right]
        self.edit(operator, span, text, self.source[left:right], new)

    def edit(self, operator: str, span: tuple[int, int], text: str, old: str, new: str) -> None:
        if self.chunk is not None:
            name = ".".join(self.scope)
            chunk = self.span(self.chunk)
            if isinstance(self.chunk, cst.FunctionDef) and self.chunk.decorators:
                chunk = (self.span(self.chunk.decorators[0])[0], chunk[1])
            self.edits.append(Edit(name, operator, *span, text, tidy(old), tidy(new), chunk))

    def around(self, node: cst.CSTNode) -> cst.CSTNode:
        """The expression or statement that a short node is in, where that is not long."""
        outer = self.parents[node]
        while isinstance(outer, BETWEEN):
            outer = self.parents[outer]
        shown = isinstance(outer, (cst.BaseExpression, cst.BaseSmallStatement))
        return outer if shown and len(tidy(self.code(outer))) <= 100 else node

    # scopes

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self.scope.append(node.name.value)

    def leave_ClassDef(self, original_node: cst.ClassDef) -> None:
        self.scope.pop()

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        self.scope.append(node.name.value)
        self.bound.append({param.name.value for param in params(node.params)})
        inner = self.chunk is not None
        name = ".".join(self.scope)
        if not inner:
            if name not in self.mine:
                return False
            self.chunk = node
        if inner or name not in self.shown:  # else the stub shows the signature and decorators
            for decorator in node.decorators:
                self.drop_decorator(decorator)
                decorator.visit(self)
            node.params.visit(self)
        node.body.visit(self)
        return False

    def leave_FunctionDef(self, original_node: cst.FunctionDef) -> None:
        self.scope.pop()
        self.bound.pop()
        if self.chunk is original_node:
            self.chunk = None

    def visit_Nonlocal(self, node: cst.Nonlocal) -> None:
        self.bind(*(item.name for item in node.names))

    def visit_For(self, node: cst.For) -> None:
        self.bind(node.target)

    def visit_AsName(self, node: cst.AsName) -> None:
        self.bind(node.name)

    def visit_NamedExpr(self, node: cst.NamedExpr) -> None:
        self.bind(node.target)

    def bind(self, *targets: cst.BaseExpression) -> None:
        if self.bound:
            self.bound[-1] |= {self.code(part) for target in targets for part in parts(target)}

    # what nobody can tell from outside

    def visit_Annotation(self, node: cst.Annotation) -> bool:
        return False

    def visit_FormattedString(self, node: cst.FormattedString) -> bool:
        return False  # plain strings have nothing in them to change: modes and messages stay

    def visit_Raise(self, node: cst.Raise) -> bool:
        """Of an error only a number counts (an HTTP status); the rest is its text."""
        if isinstance(node.exc, cst.Call):
            for arg in node.exc.args:
                if isinstance(arg.value, cst.Integer):
                    arg.visit(self)
        return False

    def visit_Arg(self, node: cst.Arg) -> bool:
        return node not in self.skipped

    def visit_IfExp(self, node: cst.IfExp) -> bool:
        return self.if_or_if_exp(node)

    def visit_If(self, node: cst.If) -> bool:
        self.drop_guard(node)
        return self.if_or_if_exp(node)

    def if_or_if_exp(self, node: cst.If | cst.IfExp) -> bool:
        """Leave out what no CPU runs, and what only type checkers read."""
        test = self.code(node.test)
        if '== "cuda"' not in test and "TYPE_CHECKING" not in test:
            return True
        for child in (node.test, node.orelse):
            if child is not None:
                child.visit(self)
        return False

    # comparison, arithmetic, boolean

    def visit_ComparisonTarget(self, node: cst.ComparisonTarget) -> None:
        token = " ".join(self.code(node.operator).split())
        self.replace("comparison", node.operator, COMPARISON[token], self.around(node))

    def visit_BooleanOperation(self, node: cst.BooleanOperation) -> None:
        self.replace("boolean", node.operator, BOOLEAN[self.code(node.operator)], node)

    def visit_BinaryOperation(self, node: cst.BinaryOperation) -> None:
        token = self.code(node.operator)
        literal = (cst.BaseString, cst.List, cst.Tuple, cst.ListComp)
        if token in BOOLEAN:
            self.replace("boolean", node.operator, BOOLEAN[token], node)
        elif isinstance(node.left, literal) or isinstance(node.right, literal):
            pass  # joined or repeated: anything else is a TypeError
        elif token == "**":  # binds tighter than what it becomes
            (start, end), (left, right) = self.span(node), self.span(node.operator)
            text = f"({self.source[start:left]}*{self.source[right:end]})"
            self.replace("arithmetic", node, text)
        elif token in ARITHMETIC:
            self.replace("arithmetic", node.operator, ARITHMETIC[token], node)

    def visit_UnaryOperation(self, node: cst.UnaryOperation) -> None:
        if not isinstance(node.operator, cst.Plus):
            kind = "arithmetic" if isinstance(node.operator, cst.Minus) else "boolean"
            self.replace(kind, node, self.promoted(node.expression), self.around(node))

    # constants

    def visit_Integer(self, node: cst.Integer) -> None:
        self.replace("constant", node, str(node.evaluated_value + 1), self.around(node))

    def visit_Float(self, node: cst.Float) -> None:
        value = node.evaluated_value
        if value in (0.0, 1.0):
            text = str(1.0 - value)
        else:  # an epsilon becomes one that matters
            text = "1e-2" if value < 1e-3 else str(value + 1)
        self.replace("constant", node, text, self.around(node))

    def visit_Name(self, node: cst.Name) -> None:
        if node.value in ("True", "False"):
            self.replace("constant", node, str(node.value == "False"), self.around(node))

    # axes and slices

    def visit_Subscript(self, node: cst.Subscript) -> bool:
        index = node.slice[0].slice
        shape = isinstance(node.value, cst.Attribute) and node.value.attr.value == "shape"
        if shape and len(node.slice) == 1 and isinstance(index, cst.Index):
            if self.swap_axis(index.value, node):
                node.value.visit(self)
                return False
        return True

    def swap_axis(self, axis: cst.BaseExpression, context: cst.CSTNode) -> bool:
        """Another axis, of several one fewer; False if `axis` is no literal."""
        if isinstance(axis, cst.Tuple) and len(axis.elements) > 1:
            elements = [self.code(element.value) for element in axis.elements]
            if all(element in AXES for element in elements):
                text = ", ".join(elements[:-1]) + ("," if len(elements) == 2 else "")
                self.replace("axis", axis, text, context)
                return True
        elif self.code(axis) in AXES:
            self.replace("axis", axis, AXES[self.code(axis)], context)
            return True
        return False

    def visit_Slice(self, node: cst.Slice) -> None:
        for bound in (node.lower, node.upper, node.step):
            if bound is not None:
                self.put("slice", self.whole(bound), "", self.around(node))

    # calls

    def visit_Call(self, node: cst.Call) -> bool:
        names = dotted(node.func)
        if names and names[0] in LOGGING:
            return False
        last = names[-1] if names else ""
        function = bool(names) and (len(names) == 1 or self.is_namespace(names))
        place = AXIS_PLACE.get(last) if isinstance(node.func, cst.Attribute) else None
        if place is not None:
            place += names[0] in self.modules
            if len(node.args) > place and node.args[place].keyword is None:
                self.axis_argument(node, node.args[place])
        for arg in node.args:
            if arg.keyword is not None:
                self.keyword(node, arg, last)
            elif last in SHAPES and self.code(arg) == "-1":
                self.skipped.add(arg)  # "whatever is left": any other number could only crash
        self.unwrap(node, last, function)
        return True

    def is_namespace(self, names: list[str]) -> bool:
        """Whether `a.b.f(x)` is a function of `a.b` and x what it works on."""
        return (
            names[0] in self.modules
            or names[0][:1].isupper()
            or (names[0] in ("self", "cls") and len(names) == 2)
        )

    def axis_argument(self, call: cst.Call, arg: cst.Arg) -> None:
        if self.swap_axis(arg.value, call if len(tidy(self.code(call))) <= 100 else arg):
            self.skipped.add(arg)

    def keyword(self, call: cst.Call, arg: cst.Arg, callee: str) -> None:
        """Another axis, or the argument dropped."""
        name = arg.keyword.value
        if name in UNSEEN or (name == "strict" and callee == "zip"):
            self.skipped.add(arg)
            return
        if name in ("dim", "axis"):
            self.axis_argument(call, arg)
        if self.code(arg.value) in ("True", "False"):
            return  # given because it is not the default: the constant's flip does the same
        if name in self.required.get(callee, ()):
            return  # could only crash
        place = call.args.index(arg)
        start, end = self.span(arg)
        if place:
            before = call.args[place - 1]
            start = max(self.span(before)[1], self.whole(before.value)[1])
        elif len(call.args) > 1:
            end = self.span(call.args[1])[0]
        else:
            end = self.span(call)[1] - 1
        shown = self.code(call.func)
        rest = "..., " if len(call.args) > 1 else ""
        old = f"{shown}({rest}{self.code(arg)})"
        self.edit("keyword", (start, end), "", old, f"{shown}({rest.rstrip(', ')})")

    def unwrap(self, node: cst.Call, callee: str, function: bool) -> None:
        """The call replaced by what it works on."""
        parent = self.parents[node]
        if isinstance(parent, (cst.Expr, cst.Await, cst.Decorator, cst.Raise, cst.WithItem)):
            return  # deleted or unwrapped as a statement, or could only crash
        if isinstance(parent, (cst.Assign, cst.For, cst.CompFor)):
            target = parent.targets[0] if isinstance(parent, cst.Assign) else parent
            if isinstance(target.target, cst.Tuple):
                return  # what is unpacked here has these parts, and what it is made of has not
        if callee in NOT_UNWRAPPED or (callee[:1].isupper() and callee not in UNWRAPPED_CLASSES):
            return
        if callee == "to" and all("device" in self.code(arg) for arg in node.args):
            return  # no effect on a CPU
        if function:
            given = [arg for arg in node.args if arg.keyword is None and not arg.star]
            inside = given[0].value if given and given[0] is node.args[0] else None
        else:
            inside = node.func.value if isinstance(node.func, cst.Attribute) else None
        if isinstance(inside, cst.BaseString) and callee == "float":
            if self.code(inside).startswith('"-'):
                text = '"' + self.code(inside)[2:]
                self.replace("arithmetic", inside, text, node)
        elif inside is not None and not isinstance(inside, (cst.BaseString, cst.GeneratorExp)):
            self.replace("call", node, self.promoted(inside))

    def promoted(self, node: cst.BaseExpression) -> str:
        """The text of an expression that takes the place of what it is in."""
        start, end = self.span(node)
        text = self.source[start:end]
        atom = (cst.Name, cst.Attribute, cst.Call, cst.Subscript, cst.Integer, cst.Float)
        return text if isinstance(node, atom) and "\n" not in text else f"({text})"

    # statements

    def drop(self, node: cst.CSTNode, old: str = "") -> None:
        old = tidy(old or self.code(node))
        old = old if len(old) <= 120 else f"{old[:117]}..."
        self.edit("statement", self.span(node), "pass", old, "pass")

    def visit_Expr(self, node: cst.Expr) -> None:
        names = dotted(node.value.func) if isinstance(node.value, cst.Call) else []
        if isinstance(node.value, (cst.Call, cst.Await, cst.Yield)) and not LOGGING & {*names[:1]}:
            self.drop(node)

    def visit_AugAssign(self, node: cst.AugAssign) -> None:
        self.drop(node)
        token = self.code(node.operator)[:-1]
        other = {**ARITHMETIC, **BOOLEAN}.get(token)
        if other and not isinstance(node.value, (cst.List, cst.ListComp, cst.BaseString)):
            kind = "boolean" if token in BOOLEAN else "arithmetic"
            self.replace(kind, node.operator, f"{other}=", node)

    def visit_Assign(self, node: cst.Assign) -> None:
        self.enter_constant(node, node.targets[0].target)
        targets = [part for target in node.targets for part in parts(target.target)]
        if self.bound and all(self.has_value(target) for target in targets):
            self.drop(node)
        self.bind(*targets)

    def leave_Assign(self, original_node: cst.Assign) -> None:
        self.leave_constant(original_node)

    def visit_AnnAssign(self, node: cst.AnnAssign) -> None:
        self.enter_constant(node, node.target)
        if node.value is not None:
            self.bind(node.target)

    def leave_AnnAssign(self, original_node: cst.AnnAssign) -> None:
        self.leave_constant(original_node)

    def enter_constant(self, node: cst.CSTNode, target: cst.BaseExpression) -> None:
        """A constant of the module or of a class that the stub lacks."""
        if self.chunk is None and ".".join([*self.scope, self.code(target)]) in self.mine:
            self.scope.append(self.code(target))
            self.chunk = node

    def leave_constant(self, node: cst.CSTNode) -> None:
        if self.chunk is node:
            self.scope.pop()
            self.chunk = None

    def has_value(self, target: cst.BaseExpression) -> bool:
        """Whether it surely has one before: without an assignment it would otherwise crash."""
        if isinstance(target, cst.Subscript):
            return True
        if isinstance(target, cst.Attribute) and self.scope[-1] != "__init__":
            return True
        return self.code(target) in self.bound[-1]

    def drop_guard(self, node: cst.If) -> None:
        """An `if` that only leaves: with an error, a result, or the loop's round."""
        leaves = (cst.Raise, cst.Return, cst.Break, cst.Continue)
        last = node.body.body[-1]
        if isinstance(last, cst.SimpleStatementLine):
            last = last.body[-1]
        alone = node.orelse is None and not isinstance(self.parents[node], cst.If)
        if alone and isinstance(last, leaves):
            self.drop(node, f"if {self.code(node.test)}: {type(last).__name__.lower()}")

    def visit_With(self, node: cst.With) -> None:
        """The block without its context: gradients on, no autocast, no lock."""
        if all(item.asname is None for item in node.items):
            start = self.span(node)[0]
            end = self.source.index(":", max(self.whole(item.item)[1] for item in node.items))
            self.edit("statement", (start, end), "if True", self.source[start:end], "if True")

    def drop_decorator(self, node: cst.Decorator) -> None:
        func = node.decorator.func if isinstance(node.decorator, cst.Call) else node.decorator
        if not NOT_DROPPED & set(dotted(func)[-1:]):
            start, end = self.span(node)
            self.edit("statement", (start, end), "", self.source[start:end], "")

    def visit_Break(self, node: cst.Break) -> None:
        self.replace("break", node, "continue")

    def visit_Continue(self, node: cst.Continue) -> None:
        self.replace("break", node, "break")


# --- helpers --------------------------------------------------------------------------------------


def definitions(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Qualified name and body, dumped, of functions and assignments of a module and its classes."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield prefix + node.name, "\n".join(map(ast.dump, node.body))
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                yield prefix + ast.unparse(target), ast.dump(node)

    return walk(tree.body, "")


def required(tree: ast.Module) -> dict[str, set[str]]:
    """Arguments without a default of each function, by its last name; a class has `__init__`'s."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            body = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
            if "__init__" in body:
                found[node.name] = without_default(body["__init__"].args)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[node.name] = without_default(node.args)
    return found


def without_default(args: ast.arguments) -> set[str]:
    given = [*args.posonlyargs, *args.args]
    given = given[: len(given) - len(args.defaults)]
    pairs = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    return {arg.arg for arg in given} | {arg.arg for arg, value in pairs if value is None}


def params(node: cst.Parameters) -> list[cst.Param]:
    stars = [param for param in (node.star_arg, node.star_kwarg) if isinstance(param, cst.Param)]
    return [*node.posonly_params, *node.params, *node.kwonly_params, *stars]


def parts(target: cst.BaseExpression) -> Iterator[cst.BaseExpression]:
    """What a target assigns to, tuples taken apart."""
    if isinstance(target, (cst.Tuple, cst.List)):
        for element in target.elements:
            yield from parts(element.value)
    else:
        yield target


def dotted(node: cst.BaseExpression) -> list[str]:
    """["torch", "nn", "Linear"]; without a name at its root, ["", ..., "last"]."""
    if isinstance(node, cst.Attribute):
        return [*(dotted(node.value) or [""]), node.attr.value]
    return [node.value] if isinstance(node, cst.Name) else []


def tidy(text: str) -> str:
    """One line, as if it had fitted on one."""
    if "\n" not in text:
        return text
    text = " ".join(re.sub(r"""\s#[^"'\n]*$""", "", line).strip() for line in text.splitlines())
    text = re.sub(r",? (?=[)\]}])", "", text)
    return re.sub(r"(?<=[(\[{]) ", "", text)


def changes(source: str, text: str, chunk: tuple[int, int]) -> bool:
    """Whether a mutant compiles and is not the same program. Only the chunk is looked at."""
    start, end = chunk
    start = source.rfind("\n", 0, start) + 1
    before, after = source[start:end], text[start : len(text) - (len(source) - end)]
    prefix = "if True:\n" if before[:1].isspace() else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `1 is not x` and the like
            tree = ast.parse(prefix + after)
            compile(tree, "mutant", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return ast.dump(tree) != ast.dump(ast.parse(prefix + before))
