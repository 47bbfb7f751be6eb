"""Several runs in one Python process, as in a notebook: each is what it would be in a process of its own."""

import gc
from pathlib import Path
from typing import Any

import pytest

import megatron_slm
from megatron_slm.__main__ import main
from megatron_slm.dist import World, disconnect
from tests.gloo import run_ranks
from tests.runs import assert_bitwise_equal, config_tree, train_in_process

SHORT = {"train_tokens": 4 * 8 * 32, "save_interval": 2, "eval_interval": 4, "micro_batch_size": 4}


class Failing(megatron_slm.Callback):  # type: ignore[name-defined]
    """Ends a run in its third step."""

    def on_step_start(self, state: Any) -> None:
        if state.step == 2:
            raise RuntimeError("on purpose")


def train_all(_: World, trees: list[dict[str, Any]]) -> list[int]:
    """Train one after the other in this process, which has not trained before; return the last step of each."""
    disconnect()
    return [megatron_slm.train(tree).step for tree in trees]


def tree_of(corpora: Path, run_dir: Path, stage: int | None = 3, **groups: Any) -> dict[str, Any]:
    tree = config_tree(corpora, run_dir, stage or 0, **SHORT)
    if stage is None:
        tree["training"]["backend"] = "plain"
    return tree | groups


STAGES = (3, 3, 1, 3, None, 0)


def test_each_run_is_that_of_a_process_of_its_own(corpora: Path, tmp_path: Path) -> None:
    """With a live reference, sharded at stage 3."""
    together = [tree_of(corpora, tmp_path / f"together-{n}", stage) for n, stage in enumerate(STAGES)]
    assert run_ranks(train_all, 1, together)[0] == [4] * len(STAGES)
    for stage in set(STAGES):
        run_ranks(train_in_process, 1, tree_of(corpora, tmp_path / f"alone-{stage}", stage))
    for number, stage in enumerate(STAGES):
        assert_bitwise_equal(tmp_path / f"together-{number}", tmp_path / f"alone-{stage}", 4)
        log = (tmp_path / f"together-{number}" / "log-rank0000.txt").read_text()
        assert log.count("finished: 4 steps") == 1


def train_fail_and_resume(world: World, first: dict[str, Any], failing: dict[str, Any]) -> int:
    disconnect()
    megatron_slm.train(first)
    with pytest.raises(RuntimeError, match="on purpose") as caught:
        megatron_slm.train(failing, callbacks=[Failing()])
    # The exception is kept, with all that its traceback holds, as a notebook does.
    assert caught.value.__traceback__ is not None
    with pytest.raises(megatron_slm.UserError):
        megatron_slm.train(failing | {"seed": 5})
    return megatron_slm.train(failing).step


def test_a_run_that_failed_is_resumed_in_the_same_process(corpora: Path, tmp_path: Path) -> None:
    first, failing = tree_of(corpora, tmp_path / "first"), tree_of(corpora, tmp_path / "failing")
    assert run_ranks(train_fail_and_resume, 1, first, failing)[0] == 4
    run_ranks(train_in_process, 1, tree_of(corpora, tmp_path / "whole"))
    assert_bitwise_equal(tmp_path / "failing", tmp_path / "whole", 4)


def score_train_export(_: World, tree: dict[str, Any], config: str, folder: str) -> list[str]:
    """All commands in one process; returns the names of what export wrote."""
    disconnect()
    kinds = {"packed": f"{folder}/packed", "document": f"{folder}/document"}
    for kind, store in kinds.items():
        main(["score", config, f"score.kind={kind}", f"score.output={store}"])
        run = tree | {"run_dir": f"{folder}/{kind}-run", "reference": {"store": store}}
        megatron_slm.train(run)
    main(["export", f"{folder}/packed-run", f"{folder}/out"])
    return sorted(path.name for path in Path(folder, "out").iterdir())


def test_scoring_training_and_export_follow_each_other(corpora: Path, tmp_path: Path) -> None:
    from tests.runs import write_config

    tree = tree_of(corpora, tmp_path / "run")
    config = str(write_config(tmp_path / "run.yaml", tree))
    assert "model.safetensors" in run_ranks(score_train_export, 1, tree, config, str(tmp_path))[0]


class Watching(megatron_slm.Callback):  # type: ignore[name-defined]
    """Counts the models that there are when the first step begins."""

    def __init__(self) -> None:
        self.at_first_step: int | None = None

    def on_step_start(self, state: Any) -> None:
        if self.at_first_step is None:
            self.at_first_step = models_of_this_process()


def models_of_this_process() -> int:
    from megatron_slm.models.causal_lm import CausalLM

    gc.collect()
    return sum(isinstance(thing, CausalLM) for thing in gc.get_objects())


def models_left(_: World, tree: dict[str, Any]) -> tuple[int | None, int]:
    """How many models there were at the first step, and after the run."""
    disconnect()
    watching = Watching()
    megatron_slm.train(tree, callbacks=[watching])
    return watching.at_first_step, models_of_this_process()


@pytest.mark.parametrize("stage", [None, 0, 1, 3])
def test_the_models_of_a_run_do_not_outlive_it(corpora: Path, tmp_path: Path, stage: int | None) -> None:
    assert run_ranks(models_left, 1, tree_of(corpora, tmp_path / "run", stage))[0] == (2, 0)


def test_the_model_that_a_store_is_checked_with_does_not_outlive_the_check(corpora: Path, tmp_path: Path) -> None:
    from tests.end_to_end.test_score import score_in_process

    tree = tree_of(corpora, tmp_path / "run", 3)
    run_ranks(score_in_process, 1, tree | {"score": {"output": str(tmp_path / "store"), "kind": "document"}})
    read = tree | {"reference": {"store": str(tmp_path / "store")}}
    assert run_ranks(models_left, 1, read)[0] == (1, 0)
    assert "of the same tokens" in (tmp_path / "run" / "log-rank0000.txt").read_text()
