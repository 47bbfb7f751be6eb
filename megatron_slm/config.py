"""One YAML file a run. The parts own their settings; this file assembles, reads and compares them."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_slm.config_file import read_tree
from megatron_slm.data.settings import DataSettings
from megatron_slm.errors import UserError
from megatron_slm.io.paths import PathText, expand_path
from megatron_slm.models.settings import ModelSettings
from megatron_slm.reference.settings import FilterSettings, ReferenceSettings, ScoreSettings
from megatron_slm.selection.settings import SelectionSettings
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
"""Set by this system, and the settings to use instead, if there are any."""

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
"""What of DeepSpeed's works here; other kinds of parallelism and its own data pipeline do not."""

MAY_CHANGE_ON_RESUME = (
    "callbacks",
    "training.train_tokens",
    "training.train_epochs",
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
    "reference.micro_batch_size",
    "reference.store",
    "data.skip_samples",
    "data.keep",
)

_QUANTITY = re.compile(r"([+-]?[\d_]*\.?[\d_]*(?:[eE][+-]?\d+)?)\s*([KMBTkmbt]?)", re.ASCII)
_SURELY_QUANTITY = re.compile(r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+|[KMBT])", re.ASCII)
_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass
class Config:
    """A run, whole.

    run_dir    folder of the run: configuration, metrics, checkpoints; a run resumes where it stands [path; ours]
    objective  slm: selected tokens count; clm: all of them do [; the paper, section 2.2]
    seed       of the order of samples, the weights from scratch, dropout, and the score `random` [; Megatron]
    callbacks  classes of yours, told of every step: package.module:Class, made without arguments [; Hugging Face]
    deepspeed  passed to DeepSpeed, except what this system owns [; DeepSpeed]
    """

    run_dir: PathText
    model: ModelSettings
    data: DataSettings
    training: TrainingSettings
    objective: Literal["clm", "slm"] = "slm"
    seed: int = 1234
    callbacks: list[str] = field(default_factory=list)
    reference: ReferenceSettings | None = None
    score: ScoreSettings | None = None
    filter: FilterSettings | None = None
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    deepspeed: dict[str, Any] = field(default_factory=lambda: {"zero_optimization": {"stage": 3}})

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ValueError("seed must be 0 or more, and below 2147483648")
        step = self.training.global_batch_size * self.data.seq_length * self.candidates
        if self.data.order_tokens is not None and self.data.order_tokens < step:
            raise ValueError(
                f"data.order_tokens is {self.data.order_tokens}, less than the {step} tokens of one step "
                "(training.global_batch_size * data.seq_length, and selection.candidates times that): raise it or "
                "leave it out"
            )
        _check_deepspeed(self.deepspeed)
        self.deepspeed = _expand_paths(self.deepspeed, "deepspeed")

    @property
    def candidates(self) -> int:
        """Samples that are read for each that is trained on."""
        return self.selection.candidates if self.objective == "slm" else 1


def _check_deepspeed(section: dict[str, Any]) -> None:
    for key in section:
        if key in OWNED_DEEPSPEED_KEYS:
            ours = OWNED_DEEPSPEED_KEYS[key]
            raise ValueError(
                f"deepspeed.{key} is set by this system: {f'use {ours} instead' if ours else 'leave it out'}"
            )
        if key not in PASSED_DEEPSPEED_KEYS:
            raise ValueError(f"deepspeed.{key} is not passed to DeepSpeed: {_advice(key, PASSED_DEEPSPEED_KEYS, '')}")
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"deepspeed.zero_optimization is {zero!r}: give a group such as {{stage: 3}}, or leave it out")
    stage = zero.get("stage", 3)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed.zero_optimization.stage is {stage!r}: use 0, 1, 2 or 3")


def _expand_paths(value: Any, name: str) -> Any:
    """Expand the paths in DeepSpeed's section, such as `nvme_path`, at any depth."""
    if isinstance(value, dict):
        return {key: _expand_paths(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, str) and name.endswith("path"):
        try:
            return expand_path(value)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
    return value


def load_config(path: str, overrides: list[str]) -> Config:
    """The configuration in a YAML file, with `a.b=c` overrides applied.

    Raises:
        UserError: the file, a key, a type or a value is wrong; a sentence each.
    """
    return parse_config(read_tree(path, overrides))


def parse_config(tree: dict[str, Any]) -> Config:
    """A configuration from nested dicts.

    Raises:
        UserError: as `load_config`.
    """
    _refuse_unknown_keys(tree, Config, "")
    tree = _parse_quantities(tree, Config)
    try:
        config = TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        raise UserError(_sentence(error)) from error
    _refuse_infinite(dataclasses.asdict(config), "")
    return config


def dump_config(config: Config) -> str:
    """The configuration as YAML, every setting resolved. Reading it back gives the same configuration."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def differences_on_resume(stored: Config, wanted: Config) -> list[str]:
    """What differs between a run folder's configuration and the one asked for, and may not."""
    before, after = (_flatten(dataclasses.asdict(config)) for config in (stored, wanted))
    return [
        f"{key} was {before.get(key)} and is now {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in MAY_CHANGE_ON_RESUME and not _is_not_the_runs(key)
    ]


def _is_not_the_runs(key: str) -> bool:
    """Where the run lies, and what another command reads."""
    return key == "run_dir" or key.partition(".")[0] in ("score", "filter")


def _settings_class(hint: Any) -> type | None:
    """The dataclass in a type hint such as `ReferenceSettings | None`."""
    candidates = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((c for c in candidates if dataclasses.is_dataclass(c)), None)  # type: ignore[return-value]


def _entry_class(hint: Any) -> type | None:
    """The dataclass in a type hint such as `list[PartSettings]`."""
    return _settings_class(typing.get_args(hint)[0]) if typing.get_origin(hint) is list else None


def _refuse_unknown_keys(tree: Any, settings: type, prefix: str) -> None:
    if not isinstance(tree, dict):
        raise UserError(f"{prefix.rstrip('.')} must be a group of settings, but is {tree!r}.")
    hints = typing.get_type_hints(settings)
    for key, value in tree.items():
        if key not in hints:
            raise UserError(f"{prefix}{key} is not a setting: {_advice(str(key), hints, prefix)}")
        if bool not in _kinds(hints[key]) and _holds_truth(value):
            raise UserError(f"{prefix}{key} is {value!r}: it takes no true or false.")
        nested = _settings_class(hints[key])
        if nested is not None and value is not None:
            _refuse_unknown_keys(value, nested, f"{prefix}{key}.")
        entry = _entry_class(hints[key])
        if entry is not None and isinstance(value, list):
            for index, group in enumerate(value):
                _refuse_unknown_keys(group, entry, f"{prefix}{key}[{index}].")


def _advice(key: str, known: Iterable[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(sorted(known))}."


def _holds_truth(value: Any) -> bool:
    return any(map(_holds_truth, value)) if isinstance(value, list) else isinstance(value, bool)


def _kinds(hint: Any) -> set[Any]:
    """All types that occur in a hint."""
    return {hint}.union(*map(_kinds, typing.get_args(hint)))


def _refuse_infinite(value: Any, name: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}: give a finite number.")
    if isinstance(value, dict):
        for key, item in value.items():
            # Some Hugging Face configurations hold infinite limits.
            if name != "model" or key != "config":
                _refuse_infinite(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_infinite(item, name)


def _parse_quantities(tree: dict[str, Any], settings: type) -> dict[str, Any]:
    """Numbers that YAML reads as text (80e9, 80B, 80_000) become numbers where a number is wanted.

    Groups that are empty in YAML are left to their defaults.
    """
    hints = typing.get_type_hints(settings)
    parsed = {}
    for key, value in tree.items():
        nested = _settings_class(hints[key])
        entry = _entry_class(hints[key])
        wanted = _kinds(hints[key])
        if value is None and _is_group(hints[key]):
            continue
        if nested is not None and isinstance(value, dict):
            value = _parse_quantities(value, nested)
        elif entry is not None and isinstance(value, list):
            value = [_parse_quantities(group, entry) for group in value]
        elif hints[key] == dict[str, Any]:
            value = _parse_foreign(value)
        elif str not in wanted and wanted & {int, float}:
            value = _parse_numbers(value, int in wanted)
        parsed[key] = value
    return parsed


def _parse_numbers(value: Any, whole: bool) -> Any:
    """Text as numbers, at any depth of a list; those without a fraction as int where one is wanted."""
    if isinstance(value, list):
        return [_parse_numbers(item, whole) for item in value]
    if isinstance(value, str):
        return parse_quantity(value)
    return int(value) if whole and isinstance(value, float) and value.is_integer() else value


def _is_group(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict


def _parse_foreign(value: Any) -> Any:
    """1e-5, 5e8 and 80B as numbers, at any depth of a group that others define; their names and paths stay text."""
    if isinstance(value, dict):
        return {k: item if re.search("name|path", str(k)) else _parse_foreign(item) for k, item in value.items()}
    if isinstance(value, list):
        return [_parse_foreign(item) for item in value]
    return parse_quantity(value) if isinstance(value, str) and _SURELY_QUANTITY.fullmatch(value) else value


def parse_quantity(text: str) -> int | float | str:
    """80e9, 80B, 80_000_000_000 and 0.1B as numbers; any other text as it is."""
    match = _QUANTITY.fullmatch(text.strip())
    try:
        number = float(match[1].replace("_", "")) * _SUFFIX[match[2].upper()] if match else None
    except ValueError:
        number = None
    if number is None:
        return text
    return int(number) if number.is_integer() else number


def _sentence(error: ValidationError) -> str:
    """The first thing that pydantic found, as a sentence."""
    errors = error.errors(include_url=False)
    # Of a setting that may be of several types, what a type's own check says names the mistake best.
    first = next((found for found in errors if found["type"] == "value_error"), errors[0])
    name = ".".join(str(part) for part in first["loc"] if not str(part).endswith("]") and part not in ("str", "int"))
    is_short = first["type"] == "missing" and isinstance(first["loc"][-1], int)
    if is_short or (first["type"] in ("tuple_type", "too_long")):
        name = name.rpartition(".")[0] if is_short else name
        return f"{name} is {first['input']!r}: give a list of numbers such as [10, 12]."
    if first["type"] in ("missing", "missing_argument"):
        return f"{name} is missing: add it to the configuration."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        value = first["input"]
        setting = message.split()[0]
        if isinstance(value, dict) and setting in value:
            return f"{name}{'.' if name else ''}{setting} is {value[setting]!r}: {message}."
        end = "" if message.endswith((".", "?")) else "."
        # A validator of one setting does not know its name.
        colon = " " if message.startswith("is ") else ": "
        return f"{name}{colon}{message}{end}" if name else f"{message}{end}"
    message = message.replace("valid dictionary", "group such as {key: value}").replace("valid string", "text")
    return f"{name} is {first['input']!r}: {message[0].lower()}{message[1:]}."


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
