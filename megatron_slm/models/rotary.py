"""Rotary positions in `model.config`: one group `rope_parameters`, whatever names they are given by.

Before transformers 5 there were two, `rope_theta` and `rope_scaling`. Hugging Face translates these while it makes a
configuration, but drops one of two forms without a word, and does nothing to a configuration that it has read.
"""

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from megatron_slm.errors import UserError

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
