"""What users get wrong about `selection:`, and the sentence that they hear."""

SELECTION = {
    "no candidate": ("selection.candidates=0", "selection.candidates is 0: candidates must be 1 or more"),
    "part of a candidate": ("selection.candidates=1.5", "selection.candidates is 1.5"),
    "candidates of several scores": (
        "selection={candidates: 2, combine: union, of: [{score: excess, ratio: 0.7}]}",
        "selection.candidates is 2: candidates are ranked by one score, and combine has several",
    ),
    "candidates before there is a score": (
        "selection={candidates: 2, start: 0.1}",
        "selection.candidates is 2: candidates are scored from the first step on, and start begins later",
    ),
    "a combination of nothing": ("selection.combine=union", "selection.combine is 'union': combine needs scores"),
    "scores without a combination": (
        "selection.of=[{score: excess, ratio: 0.7}]",
        "selection.of is [{'score': 'excess', 'ratio': 0.7}]: of lists scores to combine: set combine",
    ),
    "a combined ratio above one": (
        "selection={combine: union, of: [{score: excess, ratio: 1.7}]}",
        "selection.of.0.ratio is 1.7: ratio is the share",
    ),
    "an unknown key of a combined score": (
        "selection={combine: union, of: [{score: excess, ratoi: 0.7}]}",
        "selection.of[0].ratoi is not a setting: did you mean selection.of[0].ratio?",
    ),
    "a combined score that does not exist": (
        "selection={combine: union, of: [{score: excess, ratio: 0.5}, {score: surprise, ratio: 0.5}]}",
        "selection.of[1].score is 'surprise': use one of excess",
    ),
    "a combination with soft weights": (
        "selection={combine: union, of: [{score: excess, ratio: 0.7}], weighting: soft}",
        "combine has no one threshold to weigh by",
    ),
    "a combination with a schedule": (
        "selection={combine: union, of: [{score: excess, ratio: 0.7}], schedule: linear, schedule_tokens: 9}",
        "combine keeps by the ratios in of",
    ),
    "soft weights that leave nothing out": (
        "selection={weighting: soft, backward: rows}",
        "weighting soft leaves nothing out that backward rows could save: use exact",
    ),
    "an unknown backward": ("selection.backward=row", "selection.backward is 'row'"),
    "an unknown weighting": ("selection.weighting=loud", "selection.weighting is 'loud'"),
    "no temperature": ("selection.temperature=0", "selection.temperature is 0: temperature must be above 0"),
    "sequences alone": (
        "selection={unit: sequence, scope: sequence}",
        "selection.unit is 'sequence': unit sequence ranks sequences among each other",
    ),
    "a share of sequences that is missing": ("selection.unit=both", "sequence_ratio belongs to unit both"),
    "a share of sequences without its unit": (
        "selection.sequence_ratio=0.5",
        "selection.sequence_ratio is 0.5: sequence_ratio belongs to unit both",
    ),
    "a share of sequences above one": (
        "selection={unit: both, sequence_ratio: 1.5}",
        "selection.sequence_ratio is 1.5: sequence_ratio is a share of the sequences",
    ),
    "a schedule without its length": ("selection.schedule=linear", "schedule_tokens belongs to schedule linear"),
    "a length without its schedule": ("selection.schedule_tokens=1M", "selection.schedule_tokens is 1000000"),
    "a schedule of no length": (
        "selection={schedule: cosine, schedule_tokens: 0}",
        "selection.schedule_tokens is 0: schedule_tokens must be 1 or more",
    ),
    "steps that are missing": ("selection.schedule=steps", "ratio_steps belongs to schedule steps"),
    "steps that fall": (
        "selection={schedule: steps, ratio_steps: [[2K, 0.8], [1K, 0.6]]}",
        "selection.ratio_steps is [[2000, 0.8], [1000, 0.6]]: ratio_steps must be pairs [tokens, ratio] whose",
    ),
    "a step to nothing": (
        "selection={schedule: steps, ratio_steps: [[1K, 0]]}",
        "selection.ratio_steps is [[1000, 0]]: ratio_steps must be pairs [tokens, ratio] with ratios above 0",
    ),
    "a step of one number": (
        "selection={schedule: steps, ratio_steps: [[5]]}",
        "selection.ratio_steps.0 is [5]: give a list of numbers such as [10, 12]",
    ),
    "a start after the end": ("selection.start=2", "selection.start is 2: start is a share of train_tokens"),
}
