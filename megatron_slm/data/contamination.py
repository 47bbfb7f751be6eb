"""Which runs of words two texts share: n-grams of lower-cased words, as 64-bit numbers."""

import functools
import hashlib
import re

import numpy as np

NGRAM_WORDS = 13  # as GPT-3 and most since count overlaps with evaluation sets
_WORD = re.compile(r"[^\W_]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so no bit of a word's hash is lost


def word_ngrams(text: str, n: int = NGRAM_WORDS) -> set[int]:
    """Return the different n-grams of ``text`` as 64-bit hashes; none where it has fewer than ``n`` words.

    Words are runs of letters and digits, lower-cased; punctuation and spacing do not count. The
    same text gives the same numbers in every process and on every machine.
    """
    return set(hash_ngrams(text, n).tolist())


def hash_ngrams(text: str, n: int = NGRAM_WORDS) -> np.ndarray:
    """Return the hash of every n-gram of ``text``, in its order: uint64 [words - n + 1], or [0]."""
    words = _WORD.findall(text.lower())
    word_hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))
    count = max(0, len(words) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for place in range(n):
        hashes = hashes * _FACTOR + word_hashes[place : place + count]
    return hashes


@functools.lru_cache(maxsize=2**18)  # text repeats its words
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
