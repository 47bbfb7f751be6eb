"""Weights that are read from a checkpoint in pieces, compared with the saved ones."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_slm.backend import EngineSettings
from megatron_slm.dist import World
from megatron_slm.training.optimizer import adamw
from megatron_slm.training.settings import TrainingSettings
from tests.gloo import run_ranks
from tests.steps import TINY_LLAMA, Case, make_backend, make_student, weights

ODD = TINY_LLAMA | {"hidden_size": 40, "intermediate_size": 41, "vocab_size": 101}


def save_and_read(world: World, stage: int | None, tied: bool, precision: torch.dtype, folder: str) -> list[str]:
    """Return the names of weights that are not read from a checkpoint as they were saved."""
    case = Case(stage=stage, precision=precision, model=ODD | {"tie_word_embeddings": tied})
    backend = make_backend(world, case)
    module, _ = make_student(backend, case)
    optimizer = adamw(module, TrainingSettings(global_batch_size=8, train_tokens=1, lr=1e-3), world.device)
    engine = backend.training_engine(module, optimizer, EngineSettings(4, 1, 1.0, precision))
    engine.save(Path(folder))
    expected = weights(backend, module)
    torch.distributed.barrier()
    found = backend.stored_weights(Path(folder))
    assert found.keys() == {"lm.lm_head.weight", *expected}
    with mock.patch("megatron_slm.backend.stored.PIECE_BYTES", 500):
        wrong = [name for name, value in expected.items() if not torch.equal(found[name].read(torch.float32), value)]
        wrong = [name for name in wrong if not torch.equal(found[name].read(precision).float(), expected[name])]
        for name, value in expected.items():
            changed = value.clone()
            changed.view(-1)[-1] += 1
            same = found[name].equals(value.to(precision), precision)
            wrong += [name] * (not same or found[name].equals(changed.to(precision), precision))
    assert (found["lm.lm_head.weight"] == found["lm.model.embed_tokens.weight"]) is tied
    return wrong


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_stored_weights_equal_the_saved_ones(stage: int | None, ranks: int, tmp_path: Path) -> None:
    for found in run_ranks(save_and_read, ranks, stage, ranks == 3, torch.float32, str(tmp_path)):
        assert found == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stored_weights_of_a_bf16_run_round_to_its_weights(stage: int, tmp_path: Path) -> None:
    for found in run_ranks(save_and_read, 2, stage, False, torch.bfloat16, str(tmp_path)):
        assert found == []
