"""The files for Kubernetes in `examples/launch`, held against the schemas of Kubeflow's own packages.

The packages generate their models from the schemas of the custom resources. A key that a schema does not know is lost
when a model reads a file and writes it again.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "examples" / "launch"

pytestmark = pytest.mark.slow


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def trainer_v2(document: dict[str, Any]) -> Any:
    """Return a document as the models of Kubeflow Trainer v2 read and write it."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    return getattr(models, f"TrainerV1alpha1{document['kind']}").from_dict(document).to_dict()


def operator_v1(document: dict[str, Any]) -> Any:
    """Return a document as the models of the training operator v1 read and write it."""
    client = pytest.importorskip("kubeflow.training.api_client").ApiClient()
    response = SimpleNamespace(data=json.dumps(document))
    return client.sanitize_for_serialization(client.deserialize(response, f"KubeflowOrgV1{document['kind']}"))


CASES = [("trainjob.yaml", trainer_v2), ("pytorchjob.yaml", operator_v1)]


@pytest.mark.parametrize(("name", "read"), CASES, ids=[name for name, _ in CASES])
def test_the_schema_knows_every_key_and_finds_none_missing(name: str, read: Any) -> None:
    for document in documents(name):
        assert read(document) == document


@pytest.mark.parametrize(("name", "read"), CASES, ids=[name for name, _ in CASES])
def test_a_misspelt_key_is_found(name: str, read: Any) -> None:
    *_, document = documents(name)
    document["spec"]["runPolicies"] = {}
    assert read(document) != document
