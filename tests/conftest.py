"""Settings that libraries read when they are imported, and what many tests share."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpora `web`, `books`, `held_out` and `other`, and the model `reference`. Read only."""
    from megatron_slm.data.tokenizer import load_tokenizer
    from tests.runs import make_corpora, make_reference

    folder = tmp_path_factory.mktemp("corpora")
    make_corpora(folder)
    make_reference(folder, len(load_tokenizer(str(folder / "web.tokenizer"))))
    return folder
