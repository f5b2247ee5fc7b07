"""The documents: links, code and commands that work, figures as computed, nothing of the answer."""

import ast
import functools
import re
import shlex
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from harness import catalog, cli, stubs
from harness.guide import GUIDES, file_of
from harness.paths import REFERENCE, ROOT, SRC
from reference_tests import pictures

COMMAND = re.compile(r"(\./|python )?kata( (?!\d)|$)|(\.venv/bin/)?(pytest |python -m )")
IGNORED = {".venv", ".kata", "runs", "node_modules", "progress", ".tox"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SECTIONS = ["Concept", "Architecture", "Your Task", "Hints", "Checkpoint"]
SCALE = "**What changes at the scale of a billion users.**"
SOURCE = re.compile(r"\b([A-Z][a-z]+(?: et al\.| and [A-Z][a-z]+)?) (\d{4})\b")


def documents():
    found = ROOT.rglob("*.md")
    return sorted(p for p in found if not IGNORED & set(p.relative_to(ROOT).parts))


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.relative_to(ROOT).as_posix())


def blocks(path, *languages):
    text = path.read_text(encoding="utf-8")
    return [body for language, body in FENCE.findall(text) if language in languages]


def prose(path):
    """The text without its code blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchor(heading):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# --- links ----------------------------------------------------------------------------------------


def broken_links(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):  # of the web: not asked for here
            continue
        file, _, part = target.partition("#")
        goal = (path.parent / file).resolve() if file else path
        if not goal.exists():
            yield f"{target}: no such file"
        elif part and part not in [anchor(h) for h in re.findall(r"^#+ (.*)$", prose(goal), re.M)]:
            yield f"{target}: no such heading"


@each(documents())
def test_links_resolve(path):
    assert not list(broken_links(path))


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# One two\n[x](b.md) [y](#one-two) [z](#three) [w](https://w.org/a)\n")
    assert list(broken_links(page)) == ["b.md: no such file", "#three: no such heading"]


# --- code and commands ----------------------------------------------------------------------------


@each([path for path in documents() if blocks(path, "python")])
def test_python_blocks_run(path):
    """One after the other in one namespace, with the reference for what is imported of recsys."""
    if path.name == "authoring.md":  # parts of tests, with made-up names
        for block in blocks(path, "python"):
            ast.parse(block)
        return
    code = "\n".join(blocks(path, "python"))
    runs = f"import sys; sys.path[:0] = {[str(REFERENCE), str(SRC), str(ROOT)]!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", runs], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def commands(path):
    """What a document tells to type: lines of code blocks, and `kata ...` within the text."""
    text = path.read_text(encoding="utf-8")
    listed = [line for block in blocks(path, "") for line in block.splitlines()]
    listed += [line for line in text.splitlines() if line.startswith("    ")]
    listed += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(path))]
    for line in listed:
        line = re.sub(r"(\s{2,}|\s*#).*$", "", line.strip())
        line = re.sub(r"^([A-Z_]+=\S+ )+", "", line).removeprefix("$ ")
        if COMMAND.match(line):
            yield line


def complaint(line):
    """What is wrong with a command, or None. Placeholders in capitals stand for real things."""
    line = re.sub(r"\b(NN_name|NN|N)\b", "01", line).replace("[", "").replace("]", "")
    words = shlex.split(line)
    words = words[: words.index("|")] if "|" in words else words
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[0] == "python" and words[1] == "kata":
        words = words[1:]
    if words[0] in ("kata", "./kata"):
        try:
            cli.parser().parse_args(words[1:])
        except SystemExit as end:
            return None if end.code == 0 else f"{line}: kata does not take that"
        return None
    if words[:2] == ["python", "-m"] and words[2] != "pytest":
        file = ROOT / words[2].replace(".", "/")
        known = file.with_suffix(".py").is_file() or (file / "__main__.py").is_file()
        return None if known else f"{line}: there is no module {words[2]}"
    for word in words:
        file = word.partition("::")[0]
        if "/" in file and not file.startswith((".venv", "--", "path/", "~")):
            name = re.fullmatch(r"katas/(\d\d)(/.*)?", file)
            if not (name or (ROOT / file).exists()):
                return f"{line}: there is no {file}"
    return None


@each(documents())
def test_commands_exist(path, capsys):
    wrong = [said for line in commands(path) if (said := complaint(line))]
    assert not wrong, capsys.readouterr().err


def test_a_wrong_command_is_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "```\n./kata tset 01   # a comment\npytest katas/77_none\n```\n`kata run --dta x`\n"
        "`python -m harness.nothing`\n\n    kata guide NN\n    A=1 ./kata run --data path/to/x\n"
    )
    said = [complaint(line) for line in commands(page)]
    assert [text is None for text in said] == [False, False, True, True, False, False], said


@pytest.mark.parametrize("line", ["", "--help", "status --json", "guide 01"])
def test_cheap_commands_run(line):
    command = [sys.executable, "-m", "harness", *line.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout, done.stderr


# --- the README -----------------------------------------------------------------------------------

README = ROOT / "README.md"


def test_the_message_in_the_readme_is_one():
    (shown,) = [block for block in blocks(README, "") if block.startswith("kata 03")]
    assert shown in (ROOT / "reference_tests/transcripts/03_contrastive_loss.txt").read_text()


def test_the_katas_in_the_readme():
    rows = re.findall(r"^\| (\d\d) ([^|]+) \| ([^|]+) \| (\d+) \|$", prose(README), re.M)
    wanted = [
        (k.number, k.title, ", ".join(f"`{file}`" for file in k.files), f"{k.hours:g}")
        for k in catalog.load()
    ]
    assert rows == wanted
    core = sum(kata.hours for kata in catalog.load() if kata.track == "core")
    assert f"about {core:g} hours" in prose(README)
    assert f"{core:g} hours for the ten core katas" in prose(ROOT / "docs/ROADMAP.md")


def test_the_strength_in_the_readme():
    """What docs/spec-strength.md says of all katas."""
    table = (ROOT / "docs/spec-strength.md").read_text(encoding="utf-8")
    (row,) = [line for line in table.splitlines() if line.startswith("| **all** |")]
    _, _, rejected, named, _, accepted, killed, *_ = [x.strip() for x in row.strip("|").split("|")]
    accepted, right = re.findall(r"\d+", accepted)[:2]
    for figure in (rejected, named, f"{int(right) - int(accepted)} of {right}", killed):
        assert f"| {figure} |" in prose(README), figure


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_current(name):
    drawn = pictures.PICTURES[name]()
    assert (pictures.FOLDER / name).read_text(encoding="utf-8") == drawn, (
        "python -m reference_tests.pictures"
    )
    assert ElementTree.fromstring(drawn).tag.endswith("svg") and len(drawn) < 10_000
    assert "prefers-color-scheme: dark" in drawn


# --- the guides -----------------------------------------------------------------------------------

KATAS = {file_of(kata): kata for kata in catalog.load()}


def test_every_kata_has_a_guide_and_every_guide_a_kata():
    assert set(GUIDES.glob("*.md")) == {*KATAS, GUIDES / "00-overview.md"}


@each(sorted(KATAS))
def test_a_guide_has_its_parts(path):
    text, kata = path.read_text(encoding="utf-8"), KATAS[path]
    assert text.startswith(f"# {kata.number} ")
    assert re.findall(r"^## (.*)$", prose(path), re.M) == SECTIONS
    assert f"pytest katas/{kata.id}\n" in text
    for file in kata.files:
        assert file in text, f"does not say where to write: {file}"
    last = text.split("## Checkpoint\n")[1].strip().split("\n\n")[-1]
    assert last.startswith(SCALE), f"ends without {SCALE}"
    assert SOURCE.search(last), "no source"


@each(sorted(GUIDES.glob("*.md")))
def test_sources_have_a_title(path):
    """ "Yi et al. 2019" alone finds nobody; in each guide its title follows it once."""
    text = " ".join(prose(path).split())
    for name, year in set(SOURCE.findall(text)):
        assert re.search(rf'{name} {year}, "[^"]+[^"]+"', text), f"{name} {year} has no title"


def code_lines(source):
    """Lines of a program as they would be recognised anywhere, with how they are to be spelt."""
    lines = dict(enumerate(source.splitlines(), 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            for number in range(node.lineno, node.end_lineno + 1):
                lines.pop(number, None)
    bare = {re.sub(r"\s+", "", line.partition("  #")[0]) for line in lines.values()}
    return {line for line in bare if len(line) >= 16 and re.search(r"[(=\[]", line)}


@each(sorted(GUIDES.glob("*.md")))
def test_a_guide_holds_no_line_of_a_solution(path):
    text = re.sub(r"\s+", "", path.read_text(encoding="utf-8"))
    for file, secret in secrets().items():
        shown = [line for line in secret if line in text]
        assert not shown, f"spoils {file}"


@functools.cache
def secrets():
    """Learner file -> the reference's lines that the stub, as generated, does not show."""
    found = {}
    for kata in KATAS.values():
        for file in kata.files:
            source = (REFERENCE / "recsys" / file).read_text(encoding="utf-8")
            found[file] = code_lines(source) - code_lines(stubs.generate(kata, file))
    return found


def test_a_spoiler_is_found():
    source = 'def f(x):\n    """Twice x, as x + x is."""\n    return  x + x * scale(x)  # so\n'
    assert code_lines(source) == {"returnx+x*scale(x)"}
    assert all(len(lines) > 10 for lines in secrets().values())
