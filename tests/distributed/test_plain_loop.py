"""The engine against a plain loop: full logits, one process, a sort, and nothing of this package."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_slm.dist import World
from tests.gloo import run_ranks
from tests.steps import LENGTH, TINY_LLAMA, Case, RaggedSamples, flat, run_steps, valid_length

CASE = Case(steps=10, micro_batch_size=2, global_batch_size=8)


def plain_loop(_: World, start: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Train by selective language modeling in thirty lines; `start` and `reference` are weights."""
    config = AutoConfig.for_model(**TINY_LLAMA)
    student, teacher = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    student.load_state_dict({name.removeprefix("lm."): weight for name, weight in start.items()})
    teacher.load_state_dict({name.removeprefix("lm."): weight for name, weight in reference.items()})
    matrices = [p for n, p in student.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in student.named_parameters() if p.ndim == 1 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=CASE.lr, betas=(0.9, 0.95), eps=1e-8)
    norms, samples = [], RaggedSamples()
    for step in range(CASE.steps):
        chosen_losses, count = [], 0
        for micro_step in range(2):  # two ranks of two samples at a time
            ordinals = torch.arange(4) + 8 * step + 4 * micro_step
            text = torch.stack([torch.from_numpy(samples[int(n)].text) for n in ordinals])
            valid = torch.arange(LENGTH) < valid_length(ordinals)[:, None]
            losses = []
            for model in (student, teacher):
                logits = model(text[:, :-1]).logits
                losses.append(
                    cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none")[valid.flatten()]
                )
            k = int(0.6 * valid.sum() + 0.5)
            kept = (losses[0] - losses[1]).detach().argsort(descending=True)[:k]
            chosen_losses.append(losses[0][kept].sum())
            count += k
        (sum(chosen_losses) / count).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
    return {"after": {f"lm.{n}": p.detach() for n, p in student.named_parameters()}, "norms": norms}


def reference_weights(world: World) -> dict[str, torch.Tensor]:
    """Return the weights that `tests.steps.make_reference` initialises."""
    from megatron_slm.backend.plain import PlainBackend
    from megatron_slm.models.causal_lm import initialize_weights
    from tests.steps import make_student

    module, _ = make_student(PlainBackend(world), CASE)
    initialize_weights(module.lm, 2, PlainBackend(world).gathered)
    return {name: weight.detach() for name, weight in module.named_parameters()}


def test_the_engine_under_zero_3_on_two_ranks_takes_the_steps_of_a_plain_loop() -> None:
    engine = run_ranks(run_steps, 2, CASE)[0]
    plain = run_ranks(plain_loop, 1, engine["before"], run_ranks(reference_weights, 1)[0])[0]
    for update, norm in zip(engine["updates"], plain["norms"], strict=True):
        assert abs(update.grad_norm - norm) < 1e-4 * norm
    moved = (flat(plain["after"]) - flat(engine["before"])).norm()
    assert (flat(plain["after"]) - flat(engine["after"])).norm() < 1e-4 * moved
