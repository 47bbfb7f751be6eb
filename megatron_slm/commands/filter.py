"""Select the documents that are worth training on by the stored losses of two models, and write a keep-list.

Documents of all corpora are ranked together by their mean excess loss: the loss of a base model, like the student at
its start, minus the loss of the reference. Training then builds its samples from the kept documents alone (data.keep);
no token is copied. CONFIG.yaml may be the configuration of a run; data.train and the group filter are enough. The
command runs as one process and needs no GPU. docs/filter.md explains the ranking.
"""

import argparse
import os

from megatron_slm.commands._partial import parse_partial
from megatron_slm.config import Config
from megatron_slm.config_file import read_tree
from megatron_slm.data.corpus import open_corpus
from megatron_slm.data.settings import blend
from megatron_slm.errors import UserError, agreed
from megatron_slm.io.shards import HELP, parse_shard
from megatron_slm.launcher import refuse_several_ranks
from megatron_slm.reference.settings import FilterSettings

EXAMPLES = """examples:
  megatron-slm score run.yaml score.kind=document reference.path=models/base score.output=scores/base
  megatron-slm score run.yaml score.kind=document reference.path=models/reference score.output=scores/reference
  megatron-slm filter run.yaml filter.base=scores/base filter.reference=scores/reference \\
      filter.keep=0.5 filter.output=keep/web.safetensors
  megatron-slm train run.yaml data.keep=keep/web.safetensors
  on many nodes: each task of a Slurm array reads one shard of the losses, and the last command ranks the documents:
    megatron-slm filter run.yaml filter.output=keep/web.safetensors --shard 0/8
    megatron-slm filter run.yaml filter.output=keep/web.safetensors --merge
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration of a run; filter reads a part of it")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="settings that replace those in the file")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--shard", metavar="I/N", help=HELP)
    modes.add_argument("--merge", action="store_true", help="rank the documents by the sums that --shard has made")


def run(arguments: argparse.Namespace) -> None:
    """Rank the documents, and write the keep-list."""
    config, settings = agreed(lambda: _read(arguments))
    shard = parse_shard(arguments.shard, os.environ)
    from megatron_slm.build.filtering import filter_documents, filter_shard

    if shard is None:
        filter_documents(config, settings, merge=arguments.merge)
    else:
        filter_shard(config, settings, shard)


def _read(arguments: argparse.Namespace) -> tuple[Config, FilterSettings]:
    refuse_several_ranks("filter", os.environ)
    config = parse_partial(read_tree(arguments.config, arguments.overrides))
    if config.filter is None:
        remedy = "Set filter.base and filter.reference to two stores of megatron-slm score, and filter.output to a file"
        raise UserError("filter", None, "this command needs its settings", remedy)
    for prefix in blend(config.data.train)[0]:
        open_corpus(prefix, "data.train")
    return config, config.filter
