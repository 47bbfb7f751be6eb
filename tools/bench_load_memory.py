"""Host memory of a pretrained student under ZeRO-3: read whole and then partitioned, or partitioned as it is read.

Writes a model with random weights to a temporary folder, reads it both ways on `--ranks` processes, and prints the peak
growth of each rank's resident set as a multiple of the model's size.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile

import psutil
import torch
from common import option_parser
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_slm.backend.deepspeed import DeepSpeedBackend, partition
from megatron_slm.backend.deepspeed_internals import whole_shape
from megatron_slm.dist import connect, disconnect

WAYS = {"whole": "read whole, then partitioned (this package)", "partitioned": "partitioned as it is read"}


def write_model(folder: str, layers: int) -> None:
    shape = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 12, "vocab_size": 32000}
    config = AutoConfig.for_model("llama", num_hidden_layers=layers, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def load(way: str, folder: str) -> None:
    """Read the model on this rank, partition it, and print the peak."""
    world = connect()
    backend = DeepSpeedBackend(world, {"zero_optimization": {"stage": 3}}, torch.float32)
    before = psutil.Process().memory_info().rss

    def read() -> AutoModelForCausalLM:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    lm = backend.construct(read) if way == "partitioned" else read()
    if way == "whole":
        partition(lm, backend.config(), world.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    size = 4 * sum(whole_shape(parameter).numel() for parameter in lm.parameters())
    sys.stdout.write(json.dumps({"rank": world.rank, "models": peak / size, "model_bytes": size}) + "\n")
    disconnect()


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="processes; default: %(default)s")
    parser.add_argument("--layers", type=int, default=12, help="layers of 28M weights; default: %(default)s")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        load(options.way, options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, options.layers)
        for way, label in WAYS.items():
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
            command = [sys.executable, *launcher, __file__, "--way", way, "--folder", folder]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            # DeepSpeed writes to the same stream and does not always end its lines.
            ranks = [json.loads(text) for text in re.findall(r'\{"rank.*?\}', found.stdout)]
            peaks = " ".join(f"{rank['models']:.2f}" for rank in sorted(ranks, key=lambda rank: rank["rank"]))
            sys.stdout.write(f"{label}: peak of each rank {peaks} models of {ranks[0]['model_bytes'] / 1e9:.2f} GB\n")


if __name__ == "__main__":
    main()
