"""The errors of `megatron-slm plan` on this machine: memory against rehearsals, and time against steps of one rank.

    python tools/plan_errors.py memory
    python tools/plan_errors.py time --rounds 5

Each case is a process of its own. The memory is the peak of the resident set beyond that of the imported libraries,
while freed memory is returned to the system at once. The time is the median step of one rank. A machine that is not
idle makes the errors of the time larger.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml
from common import option_parser

from megatron_slm.reporting.tables import markdown_table

GIB = 2**30


class Case(NamedTuple):
    """A model, the ranks, and the settings that differ from those of `configuration`."""

    name: str
    width: int
    layers: int
    ranks: int
    overrides: tuple[str, ...] = ()


PLAIN = ("objective=clm",)
STAGE_2 = ("deepspeed={zero_optimization: {stage: 2}}",)
CHECKPOINTED = ("training.activation_checkpointing=full",)
WHOLE_REFERENCE = ("reference.shard=false",)
SMALL_LIMITS = (
    "deepspeed={zero_optimization: {stage: 3, stage3_max_reuse_distance: 50e6, reduce_bucket_size: 30e6, "
    "stage3_prefetch_bucket_size: 10e6}}",
)

MEMORY = [
    Case("sharded reference", 1024, 8, 8),
    Case("one rank", 1024, 8, 1),
    Case("checkpointed", 1024, 8, 8, CHECKPOINTED),
    Case("reference on each rank", 1024, 8, 8, WHOLE_REFERENCE),
    Case("plain", 1024, 8, 8, PLAIN),
    Case("plain, ZeRO-2", 1024, 8, 8, (*PLAIN, *STAGE_2)),
    Case("rows", 1024, 8, 8, ("selection.backward=rows",)),
    Case("replay", 1024, 8, 8, ("selection.backward=replay",)),
    Case("small limits of ZeRO", 1024, 16, 32, (*SMALL_LIMITS, "training.global_batch_size=64")),
    Case("wider, 64 ranks", 2048, 6, 64, ("training.global_batch_size=128",)),
]
TIME = [
    Case("512 x 8", 512, 8, 1),
    Case("768 x 10", 768, 10, 1),
    Case("1024 x 8", 1024, 8, 1),
    Case("1280 x 8", 1280, 8, 1),
    Case("1536 x 12", 1536, 12, 1),
]


def configuration(case: Case) -> dict[str, Any]:
    """Return a selective run of a Llama with a vocabulary of 32,000, whose corpora and reference do not exist."""
    model = {
        "model_type": "llama",
        "hidden_size": case.width,
        "intermediate_size": 11 * case.width // 4,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.width // 64,
        "num_key_value_heads": case.width // 64,
        "vocab_size": 32_000,
        "max_position_embeddings": 4096,
    }
    return {
        "run_dir": "/nonexistent/run",
        "model": {"config": model},
        "reference": {"path": "/nonexistent/reference", "micro_batch_size": 2},
        "data": {"train": "/nonexistent/corpus", "seq_length": 512},
        "training": {"micro_batch_size": 2, "global_batch_size": 2 * case.ranks, "train_tokens": 1_000_000},
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }


def main() -> None:
    """Measure the cases of one kind, and print a table."""
    parser = option_parser(__doc__)
    parser.add_argument("kind", choices=("memory", "time"), help="what to measure")
    parser.add_argument("--rounds", type=int, default=5, help="steps whose median is taken (default: 5)")
    parser.add_argument("--case", nargs="*", help="names of the cases to measure (default: all)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        time_steps(arguments.child, arguments.rounds)
        return
    cases = [case for case in (MEMORY if arguments.kind == "memory" else TIME) if _is_wanted(case, arguments.case)]
    if arguments.kind == "memory":
        titles = ["case", "parameters", "ranks", "planned GiB", "measured GiB", "error", "phase of the peak"]
        rows = [memory_row(case) for case in cases]
    else:
        titles = ["case", "parameters", "part", "planned s", "measured s", "error"]
        rows = [row for case in cases for row in time_rows(case, arguments.rounds)]
    print(markdown_table(titles, rows))


def _is_wanted(case: Case, names: list[str] | None) -> bool:
    return not names or case.name in names


def memory_row(case: Case) -> list[str]:
    """Return the row of one case: the plan and its rehearsal."""
    values = planned(case, "--rehearse")
    libraries = values["rehearsal"]["libraries"]
    phases = values["memory"]["phases"]
    totals = {name: sum(size for part, size in parts.items() if part != "libraries") for name, parts in phases.items()}
    measured = {name: phase["peak"] - libraries for name, phase in values["rehearsal"]["phases"].items()}
    peak = max(size for name, size in measured.items() if name.startswith("step: "))
    plan = max(totals.values())
    sys.stderr.write(f"{case.name}: planned {totals}, measured {measured}\n")
    return [
        case.name,
        f"{values['parameters'] / 1e6:,.0f}M",
        str(case.ranks),
        f"{plan / GIB:.2f}",
        f"{peak / GIB:.2f}",
        f"{100 * (plan / peak - 1):+.1f} %",
        max(totals, key=lambda name: totals[name]),
    ]


def time_rows(case: Case, rounds: int) -> list[list[str]]:
    """Return the rows of one case: the parts of a step, and the step."""
    values = planned(case)
    command = [sys.executable, __file__, "time", "--rounds", str(rounds), "--child", json.dumps(case)]
    measured = json.loads(_output(command))
    step = values["step"]
    compute, exposed = step["compute"], step["exposed"]
    plan = {
        "reference": compute["forward of the reference"] + compute["pointwise, reference"],
        "forward, selection": compute["student forward"] + compute["pointwise, forward"] + exposed["selection"],
        "backward": compute["student backward"] + compute["pointwise, gradients"],
        "update": exposed["update"],
    }
    plan["step"] = sum(plan.values())
    measured["step"] = sum(measured.values())
    return [
        [
            case.name if name == "step" else "",
            f"{values['parameters'] / 1e6:,.0f}M" if name == "step" else "",
            name,
            f"{plan[name]:.2f}",
            f"{measured[name]:.2f}",
            f"{100 * (plan[name] / measured[name] - 1):+.0f} %",
        ]
        for name in ("step", *(part for part in plan if part != "step"))
    ]


def planned(case: Case, *options: str) -> dict[str, Any]:
    """Return the plan of a case on this CPU, as JSON has it."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.yaml"
        config.write_text(yaml.safe_dump(configuration(case)), encoding="utf-8")
        command = [sys.executable, "-m", "megatron_slm", "plan", str(config), *case.overrides]
        command += ["--ranks", str(case.ranks), "--device", "cpu", "--json", *options]
        values: dict[str, Any] = json.loads(_output(command))
        return values


def _output(command: list[str]) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ended.stderr[-2000:]}")
    return ended.stdout


def time_steps(text: str, rounds: int) -> None:
    """Print the median seconds of the parts of a step, as JSON; this is a process of its own."""
    from megatron_slm.build.outline import outline
    from megatron_slm.build.rehearsal import STEP, rehearse
    from megatron_slm.config import parse_config
    from megatron_slm.dist import connect_alone

    case = Case(*json.loads(text))
    world = connect_alone("plan_errors")
    run = outline(parse_config(configuration(case)), world)
    rehearsals = [rehearse(run, world, returns_memory=False) for _ in range(rounds)]
    names = [name for name in rehearsals[0].phases if name.startswith(STEP)]
    print(
        json.dumps({name.removeprefix(STEP): median(one.phases[name].seconds for one in rehearsals) for name in names})
    )


if __name__ == "__main__":
    main()
