"""Mistakes in `selection:`, each with the setting and value of the error, and a word of its reason or remedy."""

SELECTION = {
    "no candidate": ("selection.candidates=0", "selection.candidates is 0", "above 0"),
    "part of a candidate": ("selection.candidates=1.5", "selection.candidates is 1.5", "whole number"),
    "candidates of several scores": (
        "selection={candidates: 2, combine: union, of: [{score: excess, ratio: 0.7}]}",
        "selection.candidates is 2",
        "selection.combine",
    ),
    "candidates before there is a score": (
        "selection={candidates: 2, start: 0.1}",
        "selection.candidates is 2",
        "selection.start is 0.1",
    ),
    "a combination of nothing": ("selection.combine=union", "selection.of is not set", "selection.combine"),
    "scores without a combination": (
        "selection.of=[{score: excess, ratio: 0.7}]",
        "selection.combine is not set",
        "selection.of lists scores",
    ),
    "a combined ratio above one": (
        "selection={combine: union, of: [{score: excess, ratio: 1.7}]}",
        "selection.of[0].ratio is 1.7",
        "1 or less",
    ),
    "an unknown key of a combined score": (
        "selection={combine: union, of: [{score: excess, ratoi: 0.7}]}",
        "selection.of[0].ratoi is 0.7",
        "Did you mean selection.of[0].ratio?",
    ),
    "a combined score that does not exist": (
        "selection={combine: union, of: [{score: excess, ratio: 0.5}, {score: surprise, ratio: 0.5}]}",
        "selection.of[1].score is",
        "excess",
    ),
    "a combination with soft weights": (
        "selection={combine: union, of: [{score: excess, ratio: 0.7}], weighting: soft}",
        "selection.combine is union",
        "one threshold",
    ),
    "a combination with a schedule": (
        "selection={combine: union, of: [{score: excess, ratio: 0.7}], schedule: linear, schedule_tokens: 9}",
        "selection.schedule is linear",
        "selection.of",
    ),
    "soft weights with an approximate backward": (
        "selection={weighting: soft, backward: rows}",
        "selection.weighting is soft",
        "selection.backward rows",
    ),
    "an unknown backward": ("selection.backward=row", "selection.backward is row", "'rows'"),
    "an unknown weighting": ("selection.weighting=loud", "selection.weighting is loud", "'stochastic'"),
    "no temperature": ("selection.temperature=0", "selection.temperature is 0", "above 0"),
    "a quantile of all": ("selection.quantiles=[0.5, 1]", "selection.quantiles[1] is 1", "below 1"),
    "sequences ranked in themselves": (
        "selection={unit: sequence, scope: sequence}",
        "selection.unit is sequence",
        "selection.scope sequence",
    ),
    "a share of sequences that is missing": (
        "selection.unit=both",
        "selection.sequence_ratio is not set",
        "selection.unit both",
    ),
    "a share of sequences without its unit": (
        "selection.sequence_ratio=0.5",
        "selection.sequence_ratio is 0.5",
        "selection.unit both",
    ),
    "a share of sequences above one": (
        "selection={unit: both, sequence_ratio: 1.5}",
        "selection.sequence_ratio is 1.5",
        "1 or less",
    ),
    "a schedule without its length": (
        "selection.schedule=linear",
        "selection.schedule_tokens is not set",
        "selection.schedule linear",
    ),
    "a length without its schedule": (
        "selection.schedule_tokens=1M",
        "selection.schedule_tokens is 1000000",
        "selection.schedule",
    ),
    "a schedule of no length": (
        "selection={schedule: cosine, schedule_tokens: 0}",
        "selection.schedule_tokens is 0",
        "above 0",
    ),
    "steps that are missing": (
        "selection.schedule=steps",
        "selection.ratio_steps is not set",
        "selection.schedule steps",
    ),
    "steps without their schedule": (
        "selection.ratio_steps=[[1K, 0.8]]",
        "selection.ratio_steps is [[1000, 0.8]]",
        "selection.schedule steps",
    ),
    "steps that fall": (
        "selection={schedule: steps, ratio_steps: [[2K, 0.8], [1K, 0.6]]}",
        "selection.ratio_steps is [[2000, 0.8], [1000, 0.6]]",
        "Order",
    ),
    "a step to nothing": (
        "selection={schedule: steps, ratio_steps: [[1K, 0]]}",
        "selection.ratio_steps[0][1] is 0",
        "above 0",
    ),
    "a step before the start": (
        "selection={schedule: steps, ratio_steps: [[-1, 0.5]]}",
        "selection.ratio_steps[0][0] is -1",
        "0 or more",
    ),
    "a step of one number": (
        "selection={schedule: steps, ratio_steps: [[5]]}",
        "selection.ratio_steps[0] is [5]",
        "two numbers",
    ),
    "a start after the end": ("selection.start=2", "selection.start is 2", "1 or less"),
    "a negative context": ("selection.min_context=-1", "selection.min_context is -1", "0 or more"),
}
