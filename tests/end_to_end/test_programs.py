"""The programs of a user: examples, the device check, the wheel, the README's commands, and benchmarks."""

import argparse
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml

from megatron_slm import __version__
from megatron_slm.__main__ import main
from megatron_slm.commands import check_device as check_device_verb
from megatron_slm.config import load_config
from megatron_slm.device_check.report import Section
from megatron_slm.device_check.shapes import PRESETS
from megatron_slm.errors import UserError
from tests.runs import write_text

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=900, check=False)


EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
MANIFESTS = sorted((ROOT / "examples" / "launch").glob("*.yaml"))


@pytest.mark.parametrize(
    "path",
    [path for path in EXAMPLES if path not in MANIFESTS],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_example_is_a_valid_configuration(path: Path) -> None:
    assert load_config(str(path), []).run_dir == yaml.safe_load(path.read_text())["run_dir"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_manifest_is_yaml_that_starts_training(path: Path) -> None:
    assert all(isinstance(document, dict) for document in yaml.safe_load_all(path.read_text()))
    assert "megatron_slm" in path.read_text() or "examples/launch/torchrun.sh" in path.read_text()


@pytest.mark.slow
def test_the_data_path_is_measured_on_two_ranks(tmp_path: Path) -> None:
    options = ["--tokens", "2M", "--documents", "5k", "--ranks", "2", "--reads", "50", "--seq-length", "256", "--json"]
    program = [sys.executable, str(ROOT / "tools" / "data_path_at_scale.py"), "--folder", str(tmp_path)]
    ended = run(*program, *options, cwd=tmp_path, DS_ACCELERATOR="cpu")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["indices"] > 4 * 5000 and len(found["ranks"]) == 2
    assert all(rank["samples"] > 7000 and rank["read_us"] > 0 for rank in found["ranks"])
    assert list(tmp_path.iterdir()) == []


def check_device(*options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "megatron_slm", "check-device", *options, cwd=folder, CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
def test_the_device_check_passes_on_a_cpu(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    ended = check_device("--output", str(report), folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "no GPU" in ended.stderr
    assert "against_cpu: ok" in ended.stdout and ended.stdout.endswith("All checks passed.\n")
    found = json.loads(report.read_text())
    assert found["environment"]["preset"] == "tiny"
    assert found["against_cpu"]["fp32"]["masks_flipped"] == 0
    assert found["training_and_resume"]["resume_is_bitwise"]
    assert found["slm"]["tokens_per_second"] > 0
    assert found["selected_backward"]["ok"]
    assert {"exact@0.6", "rows@0.5", "replay@0.3"} <= found["selected_steps"]["modes"].keys()


def test_a_failed_check_ends_the_command_with_status_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = [Section("against_cpu", 1.0, {"ok": False}), Section("clm", 1.0, {"tokens_per_second": 5.0})]
    monkeypatch.setattr("megatron_slm.device_check.report.run_sections", lambda *_: iter(sections))
    monkeypatch.setattr("megatron_slm.dist.disconnect", lambda: None)
    with pytest.raises(SystemExit) as end:
        main(["check-device", "--output", str(tmp_path / "report.json")])
    assert end.value.code == 1
    shown = capsys.readouterr().out
    assert "against_cpu: FAILED" in shown and shown.endswith("Failed: against_cpu.\n")
    assert json.loads((tmp_path / "report.json").read_text()) == {section.name: section.values for section in sections}


@pytest.mark.parametrize(
    ("option", "setting"), [(["--micro-batch-size", "0"], "--micro-batch-size"), (["--output", "."], "--output")]
)
def test_options_of_the_device_check_are_checked_first(option: list[str], setting: str) -> None:
    parser = argparse.ArgumentParser()
    check_device_verb.add_arguments(parser)
    with pytest.raises(UserError) as caught:
        check_device_verb.run(parser.parse_args(option))
    assert caught.value.setting == setting


def test_the_help_of_the_device_check_lists_its_presets() -> None:
    assert tuple(PRESETS) == check_device_verb._PRESETS


@pytest.mark.slow
def test_the_step_benchmark_prints_one_line_of_json(tmp_path: Path) -> None:
    options = ["--preset", "tiny", "--rounds", "1", "--ratios", "0.6", "--json"]
    ended = run(sys.executable, str(ROOT / "tools" / "bench_step.py"), *options, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["modes"].keys() == {"exact@0.6", "rows@0.6", "replay@0.6"}
    for row in found["modes"].values():
        assert {"seconds", "of_clm", "of_checkpointed", "peak_bytes"} <= row.keys()
    assert found["clm"] > 0 and found["clm_checkpointed"] > 0 and found["optimizer"] > 0


def test_the_simulated_cluster_selects_exactly_and_counts_its_bytes(tmp_path: Path) -> None:
    options = ["--ranks", "8", "40", "--tokens", "600", "--plot", "cluster.png", "--json"]
    ended = run(sys.executable, str(ROOT / "tools" / "simulate_cluster.py"), *options, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "cluster.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(ended.stdout)
    assert [(r["ranks"], r["scores"]) for r in found["simulation"]] == list(product((8, 40), ("distinct", "tied")))
    for result in found["simulation"]:
        assert result["exact"], result
        tied = result["scores"] == "tied"
        assert (result["tied_at_threshold"] > 1) == tied
        # 3 rounds of 16 kB for the threshold, 2 for the positions of ties, and a few bytes of counts.
        rounds = [call for call in result["calls"] if call["size"] == 2048 * 8]
        assert len(rounds) == result["rounds"] == (5 if tied else 3)
        assert result["bytes_per_rank"] == result["rounds"] * 2048 * 8 + (16 + 24 + (8 + 16 if tied else 0))
    # By hand, on one node by a ring: 6.8 us + 14 steps of 0.6 us for each of the 5 all-reduces, and 3 times 14/8 of
    # 16 kB at a quarter of 450 GB/s.
    assert found["model"][0]["network"] == pytest.approx(5 * 15.2e-6 + 3 * 14 / 8 * 16384 / 112.5e9, rel=1e-3)
    assert found["model"][0]["gather_size"] == 8 * 600 * 4


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    built = run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT), cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    wheel = next((tmp_path / "dist").glob("*.whl"))
    assert f"-{__version__}-" in wheel.name
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    assert run(*pip, cwd=tmp_path).returncode == 0
    text = write_text(tmp_path / "notes.jsonl", 50, 1)
    arguments = ["--input", str(text), "--train-tokenizer", "290", "--output", str(tmp_path / "notes")]
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    ended = run(sys.executable, "-m", "megatron_slm", "prepare", *arguments, cwd=tmp_path, **environment)
    assert ended.returncode == 0, ended.stderr
    help_text = run(sys.executable, "-m", "megatron_slm", "check-device", "--help", cwd=tmp_path, **environment)
    assert help_text.returncode == 0 and "--preset" in help_text.stdout
    where = "import megatron_slm; print(megatron_slm.__file__)"
    assert str(tmp_path / "site") in run(sys.executable, "-c", where, cwd=tmp_path, **environment).stdout


def readme_blocks() -> list[str]:
    """Return the indented blocks of the README's walk from text to an exported model."""
    walk = (ROOT / "README.md").read_text().split("## Your own text")[1].split("## Settings")[0]
    blocks: list[str] = []
    for line in walk.splitlines():
        if line.startswith("    "):
            blocks.append(line[4:])
        elif blocks and blocks[-1] and line.strip():
            blocks.append("")
    return "\n".join(blocks).split("\n\n")


@pytest.mark.slow
def test_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    """From jsonl to an exported selective model, every command in its order."""
    for seed, name in enumerate(("notes", "curated", "held_out")):
        write_text(tmp_path / f"{name}.jsonl", 3000, seed)
    script = ["set -ex"]
    for block in readme_blocks():
        if block.startswith("# run.yaml"):
            (tmp_path / "run.yaml").write_text(block)
        elif block.strip():
            # TensorBoard would wait for a browser, and a vocabulary of 2,048 needs more text than this.
            script += [line.replace("2048", "300") for line in block.splitlines() if "tensorboard" not in line]
    script.append("megatron-slm export runs/slm models/slm")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = run("bash", "-c", "\n".join(script), cwd=tmp_path, PATH=path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (tmp_path / "models" / "slm" / "model.safetensors").exists()
    assert "loss/selected" in (tmp_path / "runs" / "slm" / "metrics.jsonl").read_text()
