"""The objective of a run: the selection rule, and the objects that apply it."""

from megatron_slm.backend import TrainingEngine
from megatron_slm.config import Config
from megatron_slm.data.loader import accumulation_steps
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.reference.references import LiveReference
from megatron_slm.reference.settings import ReferenceSettings
from megatron_slm.selection.rule import Rule, ratio_at
from megatron_slm.selection.scores import find_score
from megatron_slm.signals import COLUMNS, SIGNALS, columns_of
from megatron_slm.training.candidates import Candidates
from megatron_slm.training.objective import CausalLanguageModeling, Objective, SelectiveLanguageModeling
from megatron_slm.training.state import Plan


def make_rule(config: Config, world: World) -> Rule | None:
    """Return the selection rule; None under CLM.

    Raises:
        UserError: the batch cannot be divided among the ranks, a score does not exist, or a score needs a signal that
            this run does not have.
    """
    accumulation_steps(config.training.global_batch_size, config.training.micro_batch_size, world.data.size)
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
    """Return the choice among candidates by the student's own scores; None if every sample is trained on."""
    if rule is None or config.candidates == 1:
        return None
    samples = config.training.micro_batch_size
    return Candidates(LiveReference(engine.module, samples), rule, samples, config.seed, min_context)


def objective_at(
    config: Config, plan: Plan, rule: Rule | None, min_context: int, world: World, tokens: int
) -> Objective:
    """Return the objective of the step that begins after `tokens` trained tokens; it is the same on all ranks."""
    ratio = None if rule is None else ratio_at(config.selection, tokens, plan.total_tokens)
    if rule is None or ratio is None:
        return CausalLanguageModeling(world.data.group)
    return SelectiveLanguageModeling(rule, ratio, config.selection.pool == "step", min_context, world.data.group)


def _check_mix(settings: ReferenceSettings | None, rule: Rule) -> None:
    if settings is None or not settings.of or settings.mix == "mean":
        return
    for column in columns_of("reference", rule.needs):
        if not COLUMNS[column].is_log_probability:
            reason = f"it mixes losses only, and selection.score needs reference.{column}"
            raise UserError("reference.mix", settings.mix, reason, "Use reference.mix=mean, or one reference")


def _check_score(setting: str, name: str, has_reference: bool) -> None:
    score = find_score(name, setting)
    unknown = [signal for signal in score.needs if signal not in SIGNALS]
    if unknown:
        reason = f"it needs the signal '{unknown[0]}', which does not exist"
        raise UserError(setting, name, reason, f"Name one of {', '.join(SIGNALS)} in its @score(needs=(...))")
    if not has_reference and any(signal.startswith("reference.") for signal in score.needs):
        remedy = (
            "Set reference.path to a Hugging Face folder, use a score that needs no reference (student_loss, "
            "student_entropy, random), or set objective=clm"
        )
        raise UserError(setting, name, "it needs a reference model, and reference.path is not set", remedy)
