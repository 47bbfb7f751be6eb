"""The folder that explains a run: its configuration, frozen, and where it ran."""

import dataclasses
import json
import logging
import platform
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from megatron_slm.config import Config, differences_on_resume, dump_config, load_config
from megatron_slm.dist import World
from megatron_slm.errors import UserError

FORMAT_VERSION = 1


class RunFolder:
    """`run_dir` and the names in it."""

    def __init__(self, run_dir: str) -> None:
        self.path = Path(run_dir)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.cache = self.path / "cache"

    @property
    def has_begun(self) -> bool:
        """A start that failed before its first step binds nobody to its configuration."""
        return self.metrics.exists()

    def settle(self, config: Config) -> Config:
        """The configuration to run: of a new run as it is, of a known one with the defaults that it resolved.

        Raises:
            UserError: the folder belongs to a run whose configuration differs in what may not change.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir is {self.path}, which cannot be made ({error.strerror}): use another.") from error
        if not self.has_begun:
            return config
        stored = load_config(str(self.config), [])
        data, training = config.data, config.training
        if data.order_tokens is None:
            data = dataclasses.replace(data, order_tokens=stored.data.order_tokens)
        if training.precision is None:
            training = dataclasses.replace(training, precision=stored.training.precision)
        config = dataclasses.replace(config, data=data, training=training)
        differences = differences_on_resume(stored, config)
        if differences:
            raise UserError(
                f"run_dir is {self.path}, which holds a run of another configuration: {'; '.join(differences)}. "
                "Use another run_dir, or set these back to resume."
            )
        return config

    def begin(self, config: Config, order_fingerprint: str, world: World) -> None:
        """Write `config.yaml` and `environment.json` on rank 0, and log to files from here on.

        Raises:
            UserError: resuming would change the order of samples, though the settings are the same.
        """
        environment = self.path / "environment.json"
        if self.has_begun and json.loads(environment.read_text())["order_fingerprint"] != order_fingerprint:
            raise UserError(
                f"Resuming {self.path} would change the order of samples: the corpora of data.train are not those "
                "that it began with. Put them back, or use another run_dir."
            )
        if world.is_main:
            _replace(self.config, dump_config(config))
            _replace(environment, json.dumps(_environment(order_fingerprint, world), indent=2) + "\n")
        self._log_to_files(world)

    def _log_to_files(self, world: World) -> None:
        """What each rank logs in `log-rankNNNN.txt`; what rank 0 logs on the terminal too."""
        file = logging.FileHandler(self.path / f"log-rank{world.rank:04d}.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        terminal = logging.StreamHandler()
        terminal.setFormatter(logging.Formatter("%(message)s"))
        terminal.setLevel(logging.INFO if world.is_main else logging.ERROR)
        package = logging.getLogger("megatron_slm")
        package.setLevel(logging.INFO)
        package.propagate = False
        package.handlers = [file, terminal]


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _environment(order_fingerprint: str, world: World) -> dict[str, object]:
    packages = ("megatron_slm", "torch", "deepspeed", "transformers", "megatron-core", "numpy")
    return {
        "format_version": FORMAT_VERSION,
        "order_fingerprint": order_fingerprint,
        "ranks": world.size,
        "device": world.device.type,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "commit": _commit(),
        "command": sys.argv,
    }


def _commit() -> str | None:
    """The commit of the package's checkout; None where it is installed."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
