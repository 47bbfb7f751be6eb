"""Scoring and filtering by shards: the merge equals one command, and names every shard that it lacks."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.config import parse_config
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.io.shards import WorkShard
from megatron_slm.reference.store_parts import merge_store
from tests.end_to_end.test_bad_input import command_lines, sentence_of
from tests.end_to_end.test_filter import filter_tree, make_stores
from tests.end_to_end.test_score import files_of, score_in_process, scoring_tree
from tests.gloo import RankError, run_ranks
from tests.refusal import refuses
from tests.runs import write_config

SHARDS = 8
STRETCH = 400  # tokens that a filtering reads at a time, in these tests


def score_shards(world: World, tree: dict[str, Any], count: int, *indices: int) -> None:
    from megatron_slm.build.scoring import score_corpora

    config = parse_config(tree)
    assert config.score is not None
    for index in indices:
        score_corpora(config, config.score, world, shard=WorkShard(index, count))


def score_shard_until_killed(world: World, tree: dict[str, Any], name: str, index: int) -> None:
    """Kill this process when it publishes a shard, or when it has written the first piece to the journal."""
    from megatron_slm.io.shards import Shards
    from megatron_slm.io.staging import Journal

    owner = {"write": Journal, "finish": Shards}[name]
    original = getattr(owner, name)

    def deadly(*arguments: Any) -> None:
        if name == "write":
            original(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, deadly)
    score_shards(world, tree, SHARDS, index)


def reasons(error: UserError) -> list[str]:
    return [one.reason for one in (error, *error.others)]


def test_the_merge_of_eight_shards_of_which_two_were_killed_equals_one_scoring(corpora: Path, tmp_path: Path) -> None:
    tree = scoring_tree(corpora, tmp_path / "documents", shard_tokens=512)
    expected = scoring_tree(corpora, tmp_path / "whole", shard_tokens=512)
    run_ranks(score_in_process, 1, expected)
    run_ranks(score_shards, 2, tree, SHARDS, 6, 0, 3, 4)
    for index, name in ((2, "write"), (5, "finish")):
        with pytest.raises(RankError, match="exit code -9"):
            run_ranks(score_shard_until_killed, 1, tree, name, index)
    with pytest.raises(UserError) as caught:
        merge_store(str(tmp_path / "documents"))
    found = reasons(caught.value)
    assert len(found) == 3 and "2 of its 8 shards are missing: 1,7" in found[0]
    assert "shard 2/8 is unfinished: 1 of 2 pieces" in found[1] and "shard 5/8 is unfinished: 2 of 2" in found[2]
    assert not (tmp_path / "documents").exists()
    run_ranks(score_shards, 1, tree, SHARDS, 1, 2, 5, 7, 0)
    merge_store(str(tmp_path / "documents"))
    assert files_of(tmp_path / "documents") == files_of(tmp_path / "whole")
    with refuses("score.output", tmp_path / "documents", "already exists"):
        merge_store(str(tmp_path / "documents"))


def test_the_merge_of_packed_shards_equals_one_scoring_and_finds_a_changed_shard(corpora: Path, tmp_path: Path) -> None:
    tree = scoring_tree(corpora, tmp_path / "packed", kind="packed", entropy=True)
    run_ranks(score_in_process, 1, scoring_tree(corpora, tmp_path / "whole", kind="packed", entropy=True))
    run_ranks(score_shards, 1, tree, 3, 0, 1, 2)
    part = tmp_path / ".packed.shards" / "1-of-3" / "order.scores"
    content = part.read_bytes()
    part.write_bytes(content[:100] + b"\1" + content[101:])
    with refuses("--merge", part.parent, "has changed"):
        merge_store(str(tmp_path / "packed"))
    assert not (tmp_path / "packed").exists() and not (tmp_path / ".packed.merging").exists()
    part.write_bytes(content)
    merge_store(str(tmp_path / "packed"))
    assert files_of(tmp_path / "packed") == files_of(tmp_path / "whole")


def test_shards_of_another_scoring_are_refused(corpora: Path, tmp_path: Path) -> None:
    tree = scoring_tree(corpora, tmp_path / "documents")
    run_ranks(score_shards, 1, tree, 3, 0)
    before = sorted(tmp_path.rglob("*"))
    other = tree | {"score": tree["score"] | {"entropy": True}}
    for changed, count, reason in (
        (other, 3, "score.entropy was false and is true"),
        (tree, 4, "number of shards was 3 and is 4"),
        (tree, 400, "in only [0-9]+ pieces"),
    ):
        with pytest.raises(RankError, match=reason):
            run_ranks(score_shards, 1, changed, count, 1)
    assert sorted(tmp_path.rglob("*")) == before


def filter_by_shards(_: World, tree: dict[str, Any], count: int, *indices: int, kill: bool = False) -> None:
    from megatron_slm.build import filtering

    filtering.STRETCH = STRETCH  # type: ignore[attr-defined]
    if kill:
        np.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, misc]
    config = parse_config(tree)
    assert config.filter is not None
    for index in indices:
        filtering.filter_shard(config, config.filter, WorkShard(index, count))


def killed_filter(world: World, tree: dict[str, Any], count: int, index: int) -> None:
    filter_by_shards(world, tree, count, index, kill=True)


def merge_filter(_: World, tree: dict[str, Any], merge: bool) -> list[str]:
    """Write a keep-list, and return the reasons of its errors."""
    from megatron_slm.build import filtering

    filtering.STRETCH = STRETCH  # type: ignore[attr-defined]
    config = parse_config(tree)
    assert config.filter is not None
    try:
        filtering.filter_documents(config, config.filter, merge=merge)
    except UserError as error:
        return reasons(error)
    return []


def test_the_merge_of_eight_shards_of_which_two_were_killed_equals_one_filtering(corpora: Path, tmp_path: Path) -> None:
    run_ranks(make_stores, 1, corpora, tmp_path)
    tree = filter_tree(corpora, tmp_path, tmp_path / "keep")
    run_ranks(filter_by_shards, 1, tree, SHARDS, 7, 0, 3, 4, 1)
    for index in (2, 5):
        with pytest.raises(RankError, match="exit code -9"):
            run_ranks(killed_filter, 1, tree, SHARDS, index)
    found = run_ranks(merge_filter, 1, tree, True)[0]
    assert len(found) == 3 and "1 of its 8 shards are missing: 6" in found[0]
    assert "shard 2/8 is unfinished" in found[1] and "shard 5/8 is unfinished" in found[2]
    run_ranks(filter_by_shards, 1, tree, SHARDS, 2, 5, 6, 0)
    part = tmp_path / ".keep.shards" / "3-of-8" / "total_D.npy"
    content = part.read_bytes()
    np.save(part, np.load(part) + 1)
    assert "3-of-8 has changed" in run_ranks(merge_filter, 1, tree, True)[0][0]
    part.write_bytes(content)
    assert run_ranks(merge_filter, 1, tree, True) == [[]]
    assert run_ranks(merge_filter, 1, filter_tree(corpora, tmp_path, tmp_path / "whole"), False) == [[]]
    assert (tmp_path / "keep").read_bytes() == (tmp_path / "whole").read_bytes()
    other = filter_tree(corpora, tmp_path, tmp_path / "keep")
    other["filter"]["base"], other["filter"]["reference"] = other["filter"]["reference"], other["filter"]["base"]
    (tmp_path / "keep").unlink()
    assert "filter.base (fingerprint) was" in run_ranks(merge_filter, 1, other, True)[0][0]
    # The share to keep is chosen when the shards are merged.
    assert run_ranks(merge_filter, 1, filter_tree(corpora, tmp_path, tmp_path / "keep", 0.6), True) == [[]]


def test_the_commands_take_shards_and_refuse_options_that_contradict_each_other(corpora: Path, tmp_path: Path) -> None:
    tree = scoring_tree(corpora, tmp_path / "documents")
    config = str(write_config(tmp_path / "run.yaml", tree))
    runs = [
        ["score", config, "--shard", "0/2"],
        ["score", config, "--shard", "1/2"],
        ["score", config, "--merge"],
        ["score", config, "--verify"],
        ["score", config, "--shard", "2/2"],
        ["score", config, "--shard", "0/2", "--merge"],
        ["score", config, "--shard", "0/2", "--import", "x.npy"],
    ]
    *good, beyond, both, imported = run_ranks(command_lines, 1, runs)[0]
    assert [status for status, _ in good] == [0] * 4, good
    assert "--shard is 2/2, but shards count from 0" in sentence_of("score", *beyond)
    assert "--merge is true, but --shard is also given" in sentence_of("score", *both)
    assert "--import is x.npy, but --shard is also given" in sentence_of("score", *imported)
    shutil.rmtree(tmp_path / ".documents.shards")  # the store does not need it
    assert "is intact" in run_ranks(command_lines, 1, [["score", config, "--verify"]])[0][0][1]
