"""Scores: what tokens are ranked by. One function in one file under `scores/`, or anywhere of yours."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor


class Score(Protocol):
    """A function from signals (float32 `[B, T]` columns by name) to a float `[B, T]` score; higher is kept."""

    needs: tuple[str, ...]

    def __call__(self, signals: dict[str, Tensor]) -> Tensor: ...


def score(*, needs: tuple[str, ...]) -> Callable[[Callable[[dict[str, Tensor]], Tensor]], Score]:
    """Mark a function as a score and say which signals it reads.

    Args:
        needs: names of columns, such as `student.loss`, `reference.loss`, `student.entropy`, `uniform`.
    """

    def mark(function: Callable[[dict[str, Tensor]], Tensor]) -> Score:
        marked = cast(Score, function)
        marked.needs = needs
        return marked

    return mark


def find_score(name: str) -> Score:
    """The score called `name`: a file in `selection/scores/`, or `package.module:function`.

    Raises:
        ValueError: a sentence with the known names, if there is no such score.
    """
    module_name, _, function_name = name.rpartition(":")
    if not module_name:
        if name not in built_in_scores():
            known = ", ".join(built_in_scores())
            raise ValueError(f"selection.score is '{name}': use one of {known}, or package.module:function.")
        module_name, function_name = f"{__package__}.scores.{name}", name
    try:
        found = getattr(import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"selection.score is '{name}', which cannot be imported ({error}): "
            "put its package on PYTHONPATH and check the spelling."
        ) from error
    if not hasattr(found, "needs"):
        raise ValueError(f"selection.score is '{name}', a function without @score: write @score(needs=(...)) above it.")
    return cast(Score, found)


def call_score(score: Score, signals: dict[str, Tensor], valid: Tensor) -> Tensor:
    """What a score says of each token, from the signals that it needs.

    Raises:
        ValueError: it reads another signal, or does not return a float tensor of the shape of `valid`.
    """
    try:
        found = score({name: signals[name] for name in score.needs})
    except KeyError as error:
        raise ValueError(
            f"The score {getattr(score, '__name__', '?')} (selection.score) reads {error}, which its @score(needs=...) "
            "does not name: add it there."
        ) from error
    if isinstance(found, Tensor) and found.shape == valid.shape and found.is_floating_point():
        return found
    said = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    name = getattr(score, "__name__", "?")
    raise ValueError(
        f"The score {name} (selection.score) returned {said}: return a float tensor {list(valid.shape)}, a score for "
        "every token."
    )


def built_in_scores() -> list[str]:
    """Names of the scores that come with this package."""
    return sorted(path.stem for path in (Path(__file__).parent / "scores").glob("[!_]*.py"))
