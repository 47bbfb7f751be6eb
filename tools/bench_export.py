"""Host memory of `megatron-slm export`, as a multiple of the size of the exported folder.

Trains one step of a model with random weights under ZeRO, on `--ranks` processes, in a temporary folder, and exports it
in float32 and in bf16. Prints the peaks of the resident set, which includes mapped files, and of anonymous memory, each
minus the memory of the process after it imported the libraries.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from common import option_parser

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8},
    "mixtral": {
        **{"hidden_size": 768, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 8},
        "num_local_experts": 8,
    },
}


def resident() -> dict[str, int]:
    """Return the resident and the anonymous bytes of this process."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {line[0]: int(line[1]) for line in lines if line[0] in ("VmRSS:", "RssAnon:")}
    return {"resident": kilobytes["VmRSS:"] * 1024, "anonymous": kilobytes["RssAnon:"] * 1024}


def export(run: str, output: str, dtype: str) -> None:
    """Export in this process, and print the peaks as JSON."""
    import deepspeed  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from megatron_slm.__main__ import main

    config = AutoConfig.from_pretrained(f"{run}/model")
    config.num_hidden_layers, config.hidden_size = 1, 64
    AutoModelForCausalLM.from_config(config)  # imports the modules of the architecture
    AutoTokenizer.from_pretrained(f"{run}/tokenizer")
    before, peak, over = resident(), resident(), threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            for name, size in resident().items():
                peak[name] = max(peak[name], size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    main(["export", run, output, "--dtype", dtype])
    seconds = time.perf_counter() - started
    over.set()
    watcher.join()
    found: dict[str, float] = {name: peak[name] - before[name] for name in before}
    sys.stdout.write("\n" + json.dumps(found | {"seconds": seconds}) + "\n")


def make_run(folder: Path, model: str, layers: int, stage: int, ranks: int) -> None:
    """Prepare a small corpus and train one step."""
    text = [json.dumps({"text": f"{number} plus {number + 1} is {2 * number + 1}."}) for number in range(2000)]
    (folder / "text.jsonl").write_text("\n".join(text))
    command = [sys.executable, "-m", "megatron_slm"]
    prepare = ["prepare", "--input", str(folder / "text.jsonl"), "--output", str(folder / "corpus")]
    subprocess.run([*command, *prepare, "--train-tokenizer", "280"], check=True)
    shape = SHAPES[model] | {"model_type": model, "num_hidden_layers": layers, "vocab_size": 32000}
    config = {
        "run_dir": str(folder / "run"),
        "objective": "clm",
        "model": {"config": shape | {"max_position_embeddings": 64}},
        "data": {"train": str(folder / "corpus"), "seq_length": 16},
        "training": {"micro_batch_size": 1, "global_batch_size": ranks, "train_tokens": 16 * ranks, "lr": 1e-3},
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    subprocess.run([*launcher, "-m", "megatron_slm", "train", str(folder / "run.yaml")], check=True)


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--model", choices=SHAPES, default="llama", help="architecture; default: %(default)s")
    parser.add_argument("--layers", type=int, default=16, help="layers of the model; default: %(default)s")
    parser.add_argument("--stage", type=int, default=3, help="stage of ZeRO; default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="processes that train; default: %(default)s")
    parser.add_argument("--export", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        export(*options.export)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder, options.model, options.layers, options.stage, options.ranks)
        for dtype in ("fp32", "bf16"):
            command = [sys.executable, __file__, "--export", str(folder / "run"), str(folder / dtype), dtype]
            found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
            size = sum(path.stat().st_size for path in (folder / dtype).iterdir())
            shards = len(list((folder / dtype).glob("*.safetensors")))
            peaks = ", ".join(f"{part} {found[part] / size:.2f}" for part in ("resident", "anonymous"))
            sys.stdout.write(
                f"{dtype}: peak memory over the folder's {size / 1e9:.2f} GB in {shards} shards: {peaks}; "
                f"{found['seconds']:.0f} s\n"
            )


if __name__ == "__main__":
    main()
