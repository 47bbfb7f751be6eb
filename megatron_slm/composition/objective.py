"""Which tokens count, step by step."""

from megatron_slm.backend import TrainingEngine
from megatron_slm.config import Config
from megatron_slm.data.loader import accumulation_steps
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.selection.rule import Rule
from megatron_slm.selection.schedule import ratio_at
from megatron_slm.selection.scoring import find_score
from megatron_slm.signals.live import LiveReference
from megatron_slm.signals.settings import ReferenceSettings
from megatron_slm.training.candidates import Candidates
from megatron_slm.training.objective import CausalLanguageModeling, Objective, SelectiveLanguageModeling
from megatron_slm.training.state import Plan
from megatron_slm.types import SIGNALS


def make_rule(config: Config, world: World) -> Rule | None:
    """The rule of selection, None under CLM; the batch can be dealt, and there is what the rule needs.

    Raises:
        UserError: a batch that cannot be dealt, a score that is not there, or one that needs what is not there.
    """
    accumulation_steps(config.training.global_batch_size, config.training.micro_batch_size, world.size)
    if config.objective == "clm":
        return None
    settings = config.selection
    combined = [(f"selection.of[{index}].score", part.score) for index, part in enumerate(settings.of)]
    for setting, name in combined or [("selection.score", settings.score)]:
        _check_score(setting, name, config.reference is not None)
    rule = Rule(settings)
    _check_mix(config.reference, rule)
    return rule


def make_candidates(config: Config, rule: Rule | None, engine: TrainingEngine, min_context: int) -> Candidates | None:
    """What chooses among candidates, by the student's own scores; None where all samples are trained on."""
    if rule is None or config.candidates == 1:
        return None
    samples = config.training.micro_batch_size
    return Candidates(LiveReference(engine.module, samples), rule, samples, config.seed, min_context)


def objective_at(config: Config, plan: Plan, rule: Rule | None, min_context: int, tokens: int) -> Objective:
    """Return the objective of the step that begins after `tokens`; a function of them, so that all ranks agree."""
    ratio = None if rule is None else ratio_at(config.selection, tokens, plan.total_steps * plan.tokens_per_step)
    if rule is None or ratio is None:
        return CausalLanguageModeling()
    return SelectiveLanguageModeling(rule, ratio, config.selection.pool == "step", min_context)


def _check_mix(settings: ReferenceSettings | None, rule: Rule) -> None:
    if settings is not None and settings.of and settings.mix != "mean" and "reference.entropy" in rule.needs:
        raise UserError(
            f"reference.mix is {settings.mix}, which mixes losses, and selection.score needs reference.entropy: use "
            "reference.mix=mean, or one reference."
        )


def _check_score(setting: str, name: str, has_reference: bool) -> None:
    try:
        score = find_score(name)
    except ValueError as error:
        raise UserError(str(error).replace("selection.score", setting, 1)) from error
    unknown = [signal for signal in score.needs if signal not in SIGNALS]
    if unknown:
        raise UserError(
            f"{setting} is '{name}', which needs '{unknown[0]}', a signal that does not exist: "
            f"name one of {', '.join(SIGNALS)} in its @score(needs=(...))."
        )
    if not has_reference and any(signal.startswith("reference.") for signal in score.needs):
        raise UserError(
            f"{setting} is '{name}', which needs a reference model: set reference.path to a Hugging Face folder, "
            "or use a score that needs none (student_loss, student_entropy, random), or objective=clm."
        )
