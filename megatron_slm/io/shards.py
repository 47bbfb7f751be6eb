"""Work that several processes share: shard I of N of a command, and the folder in which shards wait for their merge.

.NAME.shards/plan.json        the settings that all shards share, and their number
             I-of-N/          a finished shard; its shard.json names the plan that it belongs to
             .I-of-N.DOING/   an unfinished shard, see io/staging.py
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_slm.errors import Mistakes, UserError
from megatron_slm.io.files import hold, publish, sync_tree, write_durably
from megatron_slm.io.staging import JOURNAL, Staging, differences

logger = logging.getLogger(__name__)

OPTION = "--shard"
HELP = (
    "do only shard I of N, counted from 0, such as 0/8 to 7/8; the option --merge then joins the shards. "
    "auto: take I and N from the variables of a Slurm array such as --array=0-7"
)
_MERGE = "--merge"
_PLAN, _REPORT = "plan.json", "shard.json"
_NAME = re.compile(r"(\d+)-of-(\d+)")
_AUTO = "auto"


@dataclass(frozen=True)
class WorkShard:
    """Shard `index` of `count` of the work of a command; the index counts from 0."""

    index: int
    count: int

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return f"{self.index}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, things: int) -> range:
        """Return the numbers of the things that this shard gets, if each shard gets as many, in order."""
        return range(things * self.index // self.count, things * (self.index + 1) // self.count)


def parse_shard(text: str | None, environment: Mapping[str, str]) -> WorkShard | None:
    """Return the shard that an option I/N or `auto` names; None without the option.

    Raises:
        UserError: it is not I/N with I below N, or `auto` was given outside of a Slurm array.
    """
    if text is None:
        return None
    if text == _AUTO:
        return _slurm_shard(environment)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        remedy = "Give the number of this shard, from 0, and the number of shards, such as 0/8"
        raise UserError(OPTION, text, "it is neither I/N nor auto", remedy)
    shard = WorkShard(int(match[1]), int(match[2]))
    if shard.count < 1:
        raise UserError(OPTION, text, "there is no shard", "Use 1 shard or more, such as 0/8")
    if shard.index >= shard.count:
        remedy = f"Use 0/{shard.count} to {shard.count - 1}/{shard.count}"
        raise UserError(OPTION, text, "shards count from 0, so I must be below N", remedy)
    return shard


def _slurm_shard(environment: Mapping[str, str]) -> WorkShard:
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT")]
    if missing := [name for name in names if not environment.get(name, "").isdigit()]:
        remedy = "Submit a Slurm array, as in sbatch --array=0-7, or give I/N"
        raise UserError(OPTION, _AUTO, f"{missing[0]} is not set", remedy)
    task, first, last, count = (int(environment[name]) for name in names)
    if last - first + 1 != count:
        reason = f"the Slurm array has {count} of the tasks {first} to {last}, so the number of shards is not known"
        raise UserError(OPTION, _AUTO, reason, "Give I/N with the N of all shards, such as $SLURM_ARRAY_TASK_ID/8")
    return WorkShard(task - first, count)


@dataclass(frozen=True)
class FinishedShard:
    """A finished shard: its folder, and the values that its verb reported."""

    folder: Path
    report: dict[str, Any]


@dataclass(frozen=True)
class ShardPlan:
    """The plan that all shards of a command share.

    settings  the JSON values that decide the result, by setting or option
    count     number of shards
    facts     further JSON values that the merge needs
    """

    settings: dict[str, Any]
    count: int
    facts: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Return the SHA-256 of all that must be equal."""
        return hashlib.sha256(json.dumps([self.settings, self.count], sort_keys=True).encode()).hexdigest()

    def compared(self) -> dict[str, Any]:
        """Return all that must be equal, by setting."""
        return {"number of shards": self.count, **self.settings}


class Shards:
    """The shards of one output.

    Args:
        output: the file, folder or prefix that the merge makes.
        setting: the setting or option that names the output, for errors.
        doing: the end of the names of unfinished folders, such as "preparing".

    Attributes:
        folder: the folder of all shards. It is hidden, so that a folder of input files does not grow by its files.
    """

    def __init__(self, output: Path, setting: str, doing: str) -> None:
        self.folder = output.with_name(f".{output.name}.shards") if output.name else output
        self._output, self._setting, self._doing = output, setting, doing

    def staging(self, shard: WorkShard) -> Staging:
        """Return the staging folder of a shard, whose output is the folder of the finished shard."""
        return Staging(self.folder / shard.name, OPTION, self._doing)

    def begin(self, shard: WorkShard, settings: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> ShardPlan:
        """Write the plan, or compare it with the plan that another shard has written; return it.

        A plan of other settings is replaced if no shard has finished any work.

        Raises:
            UserError: there are shards of another command, or the folder cannot be written.
        """
        plan = ShardPlan(json.loads(json.dumps(settings)), shard.count, dict(facts or {}))
        with Staging(self._output, self._setting, self._doing).writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with hold(self.folder):
                before = self._read_plan()
                found = differences(before.compared(), plan.compared()) if before else []
                if found and self._has_work():
                    reason = f"{self.folder} holds shards of another command: {'; '.join(found)}"
                    remedy = f"Give all shards the same options, or remove {self.folder} to start again"
                    raise UserError(OPTION, str(shard), reason, remedy)
                if found or before is None:
                    text = json.dumps({"settings": plan.settings, "count": plan.count, "facts": plan.facts})
                    write_durably(self.folder / _PLAN, text)
        return plan

    def is_finished(self, shard: WorkShard) -> bool:
        """Return whether a shard is finished, and log it if so; call it while its staging folder is open."""
        folder = self.folder / shard.name
        if folder.exists():
            logger.info("shard %s is finished already: %s", shard, folder)
        return folder.exists()

    def finish(self, staging: Staging, plan: ShardPlan, report: Mapping[str, Any]) -> None:
        """Publish a shard whose files are in `ready`.

        Args:
            staging: the staging folder of the shard, open.
            plan: from `begin`.
            report: JSON values that the merge needs to know about this shard.
        """
        text = json.dumps({"plan": plan.digest(), **report})
        (staging.ready / _REPORT).write_text(text, encoding="utf-8")
        sync_tree(staging.ready)
        publish(staging.ready, staging.output, flush=False)
        logger.info("%s is finished; when all %d shards are, merge them with %s", staging.output, plan.count, _MERGE)

    def collect(
        self, describe: Callable[[ShardPlan, WorkShard, dict[str, Any]], str], settings: Mapping[str, Any] | None = None
    ) -> tuple[ShardPlan, list[FinishedShard]]:
        """Return the plan and all its shards, in order.

        Args:
            describe: returns the progress of an unfinished shard in words, from the progress in its journal.
            settings: the settings that the shards must have; None to accept those of the plan.

        Raises:
            UserError: shards are missing, unfinished or of another command; each is named.
        """
        plan = self._read_plan()
        if plan is None:
            reason = f"there are no shards in {self.folder}"
            raise UserError(_MERGE, self._output, reason, f"Run the command with {OPTION} 0/N to N-1/N first")
        if settings is not None:
            now = ShardPlan(json.loads(json.dumps(settings)), plan.count)
            if found := differences(plan.compared(), now.compared()):
                reason = f"{self.folder} holds shards of another command: {'; '.join(found)}"
                raise UserError(_MERGE, self._output, reason, "Give the options of the shards")
        mistakes, finished, missing = Mistakes(), [], []
        for shard in (WorkShard(index, plan.count) for index in range(plan.count)):
            if (self.folder / shard.name).exists():
                with mistakes.collect():
                    finished.append(self._finished(shard, plan))
            elif (unfinished := self.staging(shard)).folder.exists():
                mistakes.errors.append(self._unfinished(shard, unfinished, partial(describe, plan, shard)))
            else:
                missing.append(shard)
        mistakes.errors = [*self._missing(missing), *mistakes.errors, *self._foreign(plan)]
        mistakes.raise_any()
        return plan, finished

    def _finished(self, shard: WorkShard, plan: ShardPlan) -> FinishedShard:
        folder = self.folder / shard.name
        try:
            report: dict[str, Any] = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
            digest = report.pop("plan")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            reason = f"the report of its shard {folder} cannot be read ({error})"
            raise UserError(_MERGE, self._output, reason, f"Remove that folder and run {OPTION} {shard}") from error
        if digest != plan.digest():
            raise self._of_another_command(folder)
        return FinishedShard(folder, report)

    def _unfinished(self, shard: WorkShard, staging: Staging, describe: Callable[[dict[str, Any]], str]) -> UserError:
        try:
            progress = json.loads(staging.journal.read_text(encoding="utf-8"))
            done = describe(progress)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            done = "nothing is finished yet"
        reason = f"its shard {shard} is unfinished: {done}; it last wrote {_age(staging.folder)}"
        return UserError(_MERGE, self._output, reason, f"Wait for it, or resume it with {OPTION} {shard}")

    def _missing(self, shards: Sequence[WorkShard]) -> list[UserError]:
        if not shards:
            return []
        ranges = index_ranges([shard.index for shard in shards])
        reason = f"{len(shards)} of its {shards[0].count} shards are missing: {ranges}"
        remedy = f"Run the command with {OPTION} {shards[0]}{' and so on' * (len(shards) > 1)}"
        return [UserError(_MERGE, self._output, reason, f"{remedy}, in Slurm with sbatch --array={ranges}")]

    def _foreign(self, plan: ShardPlan) -> list[UserError]:
        """Return an error for each shard whose number does not belong to the plan."""
        found = ((path, _NAME.fullmatch(path.name)) for path in sorted(self.folder.iterdir()))
        return [
            self._of_another_command(path)
            for path, name in found
            if name and (int(name[2]) != plan.count or int(name[1]) >= plan.count)
        ]

    def _of_another_command(self, folder: Path) -> UserError:
        reason = f"the shard {folder} belongs to another command (its options or the number of shards differ)"
        return UserError(_MERGE, self._output, reason, "Move it away, and run its number again if it is then missing")

    def _has_work(self) -> bool:
        """Return whether there is a finished shard, or one with finished work."""
        entries = (path for path in self.folder.iterdir() if path.is_dir())
        return any(_NAME.fullmatch(path.name) or (path / JOURNAL).exists() for path in entries)

    def _read_plan(self) -> ShardPlan | None:
        path = self.folder / _PLAN
        try:
            return ShardPlan(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            reason = f"the plan {path} cannot be read ({error})"
            raise UserError(self._setting, self._output, reason, f"Remove {self.folder} to start again") from error


def index_ranges(indices: Sequence[int]) -> str:
    """Return sorted indices as Slurm writes them, such as 0,3-5."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ",".join("-".join(map(str, run)) for run in runs)


def _age(folder: Path) -> str:
    """Return when a file in a folder was last written, and how long ago that is."""
    last = max((path.stat().st_mtime for path in (folder, *folder.rglob("*")) if path.exists()), default=0.0)
    minutes = max(0.0, time.time() - last) / 60
    ago = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
    return f"at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(last))}, {ago} ago"
