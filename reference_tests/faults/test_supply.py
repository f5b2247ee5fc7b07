"""What comes from outside: exact versions, files as published, no code in data, none from a hub."""

from __future__ import annotations

import ast
import base64
import hashlib
import shutil
import subprocess
from fnmatch import fnmatch
from importlib import metadata

import pytest

from harness import encoders
from harness.errors import UsageError
from harness.paths import FIXTURES, KATAS, REFERENCE, ROOT, SRC

FOLDERS = [SRC, REFERENCE, ROOT / "harness", KATAS, ROOT / "reference_tests"]
# Where a rule may be broken, and why: attacks that are tried, our own child's answer.
ALLOWED = {
    ("harness/devices.py", "pickle.loads"): "from a child of this process, through a pipe",
    ("harness/devices.py", "pickle.dumps"): "the other end of it",
    ("reference_tests/faults/test_training.py", "os.system"): "an attack that is tried",
    ("reference_tests/faults/test_training.py", "pickle.dumps"): "an attack that is tried",
    ("katas/08_llm_pooling/test_spec.py", "pickle.dumps"): "an attack that is tried",
}


def calls():
    """(file, line, dotted name, call) of every call in the repository."""
    for folder in FOLDERS:
        for path in sorted(folder.rglob("*.py")):
            if "__pycache__" in path.parts or path.name == "test_supply.py":
                continue
            file = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield file, node.lineno, dotted(node.func), node


def dotted(node) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return getattr(node, "id", "")


def constant(call, name):
    """The value of a keyword, None if it is not given, ... if it is no constant."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return getattr(keyword.value, "value", ...)
    return None


def forbidden(name, call) -> str | None:
    """Why a call would run code from a file or from elsewhere; None if it does not."""
    if name in ("torch.load",) and constant(call, "weights_only") is not True:
        return "torch.load without weights_only=True"
    if name.startswith(("pickle.", "marshal.", "shelve.", "joblib.", "dill.")):
        return f"{name}: reads or writes what may hold code"
    if name == "yaml.load" or name.startswith("yaml.unsafe") or name == "yaml.full_load":
        return "yaml without safe_load"
    if constant(call, "allow_pickle") not in (None, False):
        return "allow_pickle"
    if constant(call, "trust_remote_code") not in (None, False):
        return "trust_remote_code"
    if name.startswith("torch.hub."):
        return "torch.hub runs code from a repository"
    if constant(call, "shell") not in (None, False) or name in ("os.system", "os.popen"):
        return "a shell"
    return None


def test_nothing_runs_code_that_came_as_data(tally):
    count, found = 0, []
    for file, line, name, call in calls():
        why = forbidden(name, call)
        count += 1
        if why and (file, name) not in ALLOWED and not file.startswith("reference_tests/mistakes"):
            found.append(f"{file}:{line}: {why}")
    assert not found, "\n".join(found)
    tally("calls in the repository that load, unpickle, download or start something",
          "no code from data, none from a hub", count)  # fmt: skip


@pytest.mark.parametrize("code", [
    "torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=x)",
    "pickle.load(f)", "yaml.load(f)", "np.load(p, allow_pickle=True)", "os.system('ls')",
    "AutoModel.from_pretrained(n, trust_remote_code=True)", "torch.hub.load('a/b', 'c')",
    "subprocess.run('ls', shell=True)", "joblib.load(p)",
])  # fmt: skip
def test_that_check_can_fail(code):
    call = ast.parse(code).body[0].value
    assert forbidden(dotted(call.func), call)


def test_models_in_the_repository_are_safetensors(tally):
    """Weights that are plain numbers; nothing beside them that anybody could run."""
    folders = {path.parent for path in FIXTURES.rglob("config.json")}
    for folder in folders:
        kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert kinds <= {".json", ".safetensors"}, folder
        tally("model folders in the repository", "safetensors and JSON only")
    assert folders


def test_a_model_of_the_hub_by_commit(tmp_path, monkeypatch, tally):
    """NAME@COMMIT fetches that commit, and no file that could be code; a branch is refused."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download",
        lambda name, **how: asked.append((name, how)) or str(tmp_path),
    )  # fmt: skip
    commit = "0123456789abcdef" * 2 + "01234567"
    model = f"org/model@{commit}"
    assert encoders.resolve(model) == (str(tmp_path.resolve()), model)
    ((name, how),) = asked
    assert (name, how["revision"]) == ("org/model", commit)
    assert not any(fnmatch(file, pattern) for pattern in how["allow_patterns"]
                   for file in ("modeling.py", "pytorch_model.bin", "model.pkl"))  # fmt: skip
    for other in ("main", "v1.0", commit[:7], commit.upper(), ""):
        with pytest.raises(UsageError, match="40 hexadecimal digits"):
            encoders.resolve(f"org/model@{other}")
        tally("models of the hub", "a branch, tag or short commit is refused")

    def offline(*args, **how):
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UsageError, match="cannot be had: no network$"):
        encoders.resolve(f"org/model@{commit}")
    tally("models of the hub", "at a commit, without code")


def test_what_is_installed_is_as_published(tally, often):
    """Every installed file has the checksum that its package lists."""
    if not often(0, 1):
        pytest.skip("in the long form: it reads all of torch")
    pinned = {line.partition("==")[0].strip().lower().replace("_", "-")
              for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    for package in metadata.distributions():
        if package.metadata["Name"].lower().replace("_", "-") not in pinned:
            continue
        for file in package.files or []:
            path = file.locate()
            if file.hash is None or not path.is_file() or path.parent.name == "bin":
                continue  # pip writes the commands, for this very Python
            digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
            found = base64.urlsafe_b64encode(digest).decode().rstrip("=")
            assert found == file.hash.value, f"{path} is not what {package.name} published"
            tally("installed files of pinned packages", "the checksum that the package lists")


def test_an_audit_of_known_vulnerabilities(tally, often):
    """pip-audit, where it is installed and its service can be reached; else that is said."""
    if not often(0, 1):
        pytest.skip("in the long form")
    what = "an audit of the pins for known vulnerabilities (pip-audit)"
    program = shutil.which("pip-audit")
    if program is None:
        return tally(what, "NOT DONE: pip-audit is not installed here")
    command = [program, "--no-deps", "--disable-pip", "-s", "osv", "--timeout", "5"]
    done = subprocess.run([*command, "-r", str(ROOT / "constraints.txt")], capture_output=True,
                          text=True)  # fmt: skip
    if done.returncode == 0:
        tally(what, "none known")
    elif "vulnerabilit" in done.stdout + done.stderr and "Found" in done.stdout + done.stderr:
        pytest.fail(done.stdout)
    else:
        tally(what, "NOT DONE: its service cannot be reached from here")
