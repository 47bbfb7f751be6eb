"""The Hugging Face configuration of the student, from the group `model.config`.

Every key must have an effect. Hugging Face keeps unknown keys without an error, and nothing reads them.

Rotary positions are set in one group, `rope_parameters`. Before transformers 5 they were set by `rope_theta` and
`rope_scaling`, and both are accepted here. Hugging Face translates them while it builds a configuration. But if both
forms are given, it silently drops one, and it does not translate keys that are set on an existing configuration.
"""

import copy
import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from megatron_slm.errors import UserError
from megatron_slm.models.pretrained import one_line, pretrained_config
from megatron_slm.models.settings import ModelSettings

READ_OF_EVERY_MODEL = {
    *("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tie_word_embeddings", "use_cache"),
    *("initializer_range", "initializer_factor", "init_std", "gradient_checkpointing", "quantization_config"),
}
"""Attributes that every model or `from_pretrained` reads, although not every configuration declares them."""

READ_BY_THE_BASE_CLASS = {
    *("model_type", "name_or_path", "num_labels", "torch_dtype", "output_attentions", "per_layer_config"),
    *("attn_implementation", "experts_implementation"),
}
"""Arguments of `PretrainedConfig` that are not fields. Those that are properties can also be set later."""

ROTARY = {"rope_parameters", "rope_theta", "rope_scaling"}
ROTARY_OF_EVERY_TYPE = ("rope_theta", "partial_rotary_factor")
"""Rotary parameters that are kept when the type of scaling changes; the others belong to one type."""


def model_config(settings: ModelSettings, vocab_size: int, special_ids: dict[str, int | None]) -> PretrainedConfig:
    """Return the Hugging Face configuration of the student.

    Args:
        settings: the group `model`.
        vocab_size: number of entries in the corpus's tokenizer; the vocabulary size of a model from scratch.
        special_ids: `bos_token_id` and others, for a model from scratch.

    Raises:
        UserError: the model type is unknown, a key has no effect, or the vocabulary is smaller than the tokenizer's.
    """
    # A copy, because Hugging Face writes to nested groups.
    wanted = copy.deepcopy(settings.config)
    config = pretrained_config(settings.path, "model", settings.trust_remote_code) if settings.path else None
    try:
        if config is not None:
            _change(config, wanted, "model.config", settings.path)
        else:
            multiple = settings.make_vocab_size_divisible_by
            padded_size = -(-vocab_size // multiple) * multiple
            config = _from_scratch(wanted, {"vocab_size": padded_size, **special_ids})
    except UserError:
        raise
    except Exception as error:
        reason = f"Hugging Face cannot build a configuration from it ({one_line(error)})"
        raise UserError("model.config", settings.config, reason, "Change it") from error
    if config.vocab_size < vocab_size:
        raise UserError(
            "model.config.vocab_size",
            config.vocab_size,
            f"the corpus's tokenizer has {vocab_size} entries",
            "Prepare the corpus with the model's own tokenizer, or set a larger size",
        )
    return config


def _from_scratch(wanted: dict[str, Any], defaults: dict[str, Any]) -> PretrainedConfig:
    model_type = str(wanted["model_type"])
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, CONFIG_MAPPING, n=1)
        advice = f"Did you mean {near[0]}?" if near else "Use one of Hugging Face's model types"
        raise UserError("model.config.model_type", model_type, "Hugging Face has no such model type", advice)
    kind = CONFIG_MAPPING[model_type]
    names = kind.attribute_map
    _refuse_two_values(wanted, names, "model.config")
    if not ROTARY & _declared(kind):
        for key in ROTARY & wanted.keys():
            _refuse_key(kind, key, wanted[key], "model.config", ())
    for key in ROTARY & wanted.keys():
        if isinstance(wanted[key], dict):
            wanted[key] = _with_rope_type(wanted[key], f"model.config.{key}")
    given = {names.get(key, key) for key in wanted}
    defaults = {key: value for key, value in defaults.items() if names.get(key, key) not in given}
    config = AutoConfig.for_model(**copy.deepcopy(defaults | wanted))
    _refuse_unknown(config, wanted, "model.config", built=False)
    if not hasattr(config, "rope_parameters") or not ROTARY & wanted.keys():
        return config
    # `config` holds the class's own translation of older names, which can depend on the types of its layers.
    requested = _pop_rotary(wanted, "model.config")
    without = AutoConfig.for_model(**copy.deepcopy(defaults | wanted))
    _set_rotary(config, without.rope_parameters, requested, "model.config")
    return config


def _change(config: PretrainedConfig, wanted: dict[str, Any], name: str, path: str | None) -> None:
    """Change an existing configuration in place; nested configurations are changed key by key."""
    _refuse_two_values(wanted, config.attribute_map, name)
    _refuse_unknown(config, wanted, name, built=True)
    kind = wanted.pop("model_type", config.model_type)
    if kind != config.model_type:
        raise UserError(
            f"{name}.model_type",
            kind,
            f"model.path is {path}, a model of type {config.model_type}",
            f"Remove {name}.model_type, or remove model.path to train from scratch",
        )
    if hasattr(config, "rope_parameters"):
        before = copy.deepcopy(config.rope_parameters)
        if ROTARY & wanted.keys():
            _set_rotary(config, before, _pop_rotary(wanted, name), name)
    for key, value in wanted.items():
        part = vars(config).get(key)
        if isinstance(part, PretrainedConfig) and isinstance(value, dict):
            _change(part, value, f"{name}.{key}", path)
        else:
            setattr(config, key, value)


def _refuse_two_values(wanted: dict[str, Any], names: dict[str, str], group: str) -> None:
    """Raise a UserError if two names of one attribute (`n_positions`, `max_position_embeddings`) differ in value."""
    seen: dict[str, str] = {}
    for key, value in wanted.items():
        other = seen.setdefault(names.get(key, key), key)
        if wanted[other] != value:
            raise UserError(
                f"{group}.{other}",
                wanted[other],
                f"{group}.{key} is {value}, and they are two names of one attribute",
                "Remove one of them",
            )


def _refuse_unknown(config: PretrainedConfig, wanted: dict[str, Any], group: str, *, built: bool) -> None:
    """Raise a UserError if a key has no effect: Hugging Face would keep it, but nothing would read it.

    Args:
        config: a configuration of the model's class.
        wanted: the keys to set, with their values.
        group: the name of `wanted`.
        built: the keys are set after construction, so those that only the constructor reads have no effect.
    """
    known = _known(config, built)
    for key, value in wanted.items():
        part = vars(config).get(key)
        if isinstance(part, PretrainedConfig) and isinstance(value, dict):
            _refuse_unknown(part, value, f"{group}.{key}", built=built)
        # Keys that begin with an underscore are Hugging Face's own, from a `config.json`.
        elif key not in known and not key.startswith("_") and not _is_read_by_the_code(config, key, built):
            _refuse_key(type(config), key, value, group, known)


def _refuse_key(kind: type, key: str, value: Any, group: str, known: Iterable[str]) -> NoReturn:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    reason = f"{kind.__name__} has no such attribute"
    remedy = f"Did you mean {near[0]}?" if near else "Remove it"
    if key in {field.name for field in dataclasses.fields(ModelSettings)}:
        remedy = f"Set model.{key} instead"
    if key in ROTARY:
        reason, remedy = f"{reason}, because its positions are not rotary", "Remove it"
    raise UserError(f"{group}.{key}", value, reason, remedy)


def _declared(kind: type) -> set[str]:
    """Return the attributes that a configuration class declares."""
    return {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()


def _known(config: PretrainedConfig, built: bool) -> set[str]:
    kind = type(config)
    known = _declared(kind) | READ_OF_EVERY_MODEL | {*config.attribute_map}
    # A class that comes with a model may declare its attributes in its constructor.
    known |= {name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "args", "kwargs")}
    if hasattr(config, "rope_parameters"):
        known |= ROTARY
    if not built:
        return known | READ_BY_THE_BASE_CLASS
    # Every key of its `config.json` may be changed, except those that only the constructor of the base class reads.
    known |= {"model_type", *(key for key in vars(config) if not key.startswith("_"))}
    return known | {key for key in READ_BY_THE_BASE_CLASS if isinstance(getattr(kind, key, None), property)}


def _is_read_by_the_code(config: PretrainedConfig, key: str, built: bool) -> bool:
    """Return whether the code of a model reads this attribute, although its configuration class does not declare it.

    Some constructors of configurations read older names, and some models read optional attributes.
    """
    home = Path(inspect.getfile(type(config))).parent
    ours = type(config).__module__.startswith("transformers.models.")
    patterns = ["*.py"] if not ours else ["modeling_*.py"] if built else ["modeling_*.py", "configuration_*.py"]
    word = re.compile(rf"(?:\.|[\"']){re.escape(key)}\b")
    files = (file for pattern in patterns for file in home.glob(pattern))
    return any(word.search(file.read_text(encoding="utf-8")) for file in files)


def _with_rope_type(parameters: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a copy of rotary parameters with the older key `type` renamed to `rope_type`, at every depth.

    Args:
        parameters: flat, or by layer type.
        name: name of the parameters, for the error.

    Raises:
        UserError: they hold both keys, with different values.
    """
    copied: dict[str, Any] = {}
    for key, value in parameters.items():
        copied[key] = _with_rope_type(value, f"{name}.{key}") if isinstance(value, dict) else value
    if "type" in copied:
        older = copied.pop("type")
        if copied.setdefault("rope_type", older) != older:
            reason = f"rope_type is {copied['rope_type']}, and they are two names of one parameter"
            raise UserError(f"{name}.type", older, reason, "Remove type")
    return copied


def _pop_rotary(wanted: dict[str, Any], group: str) -> dict[str, Any]:
    """Remove all keys of rotary positions from `wanted`, and return the `rope_parameters` that they request.

    Args:
        wanted: `model.config`, or a group in it.
        group: name of `wanted`.

    Returns:
        The parameters, flat or by layer type.

    Raises:
        UserError: two keys contradict each other.
    """
    given = {key: wanted.pop(key) for key in sorted(ROTARY & wanted.keys())}
    requested: dict[str, Any] = {}
    if "rope_parameters" in given:
        requested = _with_rope_type(given["rope_parameters"] or {}, f"{group}.rope_parameters")
    older: dict[str, Any] = {}
    if "rope_scaling" in given:
        scaling = given["rope_scaling"]
        older = {"rope_type": "default"} if scaling is None else _with_rope_type(scaling, f"{group}.rope_scaling")
    if "rope_theta" in given:
        older = _joined(older, {"rope_theta": given["rope_theta"]}, group, given)
    return _joined(requested, older, group, given)


def _set_rotary(config: PretrainedConfig, before: dict[str, Any] | None, requested: dict[str, Any], group: str) -> None:
    """Set `rope_parameters` to those from before, updated with the requested ones.

    Args:
        config: the configuration to change.
        before: parameters that stay unless others are requested.
        requested: from `_pop_rotary`.
        group: name of the configuration's group, for the error.

    Raises:
        UserError: the class has separate parameters for several layer types, and the requested ones name no type.
    """
    declared = _declared(type(config))
    for key in (ROTARY - {"rope_parameters"} - declared) & vars(config).keys():
        delattr(config, key)  # nothing reads it, and an export would hold both forms
    if "rope_theta" in declared and "rope_theta" in requested:
        config.rope_theta = requested["rope_theta"]
    now, before = config.rope_parameters or {}, before or {}
    # A class may have translated older keys itself, each to another layer type.
    if now and (_holds(now, requested) or (now != before and _has_each(now, requested))):
        return
    if not _is_nested(requested) and _is_nested(before):
        # Flat parameters belong to the layers with full attention, as when the classes translate older files.
        if not isinstance(before.get("full_attention"), dict):
            raise UserError(
                f"{group}.rope_parameters",
                requested,
                f"{type(config).__name__} has separate rotary positions for several types of layers",
                f"Set them in one of {', '.join(sorted(before))}",
            )
        requested = {"full_attention": requested}
    if _is_nested(requested):
        changed = {kind: _updated(before.get(kind) or {}, part) for kind, part in requested.items()}
        config.rope_parameters = before | changed
    else:
        config.rope_parameters = _updated(before, requested)
    config.standardize_rope_params()
    config.validate_rope()


def _joined(one: dict[str, Any], other: dict[str, Any], group: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the union of parameters without contradictions; flat ones belong to the layers with full attention."""
    if _is_nested(one) and other and not _is_nested(other):
        other = {"full_attention": other}
    if _is_nested(other) and one and not _is_nested(one):
        one = {"full_attention": one}
    joined = dict(one)
    for key, value in other.items():
        if key in joined and isinstance(joined[key], dict) and isinstance(value, dict):
            joined[key] = _joined(joined[key], value, group, given)
        elif key in joined and joined[key] != value:
            names = " and ".join(f"{group}.{name}" for name in given)
            raise UserError(
                f"{group}.rope_parameters.{key}",
                joined[key],
                f"{names} give it two values; the other is {value}",
                f"Set {group}.rope_parameters alone",
            )
        else:
            joined[key] = value
    return joined


def _updated(before: dict[str, Any], requested: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of one layer type, updated with the requested ones."""
    type_before = before.get("rope_type")
    if requested.get("rope_type", type_before) != type_before:
        before = {key: before[key] for key in ROTARY_OF_EVERY_TYPE if key in before}
    return before | requested


def _is_nested(parameters: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in parameters.values())


def _holds(parameters: dict[str, Any], requested: dict[str, Any]) -> bool:
    """Return whether parameters hold all requested ones; flat ones belong to the layers with full attention."""
    if _is_nested(parameters) and not _is_nested(requested):
        whole = parameters.get("full_attention")
        return isinstance(whole, dict) and _holds(whole, requested)
    return all(
        key in parameters
        and (_holds(parameters[key] or {}, value) if isinstance(value, dict) else parameters[key] == value)
        for key, value in requested.items()
    )


def _has_each(parameters: dict[str, Any], requested: dict[str, Any]) -> bool:
    """Return whether each requested value is held by some layer type."""
    parts = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return all(any(part.get(key) == value for part in parts) for key, value in requested.items())
