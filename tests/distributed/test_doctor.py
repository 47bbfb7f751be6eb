"""`doctor` on ranks that communicate over gloo; each stands for a host of its own."""

import io
import json
import os
import socket
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_slm.__main__ import main
from megatron_slm.dist import World, agree, disconnect
from megatron_slm.doctor import files
from megatron_slm.doctor.network import measure_skew
from megatron_slm.errors import AgreedError
from megatron_slm.run_directory import RunDirectory
from tests.gloo import run_ranks
from tests.runs import config_tree, free_port, write_config

Answer = tuple[int, str, str]


def doctor(
    world: World,
    port: str,
    size: int,
    arguments: list[str],
    apart: dict[int, str],
    environment: dict[int, dict[str, str]],
) -> Answer:
    """Run the command as rank of `size`, on a host of its own; return exit status, standard output and error.

    Args:
        world: the rank.
        port: of the store of rank 0.
        size: number of ranks, which may be more than run.
        arguments: of the command.
        apart: current directories of some ranks.
        environment: variables of some ranks.
    """
    disconnect()
    os.environ |= {"MASTER_PORT": port, "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
    os.environ |= {"SLURMD_NODENAME": f"node{world.rank}"} | environment.get(world.rank, {})
    os.chdir(apart.get(world.rank, "."))
    out, err = io.StringIO(), io.StringIO()
    patience = (
        mock.patch("megatron_slm.__main__.SECONDS_FOR_RANK_0", 0.0),
        mock.patch.object(files, "SECONDS_TO_APPEAR", 1),
    )
    with redirect_stdout(out), redirect_stderr(err), patience[0], patience[1]:
        try:
            main(["doctor", *arguments])
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def run_doctor(
    ranks: int,
    *arguments: str,
    size: int | None = None,
    port: str | None = None,
    apart: dict[int, str] | None = None,
    environment: dict[int, dict[str, str]] | None = None,
) -> list[Answer]:
    return run_ranks(doctor, ranks, port or free_port(), size or ranks, [*arguments], apart or {}, environment or {})


def test_three_hosts_are_examined_with_the_run_that_they_are_for(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", global_batch_size=12, train_tokens=12 * 32)
    config = write_config(tmp_path / "run.yaml", tree)
    passing = tmp_path / "passing"
    answers = run_doctor(3, str(config), "--json", "--passing", str(passing))
    assert [status for status, _, _ in answers] == [0, 0, 0], answers
    report = json.loads(answers[0][1])
    assert report["verdict"] in ("PASS", "WARN")  # a busy machine may look like a slow host
    assert [rank["host"] for rank in report["ranks"]] == ["node0", "node1", "node2"]
    assert {tuple(sorted(pair["hosts"])) for pair in report["pairs"]} == {
        ("node0", "node1"), ("node0", "node2"), ("node1", "node2"),
    }  # fmt: skip
    assert all(pair["bytes_per_second"] > 0 for pair in [*report["pairs"], report["all_ranks"]])
    assert all(abs(skew) < 1 for skew in report["clock_skew_seconds"].values())
    [seen] = report["directories"].values()
    assert all(not one["apart"] and not one["unseen"] and not one["locks"] for one in seen.values())
    assert {one["setting"] for one in report["inputs"]} == {"data.train", "data.valid.held_out", "reference.path"}
    assert passing.read_text() == "".join(f"{host} slots=1\n" for host in report["passing_hosts"])
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".megatron*"))
    assert answers[1][1] == answers[2][1] == ""


def test_a_host_with_another_directory_fails_and_is_named(tmp_path: Path) -> None:
    for name in ("shared", "own"):
        (tmp_path / name).mkdir()
    folders = {0: str(tmp_path / "shared"), 1: str(tmp_path / "shared"), 2: str(tmp_path / "own")}
    answers = run_doctor(3, apart=folders)
    assert [status for status, _, _ in answers] == [1, 1, 1], answers
    [finding] = [line for line in answers[0][1].splitlines() if line.startswith("FAIL")]
    assert "node2" in finding and "node1" not in finding
    assert answers[0][1].endswith("verdict: FAIL\n")


def test_a_host_that_does_not_come_is_named_on_time(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("".join(f"node{n} slots=1\n" for n in range(4)))
    start = time.monotonic()
    # Rank 3 is the one that is missing.
    answers = run_doctor(3, "--wait", "2", "--hostfile", str(tmp_path / "hostfile"), size=4)
    assert time.monotonic() - start < 60
    assert [status for status, _, _ in answers] == [2, 2, 2]
    assert "rank 3 did not come within 2 seconds, and no rank came from node3" in answers[0][2]
    assert [heard for _, _, heard in answers[1:]] == ["", ""], "every rank repeats it"


def alone(world: World, *arguments: Any) -> Answer:
    return doctor(replace(world, rank=1), *arguments)


def test_a_rank_that_cannot_reach_rank_0_says_where_it_tried() -> None:
    port = free_port()
    environment = {1: {"RANK": "1"}}
    [(status, _, heard)] = run_ranks(alone, 1, port, 2, ["--wait", "1"], {}, environment)
    assert status == 2 and "MASTER_ADDR is 127.0.0.1" in heard
    assert f"rank 1 on node1 cannot connect to port {port} there from lo (127.0.0.1)" in heard


def test_an_interface_of_one_host_that_does_not_exist_is_an_error_on_all() -> None:
    answers = run_doctor(2, environment={1: {"GLOO_SOCKET_IFNAME": "eth9"}})
    assert [status for status, _, _ in answers] == [2, 2]
    assert "GLOO_SOCKET_IFNAME is eth9" in answers[0][2] and "it has lo" in answers[0][2]


def test_an_error_of_the_configuration_is_an_error_on_all(tmp_path: Path) -> None:
    answers = run_doctor(2, str(tmp_path / "none.yaml"))
    assert [status for status, _, _ in answers] == [2, 2] and "none.yaml" in answers[0][2] and answers[1][2] == ""


def skewed(world: World) -> dict[str, float]:
    real = time.time
    with mock.patch("megatron_slm.doctor.network.time.time", lambda: real() + 5 * world.rank):
        return measure_skew(world, ["a", "b", "c"])


def test_clock_skew_is_measured_whatever_the_round_trip_takes() -> None:
    for found in run_ranks(skewed, 3):
        assert found == {"a": 0.0, "b": pytest.approx(5, abs=0.5), "c": pytest.approx(10, abs=0.5)}


def start_in(world: World, folders: list[str]) -> str:
    """Begin a run in the directory `run` below a folder of this rank's own; return the error."""
    os.chdir(folders[world.rank])
    directory = RunDirectory("run", replace(world, local_rank=0))
    try:
        with mock.patch("megatron_slm.run_directory.SECONDS_TO_APPEAR", 0.5):
            agree(directory.hold)
            directory.refuse_unshared()
    except AgreedError as error:
        return f"{error.setting}: {error.reason}"
    finally:
        directory.close()
    return ""


def test_a_run_directory_that_only_some_hosts_see_is_refused_on_all(tmp_path: Path) -> None:
    for name in ("shared", "own"):
        (tmp_path / name).mkdir()
    shared, own = str(tmp_path / "shared"), str(tmp_path / "own")
    assert run_ranks(start_in, 3, [shared] * 3) == [""] * 3
    assert [path.name for path in (tmp_path / "shared" / "run").iterdir()] == [".lock"]
    refused = f"run_dir: {socket.gethostname()} does not see the files that rank 0 writes there"
    assert run_ranks(start_in, 3, [shared, shared, own]) == [refused] * 3
    assert list((tmp_path / "own").iterdir()) == []
