"""Contamination: n-grams of words as 64-bit numbers, and the report."""

import json
import re
import subprocess
import sys

import pytest

from megatron_slm.prepare.contamination import hash_ngrams, word_ngrams
from megatron_slm.prepare.inputs import find_files
from megatron_slm.prepare.prepare import Options, prepare_corpora
from tests.texts import sentence, write_jsonl

TEXT = "The slope of a line is rise over run, so if x = 3 then y = 12.5 and f(x) is the area under a curve."
PLAIN = "the slope of a line is rise over run so if x 3 then y 12 5 and f x is the area under a curve"
WORDS = PLAIN.split()


def brute_force(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@pytest.mark.parametrize("n", [1, 2, 5, 13, 26])
def test_there_is_one_number_for_each_different_run_of_words(n):
    assert len(word_ngrams(TEXT, n)) == len(brute_force(WORDS, n))
    assert len(hash_ngrams(TEXT, n)) == len(WORDS) - n + 1


def test_texts_share_the_numbers_of_the_runs_that_they_share():
    inside = " ".join(["before", *WORDS[4:18], "after"])
    assert len(word_ngrams(inside) & word_ngrams(TEXT)) == 2
    assert not word_ngrams(" ".join(reversed(WORDS))) & word_ngrams(TEXT)


def test_case_punctuation_and_spacing_do_not_count():
    assert word_ngrams(TEXT) == word_ngrams("  ".join(WORDS).upper()) == word_ngrams("_—".join(WORDS))
    assert word_ngrams("ÉCOLE Straße 日本", 3) == word_ngrams("école, straße; 日本.", 3) != set()


@pytest.mark.parametrize("text", ["", "...", "one two", " ".join(WORDS[:12])])
def test_a_text_with_fewer_words_has_no_ngrams(text):
    assert word_ngrams(text) == set()


def test_word_order_and_word_boundaries_count():
    texts = ["a b", "b a", "ab", "a ab", "aa b"]
    assert len(set().union(*(word_ngrams(text, 2) for text in texts))) == 4


def test_every_process_gives_the_same_numbers():
    assert sorted(word_ngrams("one two three", 2)) == [11418333532430138187, 17898366591077449017]
    program = f"from megatron_slm.prepare.contamination import word_ngrams; print(sorted(word_ngrams({TEXT!r})))"
    for seed in ("1", "2"):
        shown = subprocess.check_output([sys.executable, "-c", program], text=True, env={"PYTHONHASHSEED": seed})
        assert shown.strip() == str(sorted(word_ngrams(TEXT)))


def test_numbers_fill_64_bits():
    numbers = word_ngrams(" ".join(map(str, range(20_000))))
    assert len(numbers) == 20_000 - 12
    for bit in range(64):
        assert 0.45 < sum(number >> bit & 1 for number in numbers) / len(numbers) < 0.55


@pytest.mark.parametrize("workers", [1, 2])
def test_the_report_counts_what_brute_force_counts(model, tmp_path, workers):
    corpus = [sentence(i, 60) for i in range(20)]
    questions = [
        {"question": sentence(3, 60), "choices": ["none of these", sentence(4, 20)]},
        {"question": " ".join(WORDS[:12])},
        {"question": "nothing of it " + sentence(5, 30) + " and nothing more at all"},
        {"question": " ".join(map(str, range(30)))},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    options = Options(tokenizer=model, evaluation=(str(path),), workers=workers)
    inputs = find_files([str(write_jsonl(tmp_path / "web.jsonl", corpus))])
    prepare_corpora(inputs, str(tmp_path / "web"), options)
    report = json.loads((tmp_path / "web.contamination.json").read_text())
    there = set().union(*(brute_force(words_of(text), 13) for text in corpus))
    grams = [
        set().union(*(brute_force(words_of(text), 13) for text in (one["question"], *one.get("choices", ()))))  # type: ignore[attr-defined]
        for one in questions
    ]
    assert [(one["line"], one["ngrams"], one["found"]) for one in report["documents"]] == [
        (number, len(gram), len(gram & there)) for number, gram in enumerate(grams, 1)
    ]
    assert (report["num_documents"], report["num_too_short"], report["num_contaminated"]) == (4, 1, 2)
    assert [one["line"] for one in report["worst"]] == [1, 3]
    assert report["num_found"] == sum(one["found"] for one in report["documents"]) > 0


def words_of(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())
