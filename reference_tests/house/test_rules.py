"""Who may import whom, and what the tree looks like (docs: architecture)."""

import ast
import sys

import pytest

from harness import catalog
from harness.paths import KATAS, REFERENCE, ROOT, SRC

HARNESS = ROOT / "harness"
# raw PyTorch: no trainer frameworks, no recommender libraries, no classical models
FORBIDDEN = {"lightning", "pytorch_lightning", "sklearn", "lightfm", "implicit", "recbole", "keras"}
STDLIB = set(sys.stdlib_module_names)
OURS = {"recsys", "harness", "katas", "reference_tests"}


def files(folder):
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imports(path, *, lazy=True):
    """The modules that a file imports; with lazy=False only those at import of the file."""
    found = set()

    def walk(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Call) and name_of(node.func) in ("import_module", "__import__"):
            found.update(a.value for a in node.args[:1] if isinstance(a, ast.Constant))
        for child in ast.iter_child_nodes(node):
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if lazy or not (function or is_type_checking(child)):
                walk(child)

    walk(ast.parse(path.read_text(encoding="utf-8")))
    return found


def name_of(node):
    return getattr(node, "attr", getattr(node, "id", None))


def is_type_checking(node):
    return isinstance(node, ast.If) and name_of(node.test) == "TYPE_CHECKING"


def tops(modules):
    return {module.partition(".")[0] for module in modules}


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.relative_to(ROOT).as_posix())


def test_the_import_reader_sees_all_kinds(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "import a.b\nfrom c import d\nimport importlib\n"
        "if TYPE_CHECKING:\n    import t\n"
        "def f():\n    import e\n    importlib.import_module('g.h')\n"
        "class K:\n    import k\n"
    )
    assert imports(file) == {"a.b", "c", "c.d", "importlib", "t", "e", "g.h", "k"}
    assert imports(file, lazy=False) == {"a.b", "c", "c.d", "importlib", "k"}


# --- who imports whom -----------------------------------------------------------------------------


@each(files(SRC) + files(REFERENCE))
def test_recsys_imports_libraries_and_itself(path):
    found = tops(imports(path))
    assert not found & {"harness", "katas", "reference_tests", "pytest"}
    assert not found & FORBIDDEN
    assert "transformers.Trainer" not in imports(path)


@each(files(KATAS))
def test_katas_reach_learner_code_through_the_helpers_only(path):
    modules = imports(path)
    assert not tops(modules) & {"recsys", "katas", "reference_tests"}
    # what is provided of the harness to katas; the machine itself is none of their business
    assert not {m for m in modules if m.startswith("harness.")} & {
        f"harness.{name}" for name in ("overlay", "plugin", "runner", "record", "stubs", "cli")
    }


@each(files(HARNESS))
def test_the_harness_imports_no_learner_code_when_it_is_imported(path):
    assert not tops(imports(path, lazy=False)) & {"recsys", "katas"}
    assert "katas" not in tops(imports(path))


@each(files(SRC) + files(HARNESS) + files(KATAS) + files(REFERENCE))
def test_nothing_imports_reference_tests(path):
    assert "reference_tests" not in tops(imports(path))


def test_what_the_board_imports_needs_no_torch():
    """Follows the imports of board.py that happen at import; test_board.py runs it as well."""
    waiting, seen = ["harness.cli", "harness.board"], set()
    while waiting:
        module = waiting.pop()
        path = ROOT / (module.replace(".", "/") + ".py")
        if module in seen or not path.is_file():
            continue
        seen.add(module)
        waiting += imports(path, lazy=False)
    assert "harness.record" in seen
    libraries = {
        top
        for module in seen
        for top in tops(imports(ROOT / (module.replace(".", "/") + ".py"), lazy=False))
    }
    assert libraries - STDLIB - OURS <= {"tomli"}


# --- the tree -------------------------------------------------------------------------------------


def test_recsys_is_a_namespace():
    """An __init__.py anywhere under recsys would silently disable every overlay."""
    planted = [path for root in (SRC, REFERENCE) for path in (root / "recsys").rglob("__init__.py")]
    assert not planted
    assert not list(SRC.glob("__init__.py")) and not list(KATAS.rglob("__init__.py"))


def test_every_kata_is_complete():
    folders = [path for path in KATAS.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {path.name for path in folders} == {kata.id for kata in catalog.load()}
    for kata in catalog.load():
        assert kata.files and kata.stub_digests.keys() == kata.files.keys(), kata.id
        assert (kata.folder / "test_spec.py").is_file(), kata.id
        for file in kata.files:
            assert (REFERENCE / "recsys" / file).is_file(), f"{kata.id}: no reference {file}"


def test_the_reference_mirrors_the_learner_files():
    listed = {file for kata in catalog.load() for file in kata.files}
    solved = {path.relative_to(REFERENCE / "recsys").as_posix() for path in files(REFERENCE)}
    assert listed <= solved
    provided = {path.relative_to(SRC / "recsys").as_posix() for path in files(SRC)} - listed
    assert not provided & solved, "a provided file has a reference, so --impl would replace it"


@each(files(KATAS))
def test_every_test_of_a_kata_is_a_rung(path):
    """A test without @rung would count for pytest and not for the board."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    tests = [n for n in tree.body if isinstance(n, functions) and n.name.lower().startswith("test")]
    if path.name == "test_bench.py":
        return
    rungs = catalog.rungs_of(path)
    assert [test.name for test in tests] == [rung.name for rung in rungs]
    for rung in rungs:
        assert rung.says, f"{path.name}:{rung.line} {rung.name} does not say what must hold"
        assert rung.hints and all(hint.strip() for hint in rung.hints), f"{rung.name} has no hint"
    names = [rung.name for rung in catalog.read(path.parent).rungs]
    assert len(names) == len(set(names)), "two rungs of one name"


@each(files(KATAS))
def test_nothing_is_skipped(path):
    """Missing is never shown as green, and never skipped; a benchmark may lack a peer."""
    if path.name == "test_bench.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not words & {"skip", "skipif", "importorskip", "xfail"}
    assert not {f"pytest.{word}" for word in ("skip", "xfail", "importorskip")} & imports(path)


