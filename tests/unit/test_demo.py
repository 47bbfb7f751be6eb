"""The demo's parts: its texts, its checks, its chain of stages, and its report."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_slm.__main__ import main
from megatron_slm.config import parse_config
from megatron_slm.data.corpus import open_corpus
from megatron_slm.demo.chain import COMPARED, FULL, QUICK, Folders, configuration, demo_stages
from megatron_slm.demo.machine import check_folder, check_python, check_space, hold_folder
from megatron_slm.demo.processes import StoppedError, StopRequest, stop_on_signals
from megatron_slm.demo.report import held_out_passages, overtaking, results_table, selected_table
from megatron_slm.demo.stages import Stage, Stages
from megatron_slm.demo.texts import GENERAL, HELD_OUT, Sizes, _installed_files, write_texts
from megatron_slm.errors import UserError
from megatron_slm.prepare.contamination import word_ngrams

SIZES = Sizes(general=300_000, curated=60_000, held_out=8_000)
OPTIONS = {"ranks": 2, "quick": False}

# Texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "counts.json").write_text(json.dumps(write_texts(folder, SIZES)))
    return folder


def documents(folder: Path, name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_no_held_out_document_shares_thirteen_words_with_a_training_text(texts: Path) -> None:
    training = set().union(*(word_ngrams(text) for name in (*GENERAL, "curated") for text in documents(texts, name)))
    for name in HELD_OUT:
        held_out = documents(texts, name)
        assert held_out and sum(map(len, held_out)) > SIZES.held_out / 2
        assert not any(word_ngrams(text) & training for text in held_out)


def test_documents_are_counted(texts: Path) -> None:
    counts = json.loads((texts / "counts.json").read_text())
    assert all(counts[name]["documents"] == len(documents(texts, name)) for name in (*HELD_OUT, "curated"))


def test_a_held_out_document_that_quotes_a_training_text_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"word{n}" for n in range(40)]
    training = {name: [" ".join(words)] for name in (*GENERAL, "curated")}
    quotes, own = " ".join(["so", *words[5:18]]), " ".join(["so", *words[5:17]])  # 13 words in a row, and 12
    monkeypatch.setattr("megatron_slm.demo.texts._training", lambda *_: training)
    monkeypatch.setattr("megatron_slm.demo.texts._held_out", lambda *_: {name: [quotes, own] for name in HELD_OUT})
    counts = write_texts(tmp_path, SIZES)
    assert all(documents(tmp_path, name) == [own] and counts[name]["dropped"] == 1 for name in HELD_OUT)


def test_packages_that_another_package_vendors_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    carried = tmp_path / "carrier" / "_vendor"
    (carried / "odd-1.dist-info").mkdir(parents=True)
    (carried / "odd-1.dist-info" / "METADATA").write_text("Name: odd\nVersion: 1\n")
    (carried / "odd-1.dist-info" / "RECORD").write_text("odd.py,,\n")
    before = [file.name for file in _installed_files()]
    monkeypatch.syspath_prepend(str(carried))
    assert [file.name for file in _installed_files()] == before
    assert before and "odd.py" not in before


def test_a_seventh_of_the_general_text_is_mathematics(texts: Path) -> None:
    sizes = {name: (texts / f"{name}.jsonl").stat().st_size for name in GENERAL}
    assert 0.12 < sizes["mathematics"] / sum(sizes.values()) < 0.18
    assert all(sizes.values())


def test_the_same_packages_give_the_same_texts(texts: Path, tmp_path: Path) -> None:
    """The second process has another seed of Python's hashes."""
    program = (
        "import sys; from pathlib import Path; from megatron_slm.demo.texts import Sizes, write_texts;"
        "write_texts(Path(sys.argv[1]), Sizes(*map(int, sys.argv[2:])))"
    )
    sizes = [str(size) for size in (SIZES.general, SIZES.curated, SIZES.held_out)]
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), *sizes], check=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    for name in (*GENERAL, "curated", *HELD_OUT):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (texts / f"{name}.jsonl").read_bytes(), name


# Checks


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_another_python_is_refused(version: tuple[int, int]) -> None:
    with pytest.raises(UserError) as caught:
        check_python(version)
    assert (caught.value.setting, caught.value.value) == ("Python", f"3.{version[1]}")
    assert "3.11 to 3.13" in caught.value.reason


def test_too_little_memory_or_disk_is_refused(tmp_path: Path) -> None:
    check_space(4.0, 1.0, tmp_path)
    with pytest.raises(UserError) as caught:
        check_space(3.9, 1.0, tmp_path)
    assert (caught.value.setting, caught.value.value) == ("available memory", "3.9 GiB")
    with pytest.raises(UserError) as caught:
        check_space(4.0, 0.9, tmp_path)
    assert (caught.value.setting, caught.value.value) == ("free disk space", "0.9 GiB")


def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as end:
        main(["demo", "--output", str(tmp_path)])
    assert end.value.code == 2
    assert f"--output is {tmp_path}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_ranks_that_do_not_divide_a_step_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["demo", "--output", str(tmp_path / "demo"), "--ranks", "3"])
    assert end.value.code == 2
    assert "--ranks is 3" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_demo_with_other_options_is_not_replaced(tmp_path: Path) -> None:
    with hold_folder(tmp_path / "demo", OPTIONS):
        check_folder(tmp_path / "demo", OPTIONS)
        with pytest.raises(UserError) as caught:
            check_folder(tmp_path / "demo", OPTIONS | {"quick": True})
        assert (caught.value.setting, caught.value.value) == ("--output", tmp_path / "demo")
        assert "quick: False" in caught.value.reason


def test_one_demo_at_a_time_runs_in_a_folder(tmp_path: Path) -> None:
    with (
        hold_folder(tmp_path, OPTIONS),
        pytest.raises(UserError) as caught,
        hold_folder(tmp_path, OPTIONS),
    ):
        pass
    assert caught.value.setting == "--output" and "another demo" in caught.value.reason


# Stages


def stage(folder: Path, name: str, program: str, recipe: object = "", **others: object) -> Stage:
    return Stage(name, f"make {name}", ("-c", program), (folder / name,), recipe, 1.0, **others)


def append(folder: Path, name: str) -> str:
    """Return a program that appends its name to the file `ran`, and writes its output."""
    return f"open({str(folder / 'ran')!r}, 'a').write('{name} '); open({str(folder / name)!r}, 'w')"


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def two_stages(folder: Path, recipe: object = "") -> Stages:
    names = ("first", "second")
    made = [stage(folder, name, append(folder, name), recipe if name == "first" else "") for name in names]
    return Stages(folder / "stages", made, 1)


def test_finished_stages_are_not_run_again(tmp_path: Path) -> None:
    for _ in range(2):
        two_stages(tmp_path).run(StopRequest())
    assert (tmp_path / "ran").read_text() == "first second "


def test_a_changed_recipe_runs_a_stage_and_all_later_ones_again(tmp_path: Path) -> None:
    for recipe in ("", "other packages"):
        two_stages(tmp_path, recipe).run(StopRequest())
    assert (tmp_path / "ran").read_text() == "first second first second "


def test_a_changed_recipe_survives_a_stop_in_between(tmp_path: Path) -> None:
    """The first stage has run again; the second finished on the first one's old output, so it has to run again."""
    two_stages(tmp_path).run(StopRequest())
    changed = stage(tmp_path, "first", append(tmp_path, "first"), "other packages")
    Stages(tmp_path / "stages", [changed], 1).run(StopRequest())
    two_stages(tmp_path, "other packages").run(StopRequest())
    assert (tmp_path / "ran").read_text() == "first second first second "


def test_a_deleted_output_is_made_again(tmp_path: Path) -> None:
    two_stages(tmp_path).run(StopRequest())
    (tmp_path / "second").unlink()
    two_stages(tmp_path).run(StopRequest())
    assert (tmp_path / "ran").read_text() == "first second second "


def test_a_failed_stage_reports_its_error_and_its_log(tmp_path: Path) -> None:
    failing = stage(tmp_path, "one", "raise ValueError('no more paper')")
    with pytest.raises(UserError) as caught:
        Stages(tmp_path / "stages", [failing], 1).run(StopRequest())
    assert (caught.value.setting, caught.value.value) == ("stage", "make one")
    assert "status 1: ValueError: no more paper" in caught.value.reason
    assert str(tmp_path / "stages" / "one.log") in caught.value.reason
    assert not Stages(tmp_path / "stages", [failing], 1).is_finished(0)


def test_incomplete_outputs_are_removed_but_an_incomplete_run_is_kept(tmp_path: Path) -> None:
    for name, metrics in (("text", None), ("run", tmp_path / "run" / "metrics.jsonl")):
        folder = repr(str(tmp_path / name))
        program = f"import os; print('left', os.path.exists({folder})); os.makedirs({folder}); 1/0"
        made = Stages(tmp_path / "stages", [stage(tmp_path, name, program, metrics=metrics, steps=1)], 1)
        for _ in range(2):
            with pytest.raises(UserError):
                made.run(StopRequest())
    assert "left True" not in (tmp_path / "stages" / "text.log").read_text()
    assert (tmp_path / "stages" / "run.log").read_text().count("left True") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_a_request_to_terminate_and_a_closed_terminal_stop(number: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as request:
        os.kill(os.getpid(), number)
        with pytest.raises(StoppedError) as stopped:
            request.check()
    assert stopped.value.status == 128 + number and signal.getsignal(number) == before


def test_a_run_that_a_signal_stopped_early_is_not_finished(tmp_path: Path) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    program = (
        f"import os; os.mkdir({str(metrics.parent)!r});"
        f"open({str(metrics)!r}, 'a').write('{{\"step\": 1}}\\n'); print('stopped')"
    )
    made = Stages(tmp_path / "stages", [stage(tmp_path, "run", program, metrics=metrics, steps=2)], 1)
    with pytest.raises(UserError) as caught:
        made.run(StopRequest())
    assert "status 0: stopped" in caught.value.reason
    assert not made.is_finished(0)


def test_a_stop_that_arrives_while_a_stage_ends_takes_effect(tmp_path: Path) -> None:
    request = StopRequest()

    class Late(StopRequest):
        def check(self) -> None:
            if (tmp_path / "one").exists():
                request(15, None)
            request.check()

    ending = Stages(tmp_path / "stages", [stage(tmp_path, "one", append(tmp_path, "one") + "; 1/0")], 1)
    with pytest.raises(StoppedError):
        ending.run(Late())


def test_a_stop_ends_descendants_in_other_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun starts its ranks in other sessions; one descendant ignores SIGTERM."""
    monkeypatch.setattr("megatron_slm.demo.processes.GRACE_SECONDS", 1.0)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    program = (
        "import subprocess, sys, time, pathlib;"
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True);"
        f"time.sleep(0.5); pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid)); time.sleep(600)"
    )
    request = StopRequest()

    class Stopping(StopRequest):
        def check(self) -> None:
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
                request(15, None)
            request.check()

    with pytest.raises(StoppedError) as stopped:
        Stages(tmp_path / "stages", [stage(tmp_path, "one", program)], 1).run(Stopping())
    assert stopped.value.status == 143
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_ranks_share_the_cores_and_run_offline(tmp_path: Path) -> None:
    program = (
        "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['HF_HUB_OFFLINE'], os.getsid(0) == os.getpid())"
    )
    one = replace(stage(tmp_path, "one", program), outputs=())
    Stages(tmp_path / "stages", [one], 2).run(StopRequest())
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (tmp_path / "stages" / "one.log").read_text().split() == [str(threads), "1", "True"]


# Runs and results


@pytest.mark.parametrize("lengths", [FULL, QUICK], ids=["full", "quick"])
def test_every_configuration_of_the_demo_is_valid(tmp_path: Path, lengths: object) -> None:
    made = [text for stage in demo_stages(Folders(tmp_path), lengths, 2) for text in stage.files.values()]
    assert len(made) == 5
    assert [parse_config(yaml.safe_load(text)).objective for text in made].count("slm") == 1


def test_the_compared_runs_differ_in_nothing_else(tmp_path: Path) -> None:
    clm, slm, curated = (configuration(name, Folders(tmp_path), FULL, 2) for name in COMPARED)
    assert clm["data"] == slm["data"] and clm["training"] == slm["training"] == curated["training"]
    assert clm["model"] == slm["model"] == curated["model"]
    assert curated["data"]["train"] == [*clm["data"]["train"], str(tmp_path / "corpora" / "curated")]


def test_a_demo_that_was_moved_stays_finished(tmp_path: Path) -> None:
    first, second = (demo_stages(Folders(tmp_path / name), QUICK, 2) for name in ("here", "there"))
    assert [stage.recipe for stage in first] == [stage.recipe for stage in second]


def write_records(runs: Path, name: str, losses: list[float], **others: float) -> None:
    (runs / name).mkdir(parents=True)
    lines = [
        {"step": i, "consumed_tokens": 100 * i, "eval/math/loss": loss, "eval/math/bits_per_byte": loss / 2} | others
        for i, loss in enumerate(losses, 1)
    ]
    (runs / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_overtaking_is_the_first_evaluation_with_no_higher_loss(tmp_path: Path) -> None:
    write_records(tmp_path, "clm", [5.0, 4.8, 4.7, 4.6])
    write_records(tmp_path, "slm", [4.9, 4.6, 4.5, 4.4])
    assert "by token 200; CLM took 400, 2.0 times as many" in overtaking(tmp_path, "math")


def test_a_run_that_does_not_overtake_is_reported(tmp_path: Path) -> None:
    write_records(tmp_path, "clm", [5.0, 4.0])
    write_records(tmp_path, "slm", [5.0, 4.1])
    assert "did not reach" in overtaking(tmp_path, "math")


def test_the_tables_show_the_last_losses_and_the_selected_shares(tmp_path: Path) -> None:
    write_records(tmp_path, "slm", [5.0, 4.25], **{"consumed_selected_tokens": 1234, "selection/ratio/a": 0.75})
    table = results_table(tmp_path, {"slm": "SLM"}, {"math": "mathematics"})
    assert table.splitlines()[-1] == "| SLM | 1,234 | 4.250 | 2.125 |"
    assert selected_table(tmp_path).splitlines()[-1] == "| a | 75% | 75% |"


def test_passages_are_held_out_text_with_its_selected_share(corpora: Path) -> None:
    sets = {name: corpora / name for name in ("held_out", "books")}
    model = corpora / "reference"
    found = held_out_passages(sets, {"student": model, "reference": model}, 0.5, 32, 3, 20)
    assert all(len(found[name].passages) == 3 for name in sets)
    text = json.loads((corpora / "books.jsonl").read_text().splitlines()[0])["text"]
    first = "".join(token.text for token in found["books"].passages[0])
    assert text.endswith(first.split("</s>")[0][-20:]) or first[:20] in text
    # One model against itself: every excess is 0, so the ties fall to the first half of the pool.
    tokens_of = {name: open_corpus(str(prefix)).num_tokens for name, prefix in sets.items()}
    selected = sum(found[name].share * tokens_of[name] for name in sets)
    assert selected == pytest.approx(0.5 * sum(tokens_of.values()), rel=0.05)
    tokens = [token for passages in found.values() for passage in passages.passages for token in passage]
    assert all(token.excess == 0.0 for token in tokens if token.excess is not None)
    assert {token.selected for token in tokens} == {True, False}


def test_without_a_terminal_the_time_left_is_logged(tmp_path: Path) -> None:
    """Half of an hour's stages after a minute that half an hour's work took."""
    from megatron_slm.io.progress import StageMeter

    progress = StageMeter([1800.0, 1800.0])
    progress._started = time.monotonic() - 60.0
    progress.begin(1, "the second half")
    assert progress._left(0.0).endswith(" s") and 80 < float(progress._left(0.0).split()[0]) <= 90
    assert progress._left(1.0) == "0 s"
    progress.close()
