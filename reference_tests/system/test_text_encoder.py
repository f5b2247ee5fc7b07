"""`load_encoder` on pretrained models: pooled, normalised and cut as their own files say.

The files are read here a second time, and each sentence goes through the model alone, in float64.
"""

import importlib.util
import json

import pytest
import torch

from harness.encoders import PACKAGE, TINY, packaged
from harness.paths import FIXTURES, REFERENCE

TITLES = [
    "Haunted Harbor of Glass (1987). Horror.",
    "War",
    "The Golden Train on Fire II (2001). Action, Adventure, Western. " * 30,
    "",
    "Love at noon",
]
DECODER = FIXTURES / "08_llm_pooling" / "decoder"


@pytest.fixture(scope="module")
def text():
    file = REFERENCE / "recsys" / "models" / "text.py"
    spec = importlib.util.spec_from_file_location("reference_text", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")


def by_its_own_files(folder, texts):
    """(n, D) float64 and the number of tokens at most."""
    from transformers import AutoModel, AutoTokenizer

    def read(file):
        path = folder / file
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    pooling = read("1_Pooling/config.json")
    normalize = any(module["type"].endswith(".Normalize") for module in read("modules.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    length = read("sentence_bert_config.json").get("max_seq_length", 128)
    length = min(length, tokenizer.model_max_length)
    model = AutoModel.from_pretrained(folder, dtype=torch.float64, local_files_only=True).eval()
    rows = []
    for each in texts:
        ids = tokenizer(each, truncation=True, max_length=length)["input_ids"]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        if pooling.get("pooling_mode_mean_tokens"):
            vector = hidden.mean(0)
        elif pooling.get("pooling_mode_cls_token"):
            vector = hidden[0]
        else:
            assert pooling["pooling_mode_lasttoken"]
            vector = hidden[-1]
        rows.append(vector / vector.norm() if normalize else vector)
    return torch.stack(rows), length


@pytest.mark.parametrize("which", ["encoder", "decoder", "all-MiniLM-L6-v2"])
def test_a_pretrained_model_is_pooled_as_its_own_files_say(text, which):
    folder = {"encoder": TINY, "decoder": DECODER}.get(which) or packaged()
    if folder is None:
        pytest.skip(f"{PACKAGE} is not installed")
    encoder = text.load_encoder(folder)
    wanted, length = by_its_own_files(folder, TITLES)
    assert encoder.max_length == length
    torch.testing.assert_close(encoder.encode(TITLES).double(), wanted, rtol=2e-4, atol=2e-5)
    assert text.load_encoder(folder).identity() == encoder.identity()


def test_all_minilm_is_pooled_by_the_mean_normalised_and_cut_at_256(text):
    folder = packaged()
    if folder is None:
        pytest.skip(f"{PACKAGE} is not installed")
    encoder = text.load_encoder(folder)
    settings = (encoder.pooling, encoder.normalize, encoder.max_length, encoder.dim)
    assert settings == ("mean", True, 256, 384)
    war, peace, recipe = encoder.encode(
        ["a war film about soldiers", "soldiers fight in a battle", "a cake with cream"]
    )
    assert float(war @ peace) > float(war @ recipe) + 0.2


def test_pooling_can_be_chosen_and_what_is_not_there_is_said(text, tmp_path):
    assert text.load_encoder(TINY, pooling="cls").pooling == "cls"
    with pytest.raises(OSError, match="folder"):
        text.load_encoder(tmp_path / "none")
