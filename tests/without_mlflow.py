"""Hides MLflow from the server that ranks are forked from: DeepSpeed imports it if it can, and it starts a thread."""

import sys

sys.modules["mlflow"] = None  # type: ignore[assignment]
