"""Export: it reads the run directory alone, copies the files of the starting model, and checks before it publishes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from megatron_slm.dist import World
from tests.end_to_end.test_bad_input import command_line, sentence_of
from tests.gloo import run_ranks
from tests.runs import LLAMA, config_tree, records, train_in_process, write_config

GENERATION = {"eos_token_id": [0, 1], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
CODE = {
    "configuration_own.py": """from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
""",
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 3, "intermediate_size": 32}


def make_starting_model(
    corpora: Path, folder: Path, config: dict[str, Any], tied: bool = True, code: bool = False
) -> Path:
    """Write a model with all kinds of files of a hub folder; unless `tied`, its head and embedding differ."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(corpora / "web.tokenizer")
    made = AutoConfig.for_model(**config, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "LICENSE").write_text("do what you like")
    (folder / "README.md").write_text("# The starting model")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("not weights")
    if not tied:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if code:
        tree = json.loads((folder / "config.json").read_text())
        auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
        (folder / "config.json").write_text(json.dumps(tree | {"model_type": "own", "auto_map": auto_map}))
        for name, text in CODE.items():
            (folder / name).write_text(text)
    return folder


def short_run(corpora: Path, run_dir: Path, **model: Any) -> dict[str, Any]:
    return config_tree(corpora, run_dir, train_tokens=2 * 8 * 32) | {"model": model}


def train_in(world: World, place: str, tree: dict[str, Any]) -> None:
    os.chdir(place)
    train_in_process(world, tree)


def export(world: World, place: str, *arguments: str) -> tuple[int, str]:
    os.chdir(place)
    return command_line(world, "export", *arguments)


def loaded(world: World, folder: str, trusted: bool = False) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted).state_dict()


def trained_weights(world: World, tree: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    """Return the float32 weights of a checkpoint, from DeepSpeed's own program."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = f"{tree['run_dir']}/checkpoints/step_{step:08d}"
    found = get_fp32_state_dict_from_zero_checkpoint(folder, tag="engine")
    return {name.removeprefix("lm."): weight for name, weight in found.items()}


def test_export_reads_only_the_run_directory(corpora: Path, tmp_path: Path) -> None:
    """The run uses relative paths; it is exported from elsewhere, without its corpora and starting model."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(corpora, home / "data")
    original = make_starting_model(corpora, tmp_path / "original", LLAMA)
    shutil.copytree(original, home / "starting")
    tree = short_run(Path("data"), Path("run"), path="starting")
    run_ranks(train_in, 2, str(home), tree)
    shutil.rmtree(home / "data")
    shutil.rmtree(home / "starting")
    status, heard = run_ranks(export, 1, str(elsewhere), "../home/run", "out")[0]
    assert status == 0, heard
    out = elsewhere / "out"
    unchanged = ("generation_config.json", "LICENSE", "preprocessor_config.json", "tokenizer.json")
    for name in (*unchanged, "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (original / name).read_bytes(), name
    assert (out / "README.starting-model.md").read_text() == "# The starting model"
    assert "Selective Language Modeling" in (out / "README.md").read_text()
    assert not {"pytorch_model.bin", "starting_model.json"} & {path.name for path in out.iterdir()}
    lines = heard.splitlines()
    assert any("copied from" in line and "generation_config.json" in line for line in lines)
    assert any("not copied" in line and "pytorch_model.bin" in line and "weights" in line for line in lines)
    weights = run_ranks(loaded, 1, str(out))[0]
    expected = run_ranks(trained_weights, 1, tree | {"run_dir": str(home / "run")}, 2)[0]
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    assert json.loads((out / "config.json").read_text()).items() >= {"tie_word_embeddings": True}.items()


@pytest.mark.parametrize("case", ["from scratch", "code of its own", "experts"])
def test_a_run_without_its_sources_is_exported(corpora: Path, tmp_path: Path, case: str) -> None:
    shutil.copytree(corpora, tmp_path / "data")
    model: dict[str, Any] = {"config": MIXTRAL}
    if case != "from scratch":
        code = case == "code of its own"
        config = LLAMA if code else MIXTRAL
        path = make_starting_model(corpora, tmp_path / "starting", config, code=code)
        model = {"path": str(path), "trust_remote_code": code}
    tree = short_run(tmp_path / "data", tmp_path / "run", **model)
    run_ranks(train_in_process, 2, tree)
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / "starting", ignore_errors=True)
    status, heard = run_ranks(export, 1, str(tmp_path), "run", "out", "--dtype", "bf16")[0]
    assert status == 0, heard
    weights = run_ranks(loaded, 1, str(tmp_path / "out"), case == "code of its own")[0]
    expected = run_ranks(trained_weights, 1, tree, 2)[0]
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name].bfloat16()), name
    if case == "from scratch":
        made, prepared = (folder / "tokenizer.json" for folder in (tmp_path / "out", corpora / "web.tokenizer"))
        assert made.read_bytes() == prepared.read_bytes()


def test_a_run_of_an_earlier_version_is_exported_from_its_sources(corpora: Path, tmp_path: Path) -> None:
    path = make_starting_model(corpora, tmp_path / "starting", LLAMA)
    run_ranks(train_in_process, 1, short_run(corpora, tmp_path / "run", path=str(path)))
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    status, heard = run_ranks(export, 1, str(tmp_path), "run", "out")[0]
    assert status == 0, heard
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == GENERATION


def test_a_run_killed_while_it_copied_starting_files_copies_them_on_resume(corpora: Path, tmp_path: Path) -> None:
    path = make_starting_model(corpora, tmp_path / "starting", LLAMA)
    tree = short_run(corpora, tmp_path / "run", path=str(path))
    run_ranks(train_in_process, 1, tree)
    kept = {name: (tmp_path / "run" / "model" / name).read_bytes() for name in ("config.json", "LICENSE")}
    (tmp_path / "run" / "model").rename(tmp_path / "run" / ".model.writing")
    (tmp_path / "run" / ".model.writing" / "LICENSE").write_text("cut")
    tree["training"]["train_tokens"] *= 2
    run_ranks(train_in_process, 1, tree)
    assert {name: (tmp_path / "run" / "model" / name).read_bytes() for name in kept} == kept
    assert not (tmp_path / "run" / ".model.writing").exists()


def test_starting_files_of_a_failed_start_are_replaced(corpora: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "LICENSE").write_text("of another model")
    run_ranks(train_in_process, 1, short_run(corpora, tmp_path / "run", config=LLAMA))
    assert {path.name for path in (tmp_path / "run" / "model").iterdir()} == {"config.json", "starting_model.json"}


@pytest.fixture(scope="module")
def untied(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose configuration ties two weights that differ in its files."""
    return make_starting_model(corpora, tmp_path_factory.mktemp("untied") / "model", LLAMA, tied=False)


def test_different_weights_that_the_configuration_ties_are_refused(corpora: Path, tmp_path: Path, untied: Path) -> None:
    config = str(write_config(tmp_path / "run.yaml", short_run(corpora, tmp_path / "run", path=str(untied))))
    for arguments in (["train", config], ["train", config, "--dry-run"]):
        sentence = sentence_of("train", *run_ranks(command_line, 1, *arguments)[0])
        assert sentence.startswith(f"model.path is {untied}, but its configuration ties lm_head.weight")
        assert "model.config.tie_word_embeddings=false" in sentence


def test_untied_weights_are_both_trained_and_exported(corpora: Path, tmp_path: Path, untied: Path) -> None:
    tree = short_run(corpora, tmp_path / "run", path=str(untied), config={"tie_word_embeddings": False})
    run_ranks(train_in_process, 2, tree)
    status, heard = run_ranks(export, 1, str(tmp_path), "run", "out")[0]
    assert status == 0, heard
    before, after = (run_ranks(loaded, 1, str(folder))[0] for folder in (untied, tmp_path / "out"))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        moved = (after[name] - before[name]).abs().max()
        assert 0 < moved < 0.01, name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def plain_losses(world: World, folder: str, text: list[list[int]]) -> float:
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor(text)
    with torch.no_grad():
        return float(AutoModelForCausalLM.from_pretrained(folder)(tokens, labels=tokens).loss)


def reference_losses(world: World, corpora: str, folder: str, text: list[list[int]], shard: bool) -> float:
    from megatron_slm.build.models import frozen_model, make_backend
    from megatron_slm.config import parse_config

    tree = config_tree(Path(corpora), Path("unused"), precision="fp32")
    tree["reference"] = {"path": folder, "shard": shard}
    config = parse_config(tree)
    assert config.reference is not None
    backend = make_backend(config, world)
    engine, _ = frozen_model(config, config.reference.parts[0], backend)
    tokens = torch.tensor(text)
    positions = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
    with torch.no_grad():
        return float(engine(tokens[:, :-1], tokens[:, 1:], positions)["loss"].mean())


def test_an_untied_reference_has_the_losses_of_plain_transformers(corpora: Path, untied: Path) -> None:
    text = torch.randint(0, 290, (2, 17), generator=torch.Generator().manual_seed(1)).tolist()
    expected = run_ranks(plain_losses, 1, str(untied), text)[0]
    for shard in (False, True):
        for found in run_ranks(reference_losses, 2, str(corpora), str(untied), text, shard):
            assert found == pytest.approx(expected, rel=1e-5)


def export_with_fault(world: World, place: str, what: str) -> tuple[int, str]:
    """Export, and damage the exported folder while it is written: `what` is damaged or missing."""
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def wrong(model: Any, folder: Path, state_dict: dict[str, torch.Tensor], **options: Any) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        if what == "one bit":
            state_dict[name].view(torch.int32)[3, 4] ^= 1
        elif what == "a weight":
            del state_dict[name]
        save(model, folder, state_dict=state_dict, **options)
        if what == "a file":
            (Path(folder) / "config.json").write_text("{}")

    with mock.patch.object(PreTrainedModel, "save_pretrained", wrong):
        return export(world, place, "run", "out")


@pytest.fixture(scope="module")
def finished(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a finished run, whose weights lie in several shards when exported."""
    folder = tmp_path_factory.mktemp("finished")
    run_ranks(train_in_process, 1, short_run(corpora, folder / "run", config=LLAMA))
    return folder


@pytest.mark.parametrize("what", ["one bit", "a weight", "a file"])
def test_a_folder_that_differs_from_the_checkpoint_is_not_published(finished: Path, what: str) -> None:
    sentence = sentence_of("export", *run_ranks(export_with_fault, 1, str(finished), what)[0])
    assert sentence.startswith("version of transformers is ") and "nothing was exported" in sentence
    assert {path.name for path in finished.iterdir()} == {"run"}


def export_in_shards(world: World, place: str) -> tuple[int, str]:
    with mock.patch("megatron_slm.models.export.SMALLEST_SHARD", 0):
        return export(world, place, "run", "sharded")


def test_shards_hold_the_same_weights(corpora: Path, tmp_path: Path) -> None:
    run_ranks(train_in_process, 1, short_run(corpora, tmp_path / "run", config=MIXTRAL))
    assert run_ranks(export_in_shards, 1, str(tmp_path))[0][0] == 0
    assert run_ranks(export, 1, str(tmp_path), "run", "whole")[0][0] == 0
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 2
    for folder in ("sharded", "whole"):  # The weights have the permissions of the other files.
        assert len({path.stat().st_mode for path in (tmp_path / folder).iterdir()}) == 1
    one, other = (run_ranks(loaded, 1, str(tmp_path / name))[0] for name in ("sharded", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    (index,) = (tmp_path / "sharded").glob("*.index.json")
    assert json.loads(index.read_text())["metadata"]["total_size"] == bytes_of_weights(tmp_path / "whole")


def bytes_of_weights(folder: Path) -> int:
    """Return the size of model.safetensors, without its header."""
    file = folder / "model.safetensors"
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def test_weights_that_an_earlier_version_trained_separately_are_not_exported_as_tied(
    corpora: Path, tmp_path: Path, untied: Path
) -> None:
    """Earlier versions did not refuse such a configuration."""
    tree = short_run(corpora, tmp_path / "run", path=str(untied), config={"tie_word_embeddings": False})
    run_ranks(train_in_process, 1, tree)
    shutil.rmtree(tmp_path / "run" / "model")
    stored = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(stored.replace("tie_word_embeddings: false", "use_cache: true"))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["config"] == {"use_cache": True}
    sentence = sentence_of("export", *run_ranks(export, 1, str(tmp_path), "run", "out")[0])
    assert sentence.startswith("model.config.tie_word_embeddings is true") and not (tmp_path / "out").exists()
    assert records(tmp_path / "run")[-1]["step"] == 2


def test_a_run_stores_its_settings_unchanged(corpora: Path, tmp_path: Path) -> None:
    """Hugging Face writes to nested groups, which would make a resumed run look different."""
    rope = {"rope_theta": 5e5}
    tree = short_run(corpora, tmp_path / "run", config=LLAMA | {"rope_parameters": dict(rope)})
    run_ranks(train_in_process, 1, tree)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["config"]["rope_parameters"] == rope
    run_ranks(train_in_process, 1, tree)


def test_a_run_of_an_earlier_version_does_not_change_its_positions(corpora: Path, tmp_path: Path) -> None:
    path = make_starting_model(corpora, tmp_path / "starting", LLAMA)
    tree = short_run(corpora, tmp_path / "run", path=str(path), config={"rope_theta": 5e5})
    run_ranks(train_in_process, 1, tree)
    shutil.rmtree(tmp_path / "run" / "model")
    config = str(write_config(tmp_path / "run.yaml", tree))
    sentence = sentence_of("train", *run_ranks(command_line, 1, "train", config)[0])
    assert "ignored model.config.rope_theta" in sentence


def test_a_warning_is_logged_if_auto_tokenizer_returns_other_ids(corpora: Path, tmp_path: Path) -> None:
    """transformers rebuilds the tokenizer of a folder of the type qwen2, whatever its tokenizer.json holds."""
    for model_type in ("llama", "qwen2"):
        tree = short_run(corpora, tmp_path / model_type)
        tree["model"] = {"config": dict(LLAMA) | {"model_type": model_type}}
        run_ranks(train_in, 1, str(tmp_path), tree)
        arguments = (str(tmp_path / model_type), str(tmp_path / f"{model_type}-out"))
        status, heard = run_ranks(export, 1, str(tmp_path), *arguments)[0]
        assert status == 0, heard
        assert ("returns other ids than the tokenizer of the run" in heard) == (model_type == "qwen2")
