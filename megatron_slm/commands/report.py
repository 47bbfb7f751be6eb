"""Write one page about one run or several: verdict, curves, token dynamics, selections, cost, configuration.

The page is one HTML file without a network, for any browser, and for print. The first run is the baseline of
comparisons. Runs may still be training. docs/report.md explains the figures.
"""

import argparse
import logging
import os
from pathlib import Path

from megatron_slm.launcher import refuse_several_ranks

EXAMPLES = """examples:
  megatron-slm report runs/slm --output report.html
  megatron-slm report runs/clm runs/slm runs/random --output report.html --figures figures
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="run directories; the first is the baseline")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the page; an earlier report is overwritten"
    )
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="also write every figure as PNG and SVG, and every curve and table as CSV, to this folder",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the report."""
    refuse_several_ranks("report", os.environ)
    from megatron_slm.analysis.report import Output, write_report

    write_report(arguments.run_dirs, Output(arguments.output, arguments.figures))
    logging.getLogger(__name__).info("%s: %.1f MB", arguments.output, arguments.output.stat().st_size / 1e6)
