"""`examples/curated.py`: rows of public datasets become texts."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from examples import curated

ROWS: dict[str, Mapping[str, Any]] = {
    "meta-math/MetaMathQA": {"query": "What is 1 + 1?", "response": "It is 2.\n"},
    "TIGER-Lab/MathInstruct": {"instruction": "Add 2 and 3.", "output": "5"},
    "allenai/tulu-v2-sft-mixture": {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    },
    "teknium/OpenHermes-2.5": {
        "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    },
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str, streaming: bool) -> Iterator[Mapping[str, Any]]:
        return iter([ROWS[name]])

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("subject", "texts"),
    [
        ("math", ["What is 1 + 1?\n\nIt is 2.", "Add 2 and 3.\n\n5"]),
        ("general", ["Hi\n\nHello", "Why?\n\nBecause."]),
    ],
)
def test_the_turns_of_each_row_become_one_text(
    subject: str, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "curated.jsonl"
    monkeypatch.setattr(sys, "argv", ["curated.py", subject, str(output)])
    curated.main()
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == texts
    with pytest.raises(FileExistsError):
        curated.main()
