"""Scoring a corpus once, and training on the stored losses."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.__main__ import main
from megatron_slm.config import parse_config
from megatron_slm.dist import World, disconnect
from megatron_slm.errors import AgreedError, UserError
from megatron_slm.reference.store import BlockChecksums, Store, open_store
from tests.end_to_end.test_bad_input import command_line_among, command_lines, sentence_of
from tests.gloo import RankError, run_ranks
from tests.runs import LLAMA, config_tree, free_port, megatron_slm, records, train_in_process, write_config
from tests.texts import open_tokens

SHARD = 1024


def scoring_tree(corpora: Path, output: Path, **score: Any) -> dict[str, Any]:
    """Return a configuration that scores two corpora in about ten shards."""
    tree = training_tree(corpora, output.parent / "run")
    tree["reference"] |= {"micro_batch_size": 8}
    return tree | {"score": {"output": str(output), "kind": "document", "shard_tokens": SHARD} | score}


def training_tree(corpora: Path, run_dir: Path, stage: int = 0) -> dict[str, Any]:
    """Return the configuration of a selective run on two small corpora."""
    tree = config_tree(corpora, run_dir, stage)
    tree["data"] |= {"train": [0.7, str(corpora / "books"), 0.3, str(corpora / "held_out")], "valid": {}}
    return tree


def smallest_config(corpora: Path, folder: Path) -> str:
    """Write a configuration of the three groups that are enough to score, and return its path."""
    tree = {
        "data": {"train": str(corpora / "books"), "seq_length": 32},
        "reference": {"path": str(corpora / "reference")},
        "score": {"output": str(folder / "scores"), "kind": "document"},
    }
    return str(write_config(folder / "score.yaml", tree))


def score_in_process(world: World, tree: dict[str, Any], imports: tuple[str, ...] = ()) -> None:
    from megatron_slm.build.scoring import score_corpora

    config = parse_config(tree)
    assert config.score is not None
    score_corpora(config, config.score, world, [Path(name) for name in imports])


def files_of(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


def values_of(store: Store, name: str) -> np.ndarray:
    file = store.file_of(name)
    return file.read(np.arange(file.rows))


@pytest.fixture(scope="module")
def stored(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the stores `documents` (two bytes) and `exact` (float32, with entropies)."""
    folder = tmp_path_factory.mktemp("stores")
    run_ranks(score_in_process, 1, scoring_tree(corpora, folder / "documents"))
    run_ranks(score_in_process, 1, scoring_tree(corpora, folder / "exact", encoding="float32", entropy=True))
    return folder


def plain_scores(_: World, corpora: Path) -> dict[str, np.ndarray]:
    """Return loss and entropy of each token of `books`, from Hugging Face's own logits, one document at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_slm.data.corpus import open_corpus

    model = AutoModelForCausalLM.from_pretrained(corpora / "reference").eval()
    tokens = open_tokens(open_corpus(str(corpora / "books")))
    eod, window = AutoTokenizer.from_pretrained(corpora / "reference").eos_token_id, 32
    losses, entropies = [], []
    for number in range(len(tokens)):
        labels = torch.from_numpy(np.asarray(tokens[number], dtype=np.int64))
        text = torch.cat([torch.tensor([eod]), labels[:-1]])
        for start in range(0, max(1, len(labels) - window // 2), window // 2):
            part = slice(start, start + window)
            with torch.no_grad():
                logits = model(text[None, part]).logits[0].log_softmax(-1)
            new = 0 if start == 0 else window - window // 2
            losses += (-logits.gather(-1, labels[part, None])[new:, 0]).tolist()
            entropies += (-(logits.exp() * logits).sum(-1)[new:]).tolist()
    return {"loss": np.array(losses), "entropy": np.array(entropies)}


def test_a_store_holds_loss_and_entropy_of_each_token_in_its_document(corpora: Path, stored: Path) -> None:
    expected = run_ranks(plain_scores, 1, corpora)[0]
    found = values_of(open_store(str(stored / "exact")), "books")
    assert found.shape == (len(expected["loss"]), 2)
    for column, name in enumerate(("loss", "entropy")):
        assert np.abs(found[:, column] - expected[name]).max() < 1e-4


def test_two_bytes_are_within_the_error_in_the_manifest(stored: Path) -> None:
    exact, short = (open_store(str(stored / name)) for name in ("exact", "documents"))
    for name in ("books", "held_out"):
        off = np.abs(values_of(short, name)[:, 0] - values_of(exact, name)[:, 0])
        assert off.max() <= short.manifest.max_error
        rows = short.manifest.files[0].rows if name == "books" else short.manifest.files[1].rows
        assert (stored / "documents" / f"{name}.scores").stat().st_size <= 2 * rows + 4 * (rows // 4096 + 1)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("shard", [True, False])
def test_any_number_of_ranks_writes_the_same_bytes(
    corpora: Path, stored: Path, tmp_path: Path, ranks: int, shard: bool
) -> None:
    tree = scoring_tree(corpora, tmp_path / "documents")
    tree["reference"]["shard"] = shard
    run_ranks(score_in_process, ranks, tree)
    assert files_of(tmp_path / "documents") == files_of(stored / "documents")


def scored_shards(world: World, tree: dict[str, Any], count: Path) -> None:
    """Score, and record every shard that the model computes."""
    from megatron_slm.reference.scoring import ModelSource

    original = ModelSource.values

    def noting(self: ModelSource, number: int, report: Callable[[int], None]) -> Any:
        with count.open("a") as stream:
            stream.write(f"{number}\n")
        return original(self, number, report)

    ModelSource.values = noting  # type: ignore[method-assign]
    score_in_process(world, tree)


def score_until_killed(world: World, tree: dict[str, Any], count: Path, moment: str) -> None:
    """Score until a moment is reached the given number of times, then kill this process."""
    from megatron_slm.io.staging import Journal
    from megatron_slm.reference import store_writer

    owner, name, passing = {
        "before a shard is flushed": (store_writer, "sync", 3),
        "before it is in the journal": (Journal, "write", 3),
        "before the checksums are written": (BlockChecksums, "table", 2),
        "before the store is published": (store_writer, "publish", 1),
    }[moment]
    original, calls = getattr(owner, name), []

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == passing:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)
    scored_shards(world, tree, count)


@pytest.mark.parametrize(
    "moment",
    [
        "before a shard is flushed",
        "before it is in the journal",
        "before the checksums are written",
        "before the store is published",
    ],
)
def test_a_killed_scoring_resumes_and_repeats_one_shard_at_most(
    corpora: Path, stored: Path, tmp_path: Path, moment: str
) -> None:
    tree, count = scoring_tree(corpora, tmp_path / "documents"), tmp_path / "count"
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(score_until_killed, 1, tree, count, moment)
    assert not (tmp_path / "documents").exists()
    run_ranks(scored_shards, 1, tree, count)
    assert files_of(tmp_path / "documents") == files_of(stored / "documents")
    manifest = open_store(str(tmp_path / "documents")).manifest
    shards = sum(-(-entry.rows // SHARD) for entry in manifest.files)
    assert shards <= len(count.read_text().split()) <= shards + 1
    assert not (tmp_path / ".documents.scoring").exists()


def test_unfinished_work_of_other_settings_is_not_resumed(corpora: Path, tmp_path: Path) -> None:
    tree, count = scoring_tree(corpora, tmp_path / "documents"), tmp_path / "count"
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(score_until_killed, 1, tree, count, "before it is in the journal")
    with pytest.raises(RankError, match=r"score\.entropy was false and is true"):
        run_ranks(score_in_process, 1, tree | {"score": tree["score"] | {"entropy": True}})
    assert (tmp_path / ".documents.scoring").exists()


def test_shards_of_samples_are_not_resumed_at_another_size(corpora: Path, tmp_path: Path) -> None:
    """A shard has 32 samples at 8 per batch, and 30 at 3 per batch, so resuming would leave a gap."""
    tree, count = scoring_tree(corpora, tmp_path / "packed", kind="packed"), tmp_path / "count"
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(score_until_killed, 1, tree, count, "before it is in the journal")
    longer = tree | {"training": tree["training"] | {"train_tokens": 40 * 8 * 32}}
    longer |= {"data": tree["data"] | {"order_tokens": 20 * 8 * 32}}
    smaller = tree | {"reference": tree["reference"] | {"micro_batch_size": 3}}
    for other, expected in (
        (smaller, r"reference\.micro_batch_size was 8 and is 3"),
        (longer, "the samples was 160 and is 320"),
    ):
        with pytest.raises(RankError, match=expected):
            run_ranks(score_in_process, 1, other)


def test_unfinished_work_on_other_documents_is_not_resumed(corpora: Path, tmp_path: Path) -> None:
    """The `.bin` is the same, the `.idx` is not."""
    copy = Path(shutil.copytree(corpora, tmp_path / "corpora"))
    tree, count = scoring_tree(copy, tmp_path / "documents"), tmp_path / "count"
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(score_until_killed, 1, tree, count, "before it is in the journal")
    description = copy / "books.json"
    described = json.loads(description.read_text())
    described["sha256"][".idx"] = "0" * 64
    description.write_text(json.dumps(described))
    with pytest.raises(RankError, match=r"data\.train \(name, sha256\) was"):
        run_ranks(score_in_process, 1, tree)


def score_on_a_full_disk(world: World, tree: dict[str, Any]) -> tuple[Any, ...]:
    """Return the error of this rank; only rank 0 writes."""
    from megatron_slm.reference import store_writer

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store_writer.sync = full  # type: ignore[assignment, attr-defined]
    with pytest.raises(AgreedError) as caught:
        score_in_process(world, tree)
    return caught.value.args


def test_a_full_disk_is_the_same_error_on_all_ranks(corpora: Path, tmp_path: Path) -> None:
    errors = run_ranks(score_on_a_full_disk, 2, scoring_tree(corpora, tmp_path / "scores"))
    assert errors[0] == errors[1]
    setting, value, reason, _ = errors[0]
    assert (setting, value) == ("score.output", tmp_path / "scores") and "No space left" in reason


def score_and_be_killed_at_the_end(world: World, tree: dict[str, Any]) -> None:
    """Kill this process after the store is published, before the staging folder is removed."""
    from megatron_slm.reference.store_writer import StoreWriter

    original = StoreWriter.publish

    def deadly(*args: Any) -> None:
        original(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    StoreWriter.publish = deadly  # type: ignore[method-assign]
    score_in_process(world, tree)


def test_a_removed_store_is_made_again_beside_leftovers_of_the_first_scoring(
    corpora: Path, stored: Path, tmp_path: Path
) -> None:
    tree = scoring_tree(corpora, tmp_path / "documents")
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(score_and_be_killed_at_the_end, 1, tree)
    assert (tmp_path / ".documents.scoring" / "progress.json").exists()
    shutil.rmtree(tmp_path / "documents")
    run_ranks(score_in_process, 1, tree)
    assert files_of(tmp_path / "documents") == files_of(stored / "documents")


def train_and_record(
    corpora: Path, run_dir: Path, ranks: int, stage: int = 0, steps: int = 20, **reference: Any
) -> list[dict[str, Any]]:
    tree = training_tree(corpora, run_dir, stage)
    tree["training"]["train_tokens"] = steps * 8 * 32
    tree["reference"] = reference
    run_ranks(train_in_process, ranks, tree)
    # A store saves the reference's FLOPs.
    return [{k: v for k, v in record.items() if k not in ("mfu", "flops")} for record in records(run_dir)]


def test_a_run_on_a_packed_store_is_bitwise_the_run_with_the_live_reference(corpora: Path, tmp_path: Path) -> None:
    """At the same batch shapes: a step's 8 samples at once."""
    tree = scoring_tree(corpora, tmp_path / "packed", kind="packed", encoding="float32")
    run_ranks(score_in_process, 2, tree)
    live = train_and_record(
        corpora, tmp_path / "live", 1, path=str(corpora / "reference"), micro_batch_size=8, check_windows=0
    )
    read = train_and_record(corpora, tmp_path / "stored", 1, store=str(tmp_path / "packed"))
    assert live == read
    logs = [(tmp_path / name / "log-rank0000.txt").read_text() for name in ("live", "stored")]
    assert ["store check on 8 samples" in log for log in logs] == [False, True]
    # In the very samples that were scored, the model that wrote the store selects what the store does.
    assert "selects 100% of the same tokens" in logs[1] and "WARNING" not in logs[1].partition("store check")[2]
    assert all(record["loss/reference"] for record in live)


def test_a_document_store_serves_any_order_and_any_number_of_ranks(corpora: Path, stored: Path, tmp_path: Path) -> None:
    one = train_and_record(corpora, tmp_path / "a", 1, store=str(stored / "documents"))
    two = train_and_record(corpora, tmp_path / "b", 2, stage=3, store=str(stored / "documents"))
    for first, second in zip(one, two, strict=True):
        assert first["loss/reference"] == pytest.approx(second["loss/reference"], rel=1e-6)


def test_a_run_resumes_with_its_store_moved_and_refuses_another(corpora: Path, stored: Path, tmp_path: Path) -> None:
    for name in ("documents", "exact"):
        shutil.copytree(stored / name, tmp_path / name)
    tree = training_tree(corpora, tmp_path / "run") | {"reference": {"store": str(tmp_path / "documents")}}
    half = tree | {"training": tree["training"] | {"train_tokens": 10 * 8 * 32}}
    half["data"] = tree["data"] | {"order_tokens": 20 * 8 * 32}
    tree["data"] = half["data"]
    run_ranks(train_in_process, 1, half)
    tree["reference"]["store"] = str(tmp_path / "exact")
    with pytest.raises(RankError, match="would change the reference"):
        run_ranks(train_in_process, 1, tree)
    (tmp_path / "documents").rename(tmp_path / "moved")
    tree["reference"]["store"] = str(tmp_path / "moved")
    run_ranks(train_in_process, 1, tree)
    assert records(tmp_path / "run")[-1]["step"] == 20


def test_live_and_stored_references_mix_and_one_may_be_smaller_than_the_student(
    corpora: Path, stored: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    small = tmp_path / "small"
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(corpora / "reference")
    config = AutoConfig.for_model(**(LLAMA | {"hidden_size": 16, "num_hidden_layers": 1}), vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(small)
    tokenizer.save_pretrained(small)
    of = [{"path": str(small), "weight": 1, "shard": False}, {"store": str(stored / "documents"), "weight": 3}]
    places = [{k: v for k, v in part.items() if k in ("path", "store")} for part in of]
    alone = [train_and_record(corpora, tmp_path / str(n), 2, steps=2, **place) for n, place in enumerate(places)]
    mixed = train_and_record(corpora, tmp_path / "mixed", 2, steps=2, mix="mean", of=of)
    first, second = (lines[0]["loss/reference"] for lines in alone)
    assert mixed[0]["loss/reference"] == pytest.approx(0.25 * first + 0.75 * second, rel=1e-5)


def test_the_command_scores_and_training_reads_it(corpora: Path, tmp_path: Path) -> None:
    config = smallest_config(corpora, tmp_path)
    done = run_ranks(command_line_among, 2, {"MASTER_PORT": free_port()}, "score", config)
    assert [status for status, _ in done] == [0, 0]
    assert "train with: reference.store=" in done[0][1]
    before_the_first_shard = done[0][1].partition("scoring 6,595 tokens")
    assert "loading the libraries" in before_the_first_shard[0] and "mean loss" in before_the_first_shard[2]
    assert "scores is intact: 6595 tokens" in megatron_slm("score", config, "--verify").stderr
    alone = megatron_slm("score", config, f"score.output={tmp_path}/alone")
    assert alone.returncode == 0, alone.stderr
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "scores")


Change = Callable[[Path, Path, dict[str, Any]], None]


def _cut(store: Path, _: Path, tree: dict[str, Any]) -> None:
    path = store / "books.scores"
    path.write_bytes(path.read_bytes()[:-7])


def _remove_manifest(store: Path, _: Path, tree: dict[str, Any]) -> None:
    (store / "manifest.json").unlink()


def _flip(store: Path, _: Path, tree: dict[str, Any]) -> None:
    path = store / "books.scores"
    changed = bytearray(path.read_bytes())
    changed[100] ^= 4
    path.write_bytes(changed)


def _other_corpus(store: Path, corpora: Path, tree: dict[str, Any]) -> None:
    tree["data"]["train"] = str(corpora / "web")


def _other_tokenizer(store: Path, corpora: Path, tree: dict[str, Any]) -> None:
    tree["data"]["train"] = str(corpora / "other")


def _other_model(store: Path, corpora: Path, tree: dict[str, Any]) -> None:
    shutil.copytree(corpora / "reference", store.parent / "changed", dirs_exist_ok=True)
    weights = store.parent / "changed" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    tree["reference"]["path"] = str(store.parent / "changed")


def _imported(store: Path, corpora: Path, tree: dict[str, Any]) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["reference"] = {"imported": ["web.npy"], "fingerprint": "0", "precision": None}
    (store / "manifest.json").write_text(json.dumps(manifest))
    tree["reference"]["path"] = str(corpora / "reference")


def _hub_name(store: Path, corpora: Path, tree: dict[str, Any]) -> None:
    tree["reference"]["path"] = "nobody/nothing"


def _entropy(store: Path, corpora: Path, tree: dict[str, Any]) -> None:
    tree["selection"] = {"score": "tests.end_to_end.deadly:lowest_reference_entropy"}


BAD_STORES: dict[str, tuple[Change, str]] = {
    "cut short": (_cut, "books.scores, but it has"),
    "not completed": (_remove_manifest, "holds no manifest.json"),
    "corrupted": (_flip, "books.scores, but it is corrupted: the values of its tokens 0 to 4095"),
    "of other tokens": (_other_corpus, r"it holds no scores of .*web, only of .*books, .*held_out"),
    "of another tokenizer": (_other_tokenizer, "it was scored with a different tokenizer"),
    "of another model": (_other_model, r"the weights of reference.path .*changed"),
    "imported, beside a model": (_imported, "scores from imported files, not from a model with"),
    "beside a model of the hub that is not here": (_hub_name, "reference.path is nobody/nothing, but it cannot"),
    "without entropies": (_entropy, "it holds no entropy"),
}


@pytest.mark.parametrize("change, expected", BAD_STORES.values(), ids=BAD_STORES.keys())
def test_a_store_that_does_not_belong_is_refused(
    corpora: Path, stored: Path, tmp_path: Path, change: Change, expected: str
) -> None:
    store = Path(shutil.copytree(stored / "documents", tmp_path / "store"))
    tree = training_tree(corpora, tmp_path / "run")
    tree["reference"] = {"store": str(store)}
    change(store, corpora, tree)
    with pytest.raises(RankError, match=expected):
        run_ranks(train_in_process, 1, tree)


PACKED_CHANGES = {
    "another seed": ({"seed": 5}, "another order of samples"),
    "another length": ({"data": {"seq_length": 16}}, "another order of samples"),
    "attention within documents": ({"data": {"reset_attention": True}}, "data.reset_attention=false"),
    "a longer run": ({"training": {"train_tokens": 40 * 8 * 32}, "data": {"order_tokens": 20 * 8 * 32}}, "ends after"),
}


@pytest.fixture(scope="module")
def packed(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    run_ranks(score_in_process, 1, scoring_tree(corpora, folder / "store", kind="packed"))
    return folder / "store"


@pytest.mark.parametrize("changes, expected", PACKED_CHANGES.values(), ids=PACKED_CHANGES.keys())
def test_a_packed_store_serves_its_own_order_alone(
    corpora: Path, packed: Path, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    tree = training_tree(corpora, tmp_path / "run")
    tree["reference"] = {"store": str(packed)}
    for group, change in changes.items():
        tree[group] = tree[group] | change if isinstance(change, dict) else change
    with pytest.raises(RankError, match=expected):
        run_ranks(train_in_process, 1, tree)


def test_imported_log_probabilities_train_like_those_of_the_model(corpora: Path, stored: Path, tmp_path: Path) -> None:
    exact = open_store(str(stored / "exact"))
    names = [str(tmp_path / f"{name}.npy") for name in ("books", "held_out")]
    for name in names:
        np.save(name, -values_of(exact, Path(name).stem)[:, 0])
    tree = scoring_tree(corpora, tmp_path / "imported")
    del tree["reference"]
    run_ranks(score_in_process, 1, tree, tuple(names))
    for name in ("books.scores", "held_out.scores"):
        assert (tmp_path / "imported" / name).read_bytes() == (stored / "documents" / name).read_bytes()
    assert open_store(str(tmp_path / "imported")).manifest.reference["imported"] == names


def test_an_existing_store_is_not_overwritten(corpora: Path, stored: Path) -> None:
    before = files_of(stored / "documents")
    with pytest.raises(RankError, match=r"score\.output is .*, but it already exists"):
        run_ranks(score_in_process, 1, scoring_tree(corpora, stored / "documents"))
    assert files_of(stored / "documents") == before


def test_a_link_to_nothing_is_not_written_through(corpora: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(RankError, match=r"score\.output is .*link, but it is a link to .*gone, which does not exist"):
        run_ranks(score_in_process, 1, scoring_tree(corpora, tmp_path / "link"))
    assert {path.name for path in tmp_path.iterdir()} == {"link"}


def test_a_model_whose_losses_are_not_finite_is_refused(corpora: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(corpora / "reference", tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] *= float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    tree = scoring_tree(corpora, tmp_path / "scores")
    tree["reference"]["path"] = str(broken)
    with pytest.raises(RankError, match="is not finite"):
        run_ranks(score_in_process, 1, tree)
    assert not (tmp_path / "scores").exists()


def test_settings_that_contradict_each_other_are_refused() -> None:
    base = {
        "run_dir": "r",
        "model": {"config": {"model_type": "llama"}},
        "training": {"global_batch_size": 1, "train_tokens": 1},
    }
    base |= {"data": {"train": "x"}}
    for reference, setting, value in (
        ({"path": "a", "of": [{"path": "b"}]}, "reference.path", "a"),
        ({}, "reference.path", None),
        ({"of": [{"path": "b", "store": "c"}]}, "reference.of[0].store", "c"),
        ({"of": [{"path": "b", "weight": 0}]}, "reference.of[0].weight", 0),
        ({"mix": "max", "of": [{"path": "b"}]}, "reference.mix", "max"),
    ):
        with pytest.raises(UserError) as caught:
            parse_config(base | {"reference": reference})
        assert (caught.value.setting, caught.value.value) == (setting, value)


COMMANDS: dict[str, tuple[list[str], str]] = {
    "no place to write": (["score=null"], "score.output is not set"),
    "an empty place": (["score.output=."], "score.output is ., but"),
    "an unknown kind": (["score.kind=tokens"], "score.kind is tokens, but"),
    "an unknown encoding": (["score.encoding=int8"], "score.encoding is int8, but"),
    "an unknown setting": (["score.kid=packed"], "Did you mean score.kind?"),
    "shards of nothing": (["score.shard_tokens=0"], "score.shard_tokens is 0"),
    "no model": (["reference=null"], "reference.path is not set"),
    "a model that is not there": (["reference.path=/nowhere/model"], "reference.path is /nowhere/model"),
    "samples of no run": (["score.kind=packed"], "score.kind is packed, but it scores the samples of one run"),
    "a corpus that is not there": (["data.train=/nowhere/web"], "/nowhere/web"),
    "a window beyond the model's positions": (["data.seq_length=128"], "the reference supports at most 64 positions"),
    "imports for another number of corpora": (
        ["--import", "a.npy", "--import", "b.npy"],
        "--import is a.npy, b.npy, but",
    ),
    "an import that is not there": (["--import", "nowhere.npy"], "--import is nowhere.npy, but"),
    "an import of entropies": (["score.entropy=true", "--import", "a.npy"], "score.entropy is true"),
    "an import beside --verify": (["--verify", "--import", "a.npy"], "--import is a.npy, but --verify"),
    "no store to verify": (["--verify"], "scores, but it holds no manifest.json"),
    "a model without its configuration": (["reference.path=BARE"], "config.json in it cannot be read"),
    "a precision that backend plain has not": (
        ["training={precision: bf16, backend: plain}"],
        "training.precision is bf16, but",
    ),
    "a length in words": (["training.train_epochs=many"], "training.train_epochs is many, but"),
}


def test_mistakes_on_the_command_line_are_errors(corpora: Path, tmp_path: Path) -> None:
    config = smallest_config(corpora, tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(corpora / "reference", bare)
    (bare / "config.json").unlink()
    given = [[argument.replace("BARE", str(bare)) for argument in arguments] for arguments, _ in COMMANDS.values()]
    answers = run_ranks(command_lines, 1, [["score", config, *arguments] for arguments in given])[0]
    for (_, expected), (status, stderr) in zip(COMMANDS.values(), answers, strict=True):
        assert expected in sentence_of("score", status, stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"score.yaml", "bare"}


def export_checkpoint(_: World, run_dir: Path, output: Path, step: int) -> None:
    disconnect()
    main(["export", str(run_dir), str(output), "--checkpoint", str(step)])


def test_an_earlier_checkpoint_of_a_run_is_a_reference(corpora: Path, tmp_path: Path) -> None:
    tree = training_tree(corpora, tmp_path / "run") | {"objective": "clm"}
    run_ranks(train_in_process, 1, tree)
    for step in (10, 20):
        run_ranks(export_checkpoint, 1, tmp_path / "run", tmp_path / f"step-{step}", step)
    tree = training_tree(corpora, tmp_path / "next") | {"selection": {"score": "loss_drop"}}
    tree |= {"model": {"path": str(tmp_path / "step-20")}, "reference": {"path": str(tmp_path / "step-10")}}
    tree["training"]["train_tokens"] = 2 * 8 * 32
    run_ranks(train_in_process, 1, tree)
    first = records(tmp_path / "next")[0]
    assert first["loss/all"] < first["loss/reference"]
