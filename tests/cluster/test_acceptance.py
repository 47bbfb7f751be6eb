"""The acceptance job on a cluster: it ends in go, and in no-go when hosts see different folders."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, why_not

REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

SMALL = [
    *("model.config.hidden_size=64", "model.config.intermediate_size=128", "model.config.num_hidden_layers=2"),
    *("model.config.num_attention_heads=4", "model.config.num_key_value_heads=2", "data.seq_length=64"),
    *("training.micro_batch_size=2", "training.global_batch_size=4", "training.train_tokens=3072"),
    *("training.lr=3e-3", "training.hang_seconds=5"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(hosts=2) as running:
        yield running


def test_the_job_ends_in_go(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "acceptance"
    options = ["--wait", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]
    options.append(f"--output={tmp_path}/job.txt")
    submitted = cluster.head.run(
        ["sbatch", *options, "examples/acceptance/acceptance.sbatch", *SMALL], {"FOLDER": str(folder)}, timeout=900
    )
    text = (tmp_path / "job.txt").read_text()
    assert submitted.returncode == 0, submitted.stderr + text
    report = json.loads((folder / "acceptance.json").read_text())
    assert report["go"] and all(test["passed"] for test in report["tests"].values())
    assert text.rstrip().endswith("GO") and "to the last digit" in report["tests"]["resume"]["finding"]
