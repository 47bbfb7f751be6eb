"""The command line: finds the verb in `commands/`, one file each."""

import argparse
import ast
import errno
import logging
import os
import signal
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path

from megatron_slm import __version__
from megatron_slm.errors import AgreedError, UserError
from megatron_slm.launcher import is_main_process, tell_launcher

MACHINES_OWN = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
"""Full, read-only, forbidden, or no possible name: whatever part of the program meets them, a person mends them."""

SECONDS_FOR_RANK_0 = 5.0
"""How long the other ranks wait for rank 0 to say an error that all of them met."""


def program() -> None:
    """One verb as a process of its own.

    A command that has ended well leaves at once: native threads of the libraries have been seen to abort a
    finished rank while its interpreter was taken down, which a launcher takes for a failed run.
    """
    main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main(arguments: list[str] | None = None) -> None:
    """Run one verb. A user's error is one sentence on standard error and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verbs = {path.stem: _first_line(path) for path in sorted(_commands().glob("[!_]*.py"))}
    parser = argparse.ArgumentParser(
        "megatron-slm",
        description="Selective Language Modeling: train on the tokens that a reference says are worth learning.",
        epilog="\n".join(["verbs:", *(f"  {name:9} {text}" for name, text in verbs.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("verb", choices=verbs, metavar="VERB", help="what to do; VERB --help says more")
    # The deepspeed launcher puts its own argument before ours.
    verb = parser.parse_args([a for a in arguments if not a.startswith("--local_rank")][:1]).verb
    _run(verb, arguments[arguments.index(verb) + 1 :])


def _run(verb: str, arguments: list[str]) -> None:
    """Only the verb that is called is imported, so that --help answers at once."""
    # megatron-core warns that it is without kernels which this package never calls.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    command = import_module(f"megatron_slm.commands.{verb}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megatron_slm").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(f"megatron-slm {verb}", description=command.__doc__)
    command.add_arguments(parser)
    try:
        # Overrides may stand on both sides of an option.
        command.run(parser.parse_intermixed_args(arguments))
    except UserError as error:
        # What all ranks agree on, rank 0 alone says; what one rank alone has met, that rank says.
        _refuse(verb, str(error), aloud=is_main_process(os.environ) or not isinstance(error, AgreedError))
    except KeyboardInterrupt:
        sys.stderr.write(f"megatron-slm {verb}: stopped; what was saved before is untouched.\n")
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        if error.errno not in MACHINES_OWN:
            raise
        where = f" at {error.filename}" if error.filename else ""
        _refuse(verb, f"{error.strerror}{where}: mend that and start again; what was saved before is untouched.")


def _refuse(verb: str, sentence: str, aloud: bool = True) -> None:
    tell_launcher(sentence)
    if aloud:
        sys.stderr.write(f"megatron-slm {verb}: error: {sentence}\n")
    else:
        # A launcher stops all ranks once one has failed: rank 0 must have spoken by then.
        time.sleep(SECONDS_FOR_RANK_0)
    sys.exit(2)


def _commands() -> Path:
    return Path(__file__).parent / "commands"


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


if __name__ == "__main__":
    program()
