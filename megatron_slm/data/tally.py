"""Documents, tokens and bytes counted by a label, for as many labels as can be read by eye."""

MAX_LABELS = 1000
OTHER = "other"  # all labels after the first MAX_LABELS together

Counts = dict[str, int]  # "documents", "tokens" (end tokens included), "bytes" (of text)
Tally = dict[str, Counts]  # by label, in the order in which they were first seen


def counts(documents: int, tokens: int, num_bytes: int) -> Counts:
    """Name the three counts."""
    return {"documents": documents, "tokens": tokens, "bytes": num_bytes}


def add_label(tally: Tally, label: str, more: Counts) -> None:
    """Add to a label's counts; where there are too many, a new one is counted under ``other``."""
    if label not in tally and len(tally) >= MAX_LABELS:
        label = OTHER
    before = tally.get(label, counts(0, 0, 0))
    tally[label] = {key: before[key] + more[key] for key in before}


def add_tally(tally: Tally, more: Tally) -> None:
    """Add the counts of all labels of ``more``, in their order."""
    for label, count in more.items():
        add_label(tally, label, count)
