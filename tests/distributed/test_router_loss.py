"""The router loss of a mixture of experts: its coefficient times its mean over all ranks and micro-steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_slm.data.loader import StepLoader
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.models.causal_lm import CausalLM
from megatron_slm.models.router import check_own_losses, find_router_loss
from tests.gloo import run_ranks
from tests.runs import LLAMA, assert_bitwise_equal, config_tree, records, train_in_process
from tests.steps import TINY_LLAMA, Case, RaggedSamples, flat, ragged, run_steps

COEFFICIENT = 10.0
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
MIXTRAL = TINY_LLAMA | {"model_type": "mixtral", "router_aux_loss_coef": COEFFICIENT} | EXPERTS
QWEN = TINY_LLAMA | {
    **{"model_type": "qwen3_moe", "router_aux_loss_coef": COEFFICIENT, "output_router_logits": True},
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
}
CLM = Case(objective="clm", stage=None, model=MIXTRAL, micro_batch_size=2, global_batch_size=6)


def brute_force(world: World, model: dict[str, Any], weights: dict[str, torch.Tensor], case: Case) -> Any:
    """Return the gradient and the mean router loss of the first step, from Hugging Face's forward with labels."""
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model))
    lm.load_state_dict({name.removeprefix("lm."): weight for name, weight in weights.items()}, strict=False)
    loader = StepLoader(RaggedSamples(), case.micro_batch_size, case.global_batch_size, False, world)
    batches = [ragged(batch) for batch in loader.load(0)]
    valid = sum(int(batch.valid_BT.sum()) for batch in batches)
    routers = []
    for batch in batches:
        labels_BT = batch.labels_BT.masked_fill(~batch.valid_BT, -100)
        arguments = {"input_ids": batch.tokens_BT, "position_ids": batch.position_ids_BT}
        found = lm(**arguments, labels=labels_BT, shift_labels=labels_BT, num_items_in_batch=torch.tensor(valid))
        plain = found.loss - COEFFICIENT * found.aux_loss
        (plain + COEFFICIENT * found.aux_loss / len(batches)).backward()
        routers.append(found.aux_loss.item())
    return {f"lm.{name}": p.grad for name, p in lm.named_parameters()}, sum(routers) / len(routers)


@pytest.mark.parametrize("model", [MIXTRAL, QWEN], ids=["mixtral", "qwen3_moe"])
def test_gradient_and_loss_are_those_of_plain_transformers(model: dict[str, Any]) -> None:
    found = run_ranks(run_steps, 1, replace(CLM, model=model))[0]
    gradient, router = run_ranks(brute_force, 1, model, found["before"], CLM)[0]
    assert found["router"] == [pytest.approx(router, rel=1e-5)]
    assert gradient.keys() == found["gradient"].keys()
    for name, expected in gradient.items():
        assert (found["gradient"][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-7, name
    without = run_ranks(run_steps, 1, replace(CLM, model=model | {"output_router_logits": False}))[0]
    gates = [name for name in gradient if "gate.weight" in name]
    assert gates and without["router"] == []
    for name in gates:
        assert (found["gradient"][name] - without["gradient"][name]).norm() > without["gradient"][name].norm()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("objective", ["clm", "slm"])
def test_a_run_on_many_ranks_equals_one_plain_process(objective: str, ranks: int) -> None:
    """The router loss depends on the micro-batch, so the one process runs the same micro-batches."""
    batch = {"micro_batch_size": 1, "global_batch_size": 12, "objective": objective, "pool": "step"}
    plain = run_ranks(run_steps, 1, Case(stage=None, model=MIXTRAL, **batch))[0]
    for found in run_ranks(run_steps, ranks, Case(stage=3, model=MIXTRAL, **batch), timeout=240):
        assert found["planned"] == plain["planned"] == found["selected"]
        assert found["router"] == pytest.approx(plain["router"], rel=1e-5)
        # Gradients, because AdamW turns the round-off of experts without a token into full steps.
        expected = flat(plain["gradient"])
        assert (flat(found["gradient"]) - expected).norm() <= 1e-5 * expected.norm()
        for sample, chosen in plain["chosen"].items():
            assert (found["chosen"][sample]["mask"] == chosen["mask"]).all()
        assert len({chosen["mask"].sum() for chosen in found["chosen"].values()}) > 2


@pytest.mark.parametrize(("stage", "ranks"), [(None, 1), (3, 2)])
def test_checkpointed_activations_change_nothing(stage: int | None, ranks: int) -> None:
    case = replace(CLM, stage=stage, objective="slm", micro_batch_size=1)
    kept, again = (run_ranks(run_steps, ranks, replace(case, checkpointing=on))[0] for on in (False, True))
    assert kept["router"] == again["router"]
    assert (flat(kept["gradient"]) - flat(again["gradient"])).norm() <= 1e-6 * flat(kept["gradient"]).norm()


@pytest.mark.parametrize("pool", ["micro_step", "step"])
def test_the_router_loss_does_not_change_the_selection(pool: str) -> None:
    case = replace(CLM, objective="slm", pool=pool)
    on, off = (
        run_ranks(run_steps, 1, replace(case, model=MIXTRAL | {"output_router_logits": on}))[0] for on in (True, False)
    )
    assert on["losses"] == off["losses"] and on["router"] and not off["router"]
    for sample, chosen in on["chosen"].items():
        assert (chosen["mask"] == off["chosen"][sample]["mask"]).all()
    assert not torch.equal(flat(on["gradient"]), flat(off["gradient"]))


def test_only_a_forward_with_gradients_has_the_router_loss() -> None:
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MIXTRAL))
    module = CausalLM(lm, router=find_router_loss(lm))
    tokens_BT = torch.arange(16)[None]
    with torch.no_grad():
        assert module(tokens_BT, tokens_BT, tokens_BT).keys() == {"loss"}
    expected = lm(tokens_BT, position_ids=tokens_BT).aux_loss
    assert module(tokens_BT, tokens_BT, tokens_BT)["router"] == expected


BAMBA = {
    **{"model_type": "bamba", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_n_heads": 4},
    **{"mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
}
DOGE = {
    **{"model_type": "doge", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "is_moe": True, "num_experts": 16},
    **{"num_experts_per_tok": 2},
}


@pytest.mark.parametrize(
    ("model", "turned_on"),
    [(BAMBA, {"z_loss_coefficient": 1e-4}), (DOGE, {"output_router_logits": True, "router_aux_loss_coef": 0.1})],
)
def test_an_unsupported_term_of_the_loss_is_refused_if_it_is_on(
    model: dict[str, Any], turned_on: dict[str, Any]
) -> None:
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model))
    check_own_losses(lm, find_router_loss(lm))
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model | turned_on))
    with pytest.raises(UserError) as caught:
        check_own_losses(lm, find_router_loss(lm))
    assert (caught.value.setting, caught.value.value) == ("architecture", type(lm).__name__)
    tokens_BT = torch.arange(8)[None]
    assert lm(tokens_BT, labels=tokens_BT).loss > 1, "the model has its own loss again"


TINY_MIXTRAL = LLAMA | {"model_type": "mixtral", "intermediate_size": 32, "router_aux_loss_coef": 0.1} | EXPERTS


def refused_of(world: World, tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        train_in_process(world, tree)
    return str(caught.value)


@pytest.mark.parametrize("backward", ["rows", "replay"])
def test_rows_and_replay_are_refused_with_a_router_loss(corpora: Path, tmp_path: Path, backward: str) -> None:
    tree = config_tree(corpora, tmp_path / "run") | {"model": {"config": TINY_MIXTRAL}}
    (sentence,) = run_ranks(refused_of, 1, tree | {"selection": {"backward": backward}})
    assert f"selection.backward is {backward}, but the student has a router loss" in sentence


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(corpora: Path, tmp_path: Path) -> None:
    steps = {"save_interval": 2, "eval_interval": 2}
    whole, parts = (config_tree(corpora, tmp_path / name, **steps) for name in ("whole", "parts"))
    for tree in (whole, parts):
        tree["model"] = {"config": TINY_MIXTRAL}
        tree["training"]["train_tokens"] = 4 * 8 * 32
    run_ranks(train_in_process, 2, whole)
    stopped = run_ranks(train_and_stop, 2, parts, 2)
    assert stopped == [2, 2]
    run_ranks(train_in_process, 2, parts)
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "parts", 4)
    assert all(record["loss/router"] > 0 for record in records(tmp_path / "parts"))


def train_and_stop(world: World, tree: dict[str, Any], step: int) -> int:
    """Stop the run after a step, by a signal, and return the last step."""
    import os
    import signal

    from megatron_slm.build.run import build_run
    from megatron_slm.config import parse_config
    from megatron_slm.training.trainer import Callback

    class Stopping(Callback):
        def on_step_start(self, state: Any) -> None:
            if state.step == step - 1:
                os.kill(os.getpid(), signal.SIGUSR2)

    run = build_run(parse_config(tree), world, [Stopping()])
    run.trainer.fit(run.state)
    return run.state.step
