"""The observed tokens of a run as one Parquet file, for pandas, polars or DuckDB."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.observed import Observations
from megatron_slm.io.files import publish


def write_table(observations: Observations, texts: list[str], path: Path) -> None:
    """Write a row per token; an existing file is replaced atomically.

    Columns: corpus, document, position (in its document), document_length, offset (in the corpus's .bin), token, text,
    reference_loss, and for each step N loss/N and, if the run selected, selected/N. Losses are float32, in nats.

    Args:
        observations: of the run.
        texts: text of each token.
        path: the file.

    Raises:
        OSError: it cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    names = np.array(observations.corpora, dtype=object)
    columns: dict[str, Any] = {
        "corpus": pyarrow.array(names[observations.columns["corpus"]]).dictionary_encode(),
        **{name: column for name, column in observations.columns.items() if name != "corpus"},
        "text": texts,
    }
    if observations.reference_N is not None:
        columns["reference_loss"] = observations.reference_N
    for index, step in enumerate(observations.steps):
        columns[f"loss/{step}"] = observations.loss_SN[index]
        if observations.has_selection_S[index]:
            columns[f"selected/{step}"] = observations.selected_SN[index]
    facts = {"megatron_slm": json.dumps({**observations.facts, "reference": observations.reference_facts})}
    staged = path.with_name(f".{path.name}.new")
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(facts), staged)
    publish(staged, path, replace=True)
