from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron_slm",
    version="0.1.0",
    description="The training system for Selective Language Modeling",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["megatron_slm", "megatron_slm.*"]),
    package_data={"megatron_slm": ["py.typed"]},
    entry_points={"console_scripts": ["megatron-slm = megatron_slm.__main__:program"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",  # which updates it skips, and says so
        "transformers>=5.17",
        "accelerate>=1.1",  # transformers' own ZeRO-3 construction needs it
        "megatron-core>=0.16,<0.17",
        "tokenizers",
        "sentencepiece",
        "protobuf",  # transformers reads sentencepiece models through it
        "safetensors",
        "numpy",
        "datasets",  # hub names and parquet (with pyarrow), streamed
        "zstandard>=0.19",  # .zst files
        "pydantic>=2",
        "pyyaml",
        "tensorboard",
        "tqdm",
        "psutil",
        "matplotlib",
    ],
    extras_require={
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML", "types-tqdm", "types-psutil"],
        "slow": ["build"],
    },
)
