"""Rotary positions in `model.config`: one group `rope_parameters`, whatever names they are given by.

Before transformers 5 there were two, `rope_theta` and `rope_scaling`. Hugging Face translates these while it makes a
configuration, but drops one of two forms without a word, and does nothing to a configuration that it has read.
"""

import copy
import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from megatron_slm.errors import UserError, refuse_missing_folder
from megatron_slm.models.settings import ModelSettings

ROTARY = {"rope_parameters", "rope_theta", "rope_scaling"}
KEPT = ("rope_theta", "partial_rotary_factor")
"""What stays when the type of scaling changes: the rest is of one type."""


def named_anew(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of rotary parameters in which `type` is `rope_type`, at every depth.

    Raises:
        UserError: it holds both, with different values.
    """
    copied = {key: named_anew(value) if isinstance(value, dict) else value for key, value in parameters.items()}
    if "type" in copied:
        copied.setdefault("rope_type", copied["type"])
        if copied.pop("type") != copied["rope_type"]:
            raise UserError("model.config gives rotary positions two types, as type and as rope_type: leave one out.")
    return copied


def take_rotary(wanted: dict[str, Any], group: str) -> dict[str, Any]:
    """Remove all names of rotary positions from `wanted`, and return them as what is asked of `rope_parameters`.

    Args:
        wanted: of `model.config`, or a group in it.
        group: its name.

    Returns:
        Flat, or by the type of layer.

    Raises:
        UserError: two names contradict each other.
    """
    given = {key: wanted.pop(key) for key in sorted(ROTARY & wanted.keys())}
    asked: dict[str, Any] = {}
    if "rope_parameters" in given:
        asked = named_anew(given["rope_parameters"] or {})
    older: dict[str, Any] = {}
    if "rope_scaling" in given:
        older = {"rope_type": "default"} if given["rope_scaling"] is None else named_anew(given["rope_scaling"])
    if "rope_theta" in given:
        older = _joined(older, {"rope_theta": given["rope_theta"]}, group, given)
    return _joined(asked, older, group, given)


def set_rotary(config: PretrainedConfig, before: dict[str, Any] | None, asked: dict[str, Any], group: str) -> None:
    """Set `rope_parameters` to what they were, changed by what is asked.

    Args:
        config: to change.
        before: what holds where nothing is asked.
        asked: of `take_rotary`.
        group: its name, for the message.

    Raises:
        UserError: the class has several, by the type of layer, and it is unclear which is meant.
    """
    declared = {field.name for field in dataclasses.fields(config)}
    for key in (ROTARY - {"rope_parameters"} - declared) & vars(config).keys():
        delattr(config, key)  # nothing reads it, and an export would hold both names
    if "rope_theta" in declared and "rope_theta" in asked:
        config.rope_theta = asked["rope_theta"]
    now, before = config.rope_parameters or {}, before or {}
    # A class may translate older names in its own way, each for another type of layer.
    if now and (_holds(now, asked) or (now != before and _has_each(now, asked))):
        return
    if not _is_nested(asked) and _is_nested(before):
        # As the classes themselves read older configurations: the other layers see near tokens only.
        if not isinstance(before.get("full_attention"), dict):
            raise UserError(
                f"{group} sets {', '.join(sorted(asked))} of the rotary positions, but {type(config).__name__} has "
                f"several: name one of {', '.join(sorted(before))} in {group}.rope_parameters."
            )
        asked = {"full_attention": asked}
    if _is_nested(asked):
        config.rope_parameters = before | {kind: _over(before.get(kind) or {}, part) for kind, part in asked.items()}
    else:
        config.rope_parameters = _over(before, asked)
    config.standardize_rope_params()
    config.validate_rope()


def _joined(one: dict[str, Any], other: dict[str, Any], group: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return both, which must not contradict each other; flat values join the layers that see all tokens."""
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
                f"{names} give {key} two values, {joined[key]!r} and {value!r}: set {group}.rope_parameters alone."
            )
        else:
            joined[key] = value
    return joined


def _over(before: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    changed = asked.get("rope_type", before.get("rope_type")) != before.get("rope_type")
    return ({key: before[key] for key in KEPT if key in before} if changed else before) | asked


def _is_nested(parameters: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in parameters.values())


def _holds(parameters: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Return whether the parameters hold all that is asked; flat values are those of the layers that see all tokens."""
    if _is_nested(parameters) and not _is_nested(asked):
        whole = parameters.get("full_attention")
        return isinstance(whole, dict) and _holds(whole, asked)
    return all(
        key in parameters
        and (_holds(parameters[key] or {}, value) if isinstance(value, dict) else parameters[key] == value)
        for key, value in asked.items()
    )


def _has_each(parameters: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Return whether some type of layer holds each value that is asked."""
    parts = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return all(any(part.get(key) == value for part in parts) for key, value in asked.items())


READ_OF_EVERY_MODEL = {
    *("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tie_word_embeddings", "use_cache"),
    *("initializer_range", "initializer_factor", "init_std", "gradient_checkpointing", "quantization_config"),
}
"""Attributes that the base classes of models and of `from_pretrained` read; not every configuration declares them."""

READ_BY_THE_BASE_CLASS = {
    *("model_type", "name_or_path", "num_labels", "torch_dtype", "output_attentions", "per_layer_config"),
    *("attn_implementation", "experts_implementation"),
}
"""Arguments of `PretrainedConfig` that are no fields of it; of these, a built configuration has the properties."""


def model_config(settings: ModelSettings, vocab_size: int, special_ids: dict[str, int | None]) -> PretrainedConfig:
    """Return the Hugging Face configuration of the student.

    Args:
        settings: a path, or a configuration from scratch, which takes its vocabulary from the corpus.
        vocab_size: entries of the corpus's tokenizer.
        special_ids: bos_token_id and the like, for a model from scratch.

    Raises:
        UserError: unknown model type, a key without an effect, or a vocabulary smaller than the tokenizer's.
    """
    # Hugging Face writes to nested groups, which are the run's own settings.
    wanted = copy.deepcopy(settings.config)
    if settings.path is not None:
        config = pretrained_config(settings.path, "model", settings.trust_remote_code)
        _naming_the_setting(settings, lambda: _change(config, wanted, "model.config", settings.path))
    else:
        multiple = settings.make_vocab_size_divisible_by
        defaults = {"vocab_size": -(-vocab_size // multiple) * multiple, **special_ids}
        config = _naming_the_setting(settings, lambda: _from_scratch(wanted, defaults))
    if config.vocab_size < vocab_size:
        raise UserError(
            f"The student has {config.vocab_size} vocabulary entries and the corpus's tokenizer {vocab_size}: "
            "use the model's own tokenizer in prepare."
        )
    return config


def pretrained_config(path: str, setting: str, trust_remote_code: bool) -> PretrainedConfig:
    """Return the configuration of a pretrained model.

    Args:
        path: Hugging Face folder or hub name.
        setting: `model` or `reference`, for the message.
        trust_remote_code: run Python that comes with the model.

    Raises:
        UserError: it cannot be read.
    """
    return load(AutoConfig.from_pretrained, path, setting, trust_remote_code)


def load(read: Callable[..., Any], path: str, setting: str, trust_remote_code: bool, **options: Any) -> Any:
    """Return what one of Hugging Face's `from_pretrained` reads; its errors name the setting.

    Raises:
        UserError: it cannot be read.
    """
    refuse_missing_folder(f"{setting}.path", path)
    try:
        return read(path, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        raise UserError(f"{setting}.path is '{path}', which cannot be loaded: {one_line(error)}.") from error


def one_line(error: Exception) -> str:
    """Return the message of a foreign error as a part of a sentence."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _naming_the_setting(settings: ModelSettings, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except UserError:
        raise
    except Exception as error:
        reason = _near_type(settings) or one_line(error)
        raise UserError(f"model.config is not a Hugging Face configuration: {reason}.") from error


def _near_type(settings: ModelSettings) -> str:
    """Return the model type that was probably meant: Hugging Face would name all of them."""
    wanted = str(settings.config.get("model_type"))
    near = difflib.get_close_matches(wanted, CONFIG_MAPPING, n=1)
    return f"model_type is '{wanted}', did you mean {near[0]}?" if near and wanted not in CONFIG_MAPPING else ""


def _from_scratch(wanted: dict[str, Any], defaults: dict[str, Any]) -> PretrainedConfig:
    kind = CONFIG_MAPPING[wanted["model_type"]]
    names = kind.attribute_map
    _refuse_two_values(wanted, names, "model.config")
    if not ROTARY & declared(kind):
        for key in ROTARY & wanted.keys():
            _refuse_key(kind, key, wanted[key], "model.config", ())
    wanted |= {key: named_anew(value) for key, value in wanted.items() if key in ROTARY and isinstance(value, dict)}
    given = {names.get(key, key) for key in wanted}
    defaults = {key: value for key, value in defaults.items() if names.get(key, key) not in given}
    config = AutoConfig.for_model(**copy.deepcopy(defaults | wanted))
    _refuse_unknown(config, wanted, "model.config", built=False)
    if not hasattr(config, "rope_parameters") or not ROTARY & wanted.keys():
        return config
    # The class's own conversion of the older names comes first: it knows its types of layers.
    asked = take_rotary(wanted, "model.config")
    plain = AutoConfig.for_model(**copy.deepcopy(defaults | {k: v for k, v in wanted.items() if k not in ROTARY}))
    set_rotary(config, plain.rope_parameters, asked, "model.config")
    return config


def _change(config: PretrainedConfig, wanted: dict[str, Any], name: str, path: str | None) -> None:
    """Change a configuration that was read: nested groups key by key, where they are configurations themselves."""
    _refuse_two_values(wanted, config.attribute_map, name)
    _refuse_unknown(config, wanted, name, built=True)
    kind = wanted.pop("model_type", config.model_type)
    if kind != config.model_type:
        raise UserError(
            f"{name}.model_type is '{kind}', but model.path is '{path}', a {config.model_type}: leave it out, or "
            "train from scratch without model.path."
        )
    if hasattr(config, "rope_parameters"):
        before = copy.deepcopy(config.rope_parameters)
        if ROTARY & wanted.keys():
            set_rotary(config, before, take_rotary(wanted, name), name)
    for key, value in wanted.items():
        part = vars(config).get(key)
        if isinstance(part, PretrainedConfig) and isinstance(value, dict):
            _change(part, value, f"{name}.{key}", path)
        else:
            setattr(config, key, value)


def _refuse_two_values(wanted: dict[str, Any], names: dict[str, str], group: str) -> None:
    """Refuse two names of one attribute (`n_positions`, `max_position_embeddings`) with different values."""
    seen: dict[str, str] = {}
    for key, value in wanted.items():
        other = seen.setdefault(names.get(key, key), key)
        if wanted[other] != value:
            raise UserError(
                f"{group}.{other} is {wanted[other]!r} and {group}.{key} is {value!r}, but they are two names of one "
                "attribute: leave one out."
            )


def _refuse_unknown(config: PretrainedConfig, wanted: dict[str, Any], group: str, *, built: bool) -> None:
    """Refuse keys that nothing reads: Hugging Face would keep them, and change nothing.

    Args:
        config: of the model's class.
        wanted: what is set in it.
        group: the name of `wanted`.
        built: the configuration has been made, so that what its class reads only while it is made has no effect.
    """
    known = _known(config, built)
    for key, value in wanted.items():
        part = vars(config).get(key)
        if isinstance(part, PretrainedConfig) and isinstance(value, dict):
            _refuse_unknown(part, value, f"{group}.{key}", built=built)
        # Names with an underscore in front are Hugging Face's own notes in a `config.json`.
        elif key not in known and not key.startswith("_") and not _is_read_by_the_code(config, key, built):
            _refuse_key(type(config), key, value, group, known)


def _refuse_key(kind: type, key: str, value: Any, group: str, known: Iterable[str]) -> NoReturn:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    advice = f"did you mean {near[0]}?" if near else "leave it out."
    if key in {field.name for field in dataclasses.fields(ModelSettings)}:
        advice = f"set model.{key} instead."
    if key in ROTARY:
        advice = "its positions are not rotary, so leave it out."
    raise UserError(f"{group}.{key} is {value!r}, but {kind.__name__} has no such attribute: {advice}")


def declared(kind: type) -> set[str]:
    """Return the attributes that a class of configurations declares."""
    return {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()


def _known(config: PretrainedConfig, built: bool) -> set[str]:
    kind = type(config)
    known = declared(kind) | READ_OF_EVERY_MODEL | {*config.attribute_map}
    # Code that comes with a model may declare its arguments in a constructor of its own.
    known |= {name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "args", "kwargs")}
    if hasattr(config, "rope_parameters"):
        known |= ROTARY
    if not built:
        return known | READ_BY_THE_BASE_CLASS
    # What its `config.json` holds, aside from these, of which a configuration that was made takes no notice.
    known |= {"model_type", *(key for key in vars(config) if not key.startswith("_"))}
    return known | {key for key in READ_BY_THE_BASE_CLASS if isinstance(getattr(kind, key, None), property)}


def _is_read_by_the_code(config: PretrainedConfig, key: str, built: bool) -> bool:
    """Return whether the code of a model names this attribute, though its class does not declare it.

    Some read older names while they are made, and some models ask for attributes that may be missing.
    """
    home = Path(inspect.getfile(type(config))).parent
    ours = type(config).__module__.startswith("transformers.models.")
    patterns = ["*.py"] if not ours else ["modeling_*.py"] if built else ["modeling_*.py", "configuration_*.py"]
    word = re.compile(rf"(?:\.|[\"']){re.escape(key)}\b")
    files = (file for pattern in patterns for file in home.glob(pattern))
    return any(word.search(file.read_text(encoding="utf-8")) for file in files)
