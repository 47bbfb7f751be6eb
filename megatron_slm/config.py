"""The configuration of a run: one YAML file, checked by the settings classes of the parts."""

import dataclasses
import difflib
import json
import math
import os
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import field, fields
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PlainValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from megatron_slm.config_file import read_tree
from megatron_slm.data.settings import DataSettings
from megatron_slm.errors import UserError
from megatron_slm.models.settings import ModelSettings
from megatron_slm.reference.settings import FilterSettings, PartSettings, ReferenceSettings, ScoreSettings
from megatron_slm.selection.settings import SelectionSettings
from megatron_slm.settings import STRICT, Foreign, Group, PathText, Whole, expand_path, parse_foreign
from megatron_slm.training.settings import TrainingSettings

OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "training.clip_grad",
    "optimizer": "training.lr, training.weight_decay, training.adam_*",
    "scheduler": "training.schedule, training.warmup_tokens, training.min_lr",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.precision (gradients are accumulated in float32)",
    "communication_data_type": None,
    "gradient_allreduce_op": None,
    "gradient_predivide_factor": None,
    "managed_gradient_accumulation": None,
    "prescale_gradients": None,
    "steps_per_print": None,
    "zero_allow_untested_optimizer": None,
    "zero_force_ds_cpu_optimizer": None,
}
"""DeepSpeed's settings that this package sets, and the settings to use instead; None if there are none."""

PASSED_DEEPSPEED_KEYS = (
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "comet",
    "comms_logger",
    "compile",
    "csv_monitor",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "log_level",
    "memory_breakdown",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "weight_quantization",
    "zero_optimization",
)
"""DeepSpeed's settings that users may set. Its other kinds of parallelism and its data pipeline are not supported."""

NOT_COMPARED = ("run_dir", "score", "filter")
"""Settings that may differ on resume, because they name the run directory, or because other commands read them."""

MAY_CHANGE_ON_RESUME = (
    "callbacks",
    "training.train_tokens",
    "training.train_epochs",
    "training.loggers",
    "training.log_interval",
    "training.eval_interval",
    "training.save_interval",
    "training.keep_checkpoints",
    "training.histogram_interval",
    "training.token_table_interval",
    "training.spike_sigma",
    "training.profile_steps",
    "reference.check_windows",
    "training.micro_batch_size",
    "training.activation_checkpointing",
    "training.timeout_minutes",
    "training.hang_seconds",
    "training.observe",
    "reference.micro_batch_size",
    "reference.store",
    "data.skip_samples",
    "data.keep",
)


def _read_callback(entry: Any) -> Any:
    """Return an entry of `callbacks`: `package.module:Class`, or a group of `class` and `args`."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, dict) and entry.keys() <= {"class", "args"} and isinstance(entry.get("class"), str):
        arguments = entry.get("args") or {}
        if isinstance(arguments, dict) and all(isinstance(name, str) for name in arguments):
            return {"class": entry["class"], "args": parse_foreign(arguments)}
    reason = "a callback is package.module:Class, or {class: package.module:Class, args: {name: value}}"
    raise UserError("", entry, reason, "Write one of the two forms")


CallbackEntry = Annotated[str | dict[str, Any], PlainValidator(_read_callback)]


@dataclass(config=STRICT)
class Config:
    """Settings of the run as a whole.

    run_dir    directory of the run: its configuration, metrics and checkpoints. A run that was interrupted resumes from
               its run directory [path; ours]
    objective  slm: train on selected tokens; clm: train on all tokens [; the paper, section 2.2]
    seed       seed of the order of samples, the weights of a new model, dropout, and the score `random` [; Megatron]
    callbacks  your own callbacks, each as package.module:Class or {class: package.module:Class, args: {name: value}}
               [; Hugging Face]
    deepspeed  settings of DeepSpeed, except those that this package sets [; DeepSpeed]
    """

    run_dir: PathText
    model: ModelSettings
    data: DataSettings
    training: TrainingSettings
    objective: Literal["clm", "slm"] = "slm"
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = 1234
    callbacks: list[CallbackEntry] = field(default_factory=list)
    reference: ReferenceSettings | None = None
    score: ScoreSettings | None = None
    filter: FilterSettings | None = None
    selection: Group[SelectionSettings] = field(default_factory=SelectionSettings)
    deepspeed: Foreign = field(default_factory=lambda: {"zero_optimization": {"stage": 3}})

    def __post_init__(self) -> None:
        step = self.training.global_batch_size * self.data.seq_length * self.candidates
        if self.data.order_tokens is not None and self.data.order_tokens < step:
            reason = f"a step reads {step} tokens: training.global_batch_size * data.seq_length * selection.candidates"
            raise UserError("data.order_tokens", self.data.order_tokens, reason, f"Use {step} or more, or remove it")
        _check_deepspeed(self.deepspeed)
        self.deepspeed = _read_deepspeed(self.deepspeed, "deepspeed")

    @property
    def references(self) -> list[PartSettings]:
        """The references of the run; none under CLM."""
        return self.reference.parts if self.reference is not None and self.objective == "slm" else []

    @property
    def candidates(self) -> int:
        """Samples to read per sample to train on."""
        return self.selection.candidates if self.objective == "slm" else 1


def _check_deepspeed(section: dict[str, Any]) -> None:
    for key, value in section.items():
        if key in OWNED_DEEPSPEED_KEYS:
            ours = OWNED_DEEPSPEED_KEYS[key]
            remedy = f"Use {ours} instead" if ours else "Remove it"
            raise UserError(f"deepspeed.{key}", value, "this package sets it", remedy)
        if key not in PASSED_DEEPSPEED_KEYS:
            remedy = _nearest(f"deepspeed.{key}", [f"deepspeed.{name}" for name in PASSED_DEEPSPEED_KEYS])
            raise UserError(f"deepspeed.{key}", value, "this package does not pass it to DeepSpeed", remedy)
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict):
        remedy = "Write a group such as {stage: 3}, or remove it"
        raise UserError("deepspeed.zero_optimization", zero, "DeepSpeed needs a group of settings", remedy)
    stage = zero.get("stage", 3)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError("deepspeed.zero_optimization.stage", stage, "ZeRO has no such stage", "Use 0, 1, 2 or 3")


def _read_deepspeed(value: Any, name: str) -> Any:
    """Return DeepSpeed's section with its paths expanded, such as `nvme_path`, at any depth."""
    if isinstance(value, dict):
        return {key: _read_deepspeed(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_read_deepspeed(item, name) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(name, value, *_PROBLEMS["finite_number"])
    if isinstance(value, str) and name.endswith("path"):
        try:
            return expand_path(value)
        except UserError as error:
            raise UserError(name, *error.args[1:]) from error
    return value


def load_config(path: str, overrides: list[str]) -> Config:
    """Return the configuration in a YAML file, with `a.b=c` overrides applied.

    Raises:
        UserError: the file cannot be read, or settings are wrong; `others` holds all but the first.
    """
    return parse_config(read_tree(path, overrides))


def load_run_config(run_dir: str, setting: str = "RUN_DIR") -> Config:
    """Return the configuration of the run in a run directory, which may have moved.

    Raises:
        UserError: it is no run directory, or its configuration cannot be read.
    """
    path = f"{run_dir}/config.yaml"
    if not os.path.exists(path):
        raise UserError(setting, run_dir, "it holds no config.yaml", "Pass the directory of a run")
    return load_config(path, [f"run_dir={json.dumps(str(run_dir))}"])


def parse_config(tree: dict[str, Any]) -> Config:
    """Return the configuration in nested dicts.

    Raises:
        UserError: settings are wrong; `others` holds all but the first.
    """
    try:
        return TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        # Unknown settings come first, because one may be the misspelt name of a missing setting.
        found = sorted(error.errors(include_url=False), key=lambda details: details["type"] not in _UNKNOWN)
        first, *others = map(_user_error, found)
        raise UserError(*first.args, *others) from error


def dump_config(config: Config) -> str:
    """Return the configuration as YAML with every setting. Reading it back gives the same configuration."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def setting_groups(settings: type[Any] = Config, group: str = "") -> Iterator[tuple[str, type[Any]]]:
    """Yield the settings classes, each with the full name of its group; `Config` first, with an empty name."""
    yield group, settings
    for name, hint in typing.get_type_hints(settings).items():
        for nested in (hint, *typing.get_args(hint)):
            if isinstance(nested, type) and dataclasses.is_dataclass(nested):
                yield from setting_groups(nested, f"{group}.{name}".removeprefix("."))


def setting_names() -> list[str]:
    """Return the full names of all settings and groups, such as `selection.of.ratio`."""
    groups = setting_groups()
    return [f"{group}.{setting.name}".removeprefix(".") for group, kind in groups for setting in fields(kind)]


def differences_on_resume(stored: Config, wanted: Config) -> list[str]:
    """Return a phrase with both values for each setting that differs and may not change on resume."""
    before, after = (_flatten(dataclasses.asdict(config)) for config in (stored, wanted))
    return [
        f"{key} was {before.get(key)} and is now {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(f"{key}.".startswith(f"{name}.") for name in MAY_CHANGE_ON_RESUME)
        and key.partition(".")[0] not in NOT_COMPARED
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")

_PROBLEMS = {
    "missing": ("it is required", "Set it in the configuration"),
    "int_type": ("it must be a whole number", "Write one such as 8, 80e9 or 80B"),
    "float_type": ("it must be a number", "Write one such as 0.1, 1e-4 or 80B"),
    "finite_number": ("it must be a finite number", "Write one such as 0.1, 1e-4 or 80B"),
    "bool_type": ("it is a switch", "Use true or false"),
    "string_type": ("it must be text", "Put it in quotes"),
    "list_type": ("it must be a list", "Write it in brackets, such as [a, b]"),
    "tuple_type": ("it must be a list of numbers", "Write it in brackets, such as [10, 12]"),
    "too_long": ("it must be a list of {max_length} numbers", "Write it in brackets, such as [10, 12]"),
    "too_short": ("it must be a list of two numbers", "Write it in brackets, such as [10, 12]"),
    "dict_type": ("it must be a group of settings", "Write a group such as {{key: value}}"),
    "dataclass_type": ("it must be a group of settings", "Write a group such as {{key: value}}"),
    "literal_error": ("there is no such choice", "Use {expected}"),
    "greater_than": ("it must be above {gt:.15g}", "Use a larger value"),
    "greater_than_equal": ("it must be {ge:.15g} or more", "Use a larger value"),
    "less_than": ("it must be below {lt:.15g}", "Use a smaller value"),
    "less_than_equal": ("it must be {le:.15g} or less", "Use a smaller value"),
}
"""Reason and remedy for each type of pydantic error; braces stand for values of the error's context."""


def _user_error(details: ErrorDetails) -> UserError:
    """Return an error of pydantic as a user error, with the full name of its setting."""
    kind, location, value = details["type"], details["loc"], details["input"]
    context = {"message": details["msg"]} | details.get("ctx", {})
    if kind == "missing" and isinstance(location[-1], int):
        kind, location = "too_short", location[:-1]
    name = _name(location)
    if isinstance(error := context.get("error"), UserError):
        return UserError(".".join(filter(None, (name, error.setting))), *error.args[1:])
    if kind in _UNKNOWN:
        value = "null" if value is None else value
        return UserError(name, value, "there is no such setting", _nearest(name, setting_names()))
    reason, remedy = _PROBLEMS.get(kind, ("it is not valid ({message})", "Correct it"))
    return UserError(name, None if kind == "missing" else value, reason.format(**context), remedy.format(**context))


def _name(location: Sequence[str | int]) -> str:
    """Return the full name of a setting, such as `selection.of[0].ratio`, from its place in the configuration."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _nearest(name: str, known: Sequence[str]) -> str:
    """Return the remedy for an unknown setting: the same name in another group, or the nearest name in its own."""
    group, _, key = name.rpartition(".")
    plain = re.sub(r"\[\d+\]", "", group)
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == plain]
    prefix = f"{group}." if group else ""
    if len(elsewhere := [other for other in known if other.rpartition(".")[2] == key]) == 1:
        return f"Did you mean {elsewhere[0]}?"
    if near := difflib.get_close_matches(key, siblings, n=1, cutoff=0.5):
        return f"Did you mean {prefix}{near[0]}?"
    return f"Use one of {', '.join(prefix + sibling for sibling in sorted(siblings))}"
