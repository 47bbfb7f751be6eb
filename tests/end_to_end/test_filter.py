"""Filtering documents before training: two scorings, a keep-list, and runs on the kept documents alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.config import parse_config
from megatron_slm.data.corpus import Corpus, open_corpus
from megatron_slm.data.keep_list import open_keep_list, write_keep_list
from megatron_slm.data.loader import StepLoader
from megatron_slm.dist import World
from megatron_slm.reference.store import open_store
from tests.end_to_end.test_bad_input import command_line_among, command_lines, sentence_of
from tests.end_to_end.test_dry_run import shown
from tests.end_to_end.test_score import score_in_process, values_of
from tests.gloo import RankError, run_ranks
from tests.runs import LLAMA, config_tree, records, train_in_process, write_config
from tests.texts import open_tokens

NAMES = ("books", "held_out")


def training_tree(corpora: Path, run_dir: Path, keep: Path | None, **data: Any) -> dict[str, Any]:
    """Return the configuration of a plain run on two small corpora, in proportion to their tokens."""
    tree = config_tree(corpora, run_dir, stage=0) | {"objective": "clm"}
    tree["data"] |= {"train": [str(corpora / name) for name in NAMES], "valid": {}} | data
    if keep is not None:
        tree["data"]["keep"] = str(keep)
    return tree


def filter_tree(corpora: Path, stores: Path, output: Path, keep: float = 0.4) -> dict[str, Any]:
    group = {"base": str(stores / "base"), "reference": str(stores / "reference"), "keep": keep, "output": str(output)}
    return training_tree(corpora, output.parent / "run", None) | {"filter": group}


def make_stores(world: World, corpora: Path, folder: Path) -> None:
    """Score the corpora with two models."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(corpora / "reference")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA, vocab_size=len(tokenizer))).save_pretrained(
        folder / "model"
    )
    tokenizer.save_pretrained(folder / "model")
    for name, path, entropy in (("base", folder / "model", True), ("reference", corpora / "reference", False)):
        tree = training_tree(corpora, folder / "run", None)
        tree |= {
            "reference": {"path": str(path)},
            "score": {"output": str(folder / name), "kind": "document", "entropy": entropy},
        }
        score_in_process(world, tree)


def filter_in_process(_: World, *trees: dict[str, Any]) -> None:
    from megatron_slm.build.filtering import filter_documents

    for tree in trees:
        config = parse_config(tree)
        assert config.filter is not None
        filter_documents(config, config.filter)


@pytest.fixture(scope="module")
def stores(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the stores `base` and `reference`, and the lists `keep` of 0.4 and `fewer` of 0.3."""
    folder = tmp_path_factory.mktemp("stores")
    run_ranks(make_stores, 1, corpora, folder)
    trees = [filter_tree(corpora, folder, folder / name, keep) for name, keep in (("keep", 0.4), ("fewer", 0.3))]
    run_ranks(filter_in_process, 1, *trees)
    return folder


def bounds(corpus: Corpus) -> list[slice]:
    """Return the offsets of each document in the `.bin`."""
    index = open_tokens(corpus).index
    starts = index.sequence_pointers // index.dtype_size
    return [slice(int(s), int(s) + int(n)) for s, n in zip(starts, index.sequence_lengths, strict=True)]


def test_the_documents_of_highest_mean_excess_loss_are_kept(corpora: Path, stores: Path) -> None:
    """Rank both corpora together, and compare with means of one document at a time."""
    base, reference = (open_store(str(stores / name)) for name in ("base", "reference"))
    means = []
    for name in NAMES:
        excess = values_of(base, name)[:, 0].astype(np.float64) - values_of(reference, name)[:, 0]
        means += [excess[part].mean() for part in bounds(open_corpus(str(corpora / name)))]
    best = sorted(range(len(means)), key=lambda number: (-means[number], number))[: round(0.4 * len(means))]
    keep_list = open_keep_list(str(stores / "keep"))
    kept = [keep_list.documents(open_corpus(str(corpora / name))) for name in NAMES]
    assert np.flatnonzero(np.concatenate(kept)).tolist() == sorted(best)
    assert all(0 < documents.sum() < len(documents) for documents in kept)


def train_and_look(world: World, tree: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Train, and return source, offset and id of every token in this rank's batches, context included."""
    seen = []
    original = StepLoader._batch

    def looking(self: StepLoader, ordinals: list[int]) -> Any:
        batch = original(self, ordinals)
        for ordinal, tokens_T, labels_T in zip(ordinals, batch.tokens_BT, batch.labels_BT, strict=True):
            sample = self._samples[ordinal]
            text = torch.cat([tokens_T[:1], labels_T])
            assert (text[1:-1] == tokens_T[1:]).all()
            seen.extend((sample.source, *token) for token in zip(sample.offset.tolist(), text.tolist(), strict=True))
        return batch

    StepLoader._batch = looking  # type: ignore[method-assign]
    train_in_process(world, tree)
    return seen


def test_no_token_of_a_dropped_document_is_ever_in_a_batch(corpora: Path, stores: Path, tmp_path: Path) -> None:
    """Train for three passes; two ranks read the same tokens as one, and only from the training part of the split."""
    keep_list, kept, dropped = open_keep_list(str(stores / "keep")), set(), set()
    tokens = [np.fromfile(corpora / f"{name}.bin", dtype=np.uint16) for name in NAMES]
    for source, name in enumerate(NAMES):
        corpus = open_corpus(str(corpora / name))
        for number, (keeps, part) in enumerate(zip(keep_list.documents(corpus), bounds(corpus), strict=True)):
            addresses = {(source, offset) for offset in range(part.start, part.stop)}
            (kept if keeps and number < 0.75 * corpus.num_documents else dropped).update(addresses)
    found = {}
    for ranks in (1, 2):
        tree = training_tree(corpora, tmp_path / str(ranks), stores / "keep", split="75,25,0")
        tree["training"] |= {"train_tokens": None, "train_epochs": 3.0}
        seen = [token for part in run_ranks(train_and_look, ranks, tree) for token in part]
        assert all(tokens[source][offset] == token for source, offset, token in seen)
        found[ranks] = sorted(seen)
        met = {(source, offset) for source, offset, _ in seen}
        assert not met & dropped and len(met) > 0.97 * len(kept)
        steps = records(tmp_path / str(ranks))[-1]["step"]
        assert steps == -(-3 * len(kept) // (8 * 32))
    assert found[1] == found[2]
    # Corpora without weights count by their kept tokens.
    share = np.mean([source for source, _, _ in found[1]])
    assert share == pytest.approx(sum(source for source, _ in kept) / len(kept), abs=0.03)


def test_a_run_resumes_with_its_list_moved_and_refuses_another(corpora: Path, stores: Path, tmp_path: Path) -> None:
    for name in ("keep", "fewer"):
        shutil.copy(stores / name, tmp_path / name)
    tree = training_tree(corpora, tmp_path / "run", tmp_path / "keep", order_tokens=20 * 8 * 32)
    # Weights that do not tell the lists apart.
    tree["data"]["train"] = [0.7, str(corpora / NAMES[0]), 0.3, str(corpora / NAMES[1])]
    half = tree | {"training": tree["training"] | {"train_tokens": 10 * 8 * 32}}
    run_ranks(train_in_process, 1, half)
    for other in (str(tmp_path / "fewer"), None):
        with pytest.raises(RankError, match=r"other documents in data\.keep"):
            run_ranks(train_in_process, 1, tree | {"data": tree["data"] | {"keep": other}})
    (tmp_path / "keep").rename(tmp_path / "moved")
    tree["data"]["keep"] = str(tmp_path / "moved")
    run_ranks(train_in_process, 1, tree)
    assert records(tmp_path / "run")[-1]["step"] == 20
    log = (tmp_path / "run" / "log-rank0000.txt").read_text()
    assert log.count("documents of books, ") == 2 and "moved: " in log


def test_a_packed_store_of_kept_documents_serves_runs_on_them_alone(
    corpora: Path, stores: Path, tmp_path: Path
) -> None:
    tree = training_tree(corpora, tmp_path / "run", stores / "keep") | {"objective": "slm"}
    scoring = tree | {"score": {"output": str(tmp_path / "packed"), "kind": "packed", "encoding": "float32"}}
    scoring["reference"] = tree["reference"] | {"micro_batch_size": 8}
    run_ranks(score_in_process, 1, scoring)
    tree["reference"] = {"store": str(tmp_path / "packed")}
    run_ranks(train_in_process, 1, tree)
    assert all(record["loss/reference"] for record in records(tmp_path / "run"))
    with pytest.raises(RankError, match=r"another order of samples \(data.train, data.split, data.keep"):
        run_ranks(train_in_process, 1, tree | {"run_dir": str(tmp_path / "all"), "data": tree["data"] | {"keep": None}})
    config = str(write_config(tmp_path / "run.yaml", tree | {"run_dir": str(tmp_path / "new")}))
    status, stderr, stdout = run_ranks(shown, 1, "train", config, "--dry-run")[0]
    assert status == 0, stderr
    kept = open_keep_list(str(stores / "keep")).documents(open_corpus(str(corpora / "books")))
    assert f"keep: {kept.sum()} of {len(kept)} documents of books" in stdout


COMMANDS: dict[str, tuple[list[str], str]] = {
    "no settings": (["filter=null"], "filter is not set"),
    "no store": (["filter={output: x}"], "filter.base is not set"),
    "nowhere to write": (["filter.output=."], "filter.output is ., but"),
    "a share of more than all": (["filter.keep=1.5"], "filter.keep is 1.5, but"),
    "a share of nothing": (["filter.keep=0"], "filter.keep is 0, but"),
    "an unknown setting": (["filter.ratio=0.5"], "filter.ratio is 0.5, but there is no such setting"),
    "a corpus that is not there": (["data.train=/nowhere/web"], "/nowhere/web"),
    "a store that is not there": (["filter.base=/nowhere"], "filter.base is /nowhere, but it holds no manifest.json"),
    "a store of other corpora": (["data.train=CORPORA/web"], "it holds no scores of"),
    "a store of another tokenizer": (["data.train=CORPORA/other"], "filter.base is STORES/base, but it was scored"),
    "a store of samples": (["filter.reference=PACKED"], "filter.reference is PACKED, but it is of kind packed"),
    "too few to keep": (["filter.keep=0.001"], "filter.keep is 0.001, but it keeps none of the"),
    "one store twice": (
        ["filter.base=STORES/reference"],
        "filter.base is STORES/reference, but it holds the same",
    ),
    "a file that exists": (["filter.output=STORES/keep"], "filter.output is STORES/keep, but it already exists"),
    "a link to nothing": (["filter.output=STORES/link"], "filter.output is STORES/link, but it is a link to"),
}
TRAINING: dict[str, tuple[list[str], str]] = {
    "a list that is not there": (["data.keep=/nowhere/keep"], "data.keep is /nowhere/keep, but it is not a file"),
    "a file that is no list": (
        ["data.keep=STORES/keep.yaml"],
        "keep.yaml, but it is not a keep-list",
    ),
    "a list of other corpora": (["data.train=CORPORA/web"], "does not cover CORPORA/web, only books, held_out"),
    "a list of nothing in the split": (["data.split=20,80,0", "data.keep=LATE"], "it keeps no document of"),
}


def test_mistakes_are_errors_and_no_file_changes(corpora: Path, stores: Path, tmp_path: Path) -> None:
    packed = Path(shutil.copytree(stores / "base", tmp_path / "packed"))
    manifest = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_text(json.dumps(manifest | {"kind": "packed"}))
    both = [open_corpus(str(corpora / name)) for name in NAMES]
    late = [np.arange(corpus.num_documents) > 0.5 * corpus.num_documents for corpus in both]
    write_keep_list(tmp_path / "late", both, late, {})
    configs = {
        "filter": write_config(tmp_path / "filter.yaml", filter_tree(corpora, stores, tmp_path / "out" / "keep")),
        "train": write_config(stores / "keep.yaml", training_tree(corpora, tmp_path / "run", stores / "keep")),
    }
    (stores / "link").symlink_to(stores / "gone")
    before = {path: path.read_bytes() for path in stores.rglob("*") if path.is_file()}
    places = {"STORES": stores, "CORPORA": corpora, "PACKED": packed, "LATE": tmp_path / "late"}

    def placed(text: str) -> str:
        for name, path in places.items():
            text = text.replace(name, str(path))
        return text

    mistakes = [("filter", *one) for one in COMMANDS.values()] + [("train", *one) for one in TRAINING.values()]
    given = [[verb, str(configs[verb]), *map(placed, overrides)] for verb, overrides, _ in mistakes]
    answers = run_ranks(command_lines, 1, given)[0]
    for (verb, _, expected), (status, stderr) in zip(mistakes, answers, strict=True):
        assert placed(expected) in sentence_of(verb, status, stderr)
    assert {path: path.read_bytes() for path in stores.rglob("*") if path.is_file()} == before
    assert (stores / "link").is_symlink() and not (stores / "gone").exists()
    assert not list((tmp_path / "out").iterdir())


def test_a_filtering_on_several_ranks_is_refused(corpora: Path, stores: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "filter.yaml", filter_tree(corpora, stores, tmp_path / "keep")))
    status, stderr = run_ranks(
        command_line_among, 1, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "filter", config
    )[0]
    assert "number of ranks is 2" in sentence_of("filter", status, stderr)
    assert not (tmp_path / "keep").exists()
