"""Turn text into a prepared corpus: tokens, their index, and the tokenizer.

A corpus is PREFIX.bin and PREFIX.idx (Megatron's format), PREFIX.json (counts, sources, licenses, checksums) and
PREFIX.tokenizer/. It appears when it is complete, and an existing corpus is never overwritten. Input files are .jsonl,
.ndjson or .json (one document per line), .parquet (one document per row), or text (one document per file), each plain,
.gz or .zst. After a kill, the same command resumes: finished input files are not encoded again. In prompts with
completions and in chats, only the answers count toward the loss: PREFIX.mask marks their tokens.
"""

import argparse
import os
from typing import TYPE_CHECKING

from megatron_slm.errors import UserError
from megatron_slm.io.shards import HELP, parse_shard

if TYPE_CHECKING:
    from megatron_slm.prepare.documents import Fields

EXAMPLES = r"""examples:
  text, with a tokenizer that exists, or a new one:
    megatron-slm prepare --input web/ more.jsonl.gz --tokenizer TinyLlama/TinyLlama_v1.1 --output data/web
    megatron-slm prepare --input notes.txt --train-tokenizer 8000 --output data/notes
  with the tokenizer of a chat model, whose own end token ends turns:
    megatron-slm prepare --input web/ --tokenizer T --end-token '<|endoftext|>' --output data/web
  one corpus per source, data/web-wikipedia, data/web-arxiv, ...:
    megatron-slm prepare --input web.parquet --by meta.source --tokenizer T --output data/web
  a dataset from the hub, streamed:
    megatron-slm prepare --dataset open-web-math/open-web-math --tokenizer T --output data/owm
  for fine-tuning: questions and answers, or chats, as the tokenizer's template writes them:
    megatron-slm prepare --input gsm8k.jsonl --format prompt-completion --prompt-key question --completion-key answer \
        --separator '\n' --tokenizer T --output data/gsm8k
    megatron-slm prepare --input chats.jsonl --format messages --tokenizer T --output data/chats
  skip up to 100 bad documents, and report overlaps with evaluation files in data/web.contamination.json:
    megatron-slm prepare --input web/ --tokenizer T --output data/web --skip-bad 100 --contamination test.jsonl
  on many nodes: each task of a Slurm array encodes one shard, and the last command merges them:
    megatron-slm prepare --input web/ --tokenizer T --output data/web --shard 0/8
    megatron-slm prepare --merge --output data/web
  merge corpora that were prepared separately:
    megatron-slm prepare --merge shards/a shards/b --output data/web
  describe, in place, a .bin/.idx pair that Megatron's own tools wrote:
    megatron-slm prepare --adopt data/old --tokenizer T
  verify checksums:
    megatron-slm prepare --output data/web --verify
"""
_KEYS = {"--json-key": "text", "--prompt-key": "prompt", "--completion-key": "completion", "--messages-key": "messages"}
_FORMATS = {  # the options that apply to each
    "text": {"--json-key"},
    "prompt-completion": {"--prompt-key", "--completion-key", "--separator"},
    "messages": {"--messages-key"},
}
_MODES = {"--merge", "--adopt", "--verify"}
_NEEDED = {"--merge": {"--output"}, "--adopt": {"--tokenizer"}, "--verify": {"--output"}}
_ALLOWED = _NEEDED | {"--adopt": {"--tokenizer", "--end-token"}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    _add_input(parser.add_argument_group("input"))
    _add_output(parser.add_argument_group("output"))
    modes = parser.add_argument_group("existing corpora").add_mutually_exclusive_group()
    modes.add_argument(
        "--merge", metavar="PREFIX", nargs="*",
        help="merge these corpora, in this order, into --output; without PREFIX, the shards of --shard",
    )  # fmt: skip
    modes.add_argument(
        "--adopt", metavar="PREFIX", help="describe Megatron's PREFIX.bin and PREFIX.idx, made with --tokenizer"
    )
    modes.add_argument("--verify", action="store_true", help="only verify the checksums of the corpus at --output")


def _add_input(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--input",
        metavar="PATH",
        nargs="+",
        help="files, read in this order, and folders, whose files are read in sorted order",
    )
    source.add_argument("--dataset", metavar="NAME", help="a Hugging Face dataset, streamed; a hub name or a folder")
    group.add_argument("--dataset-config", metavar="C", help="configuration of the dataset, if it has several")
    group.add_argument("--dataset-split", metavar="S", help="split of the dataset (default: train)")
    group.add_argument(
        "--format", choices=tuple(_FORMATS),
        help="content of a record: a text (default), a prompt and its completion, or the messages of a chat; in the "
        "last two, only the answers count toward the loss and the selection",
    )  # fmt: skip
    for option, name in _KEYS.items():
        group.add_argument(option, metavar="KEY", help=f"key of a record's {name} (default: {name})")
    group.add_argument(
        "--separator", metavar="S", help=r"text between prompt and completion; \n is a newline (default: none)"
    )
    group.add_argument(
        "--skip-bad", metavar="N", type=int, help="skip up to N bad documents and damaged files (default: 0)"
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
        help="piece of --tokenizer that ends documents, such as '<|endoftext|>' (default: its eos_token)",
    )
    group.add_argument(
        "--by", metavar="FIELD", help="make one corpus PREFIX-VALUE per value of this field, such as meta.source"
    )
    group.add_argument(
        "--source-key",
        metavar="KEY",
        help="field to count as sources in PREFIX.json, also looked for under meta (default: source)",
    )
    group.add_argument(
        "--contamination", metavar="EVAL", nargs="+",
        help="evaluation files; report in PREFIX.contamination.json which of their 13-word runs occur in the input",
    )  # fmt: skip
    group.add_argument("--shard", metavar="I/N", help=HELP)
    group.add_argument(
        "--workers", metavar="N", type=int,
        help=f"processes that encode (default: one per core, here {_cores()}); the result does not depend on N",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Prepare, merge, adopt or verify.

    Raises:
        UserError: an argument, the input or an existing corpus does not work.
    """
    _check(arguments)
    if arguments.merge:
        from megatron_slm.prepare.merge import merge_corpora

        merge_corpora(arguments.merge, arguments.output)
    elif arguments.merge is not None:
        from megatron_slm.prepare.sharded import merge_shards

        merge_shards(arguments.output)
    elif arguments.adopt:
        from megatron_slm.prepare.adopt import adopt_corpus

        adopt_corpus(arguments.adopt, arguments.tokenizer, arguments.end_token)
    elif arguments.verify:
        from megatron_slm.prepare.prepare import verify_corpus

        verify_corpus(arguments.output)
    else:
        _prepare(arguments)


def _prepare(arguments: argparse.Namespace) -> None:
    shard = parse_shard(arguments.shard, os.environ)
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
    if shard is None:
        prepare_corpora(inputs, arguments.output, options)
    else:
        from megatron_slm.prepare.sharded import prepare_shard

        prepare_shard(inputs, arguments.output, options, shard)


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
    given = {
        f"--{name.replace('_', '-')}"
        for name, value in vars(arguments).items()
        if value is not None and value is not False
    }
    keys = (option.removeprefix("--").replace("-", "_") for option in _KEYS)
    for name in ("output", "tokenizer", "end_token", "by", "dataset", "source_key", *keys):
        if getattr(arguments, name) == "":
            raise UserError(f"--{name.replace('_', '-')}", "", "it is empty", "Give it a value, or remove it")
    mode = next(iter(given & _MODES), None)
    if mode:
        for option in sorted(given - {mode} - _ALLOWED[mode]):
            raise _inapplicable(arguments, option, mode)
        for option in sorted(_NEEDED[mode] - given):
            raise UserError(option, None, f"{mode} needs it", "See megatron-slm prepare --help")
        return
    if "--output" not in given:
        raise UserError("--output", None, "every corpus needs a prefix", "Set it, for example to data/corpus")
    if not given & {"--input", "--dataset"}:
        raise UserError("--input", None, "there is nothing to prepare", "Name files, or a dataset with --dataset")
    if not given & {"--tokenizer", "--train-tokenizer"}:
        raise UserError("--tokenizer", None, "a corpus needs one", "Name one, or train one with --train-tokenizer")
    if given >= {"--train-tokenizer", "--end-token"}:
        raise _inapplicable(arguments, "--end-token", "--train-tokenizer")
    if "--dataset" not in given and (alone := given & {"--dataset-config", "--dataset-split"}):
        raise _inapplicable(arguments, min(alone), "--input", "set --dataset")
    _check_format(arguments, given)
    _check_numbers(arguments)


def _check_format(arguments: argparse.Namespace, given: set[str]) -> None:
    chosen = arguments.format or "text"
    for name, options in _FORMATS.items():
        if name != chosen and (others := given & options):
            raise _inapplicable(arguments, min(others), f"--format {chosen}", f"set --format {name}")


def _inapplicable(arguments: argparse.Namespace, option: str, other: str, instead: str | None = None) -> UserError:
    """Return the error for an option that has no meaning together with another one."""
    value = getattr(arguments, option.removeprefix("--").replace("-", "_"))
    remedy = f"Remove it, or {instead}" if instead else "Remove it"
    return UserError(option, value, f"it does not apply to {other}", remedy)


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError("--workers", arguments.workers, "it must be above 0", "Use 1 or more")
    if arguments.train_tokenizer is not None and arguments.train_tokenizer < 1:
        raise UserError(
            "--train-tokenizer", arguments.train_tokenizer, "it must be above 0", "Use a vocabulary size such as 8000"
        )
    if arguments.skip_bad is not None and arguments.skip_bad < 0:
        raise UserError("--skip-bad", arguments.skip_bad, "it must not be negative", "Use 0 or more")
