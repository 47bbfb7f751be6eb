"""The command line. Each verb is a file in `commands/`."""

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
from megatron_slm.errors import AgreedError, LostRanksError, UserError
from megatron_slm.launcher import is_main_process, tell_launcher

COMMANDS = Path(__file__).parent / "commands"

MACHINE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
"""Errors of the machine, which the user corrects: a full or read-only disk, permissions, impossible names."""

SECONDS_FOR_RANK_0 = 5.0
"""How long the other ranks wait for rank 0 to print an error that all ranks raise."""


def program() -> None:
    """Run one verb as a process of its own.

    A command that ended without a defect skips the shutdown of the interpreter: native threads of the libraries can
    abort a rank in it, and the launcher would report that in place of the exit status.
    """
    status: str | int | None = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0))


def main(arguments: list[str] | None = None) -> None:
    """Run one verb. User errors are printed to standard error, one per line, and the exit status is 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verbs = {path.stem.replace("_", "-"): path for path in sorted(COMMANDS.glob("[!_]*.py"))}
    width = max(map(len, verbs))
    parser = argparse.ArgumentParser(
        "megatron-slm",
        description="Selective Language Modeling: pretrain on the tokens that a reference scores as worth learning.",
        epilog="\n".join(["verbs:", *(f"  {name:{width}}  {_first_line(path)}" for name, path in verbs.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("verb", choices=verbs, metavar="VERB", help="what to do; VERB --help explains it")
    # The deepspeed launcher puts its own argument before ours.
    verb = parser.parse_args([a for a in arguments if not a.startswith("--local_rank")][:1]).verb
    _run(verb, arguments[arguments.index(verb) + 1 :])


def _run(verb: str, arguments: list[str]) -> None:
    """Import and run one verb; the others are not imported, so that --help is fast."""
    # megatron-core warns about missing kernels, which this package never calls.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    command = import_module(f"megatron_slm.commands.{verb.replace('-', '_')}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megatron_slm").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(
        f"megatron-slm {verb}",
        description=command.__doc__,
        epilog=command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    try:
        # Overrides may come before and after options.
        command.run(parser.parse_intermixed_args(arguments))
    except UserError as error:
        # Rank 0 alone prints an error that all ranks raise; a rank prints an error that it alone raises.
        is_printed = is_main_process(os.environ) or not isinstance(error, AgreedError)
        _refuse(verb, error.sentences(), is_printed)
    except LostRanksError as error:
        sentence = f"megatron-slm {verb}: error: {error}"
        tell_launcher(sentence)
        sys.stderr.write(f"{sentence}\n")
        sys.exit(os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        sys.stderr.write(f"megatron-slm {verb}: interrupted; files that were saved before are unchanged.\n")
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        where = f" at {error.filename}" if error.filename else ""
        advice = "Correct this and start again; files that were saved before are unchanged."
        _refuse(verb, [f"{error.strerror}{where}. {advice}"])


def _refuse(verb: str, sentences: list[str], is_printed: bool = True) -> None:
    tell_launcher("\n".join(sentences))
    if is_printed:
        sys.stderr.writelines(f"megatron-slm {verb}: error: {sentence}\n" for sentence in sentences)
    else:
        # A launcher stops all ranks once one has failed: rank 0 must have printed the error by then.
        time.sleep(SECONDS_FOR_RANK_0)
    sys.exit(2)


def _first_line(path: Path) -> str:
    """Return the first line of a module's docstring without importing the module."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


if __name__ == "__main__":
    program()
