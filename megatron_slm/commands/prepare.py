"""Turn text into a prepared corpus: tokens, their index, and the tokenizer.

A corpus is PREFIX.bin and PREFIX.idx (Megatron's format), PREFIX.json (counts, sources, licences,
checksums) and PREFIX.tokenizer/; it appears when it is complete, and an existing one is never
overwritten. Input files are .jsonl, .ndjson or .json (a document a line), .parquet (a document a
row), or text (a file is one document), each plain, .gz or .zst. After a kill, the same command
goes on: input files that were finished are not encoded again. Of prompts with completions, and of
chats, only the answers are learned from: PREFIX.mask says which tokens those are.
"""

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_slm.prepare.documents import Fields

_EPILOG = r"""examples:
  text, with a tokenizer that exists, or a new one:
    megatron-slm prepare --input web/ more.jsonl.gz --tokenizer TinyLlama/TinyLlama_v1.1 --output data/web
    megatron-slm prepare --input notes.txt --train-tokenizer 8000 --output data/notes
  with the tokenizer of a chat model, whose own end token ends turns:
    megatron-slm prepare --input web/ --tokenizer T --end-token '<|endoftext|>' --output data/web
  one corpus for each source, data/web-wikipedia, data/web-arxiv, ...:
    megatron-slm prepare --input web.parquet --by meta.source --tokenizer T --output data/web
  a data set of the hub, streamed:
    megatron-slm prepare --dataset open-web-math/open-web-math --tokenizer T --output data/owm
  to fine-tune on: questions with answers, of which the answers count; or chats, as the tokenizer's template writes them
    megatron-slm prepare --input gsm8k.jsonl --format prompt-completion --prompt-key question --completion-key answer \
        --separator '\n' --tokenizer T --output data/gsm8k
    megatron-slm prepare --input chats.jsonl --format messages --tokenizer T --output data/chats
  up to 100 bad documents left out; evaluation files looked for, report in data/web.contamination.json:
    megatron-slm prepare --input web/ --tokenizer T --output data/web --skip-bad 100 --contamination test.jsonl
  shards made on several machines, put together:
    megatron-slm prepare --merge shards/a shards/b --output data/web
  a .bin/.idx that Megatron's own tools wrote, described where it lies:
    megatron-slm prepare --adopt data/old --tokenizer T
  checksums:
    megatron-slm prepare --output data/web --verify
"""
_KEYS = {"--json-key": "text", "--prompt-key": "prompt", "--completion-key": "completion", "--messages-key": "messages"}
_FORMATS = {  # the options that say something to each
    "text": {"--json-key"},
    "prompt-completion": {"--prompt-key", "--completion-key", "--separator"},
    "messages": {"--messages-key"},
}
_MODES = {"--merge", "--adopt", "--verify"}
_NEEDED = {"--merge": {"--output"}, "--adopt": {"--tokenizer"}, "--verify": {"--output"}}
_ALLOWED = _NEEDED | {"--adopt": {"--tokenizer", "--end-token"}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    _add_input(parser.add_argument_group("what is read"))
    _add_output(parser.add_argument_group("what is made of it"))
    modes = parser.add_argument_group("corpora that are there already").add_mutually_exclusive_group()
    modes.add_argument(
        "--merge", metavar="PREFIX", nargs="+", help="put these corpora together, in this order, as --output"
    )
    modes.add_argument(
        "--adopt", metavar="PREFIX", help="describe Megatron's PREFIX.bin and PREFIX.idx, made with --tokenizer"
    )
    modes.add_argument(
        "--verify", action="store_true", help="write nothing; check the checksums of the corpus at --output"
    )


def _add_input(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--input",
        metavar="PATH",
        nargs="+",
        help="files in this order, and folders, whose files are sorted",
    )
    source.add_argument("--dataset", metavar="NAME", help="a Hugging Face data set, streamed: a hub name or a folder")
    group.add_argument("--dataset-config", metavar="C", help="its configuration, where it has several")
    group.add_argument("--dataset-split", metavar="S", help="its split (default: train)")
    group.add_argument(
        "--format", choices=tuple(_FORMATS),
        help="what a record holds: a text (default), a prompt and its completion, or the messages of a chat; of the "
        "last two the answers alone count, in loss and selection",
    )  # fmt: skip
    for option, name in _KEYS.items():
        group.add_argument(option, metavar="KEY", help=f"the field of a record that holds its {name} (default: {name})")
    group.add_argument(
        "--separator", metavar="S", help=r"written between prompt and completion; \n is a new line (default: nothing)"
    )
    group.add_argument(
        "--skip-bad", metavar="N", type=int, help="leave out up to N documents and damaged files (default: 0)"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output", metavar="PREFIX", help="path of the corpus, without a suffix")
    tokenizer = group.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer", metavar="T", help="a Hugging Face folder or hub name, or a sentencepiece model file"
    )
    tokenizer.add_argument(
        "--train-tokenizer", metavar="SIZE", type=int, help="train a tokenizer of SIZE pieces on the input and use it"
    )
    group.add_argument(
        "--end-token",
        metavar="TOKEN",
        help="the piece of --tokenizer that ends documents, such as '<|endoftext|>' (default: its eos_token)",
    )
    group.add_argument(
        "--by", metavar="FIELD", help="one corpus PREFIX-VALUE for each value of this field, such as meta.source"
    )
    group.add_argument(
        "--source-key",
        metavar="KEY",
        help="the field counted as sources in PREFIX.json, or under meta (default: source)",
    )
    group.add_argument(
        "--contamination", metavar="EVAL", nargs="+",
        help="evaluation files: report which of their 13-word runs occur in the input, to PREFIX.contamination.json",
    )  # fmt: skip
    group.add_argument(
        "--workers", metavar="N", type=int,
        help=f"processes that encode (default: one a core, here {_cores()}); the result is the same with any number",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Prepare, merge, adopt or verify.

    Raises:
        UserError: arguments, input or an existing corpus that the person who runs this can mend.
    """
    _check(arguments)
    if arguments.merge:
        from megatron_slm.prepare.merge import merge_corpora

        merge_corpora(arguments.merge, arguments.output)
    elif arguments.adopt:
        from megatron_slm.prepare.adopt import adopt_corpus

        adopt_corpus(arguments.adopt, arguments.tokenizer, arguments.end_token)
    elif arguments.verify:
        from megatron_slm.prepare.prepare import verify_corpus

        verify_corpus(arguments.output)
    else:
        _prepare(arguments)


def _prepare(arguments: argparse.Namespace) -> None:
    from megatron_slm.prepare.inputs import find_dataset, find_files
    from megatron_slm.prepare.prepare import Options, prepare_corpora

    options = Options(
        tokenizer=arguments.tokenizer,
        train_size=arguments.train_tokenizer,
        fields=_fields(arguments),
        skip_bad=arguments.skip_bad or 0,
        evaluation=tuple(arguments.contamination or ()),
        workers=arguments.workers or _cores(),
        end_token=arguments.end_token,
    )
    if arguments.dataset:
        inputs = find_dataset(arguments.dataset, arguments.dataset_config, arguments.dataset_split or "train")
    else:
        inputs = find_files(arguments.input)
    prepare_corpora(inputs, arguments.output, options)


def _fields(arguments: argparse.Namespace) -> "Fields":
    from megatron_slm.prepare.documents import Fields

    given = {
        "text": arguments.json_key,
        "by": arguments.by,
        "source": arguments.source_key,
        "format": arguments.format,
        "prompt": arguments.prompt_key,
        "completion": arguments.completion_key,
        "separator": arguments.separator and arguments.separator.replace("\\n", "\n").replace("\\t", "\t"),
        "messages": arguments.messages_key,
    }
    return Fields(**{name: value for name, value in given.items() if value is not None})


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _check(arguments: argparse.Namespace) -> None:
    from megatron_slm.errors import UserError

    given = {
        f"--{name.replace('_', '-')}"
        for name, value in vars(arguments).items()
        if value is not None and value is not False
    }
    keys = (option.removeprefix("--").replace("-", "_") for option in _KEYS)
    for name in ("output", "tokenizer", "end_token", "by", "dataset", "source_key", *keys):
        if getattr(arguments, name) == "":
            raise UserError(f"--{name.replace('_', '-')} is empty: give it a value, or leave it out")
    mode = next(iter(given & _MODES), None)
    if mode:
        for option in sorted(given - {mode} - _ALLOWED[mode]):
            raise UserError(f"{option} says nothing to {mode}: leave it out")
        for option in sorted(_NEEDED[mode] - given):
            raise UserError(f"{mode} needs {option}: see megatron-slm prepare --help")
        return
    if "--output" not in given:
        raise UserError("--output is missing: name the prefix of the corpus, such as data/corpus")
    if not given & {"--input", "--dataset"}:
        raise UserError("--input is missing: name the files to prepare, or a data set with --dataset")
    if not given & {"--tokenizer", "--train-tokenizer"}:
        raise UserError("no tokenizer is given: name one with --tokenizer, or train one with --train-tokenizer")
    if given >= {"--train-tokenizer", "--end-token"}:
        raise UserError("--end-token says nothing to --train-tokenizer, which makes a piece of its own: leave it out")
    if "--dataset" not in given and (alone := given & {"--dataset-config", "--dataset-split"}):
        raise UserError(f"{min(alone)} says nothing to --input: leave it out, or give --dataset")
    _check_format(arguments.format or "text", given)
    _check_numbers(arguments)


def _check_format(chosen: str, given: set[str]) -> None:
    from megatron_slm.errors import UserError

    for name, options in _FORMATS.items():
        if name != chosen and (others := given & options):
            raise UserError(f"{min(others)} says nothing to --format {chosen}: leave it out, or give --format {name}")


def _check_numbers(arguments: argparse.Namespace) -> None:
    from megatron_slm.errors import UserError

    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers} does no work: give 1 or more")
    if arguments.train_tokenizer is not None and arguments.train_tokenizer < 1:
        raise UserError(f"--train-tokenizer {arguments.train_tokenizer} is no vocabulary size: give for instance 8000")
    if arguments.skip_bad is not None and arguments.skip_bad < 0:
        raise UserError(f"--skip-bad {arguments.skip_bad} is no number of documents: give 0 or more")
