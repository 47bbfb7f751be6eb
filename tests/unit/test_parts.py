"""Small parts of a run: schedule, decay, FLOPs, plan, records, configuration."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_slm.config import (
    OWNED_DEEPSPEED_KEYS,
    PASSED_DEEPSPEED_KEYS,
    differences_on_resume,
    dump_config,
    load_config,
    parse_config,
)
from megatron_slm.errors import UserError, refuse_missing_folder
from megatron_slm.reporting.tables import quantity
from megatron_slm.settings import parse_quantity
from megatron_slm.training.callbacks import describe, finite
from megatron_slm.training.checkpoints import cut_back
from megatron_slm.training.cost import ModelFlops, StepTokens, TokenFlops, step_flops, token_flops
from megatron_slm.training.optimizer import decay_groups, learning_rate
from megatron_slm.training.state import Plan, RunState

BASE = {
    "run_dir": "runs/a",
    "model": {"path": "m"},
    "reference": {"path": "r"},
    "data": {"train": "p"},
    "training": {"global_batch_size": 4, "train_tokens": "80B"},
}


def rate(tokens: int, schedule: str, warmup: int = 100) -> float:
    return learning_rate(tokens, train_tokens=1100, warmup_tokens=warmup, lr=2.0, min_lr=0.2, schedule=schedule)


def test_the_learning_rate_warms_up_and_comes_down() -> None:
    assert rate(50, "cosine") == 1.0 and rate(100, "cosine") == 2.0
    assert rate(600, "cosine") == pytest.approx(1.1) and rate(600, "linear") == pytest.approx(1.1)
    assert rate(350, "cosine") == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(1100, "linear") == rate(5000, "cosine") == pytest.approx(0.2)
    assert rate(5000, "constant") == 2.0 and rate(1, "constant", warmup=0) == 2.0


@pytest.mark.parametrize("tied", [True, False])
def test_norms_biases_and_embeddings_do_not_decay(tied: bool) -> None:
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=31, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group} for group in decay_groups(model))
    assert "transformer.wte.weight" in kept and "transformer.wpe.weight" in kept
    assert ("lm_head.weight" in decayed) is not tied
    assert all(name.endswith((".bias", "wte.weight", "wpe.weight")) or "ln_" in name for name in kept)
    assert {"transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_proj.weight"} <= decayed
    assert len(decayed) + len(kept) == len(names)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_count_the_weights_that_multiply(tied: bool) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"head_dim": 6}
    config = AutoConfig.for_model("llama", vocab_size=31, num_hidden_layers=3, tie_word_embeddings=tied, **shape)
    model = AutoModelForCausalLM.from_config(config)
    layer = 16 * 12 + 2 * 6 * 16 + 12 * 16 + 3 * 16 * 24 + 2 * 16
    expected = 2 * (3 * layer + 16 + 31 * 16) + 4 * 3 * 12 * 10
    assert token_flops(model, config, 10).forward == expected
    assert token_flops(model, config, 10).training == 3 * expected


@pytest.mark.parametrize(
    ("backward", "cost"),
    # A forward of what was scored before; then forward, and backward of weights (10 a token) and attention (1 a token).
    [("exact", 11 * 70 + 33 * 100), ("rows", 11 * 170 + 20 * 60 + 2 * 100), ("replay", 11 * 170 + 33 * 60)],
)
def test_a_step_costs_what_its_backward_runs(backward: str, cost: int) -> None:
    models = ModelFlops(TokenFlops(10.0, 1.0), 5.0, backward)
    tokens = StepTokens(candidates=70, trained=100, selected=60, reference=80)
    assert step_flops(models, tokens) == cost + 5 * 80
    # Ranked over the whole step, all of it is run once more; and where all tokens count, the backward is exact.
    again = dataclasses.replace(tokens, ranked_first=True)
    assert step_flops(models, again) == cost + 5 * 80 + 11 * 100
    causal = StepTokens(candidates=0, trained=100, selected=None, reference=0)
    assert step_flops(models, causal) == 33 * 100


def test_intervals_and_the_last_step_decide_what_happens() -> None:
    state = RunState(Plan(7, 4, 32, log_interval=2, eval_interval=3, save_interval=5))
    happens = {"logged": [], "evaluated": [], "saved": []}
    while not state.is_last:
        state.advance(state.next_sample + 5, selected_tokens=10, applied=state.step != 2)
        for name, steps in happens.items():
            if getattr(state, f"is_{name}"):
                steps.append(state.step)
    assert happens == {"logged": [2, 3, 4, 6, 7], "evaluated": [3, 6, 7], "saved": [5, 7]}
    counted = {"step": 7, "consumed_samples": 28, "consumed_selected_tokens": 70, "skipped_updates": 1}
    counted |= {"skipped_in_a_row": 0, "order_fingerprint": "", "next_sample": 35, "failed_saves": 0, "carried": {}}  # type: ignore[dict-item]
    assert state.progress() == counted
    assert state.first_sample == 30
    assert state.consumed_tokens == 28 * 32
    restored = RunState(state.plan)
    restored.restore(state.progress())
    assert restored == state
    of_old = {name: counted[name] for name in counted if name not in ("next_sample", "failed_saves", "carried")}
    restored.restore(of_old)
    assert restored.next_sample == restored.consumed_samples == 28
    with pytest.raises(UserError) as caught:
        RunState(state.plan, order_fingerprint="of other corpora").restore(state.progress())
    assert (caught.value.setting, caught.value.value) == ("checkpoint", "of another order of samples")


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    cut_back(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    cut_back(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    cut_back(path, 9)
    assert len(path.read_text().splitlines()) == 2


def test_json_holds_null_for_what_is_not_a_number() -> None:
    assert finite({"a": math.nan, "b": math.inf, "c": 1.5, "d": None}) == {"a": None, "b": None, "c": 1.5, "d": None}


def test_the_console_line_names_what_matters() -> None:
    state = RunState(Plan(10, 4, 256, 1, 5, 5), step=4, consumed_samples=4000)
    losses = {"loss/all": 3.0, "loss/selected": 4.0, "loss/unselected": 2.0, "loss/reference": 2.5}
    speed = {"tokens_per_second": 12345.0, "step_seconds": 2.0, "mfu": 0.42}
    record = losses | speed | {"selection/threshold": 0.5, "lr": 1e-4, "grad_norm": 1.0, "eval/math/loss": 2.25}
    line = " | ".join(describe(state, record))
    for part in ("step 4/10", "all 3.0000 selected 4.0000 unselected 2.0000", "cut 0.500", "12.3k tokens/s MFU 42.0%"):
        assert part in line
    assert "ETA 0:00:12" in line and "eval/math/loss 2.2500" in line
    assert quantity(80e9) == "80B" and quantity(None) == "n/a"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("80e9", 80 * 10**9),
        ("80B", 80 * 10**9),
        ("80_000", 80000),
        ("0.1B", 10**8),
        ("1e-4", 1e-4),
        ("2 K", 2000),
        ("20k", 20000),
    ],
)
def test_quantities_are_read_as_people_write_them(text: str, number: float) -> None:
    assert parse_quantity(text) == number and type(parse_quantity(text)) is type(number)


@pytest.mark.parametrize("text", ["fast", "B", "", "1.2.3", "e5"])
def test_other_text_is_left_alone(text: str) -> None:
    assert parse_quantity(text) == text


def test_a_dumped_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = parse_config(BASE)
    (tmp_path / "a.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "a.yaml"), []) == config
    assert config.training.train_tokens == 80 * 10**9


def test_overrides_reach_into_groups(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(BASE))
    overrides = ["training.lr=3e-4", "reference=null", "data.train=[0.5, a, 0.5, b]", "selection.score=random"]
    config = load_config(str(tmp_path / "a.yaml"), overrides)
    assert config.training.lr == 3e-4 and config.reference is None
    assert config.data.train == [0.5, "a", 0.5, "b"] and config.selection.score == "random"


def test_numbers_of_hugging_face_and_deepspeed_are_read_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "model: {config: {model_type: llama, rms_norm_eps: 1e-5, rope_parameters: {rope_theta: 5e5}, bos: '7',\n"
        "                 _name_or_path: 7B, hidden_act: silu, time_step_limit: [0.0, .inf]}}\n"
        "deepspeed: {zero_optimization: {stage: 3, reduce_bucket_size: 5e8, sub_group_size: 1B,\n"
        "            offload_param: {device: cpu, nvme_path: 1e5}}, compile: {mode: auto}}\n"
        + yaml.safe_dump({key: BASE[key] for key in ("run_dir", "reference", "data", "training")})
    )
    config = load_config(str(tmp_path / "a.yaml"), ["model.config.initializer_range=2e-2"])
    assert config.model.config == {
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500_000},
        "bos": "7",
        "_name_or_path": "7B",
        "hidden_act": "silu",
        "time_step_limit": [0.0, math.inf],
        "initializer_range": 2e-2,
    }
    zero = {"stage": 3, "reduce_bucket_size": 5 * 10**8, "sub_group_size": 10**9}
    zero["offload_param"] = {"device": "cpu", "nvme_path": "1e5"}
    assert config.deepspeed == {"zero_optimization": zero, "compile": {"mode": "auto"}}


def test_a_group_that_is_empty_in_yaml_has_its_defaults(tmp_path: Path) -> None:
    empty = BASE | {"selection": None, "deepspeed": None, "data": {"train": "p", "valid": None}}
    assert parse_config(empty) == parse_config(BASE)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(empty))
    assert load_config(str(tmp_path / "a.yaml"), ["selection.ratio=0.5"]).selection.ratio == 0.5


def test_the_keys_that_deepspeed_gets_are_deepspeeds() -> None:
    folder = Path(importlib.util.find_spec("deepspeed").submodule_search_locations[0])
    text = "".join(
        path.read_text() for name in ("runtime", "comm", "monitor") for path in folder.glob(f"{name}/**/*.py")
    )
    text += (folder / "profiling" / "constants.py").read_text() + (folder / "utils" / "timer.py").read_text()
    for key in (*PASSED_DEEPSPEED_KEYS, *OWNED_DEEPSPEED_KEYS):
        assert f'"{key}"' in text or f"'{key}'" in text, key


def test_what_may_change_on_resume_is_a_short_list() -> None:
    stored = parse_config(BASE)
    allowed = {"train_tokens": 5, "save_interval": 5, "keep_checkpoints": 9, "micro_batch_size": 2}
    training = BASE["training"] | allowed | {"activation_checkpointing": "full"}
    data = BASE["data"] | {"skip_samples": [[8, 16]]}
    assert differences_on_resume(stored, parse_config(BASE | {"training": training, "data": data})) == []
    changed = parse_config(BASE | {"seed": 2, "selection": {"ratio": 0.5}})
    assert differences_on_resume(stored, changed) == [
        "seed was 1234 and is now 2",
        "selection.ratio was 0.6 and is now 0.5",
    ]


def test_a_path_that_looks_like_a_number_stays_a_path() -> None:
    tree = BASE | {"data": {"train": "80B"}, "model": {"path": "1e5"}}
    config = parse_config(tree)
    assert config.data.train == "80B" and config.model.path == "1e5"


def test_an_error_of_a_type_has_all_four_fields() -> None:
    with pytest.raises(UserError) as caught:
        parse_config(BASE | {"training": BASE["training"] | {"lr": "fast"}})
    error = caught.value
    assert (error.setting, error.value, error.reason) == ("training.lr", "fast", "it must be a number")
    assert error.remedy and not error.others


def test_losses_are_ranked_in_float32_whatever_the_model() -> None:
    from megatron_slm.models.head import token_loss

    hidden, weight = torch.randn(3, 8, dtype=torch.bfloat16), torch.randn(11, 8, dtype=torch.bfloat16)
    assert token_loss(hidden, weight, torch.tensor([1, 2, 3]))[0].dtype == torch.float32


def test_an_error_is_one_sentence_made_from_its_fields() -> None:
    error = UserError("data.seq_length", 4096, "the model supports at most 2048 positions", "Use 2048 or less")
    assert str(error) == ("data.seq_length is 4096, but the model supports at most 2048 positions. Use 2048 or less.")
    unset = UserError("reference.path", None, "score needs a model", "Name the model")
    assert str(unset) == "reference.path is not set, but score needs a model. Name the model."
    assert str(UserError(*error.args, unset)) == f"{error}\n{unset}"
    assert UserError(*error.args, unset).sentences() == [str(error), str(unset)]


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    for path in ("models/ref", "./ref", "/nowhere/ref", "a/b/c"):
        with pytest.raises(UserError) as caught:
            refuse_missing_folder("reference.path", path)
        assert (caught.value.setting, caught.value.value) == ("reference.path", path)
    for path in ("models/base", "gpt2", "mistralai/Mistral-7B-v0.1"):
        refuse_missing_folder("reference.path", path)
