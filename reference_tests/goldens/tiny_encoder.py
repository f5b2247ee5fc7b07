"""Make the two tiny language models that kata 08 is tested with, and that run where no other is.

    python reference_tests/goldens/tiny_encoder.py [FOLDER]

writes `encoder/` and `decoder/` under FOLDER, by default fixtures/08_llm_pooling. On the pinned
versions and one thread the same machine gives the same bytes; another CPU may differ in last bits,
so the files are committed and this script says where they come from.

- encoder: BERT, 2 layers of width 64, padded on the right, mean pooling, positions learned. Trained
  for a minute by contrast on made-up titles: two titles of the same genres, each with or without
  the genres' names, are near each other. It knows a few hundred words, listed below, and spells out
  all others: enough to be better than chance, no measure of what a language model can do.
- decoder: GPT-2, 2 layers of width 32, padded on the left, last-token pooling, positions learned,
  random weights. Its padding token is the end-of-text token in which every text ends.

All text is our own: the words below and the titles of the synthetic data set.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
SEED = 808
STEPS, BATCH = 500, 96
ENCODER_VOCABULARY, DECODER_VOCABULARY = 1200, 400
ENCODER_LENGTH, DECODER_LENGTH = 128, 64

WORDS = {
    "Action": (
        "attack blade bullet chase combat explosive fury gun hunt justice kill lethal mission "
        "rage revenge strike target weapon force escape"
    ),
    "Adventure": (
        "arctic desert expedition explorer island jungle king legend mountain ocean quest river "
        "safari sea ship stone temple treasure voyage world"
    ),
    "Animation": (
        "animal bear bunny cartoon cat dinosaur dog duck dwarf mouse pig puppet rabbit toy snow "
        "wonder little tale"
    ),
    "Children": (
        "adventure baby boy brother child dog family girl home kid lion little magic pet school "
        "secret summer witch"
    ),
    "Comedy": (
        "bachelor big clown crazy date dumb funny fool grumpy happy hotel job joke laugh mad "
        "naked party silly stupid trouble wild vacation"
    ),
    "Crime": (
        "bank blood boss cop crook detective gang gangster heist jackal judge jury law mob murder "
        "police prison robbery suspect thief"
    ),
    "Documentary": (
        "artist band century concert day director dream history journey life maker memory music "
        "nation people portrait story true voice"
    ),
    "Drama": (
        "age beautiful city daughter death father heart house letter life lost man mother "
        "mountain people silence sister son soul time woman"
    ),
    "Fantasy": (
        "angel castle curse dragon fairy kingdom magic mirror monster prince princess ring spell "
        "spirit sword unicorn wizard"
    ),
    "Film-Noir": (
        "asphalt big corner darkness double key lady night notorious scarlet shadow sleep street "
        "sweet window"
    ),
    "Horror": (
        "beast blood body bride cemetery creature curse dead demon devil evil ghost grave haunted "
        "hell howl nightmare omen vampire zombie scream"
    ),
    "Musical": (
        "ballet band broadway cabaret dance dancer fiddler hair jazz melody opera rhythm rock "
        "singer song stage waltz"
    ),
    "Mystery": (
        "case clue conspiracy detective diary hidden key lie missing murder mystery night puzzle "
        "secret stranger vanish witness"
    ),
    "Romance": (
        "affair bride dear first forever garden heart honeymoon kiss letter love lover marriage "
        "moon paris passion romance rose wedding valentine"
    ),
    "Sci-Fi": (
        "alien android apocalypse cyber earth frontier future galaxy machine mars moon planet "
        "robot science space star time trek universe war"
    ),
    "Thriller": (
        "danger dark deadly deep edge enemy fatal fear game hostage instinct killer murder "
        "nightmare panic perfect silent suspicion terror victim"
    ),
    "War": (
        "air army battle bomb bridge captain colonel command enemy fighter front general hero "
        "marine patrol platoon soldier submarine victory"
    ),
    "Western": (
        "bandit canyon cowboy dollar dust frontier gold gun horse indian outlaw ranch rider "
        "saddle sheriff train trail west wagon"
    ),
}
SMALL = "the a an of and in to on for with from by at my me you his her i ii iii iv last new old"


# --- text -----------------------------------------------------------------------------------------


def made_up(rng: random.Random, genres: list[str], named: bool) -> str:
    """A title in the words of some genres, followed by their names or not."""
    words = [word for genre in genres for word in rng.sample(WORDS[genre].split(), 2)]
    rng.shuffle(words)
    words = words[: rng.randint(1, 3)]
    if rng.random() < 0.6:
        words.insert(rng.randrange(len(words) + 1), rng.choice(SMALL.split()))
    title = " ".join(words).title()
    if rng.random() < 0.7:
        title += f" ({rng.randint(1930, 2005)})"
    return f"{title}. {', '.join(genres)}." if named else f"{title}."


def synthetic_titles() -> list[str]:
    """The titles of the synthetic data set with their genres."""
    sys.path.insert(0, str(ROOT / "src"))
    from recsys.data.features import item_texts
    from recsys.data.synthetic import generate

    return item_texts(generate(0))


def vocabulary(size: int, special: list[str]) -> dict[str, int]:
    """Special tokens, characters, whole words, then the most frequent pieces of words.

    Counted and sorted, so that nothing depends on the order of a hash map.
    """
    text = " ".join([*WORDS, *WORDS.values(), SMALL, *synthetic_titles()]).lower()
    count = Counter("".join(c if c.isalpha() else " " for c in text).split())
    pieces = Counter()
    for word, times in count.items():
        for start in range(len(word)):
            for stop in range(start + 2, min(start + 5, len(word)) + 1):
                pieces[("##" if start else "") + word[start:stop]] += min(times, 3)
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    marks = list(".,()':-&!?")
    digits = [f"##{a}{b}" for a in "0123456789" for b in "0123456789"]
    words = [word for word, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))]
    common = [piece for piece, _ in sorted(pieces.items(), key=lambda item: (-item[1], item[0]))]
    tokens = [*special, *marks, *characters, *(f"##{c}" for c in characters)]
    tokens += ["19", "20", *digits] if size > 1000 else []
    tokens += words[: (size - len(tokens)) * 3 // 4] + common
    return {token: index for index, token in enumerate(list(dict.fromkeys(tokens))[:size])}


def splitter(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


# --- models ---------------------------------------------------------------------------------------


def make_encoder(folder: Path) -> None:
    words = vocabulary(ENCODER_VOCABULARY, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    inner = splitter(words)
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, words[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        padding_side="right",
        model_max_length=ENCODER_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=ENCODER_LENGTH,
        initializer_range=0.1,
    )
    model = BertModel(config, add_pooling_layer=False)
    train(model, tokenizer)
    save(model, tokenizer, folder)
    describe(folder, "mean_tokens", normalize=True)
    write(folder / "sentence_bert_config.json", {"max_seq_length": ENCODER_LENGTH})


def train(model: BertModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Two made-up films of the same genres are near each other, and so is a film with itself."""
    rng = random.Random(SEED)
    films = synthetic_titles()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    model.train()
    for step in range(STEPS):
        pairs = []
        for _ in range(BATCH):
            genres = rng.sample(list(WORDS), rng.choice([1, 1, 2, 2, 3]))
            pairs.append([made_up(rng, genres, rng.random() < 0.6) for _ in range(2)])
        for title in rng.sample(films, BATCH // 4):
            words = title.split()
            pairs.append([" ".join(w for w in words if rng.random() < 0.8) for _ in range(2)])
        texts = [text or "Unknown" for pair in zip(*pairs, strict=True) for text in pair]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        vectors = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        one, two = vectors.chunk(2)
        label = torch.arange(len(one))
        logits = one @ two.T / 0.07
        loss = (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50, 2 * (STEPS - step) / STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")


def make_decoder(folder: Path) -> None:
    words = vocabulary(DECODER_VOCABULARY, ["<end>", "[UNK]"])
    inner = splitter(words)
    inner.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", words["<end>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<end>",
        pad_token="<end>",
        unk_token="[UNK]",
        padding_side="left",
        model_max_length=DECODER_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )
    torch.manual_seed(SEED + 1)
    config = GPT2Config(
        vocab_size=len(words),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=DECODER_LENGTH,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    save(GPT2Model(config), tokenizer, folder)
    describe(folder, "lasttoken", normalize=False)


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights are kept as float16, half the size; they are computed with in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def describe(folder: Path, pooling: str, *, normalize: bool) -> None:
    """What sentence-transformers keeps beside a model: its layers and its pooling."""
    layers = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{layer}"}
        for i, (layer, path) in enumerate(zip(layers, paths, strict=False))
    ]
    write(folder / "modules.json", modules)
    write(folder / "1_Pooling" / "config.json", {f"pooling_mode_{pooling}": True})


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "fixtures" / "08_llm_pooling"
    make_encoder(target / "encoder")
    make_decoder(target / "decoder")
    for file in sorted(target.rglob("model.safetensors")):
        print(f"{file}: {file.stat().st_size / 1024:.0f} KB")
