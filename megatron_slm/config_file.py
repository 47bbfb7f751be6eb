"""A configuration file and its overrides as nested dicts, before the settings are checked.

A key or an override that would silently replace another one is an error.
"""

from pathlib import Path
from typing import Any

import yaml

from megatron_slm.errors import UserError


def read_tree(path: str, overrides: list[str]) -> dict[str, Any]:
    """Return the configuration in a YAML file, with `a.b=c` overrides applied, as nested dicts.

    Raises:
        UserError: the file or an override is not YAML, or sets something twice.
    """
    tree = _read_yaml(Path(path))
    _refuse_repeated_overrides(overrides)
    for override in overrides:
        _apply_override(tree, override)
    return tree


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), "", f"{path}")
        tree = yaml.safe_load(text)
    except OSError as error:
        raise UserError("configuration", path, f"it cannot be read ({error.strerror})", "Check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = f"it is not YAML ({' '.join(str(error).split())})"
        raise UserError("configuration", path, reason, "Correct the file") from error
    if not isinstance(tree, dict):
        raise UserError("configuration", path, "it has no settings", "Write 'name: value' lines")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError("override", override, "it is not NAME=VALUE", "Write it as in training.lr=1.0e-4")
    try:
        value = _override_value(text)
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), f"{name}.", f"the override {override}")
    except yaml.YAMLError as error:
        raise UserError("override", override, "its value is not YAML", "Put the value in quotes") from error
    *parents, last = name.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        if not isinstance(tree[parent], dict):
            reason = f"the configuration sets {parent} to a value, not to a group of settings"
            raise UserError("override", override, reason, "Check the name")
        tree = tree[parent]
    tree[last] = value


def _override_value(text: str) -> Any:
    """Return the value of an override. ` #` is a part of the value; in YAML it would begin a comment.

    Raises:
        yaml.YAMLError: the text is not YAML, or something follows a quoted value, a list or a group.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    end = node.end_mark.index if node is not None else 0
    if not text[end:].strip():
        return yaml.safe_load(text)
    if node is None or (isinstance(node, yaml.ScalarNode) and node.style is None):
        return text.strip()
    raise yaml.YAMLError(f"'{text[end:].strip()}' follows the value")


def _refuse_repeated_keys(node: yaml.Node | None, prefix: str, source: str) -> None:
    """Raise a UserError if a key occurs twice in a group, at any depth: YAML would silently keep the last one."""
    left, seen = [(node, prefix)], set()
    while left:
        node, prefix = left.pop()
        if id(node) in seen:  # An alias can lie inside its own anchor.
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += [(item, prefix) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys_in(node, prefix, source)
            left += [(value, f"{prefix}{key.value}.") for key, value in node.value]


def _refuse_repeated_keys_in(group: yaml.MappingNode, prefix: str, source: str) -> None:
    lines: dict[str, int] = {}
    for key, value in group.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            where = f"line {line}" if lines[name] == line else f"lines {lines[name]} and {line}"
            shown = value.value if isinstance(value, yaml.ScalarNode) else "a group or list"
            reason = f"{source} sets it twice ({where})"
            raise UserError(f"{prefix}{name}", shown, reason, "Keep one of the two")
        lines[name] = line


def _refuse_repeated_overrides(overrides: list[str]) -> None:
    """Raise a UserError if an override would replace an earlier one, of the same setting or of one in its group."""
    names: list[str] = []
    for override in overrides:
        name = override.partition("=")[0]
        for index, earlier in enumerate(names):
            if f"{earlier}.".startswith(f"{name}."):
                also = "" if earlier == name else ", or give the group first"
                reason = f"it would replace the earlier override {overrides[index]}"
                raise UserError("override", override, reason, f"Keep one of the two{also}")
        names.append(name)
