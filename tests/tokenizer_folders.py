"""Hugging Face folders of small byte-level BPE tokenizers, with chosen pre-tokenizers, end tokens and ids."""

import json
from pathlib import Path
from typing import Any

from tests.texts import sentence

WORDS = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["</s>", "<|im_start|>", "<|im_end|>"]


def byte_level(pattern: str | None = WORDS, special: list[str] = SPECIAL) -> Any:
    """Return a tokenizer that splits text by `pattern`, or like GPT-2 if it is None; pieces do not depend on it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = whole
    texts = [f"{sentence(i, 12)} it's 12345678 don't\n\n  we'll 2024\n" for i in range(60)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(alphabet), special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Any, **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json; the end token is `</s>` unless `config` has another."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"} | config))
    return folder


def with_holes(tokenizer: Any, first: int = 300, holes: int = 400) -> Any:
    """Return the tokenizer with ids from `first` on raised by `holes`, so that as many ids are unused."""
    from tokenizers import Tokenizer

    tree = json.loads(tokenizer.to_str())
    vocabulary = tree["model"]["vocab"].items()
    tree["model"]["vocab"] = {piece: index + holes * (index >= first) for piece, index in vocabulary}
    return Tokenizer.from_str(json.dumps(tree))
