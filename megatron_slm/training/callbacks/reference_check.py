"""Is the reference any good? The commonest mistake: it was not trained on the curated text, or its path is wrong."""

import logging

from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.evaluate import Evaluator
from megatron_slm.training.state import RunState


class ReferenceCheck(Callback):
    """Compares the reference with the student before the first step of a fresh run. It warns, and changes nothing.

    Args:
        student, reference: evaluators over the beginning of the same sets.
        path: of the reference, for the warning.
    """

    def __init__(self, student: Evaluator, reference: Evaluator, path: str) -> None:
        self._student = student
        self._reference = reference
        self._path = path

    def on_train_start(self, state: RunState) -> None:
        if state.step > 0:
            return
        log = logging.getLogger(__name__)
        students, references = self._student.losses(), self._reference.losses()
        for name, reference in references.items():
            log.info(
                "reference check: %s: loss of the reference %.4f, of the student %.4f", name, reference, students[name]
            )
        if references and not any(reference < students[name] for name, reference in references.items()):
            log.warning(
                "The reference is no better than the student on any evaluation set: was %s (reference.path) trained on "
                "the curated text?",
                self._path,
            )
