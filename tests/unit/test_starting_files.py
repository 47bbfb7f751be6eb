"""The files of a starting model that a run copies, and their sources."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from megatron_slm.io.files import whole_folder
from megatron_slm.models import starting_files
from megatron_slm.models.starting_files import (
    copy_model_files,
    copy_tokenizer_files,
    read_starting_files,
    starting_folder,
)
from tests.runs import LLAMA

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "adapter_config.json", "x.gguf")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja")
EXTRA = ("generation_config.json", "LICENSE", "preprocessor_config.json")


@pytest.fixture
def starting(tmp_path: Path) -> Path:
    folder = tmp_path / "starting"
    for name in (*WEIGHTS, *TOKENIZER, *EXTRA, "README.md", "modeling_own.py", "sub/helper.py", "onnx/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    (folder / "config.json").write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    with (folder / "statistics.json").open("wb") as large:
        large.truncate(17 << 20)
    (folder / "gone.txt").symlink_to("/nowhere")
    return folder


@pytest.mark.parametrize("trusted", [False, True])
def test_small_files_are_copied_and_weights_are_not(starting: Path, tmp_path: Path, trusted: bool) -> None:
    config = AutoConfig.for_model(**LLAMA)
    with whole_folder(tmp_path / "model", replace=False) as folder:
        found = copy_model_files(starting, config, folder, trust_remote_code=trusted)
    assert found == read_starting_files(tmp_path / "model")
    made = tmp_path / "model"
    python = {"modeling_own.py", "sub/helper.py"} if trusted else set()
    kept = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert kept == {*EXTRA, "README.starting-model.md", "config.json", "starting_model.json"} | python
    for name in EXTRA:
        assert (made / name).read_bytes() == (starting / name).read_bytes()
    reasons = {name: reason for reason, names in found.left.items() for name in names}
    assert {*WEIGHTS} <= reasons.keys() and "18 MB" in reasons["statistics.json"] and "gone.txt" in reasons
    assert reasons["onnx/"] == "a folder" and (trusted or "trust_remote_code" in reasons["modeling_own.py"])
    assert json.loads((made / "config.json").read_text())["hidden_size"] == LLAMA["hidden_size"]


def test_the_files_of_a_tokenizer_are_copied_unchanged(starting: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    copy_tokenizer_files(starting, tmp_path / "tokenizer")
    made = tmp_path / "tokenizer"
    assert {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()} == {*TOKENIZER, "config.json"}
    for name in TOKENIZER:
        assert (made / name).read_bytes() == (starting / name).read_bytes()


def test_references_to_code_of_another_repository_become_local(starting: Path, tmp_path: Path) -> None:
    config = AutoConfig.for_model(**LLAMA)
    config.auto_map = {"AutoModelForCausalLM": "a/b--modeling_own.Own", "AutoConfig": "a/b--configuration_own.Own"}
    (tmp_path / "model").mkdir()
    copy_model_files(starting, config, tmp_path / "model", trust_remote_code=True)
    written = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert written == {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "a/b--configuration_own.Own"}


def test_a_hub_name_resolves_to_its_snapshot_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(path: str, **options: object) -> str:
        if options.get("local_files_only"):
            return str(tmp_path / "snapshots" / "abc")
        assert options["revision"] == "abc"
        raise ConnectionError("no network")

    monkeypatch.setattr(starting_files, "snapshot_download", download)
    assert starting_folder("someone/model") == tmp_path / "snapshots" / "abc"
    monkeypatch.setattr(starting_files, "snapshot_download", lambda path, **_: 1 / 0)
    assert starting_folder("someone/model") is None


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (tmp_path / ".model.writing").mkdir()
    (tmp_path / ".model.writing" / "left").write_text("by a process that was killed")
    with whole_folder(folder, replace=True) as aside:
        (aside / "file").write_text("first")
    with pytest.raises(ZeroDivisionError), whole_folder(folder, replace=True) as aside:
        (aside / "file").write_text("second")
        1 / 0  # noqa: B018
    with pytest.raises(FileExistsError), whole_folder(folder, replace=False) as aside:
        (aside / "file").write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"file": "first"}
