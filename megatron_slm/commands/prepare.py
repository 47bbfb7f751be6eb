"""Turn text into a prepared corpus: tokens, their index, and the tokenizer.

A file *.jsonl, *.ndjson or *.json (or .gz of it) holds a document a line; any other file is one
document. The corpus is PREFIX.bin and PREFIX.idx (Megatron's format), PREFIX.json and
PREFIX.tokenizer/; it appears when it is complete, and an existing one is never overwritten.
"""

import argparse
import os

_EPILOG = """examples:
  megatron-slm prepare --input web-*.jsonl.gz --tokenizer TinyLlama/TinyLlama_v1.1 --output data/web
  megatron-slm prepare --input notes.txt --train-tokenizer 8000 --output data/notes
  megatron-slm prepare --output data/web --verify
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("--output", metavar="PREFIX", required=True, help="path of the corpus, without a suffix")
    parser.add_argument("--input", metavar="FILE", nargs="+", help="jsonl or text files, plain or .gz, in this order")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer", metavar="T", help="a Hugging Face folder or hub name, or a sentencepiece model file"
    )
    tokenizer.add_argument(
        "--train-tokenizer", metavar="SIZE", type=int, help="train a tokenizer of SIZE pieces on the input and use it"
    )
    parser.add_argument(
        "--json-key", metavar="KEY", default="text", help="the key of a jsonl line that holds its text (default: text)"
    )
    parser.add_argument(
        "--workers", metavar="N", type=int, default=len(os.sched_getaffinity(0)),
        help="processes that encode (default: one a core, here %(default)s); the result is the same with any number",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true", help="write nothing; check the checksums of the corpus at PREFIX"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prepare or verify a corpus.

    Raises:
        UserError: arguments, input or an existing corpus that the person who runs this can mend.
    """
    from megatron_slm.data.prepare import prepare_corpus, verify_corpus

    _check(arguments)
    if arguments.verify:
        verify_corpus(arguments.output)
        return
    prepare_corpus(
        arguments.input,
        arguments.output,
        tokenizer=arguments.tokenizer,
        train_size=arguments.train_tokenizer,
        json_key=arguments.json_key,
        workers=arguments.workers,
    )


def _check(arguments: argparse.Namespace) -> None:
    from megatron_slm.errors import UserError

    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers} does no work: give 1 or more")
    if arguments.train_tokenizer is not None and arguments.train_tokenizer < 1:
        raise UserError(f"--train-tokenizer {arguments.train_tokenizer} is no vocabulary size: give for instance 8000")
    if arguments.verify:
        return
    if not arguments.input:
        raise UserError("--input is missing: name the files to prepare")
    if arguments.tokenizer is None and arguments.train_tokenizer is None:
        raise UserError("no tokenizer is given: name one with --tokenizer, or train one with --train-tokenizer")
