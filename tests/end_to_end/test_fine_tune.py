"""Fine-tuning on answers: losses cover the answers alone and equal Hugging Face's, on any number of ranks."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_slm.dist import World
from tests.gloo import run_ranks
from tests.runs import LLAMA, WORDS, config_tree, megatron_slm, records, train_in_process, write_config
from tests.steps import Case, flat, run_steps

T, SAMPLES, EOD = 32, 8, 1
RATIO = 0.6


@pytest.fixture(scope="module")
def answers(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masked corpora `qa` and `held_out`, where some prompts are longer than a sample; the model `student`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from megatron_slm.prepare.documents import Fields
    from megatron_slm.prepare.inputs import find_files
    from megatron_slm.prepare.prepare import Options, prepare_corpora

    folder, draw = tmp_path_factory.mktemp("answers"), random.Random(5)
    for name, count in (("qa", 120), ("held_out", 30)):
        pairs = [(draw.choices(WORDS, k=draw.choice((0, 5, 20, 80))), draw.choices(WORDS, k=draw.randint(1, 20)))
                 for _ in range(count)]  # fmt: skip
        lines = [json.dumps({"question": " ".join(q), "answer": " ".join(a)}) for q, a in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        fields = Fields(format="prompt-completion", prompt="question", completion="answer", separator="\n")
        options = Options(tokenizer=str(corpora / "web.tokenizer"), fields=fields)
        prepare_corpora(find_files([str(folder / f"{name}.jsonl")]), str(folder / name), options)
    torch.manual_seed(8)
    tokenizer = AutoTokenizer.from_pretrained(corpora / "web.tokenizer")
    config = AutoConfig.for_model(**LLAMA, vocab_size=len(tokenizer), initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    return folder


def tree(corpora: Path, answers: Path, run_dir: Path, objective: str, ranks: int, **selection: str) -> dict[str, Any]:
    """Return a run of two steps, with a rate too small to change a loss visibly."""
    steps = {"micro_batch_size": SAMPLES // ranks, "train_tokens": 2 * SAMPLES * T, "lr": 1e-12, "eval_interval": 1}
    made = config_tree(corpora, run_dir, **steps)
    made["data"] |= {
        "train": [0.6, str(answers / "qa"), 0.4, str(corpora / "web")],
        "valid": {"held_out": str(answers / "held_out")},
    }
    chosen = {"objective": objective, "selection": {"ratio": RATIO} | selection}
    return made | chosen | {"model": {"path": str(answers / "student")}}


def losses(folder: Path, text: torch.Tensor) -> torch.Tensor:
    """Return the loss of each label of `[N, T + 1]` in float64, from full logits."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(text[:, :-1]).logits
    return cross_entropy(logits.double().transpose(1, 2), text[:, 1:], reduction="none")


def brute_force(world: World, corpora: str, answers: str) -> dict[str, float]:
    """Return the expected records of the first step, from the files: samples, masks, logits and a sort."""
    from megatron_slm.data.corpus import open_corpus
    from megatron_slm.data.samples import build_samples
    from megatron_slm.data.settings import DataSettings

    prefixes = [f"{answers}/qa", f"{corpora}/web"]
    settings = DataSettings(train=[0.6, prefixes[0], 0.4, prefixes[1]], seq_length=T)
    samples = build_samples(
        settings, [open_corpus(prefix) for prefix in prefixes],
        seed=1234, order_tokens=2 * SAMPLES * T, total_samples=2 * SAMPLES, cache=Path(answers) / "cache", world=world,
    )  # fmt: skip
    mask = np.fromfile(f"{answers}/qa.mask", dtype=np.uint8)
    first = [samples[n] for n in range(SAMPLES)]
    counts = [mask[s.offset[1:]] if s.source == 0 else np.ones(T, np.uint8) for s in first]
    assert {sample.source for sample in first} == {0, 1} and 0 < sum(c.sum() for c in counts) < SAMPLES * T
    valid = torch.from_numpy(np.stack(counts)).bool()
    text = torch.from_numpy(np.stack([sample.text for sample in first]))
    student, reference = (
        losses(path, text)[valid] for path in (Path(answers) / "student", Path(corpora) / "reference")
    )
    source = torch.tensor([[sample.source] * T for sample in first])[valid]
    kept = (student - reference).topk(int(RATIO * len(student) + 0.5)).indices
    return {
        "loss/all": float(student.mean()),
        "loss/all/qa": float(student[source == 0].mean()),
        "loss/all/web": float(student[source == 1].mean()),
        "loss/reference": float(reference.mean()),
        "loss/reference/web": float(reference[source == 1].mean()),
        "loss/selected": float(student[kept].mean()),
        "selection/ratio": len(kept) / len(student),
        "eval/held_out/loss": held_out(Path(answers)),
    }


def held_out(answers: Path) -> float:
    """Return the mean loss of the answers' tokens in windows of T, without end tokens."""
    tokens = np.fromfile(answers / "held_out.bin", dtype=np.uint16).astype(np.int64)
    mask = np.fromfile(answers / "held_out.mask", dtype=np.uint8).astype(bool)
    windows = range(0, len(tokens) - 1, T)
    found = []
    for start in windows:
        text = torch.from_numpy(tokens[start : start + T + 1])
        scored = torch.from_numpy(mask[start + 1 : start + T + 1]) & (text[1:] != EOD)
        found.append(losses(answers / "student", text[None])[0][scored])
    return float(torch.cat(found).mean())


def test_losses_and_selection_cover_only_the_answers(corpora: Path, answers: Path, tmp_path: Path) -> None:
    expected = run_ranks(brute_force, 1, str(corpora), str(answers))[0]
    for objective, ranks in (("clm", 1), ("slm", 1), ("slm", 2)):
        run_dir = tmp_path / f"{objective}{ranks}"
        run_ranks(train_in_process, ranks, tree(corpora, answers, run_dir, objective, ranks))
        found = records(run_dir)[0]
        for key in expected if objective == "slm" else ("loss/all", "eval/held_out/loss"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (objective, ranks, key)
    one, two = (records(tmp_path / f"slm{ranks}") for ranks in (1, 2))
    for first, second in zip(one, two, strict=True):
        numbers = {key: value for key, value in first.items() if value is not None and "/" in key}
        assert {key: second[key] for key in numbers} == pytest.approx(numbers, rel=1e-5)


@pytest.mark.parametrize("scope", ["rank", "sequence"])
@pytest.mark.parametrize("pool", ["micro_step", "step"])
def test_samples_without_a_valid_token_select_nothing(scope: str, pool: str) -> None:
    """Sample 0 has no valid token. It is alone on its rank, in its sequence, or in the first step of one rank."""
    case = Case(global_batch_size=2, micro_batch_size=1, scope=scope, pool=pool)
    found = run_ranks(run_steps, 2, case)[0]
    assert found["planned"] == [int(sums["selected"]) for sums in found["sums"]] == [4]  # of 0 and 7 valid tokens
    assert not found["chosen"][0]["mask"].any() and found["losses"][0] > 0
    alone = run_ranks(run_steps, 1, Case(global_batch_size=1, micro_batch_size=1, scope=scope, pool=pool, steps=2))[0]
    assert alone["planned"] == [0, 4]
    assert flat(alone["after"]).isfinite().all() and not torch.equal(flat(alone["after"]), flat(alone["before"]))


@pytest.mark.slow
def test_fine_tuning_on_gsm8k_lowers_the_loss(tmp_path: Path) -> None:
    data = os.environ.get("SLM_DATA")
    if not data:
        pytest.skip("SLM_DATA does not name the folder that holds curated/gsm8k_train.jsonl.gz")
    fields = ["--prompt-key", "meta.question", "--completion-key", "meta.solution_raw", "--separator", r"\n"]
    made = ["--train-tokenizer", "1000", "--output", str(tmp_path / "gsm8k")]
    source = ["--input", f"{data}/curated/gsm8k_train.jsonl.gz", "--format", "prompt-completion"]
    ended = megatron_slm("prepare", *source, *fields, *made)
    assert ended.returncode == 0, ended.stderr
    mask = np.fromfile(tmp_path / "gsm8k.mask", dtype=np.uint8)
    assert 0.3 < mask.mean() < 0.7
    config = {
        "run_dir": str(tmp_path / "run"),
        "objective": "clm",
        "model": {"config": LLAMA},
        "data": {"train": str(tmp_path / "gsm8k"), "seq_length": 64},
        "training": {"micro_batch_size": 8, "global_batch_size": 8, "train_tokens": 40 * 8 * 64, "lr": 3e-3},
    }
    ended = megatron_slm("train", str(write_config(tmp_path / "run.yaml", config)))
    assert ended.returncode == 0, ended.stderr
    lines = records(tmp_path / "run")
    assert lines[-1]["loss/all"] < lines[0]["loss/all"] - 1
