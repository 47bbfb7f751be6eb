"""Write which documents of the corpora are worth training on, from the stored losses of two models.

Documents of all corpora are ranked together by their mean excess loss: the loss of a base model, like the student
at its start, minus the loss of the reference. Training then builds its samples from the kept ones alone
(data.keep); no token is copied. The configuration of a run serves; `data.train` and the filter group are all that
is needed. One process does it, and needs no GPU. docs/filter.md tells more.
"""

import argparse
import os

from megatron_slm.commands._partial import parse_partial
from megatron_slm.config import Config
from megatron_slm.config_file import read_tree
from megatron_slm.data.corpus import open_corpus
from megatron_slm.data.settings import blend
from megatron_slm.errors import AgreedError, UserError, agreed
from megatron_slm.launcher import ranks_started
from megatron_slm.reference.settings import FilterSettings

_EPILOG = """example:
  megatron-slm score run.yaml score.kind=document reference.path=models/base score.output=scores/base
  megatron-slm score run.yaml score.kind=document reference.path=models/reference score.output=scores/reference
  megatron-slm filter run.yaml filter.base=scores/base filter.reference=scores/reference \\
      filter.keep=0.5 filter.output=keep/web.safetensors
  megatron-slm train run.yaml data.keep=keep/web.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("config", metavar="CONFIG.yaml", help="a run's configuration, or the part that is needed")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="settings that replace those in the file")


def run(arguments: argparse.Namespace) -> None:
    """Rank the documents, and write the list."""
    config, settings = agreed(lambda: _read(arguments))
    from megatron_slm.build.filtering import filter_documents

    filter_documents(config, settings)


def _read(arguments: argparse.Namespace) -> tuple[Config, FilterSettings]:
    ranks = ranks_started(os.environ)
    if ranks != "1":
        raise AgreedError(f"filter was started on {ranks} ranks, but it runs as one process. Start one.")
    config = parse_partial(read_tree(arguments.config, arguments.overrides))
    if config.filter is None:
        raise UserError(
            "filter.base, filter.reference and filter.output are not set: name two stores that megatron-slm score "
            "wrote, and the file to make."
        )
    for prefix in blend(config.data.train)[0]:
        open_corpus(prefix)
    return config, config.filter
