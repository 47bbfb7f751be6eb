"""The observed tokens of a run: chosen from its corpora, and recorded while it trains or at its checkpoints."""

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from megatron_slm.backend import Backend
from megatron_slm.backend.plain import PlainBackend
from megatron_slm.build.corpora import Corpora, open_beside, open_corpora, open_observed
from megatron_slm.build.models import make_backend, starting_model, student_config
from megatron_slm.build.objective import objective_at
from megatron_slm.build.plan import settle
from megatron_slm.build.references import check_reference, make_reference
from megatron_slm.build.resolve import Resolved
from megatron_slm.config import Config
from megatron_slm.data.corpus import Corpus
from megatron_slm.data.observed import ObservedFolder, ObservedTokens
from megatron_slm.dist import World, agree, gather_objects
from megatron_slm.errors import AgreedError, UserError
from megatron_slm.io.progress import Meter
from megatron_slm.liveness.activity import Activity, Phase
from megatron_slm.models.causal_lm import CausalLM
from megatron_slm.models.pretrained import pretrained_config, weights_fingerprint
from megatron_slm.models.transformers_internals import tied_weights
from megatron_slm.reference.references import LiveReference, MixedReference, Reference
from megatron_slm.reference.settings import ReferenceSettings
from megatron_slm.run_directory import RunDirectory
from megatron_slm.selection.rule import Rule, ratio_at
from megatron_slm.selection.settings import SelectionSettings, rule_in_words
from megatron_slm.signals import columns_of
from megatron_slm.training.checkpoints import CheckpointStore, saved_steps
from megatron_slm.training.observer import Observer, Recorder, TokenScorer
from megatron_slm.training.settings import ObserveSettings
from megatron_slm.training.state import Plan

logger = logging.getLogger(__name__)


def make_observer(
    resolved: Resolved,
    reference: Reference,
    module: nn.Module,
    folder: ObservedFolder,
    activity: Activity,
    world: World,
) -> Observer:
    """Return the callback that records the observed tokens of a run; every rank calls it.

    Args:
        resolved: the result of the first phase of the run, with `training.observe`.
        reference: of the run; a store holds no losses of the observed tokens, so it is not recorded.
        module: the student, as its engine runs it.
        folder: the folder to write.
        activity: receives the phase of this rank.
        world: this rank.

    Raises:
        AgreedError: the folder holds other tokens, or cannot be written.
    """
    config, plan, rule, observe = resolved.config, resolved.plan, resolved.rule, resolved.config.training.observe
    assert observe is not None
    tokens = _choose(config, resolved.corpora, resolved.observed, observe.tokens)
    agree(lambda: folder.begin(tokens) if world.is_main else None)
    recorder = _recorder(config, reference if _is_live(reference) else None, rule, tokens, folder, world)
    if world.is_main:
        logger.info("observing %d windows every %d steps, in %s", len(tokens), observe.interval, folder.path)
    objective = partial(objective_at, config, plan, rule, 0, world)
    return Observer(recorder, module, observe.interval, objective, partial(_selection_facts, config, plan), activity)


def _choose(config: Config, corpora: Corpora, observed: dict[str, Corpus], num_tokens: int) -> ObservedTokens:
    data = config.data
    return ObservedTokens(observed, num_tokens, data.seq_length, corpora.tokenizer.eos_token_id, data.reset_attention)


def _is_live(reference: Reference) -> bool:
    """Return True if a reference can score any text: all of its parts are models, not stores."""
    if isinstance(reference, MixedReference):
        return all(map(_is_live, reference.parts))
    return isinstance(reference, LiveReference)


def _reference_facts(config: Config, world: World) -> dict[str, Any]:
    """Return the paths and fingerprints of the references; every rank calls it, and rank 0 alone hashes the weights."""
    paths = [str(part.path) for part in config.references]
    prints = gather_objects([weights_fingerprint(path) for path in paths] if world.is_main else [])[0]
    return {"paths": paths, "fingerprints": prints}


def _selection_facts(config: Config, plan: Plan, tokens: int) -> dict[str, Any]:
    """Return the rule of the step that begins after `tokens` trained tokens, for the metadata."""
    selection = config.selection
    return {"rule": rule_in_words(selection), "ratio": ratio_at(selection, tokens, plan.total_tokens)}


@dataclasses.dataclass(frozen=True)
class TokenAnalysis:
    """What `analyze tokens` is to score.

    run_dir    directory of the run
    folder     folder for the losses
    corpora    PREFIX by name; empty for those that the folder holds, or that the run observes or evaluates
    num_tokens tokens to observe; None for those that the folder holds, or that the run observes
    reference  Hugging Face folder of a reference; None for the run's own
    """

    run_dir: str
    folder: Path
    corpora: dict[str, str]
    num_tokens: int | None
    reference: str | None


def analyze_tokens(config: Config, analysis: TokenAnalysis, world: World, activity: Activity) -> list[int]:
    """Record the observed tokens at all checkpoints of a run that are not recorded yet; every rank calls it.

    Returns:
        All recorded steps.

    Raises:
        AgreedError: an error that the user can correct, the same on every rank.
    """
    directory = RunDirectory(analysis.run_dir, world)
    folder = ObservedFolder(analysis.folder)
    steps = gather_objects(saved_steps(directory.checkpoints))[0]
    if not steps and not agree(folder.steps):
        reason = "it holds no checkpoint, and no step was recorded while it trained"
        raise AgreedError("RUN_DIR", analysis.run_dir, reason, "Wait for the first checkpoint, or set training.observe")
    corpora = agree(lambda: open_corpora(config.data))
    config, plan = agree(lambda: settle(config, corpora, world.device.type, reads_document_store=False))
    observed = agree(lambda: _observed(config, analysis, folder, corpora))
    tokens = _choose(config, corpora, observed, agree(lambda: _num_tokens(config, analysis, folder)))
    agree(lambda: folder.begin(tokens) if world.is_main else None)
    scored = config if analysis.reference is None else _with_reference(config, analysis.reference)
    activity.enter(Phase.MODEL)
    missing = sorted({0, *steps} - set(gather_objects(folder.steps())[0]))
    if missing or (scored.references and not folder.has_reference):
        backend = PlainBackend(world)  # every rank holds the whole model, and scores its share of the windows
        rule = Rule(scored.selection) if scored.objective == "slm" else None
        recorder = _recorder(scored, _load_references(scored, corpora, backend), rule, tokens, folder, world)
        student = _Student(scored, directory, corpora, backend, world)
        activity.follow(student.module)
        recorder.record_reference()
        with Meter(len(missing), "checkpoints", shown=world.is_main) as meter:
            for done, step in enumerate(missing, 1):
                activity.enter(Phase.RESTORE)
                if student.load(step):
                    activity.enter(Phase.EVALUATION)
                    trained = step * plan.tokens_per_step
                    objective = objective_at(scored, plan, rule, 0, world, trained)
                    recorder.record(student.module, step, objective, _selection_facts(scored, plan, trained))
                meter.reach(done)
    return gather_objects(folder.steps())[0]


def _recorder(
    config: Config,
    reference: Reference | None,
    rule: Rule | None,
    tokens: ObservedTokens,
    folder: ObservedFolder,
    world: World,
) -> Recorder:
    return Recorder(
        TokenScorer(tokens, config.training.micro_batch_size, config.seed, world),
        folder,
        reference,
        _reference_facts(config, world) if reference is not None else {},
        columns_of("reference", rule.needs if rule else ()),
        world,
    )


def _observed(config: Config, analysis: TokenAnalysis, folder: ObservedFolder, corpora: Corpora) -> dict[str, Corpus]:
    named = analysis.corpora
    if not named and folder.exists:
        named = {corpus["name"]: corpus["prefix"] for corpus in folder.facts()["corpora"]}
    if named:
        return {name: open_beside(prefix, "--corpus", corpora) for name, prefix in named.items()}
    if config.training.observe is not None:
        return open_observed(config.training.observe, corpora)
    if not corpora.valid:
        reason = "the run has no evaluation set to observe"
        raise UserError("RUN_DIR", analysis.run_dir, reason, "Name a corpus with --corpus NAME=PREFIX")
    return corpora.valid


def _num_tokens(config: Config, analysis: TokenAnalysis, folder: ObservedFolder) -> int:
    if analysis.num_tokens is not None:
        return analysis.num_tokens
    if folder.exists:
        return int(folder.facts()["num_tokens"])
    return (config.training.observe or ObserveSettings()).tokens


def _with_reference(config: Config, path: str) -> Config:
    """Return a configuration that selects by its own rule with another reference; a plain run uses the default rule."""
    selection = config.selection if config.objective == "slm" else SelectionSettings()
    return dataclasses.replace(
        config, objective="slm", selection=selection, reference=ReferenceSettings(path=path, shard=False)
    )


def _load_references(config: Config, corpora: Corpora, backend: Backend) -> Reference | None:
    """Load the references of a run whose models exist; None if there is none, or one is only a store."""
    if not config.references or any(part.path is None for part in config.references):
        return None
    parts = [dataclasses.replace(part, store=None) for part in config.references]
    checked = agree(lambda: [check_reference(part, corpora, config.data.seq_length) for part in parts])
    return make_reference(config, checked, backend)[0]


class _Student:
    """The student of a run, whole on every rank, with the weights of one checkpoint after another.

    Args:
        config: of the run.
        directory: its run directory.
        corpora: of the run.
        backend: holds the student.
        world: this rank.
    """

    def __init__(
        self, config: Config, directory: RunDirectory, corpora: Corpora, backend: Backend, world: World
    ) -> None:
        self._checkpoints = CheckpointStore(directory.checkpoints, world)
        self._backend_of_run = make_backend(config, world)
        hf_config = agree(lambda: _student_config(directory, config, corpora))
        self._holds_start = True
        try:
            lm = starting_model(config, hf_config, backend, world)
        except UserError as error:
            logger.warning("step 0 is not recorded: %s", error)
            self._holds_start = False
            lm = starting_model(config, hf_config, backend, world, weights=False)
        self.module = CausalLM(lm)
        backend.frozen_engine(self.module, shard=False)

    @torch.no_grad()
    def load(self, step: int) -> bool:
        """Read the weights of a step; return False if they are not there. Every rank calls it, step 0 first."""
        if step == 0:
            return self._holds_start
        checkpoint = self._checkpoints.newest(step)
        if checkpoint is None:
            logger.warning("the checkpoint of step %d was removed or is damaged; it is left out", step)
            return False
        stored = self._backend_of_run.stored_weights(checkpoint)
        state = self.module.state_dict()
        absent = state.keys() - stored.keys() - {f"lm.{name}" for name in tied_weights(self.module.lm)}
        if absent:
            reason = f"it lacks weights of the model, such as {min(absent)}"
            raise UserError("checkpoint", checkpoint, reason, "Restore it, or RUN_DIR/model")
        for name in state.keys() & stored.keys():
            state[name].copy_(stored[name].read(state[name].dtype))
        return True


def _student_config(directory: RunDirectory, config: Config, corpora: Corpora) -> PretrainedConfig:
    if directory.holds_starting_files:
        return pretrained_config(str(directory.path / "model"), "model", config.model.trust_remote_code)
    return student_config(config, corpora)
