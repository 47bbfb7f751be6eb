"""The loops in examples/your_loop: several ranks with unequal counts train like one rank that selects by a sort."""

import importlib.util
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from megatron_slm.dist import World
from megatron_slm.selection import Rule, SelectionSettings
from tests.gloo import run_ranks

FOLDER = Path(__file__).parents[2] / "examples" / "your_loop"
VOCABULARY, LENGTH = 31, 10
RULES = {
    "hard": SelectionSettings(ratio=0.6),
    "soft": SelectionSettings(ratio=0.6, weighting="soft", temperature=0.5),
}


def example(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def toy(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))


def texts(micro_steps: int = 2, samples: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Return the micro-batches of all ranks; the number of valid tokens differs, and the first sample has none."""
    chance = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(micro_steps):
        lengths = torch.randint(0, LENGTH + 1, (samples,), generator=chance).mul(torch.arange(samples) > 0)
        tokens = torch.randint(VOCABULARY, (samples, LENGTH + 1), generator=chance)
        batches.append((tokens, torch.arange(LENGTH) < lengths[:, None]))
    return batches


def part(world: World, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return this rank's samples of each micro-batch."""
    return [
        tuple(column.tensor_split(world.size)[world.rank] for column in batch)  # type: ignore[misc]
        for batch in batches
    ]


def sorted_gradient() -> Tensor:
    """Return the gradient of the summed loss of the highest 60 % of each micro-batch, divided once."""
    student, reference = toy(1), toy(2)
    total, count = torch.zeros(()), 0
    for tokens, valid in texts():
        losses = [
            cross_entropy(model(tokens[:, :-1])[valid], tokens[:, 1:][valid], reduction="none")
            for model in (student, reference)
        ]
        kept = (losses[0] - losses[1]).argsort(descending=True)[: int(0.6 * len(losses[0]) + 0.5)]
        total, count = total + losses[0][kept].sum(), count + len(kept)
    (total / count).backward()
    return gradient(student)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def plain_gradient(_: World, rule: str) -> Tensor:
    student = toy(1)
    example("plain").train_step(student, toy(2), Rule(RULES[rule]), texts())
    return gradient(student)


def fsdp2_gradient(world: World, rule: str) -> Tensor:
    loop = example("fsdp2")
    student, reference = loop.shard(toy(1)), loop.shard(toy(2))
    loop.train_step(student, reference, Rule(RULES[rule]), part(world, texts()))
    return torch.cat([parameter.grad.full_tensor().flatten() for parameter in student.parameters()])


def test_the_plain_loop_has_the_gradient_of_a_selection_by_sorting() -> None:
    torch.testing.assert_close(run_ranks(plain_gradient, 1, "hard")[0], sorted_gradient())


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_fsdp2_on_several_ranks_has_the_gradient_of_the_plain_loop(rule: str, ranks: int) -> None:
    alone = run_ranks(plain_gradient, 1, rule)[0]
    for found in run_ranks(fsdp2_gradient, ranks, rule):
        torch.testing.assert_close(found, alone)


def causal_lm(seed: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.steps import TINY_LLAMA

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def plain_weights(_: World, rule: str, micro_steps: int) -> dict[str, Any]:
    """Return the weights after six micro-batches of the plain loop with SGD, `micro_steps` per step."""
    student, reference = causal_lm(1), causal_lm(2)
    start, losses = weights(student), []
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    batches = texts(micro_steps=6, samples=4)
    for first in range(0, 6, micro_steps):
        models = (lambda tokens, model=model: model(tokens).logits for model in (student, reference))
        part = batches[first : first + micro_steps]
        losses.append(example("plain").train_step(*models, Rule(RULES[rule]), part))
        optimizer.step()
        optimizer.zero_grad()
    return {"start": start, "weights": weights(student), "losses": losses}


def hugging_face_weights(world: World, rule: str, folder: str, micro_steps: int) -> dict[str, Any]:
    """Return the same from Hugging Face's Trainer, and the evaluation losses of this and of the unchanged Trainer."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(example("hf_trainer").SelectiveTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    samples = []
    for tokens, valid in texts(micro_steps=6, samples=4):
        for text, counts in zip(tokens, valid, strict=True):
            labels = text.where(torch.cat([torch.tensor([True]), counts]), -100)
            samples.append({"input_ids": text, "labels": labels, "attention_mask": torch.ones_like(text)})
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        per_device_train_batch_size=4 // world.size,
        gradient_accumulation_steps=micro_steps,
        num_train_epochs=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    student = causal_lm(1)
    trainer = InOrder(student, arguments, train_dataset=samples, reference=causal_lm(2), rule=Rule(RULES[rule]))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    held_out = [each.evaluate(samples)["eval_loss"] for each in (trainer, Trainer(student, arguments))]
    return {"weights": weights(student), "losses": losses, "held_out": held_out}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("rule", "micro_steps"), [("hard", 2), ("hard", 4), ("soft", 2)])
def test_hugging_faces_trainer_takes_the_steps_of_the_plain_loop(
    rule: str, micro_steps: int, ranks: int, tmp_path: Path
) -> None:
    """With four micro-batches per step, the second step has only the remaining two of six."""
    plain = run_ranks(plain_weights, 1, rule, micro_steps)[0]
    moved = (plain["weights"] - plain["start"]).norm()
    for found in run_ranks(hugging_face_weights, ranks, rule, str(tmp_path), micro_steps):
        assert (found["weights"] - plain["weights"]).norm() <= 1e-4 * moved
        # The Trainer rounds what it logs.
        assert found["losses"] == pytest.approx(plain["losses"], rel=1e-3)
        assert found["held_out"][0] == found["held_out"][1]


def steps_of_a_stream(_: World, folder: str) -> int:
    """Return the number of steps trained: five, although an epoch of the stream ends after three."""
    from torch.utils.data import IterableDataset
    from transformers import TrainingArguments

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            for tokens, _ in texts(micro_steps=6, samples=4):
                yield from ({"input_ids": text, "labels": text} for text in tokens)

    arguments = TrainingArguments(
        folder, use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=5, report_to=[]
    )
    rule = Rule(RULES["hard"])
    trainer = example("hf_trainer").SelectiveTrainer(
        causal_lm(1), arguments, train_dataset=Stream(), reference=causal_lm(2), rule=rule
    )
    return trainer.train().global_step


def test_hugging_faces_trainer_restarts_a_stream_that_has_ended(tmp_path: Path) -> None:
    assert run_ranks(steps_of_a_stream, 1, str(tmp_path)) == [5]


def test_the_plain_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / "plain.py"), run_name="__main__")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20 and losses[-1] < losses[0]


def test_the_examples_use_the_selection_core_alone() -> None:
    for path in FOLDER.glob("*.py"):
        found = [line for line in path.read_text().splitlines() if "megatron_slm" in line and "import" in line]
        assert found and all(line.startswith("from megatron_slm.selection import") for line in found)
