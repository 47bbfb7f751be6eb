"""A configuration file and its overrides as nested dicts, before anything in them is checked.

Nothing is dropped without a word: a key that is given twice, and an override that would undo another, are errors.
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
        _refuse_duplicate_keys(yaml.compose(text, Loader=yaml.SafeLoader), "", f"The configuration {path}")
        tree = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"The configuration {path} cannot be read ({error.strerror}): check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict):
        raise UserError(f"The configuration {path} must hold 'key: value' lines.")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(f"The override '{override}' must look like a.b=c, such as training.lr=1.0e-4.")
    try:
        value = _override_value(text)
        _refuse_duplicate_keys(yaml.compose(text, Loader=yaml.SafeLoader), f"{name}.", f"The override '{override}'")
    except yaml.YAMLError as error:
        raise UserError(f"The override '{override}' has a value that is not YAML: quote it.") from error
    *parents, last = name.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        if not isinstance(tree[parent], dict):
            raise UserError(f"The override '{override}' goes through {parent}, which is not a group of settings.")
        tree = tree[parent]
    tree[last] = value


def _override_value(text: str) -> Any:
    """Return the value of an override. YAML would take ` #` for the beginning of a comment, and drop what follows.

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


def _refuse_duplicate_keys(node: yaml.Node | None, prefix: str, source: str) -> None:
    """Refuse a key that occurs twice in a group: YAML keeps the last one, and drops the first without a word."""
    left, seen = [(node, prefix)], set()
    while left:
        node, prefix = left.pop()
        if id(node) in seen:  # An alias; it may lie inside of what it stands for.
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += [(item, prefix) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            _refuse_duplicates_in(node, prefix, source)
            left += [(value, f"{prefix}{key.value}.") for key, value in node.value]


def _refuse_duplicates_in(group: yaml.MappingNode, prefix: str, source: str) -> None:
    lines: dict[str, int] = {}
    for key, _ in group.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            where = f"in line {line}" if lines[name] == line else f"in lines {lines[name]} and {line}"
            raise UserError(f"{source} sets {prefix}{name} twice, {where}. Keep one of the two.")
        lines[name] = line


def _refuse_repeated_overrides(overrides: list[str]) -> None:
    """Refuse an override that would drop an earlier one: of the same setting, or of a group around it."""
    names: list[str] = []
    for override in overrides:
        name = override.partition("=")[0]
        for index, earlier in enumerate(names):
            if f"{earlier}.".startswith(f"{name}."):
                also = "" if earlier == name else ", or give the group first"
                raise UserError(
                    f"The override '{override}' would replace the earlier override '{overrides[index]}'. Keep one of "
                    f"the two{also}."
                )
        names.append(name)
