"""The run directory: the configuration of a run, the environment of each start, and the names of its files."""

import dataclasses
import datetime
import json
import logging
import platform
import socket
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_slm.config import Config, differences_on_resume, dump_config, load_config
from megatron_slm.dist import World, agree, gather_objects
from megatron_slm.errors import UserError
from megatron_slm.io.files import dangling_link, hold, write_durably
from megatron_slm.training.checkpoints import list_checkpoints

FORMAT_VERSION = 1
SECONDS_TO_APPEAR = 10.0
"""How long a new file may take to appear on another host of a shared file system."""

HEADER = "# Written by megatron-slm: the configuration of this run, every setting resolved.\n"
"""First line of `config.yaml`, which distinguishes a run directory from other folders with such a file."""


class RunDirectory:
    """The directory `run_dir` and the paths of the files in it. One run at a time holds its lock."""

    def __init__(self, run_dir: str, world: World) -> None:
        self.path = Path(run_dir)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.spikes = self.path / "spikes.jsonl"
        self.observed = self.path / "observed"
        self.profile = self.path / "profile"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.cache = self.path / "cache"
        self._start = self.path / ".start"
        self._word = uuid.uuid4().hex
        self._world = world
        self._held = ExitStack()
        self._logged_before: tuple[list[logging.Handler], bool, int] | None = None

    @property
    def has_begun(self) -> bool:
        """True if there is a record or a checkpoint. After a start that failed before, settings may still change."""
        return bool(list_checkpoints(self.checkpoints)) or (self.metrics.exists() and self.metrics.stat().st_size > 0)

    @property
    def holds_starting_files(self) -> bool:
        """True if export needs only this directory; runs of earlier versions lack these files."""
        return (self.path / "model").is_dir() and (self.path / "tokenizer").is_dir()

    def hold(self) -> None:
        """Create the directory, lock it against other runs until `close`, and leave a word for the other hosts: rank 0.

        Raises:
            UserError: the directory cannot be created, or another process trains in it.
        """
        if not self._world.is_main:
            return
        self._refuse_dangling_link()
        busy = self._refused("another process is training in it", "Stop that process, or use another run_dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(hold(self.path / ".lock", busy))
            self._held.callback(self._start.unlink, missing_ok=True)
            self._start.write_text(self._word, encoding="utf-8")
        except OSError as error:
            raise self._refused(f"it cannot be used ({error.strerror})", "Use another run_dir") from error

    def refuse_unshared(self) -> None:
        """Raise a UserError if a host does not see the word that rank 0 left; every rank calls it, after `hold`.

        The ranks of such a host would write their parts of the checkpoints to another disk.

        Raises:
            AgreedError: names a host that does not see them.
        """
        word = gather_objects(self._word)[0]
        agree(lambda: self._wait_for(word) if self._world.local_rank == 0 else None)
        if self._world.is_main:
            self._start.unlink()

    def _wait_for(self, word: str) -> None:
        deadline = time.monotonic() + SECONDS_TO_APPEAR
        while not (self._start.is_file() and self._start.read_text(encoding="utf-8") == word):
            if time.monotonic() > deadline:
                raise self._refused(
                    f"{socket.gethostname()} does not see the files that rank 0 writes there",
                    "Mount the same file system on all hosts, or use a run_dir on one that they share",
                )
            time.sleep(0.02)

    def close(self) -> None:
        """Release the directory and restore logging, so that this process can start another run."""
        if self._logged_before is not None:
            package = logging.getLogger("megatron_slm")
            for handler in package.handlers:
                handler.close()
            package.handlers, package.propagate, level = self._logged_before
            package.setLevel(level)
            self._logged_before = None
        self._held.close()

    def compare(self, config: Config) -> Config:
        """Return the configuration to run. A resumed run keeps the defaults with which it began.

        Raises:
            UserError: the directory belongs to something else, or to a run of another configuration.
        """
        self._refuse_dangling_link()
        if self.path.exists() and not self.path.is_dir():
            raise self._refused("it is a file", "Use another run_dir")
        if self.config.exists() and not self.config.read_text(encoding="utf-8").startswith(HEADER):
            raise self._refused("its config.yaml was not written by a run", "Use another run_dir")
        stored = self.stored()
        return config if stored is None else self._settle_resumed(stored, config)

    def stored(self) -> Config | None:
        """Return the configuration of the run in this directory; None for a new run.

        Raises:
            UserError: its config.yaml is missing, or cannot be read.
        """
        if not self.has_begun:
            return None
        if not self.config.exists():
            raise self._refused("its config.yaml is missing", "Put the file back, or use another run_dir")
        stored = load_config(str(self.config), [])
        # A run that began before this setting existed selects among all valid tokens.
        selection = dataclasses.replace(stored.selection, min_context=stored.selection.min_context or 0)
        return dataclasses.replace(stored, selection=selection)

    def refuse_other_inputs(self, order_fingerprint: str, stores: list[str]) -> None:
        """Raise a UserError if the run in this directory read other data, though its settings are the same.

        `stores` are the fingerprints of the stores that the run reads.

        Raises:
            UserError: resuming would change the order of samples or a score.
        """
        known = self._known_environment()
        if not self.has_begun:
            return
        if known.get("stores", stores) != stores:
            raise self._refused(
                "its run began with other scores in reference.store, so that resuming would change the reference",
                "Put these scores back, or use another run_dir",
            )
        if known.get("order_fingerprint", order_fingerprint) != order_fingerprint:
            raise self._refused(
                "its run began with other corpora in data.train, or other documents in data.keep, so that resuming "
                "would change the order of samples",
                "Put these back, or use another run_dir",
            )

    def begin(
        self,
        config: Config,
        order_fingerprint: str,
        stores: list[str],
        evaluation: dict[str, str],
        bytes_per_token: dict[str, float],
    ) -> None:
        """Write the resolved `config.yaml`, add this start to `environment.json`, and log to files from here on.

        Args:
            config: with every default resolved.
            order_fingerprint: of the order of samples.
            stores: fingerprints of the stores that the run reads.
            evaluation: checksum of each evaluation set, so that reports know which sets are the same.
            bytes_per_token: of the text of each source, so that reports can compare sources in bits per byte.
        """
        if self._world.is_main:
            write_durably(self.config, HEADER + dump_config(config))
            described = {
                "format_version": FORMAT_VERSION,
                "order_fingerprint": order_fingerprint,
                "stores": stores,
                "evaluation": evaluation,
                "bytes_per_token": bytes_per_token,
                "starts": [*self._known_environment()["starts"], _environment(self._world)],
            }
            write_durably(self.environment, json.dumps(described, indent=2) + "\n")
        self._log_to_files()

    def _settle_resumed(self, stored: Config, config: Config) -> Config:
        data, training, selection = config.data, config.training, config.selection
        if data.order_tokens is None:
            data = dataclasses.replace(data, order_tokens=stored.data.order_tokens)
        if training.precision is None:
            training = dataclasses.replace(training, precision=stored.training.precision)
        if selection.min_context is None:
            selection = dataclasses.replace(selection, min_context=stored.selection.min_context)
        config = dataclasses.replace(config, data=data, training=training, selection=selection)
        differences = differences_on_resume(stored, config)
        if differences:
            raise self._refused(
                f"it holds a run of another configuration: {'; '.join(differences)}",
                "Use another run_dir, or set these back to resume",
            )
        return config

    def _refuse_dangling_link(self) -> None:
        if target := dangling_link(self.path):
            raise self._refused(
                f"it is a link to {target}, which does not exist", "Create that folder, or use another run_dir"
            )

    def _refused(self, reason: str, remedy: str) -> UserError:
        return UserError("run_dir", self.path, reason, remedy)

    def _known_environment(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.environment.read_text(encoding="utf-8"))
            return found
        except FileNotFoundError:
            return {"starts": []}
        except ValueError as error:
            raise self._refused(
                f"its {self.environment.name} cannot be read ({error})", "Put the file back, or remove it"
            ) from error

    def _log_to_files(self) -> None:
        """Log each rank to `log-rankNNNN.txt`, with tracebacks; rank 0 logs to the terminal as well."""
        file = logging.FileHandler(self.path / f"log-rank{self._world.rank:04d}.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        terminal = logging.StreamHandler()
        terminal.setFormatter(logging.Formatter("%(message)s"))
        terminal.setLevel(logging.INFO if self._world.is_main else logging.ERROR)
        package = logging.getLogger("megatron_slm")
        self._logged_before = (package.handlers, package.propagate, package.level)
        package.setLevel(logging.DEBUG)
        package.propagate = False
        package.handlers = [file, terminal]


def _environment(world: World) -> dict[str, object]:
    packages = ("megatron_slm", "torch", "deepspeed", "transformers", "megatron-core", "numpy")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ranks": world.size,
        "device": world.device.type,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "commit": _commit(),
        "command": sys.argv,
    }


def _commit() -> str | None:
    """Return the commit of the package's checkout, marked if files differ from it; None for an installed package."""
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
