"""The judgement of `doctor`, from facts that are made up, and its checks of a host list."""

import itertools
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_slm.__main__ import main
from megatron_slm.dist import World
from megatron_slm.doctor.device import judge_devices
from megatron_slm.doctor.files import (
    DirectoryFacts,
    InputFacts,
    check_directory,
    check_input,
    judge_directory,
    judge_input,
)
from megatron_slm.doctor.findings import Finding, passing_hosts, verdict
from megatron_slm.doctor.gather import Place, gloo_address, interface_of, same_place, unreachable
from megatron_slm.doctor.host import UNLIMITED, HostFacts, judge_facts
from megatron_slm.doctor.host_list import absent_hosts, check_hosts, expected_hosts, read_hostfile
from megatron_slm.doctor.network import Speed, judge_pairs, judge_skew, rounds
from megatron_slm.doctor.report import Measurements, as_json, as_text, host_list, judge
from megatron_slm.doctor.run_needs import RunNeeds, judge_needs
from megatron_slm.errors import UserError
from megatron_slm.launcher import expand_hosts, refuse_missing_interface
from tests.refusal import refuses

GIB = 2**30
HEALTHY = HostFacts(
    rank=0,
    host="node0",
    versions={"torch": "2.13.0", "python": "3.11.7"},
    cores=8,
    device="NVIDIA H100",
    device_memory=(80 * GIB, 79 * GIB),
    memory=(1000 * GIB, 900 * GIB),
    shared_memory=64 * GIB,
    descriptors=65536,
    processes=UNLIMITED,
    locked=UNLIMITED,
    interface="eth0",
    address="10.0.0.1",
    infiniband=("mlx5_0",),
)


def cluster(hosts: int = 4, ranks: int = 2) -> list[HostFacts]:
    """Return the facts of healthy hosts."""
    return [replace(HEALTHY, rank=rank, host=f"node{rank // ranks}") for rank in range(hosts * ranks)]


def changed(facts: list[HostFacts], host: str, **values: object) -> list[HostFacts]:
    return [replace(one, **values) if one.host == host else one for one in facts]


def summary(findings: list[Finding]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(finding.level, finding.check, finding.hosts) for finding in findings]


def test_healthy_hosts_have_no_finding() -> None:
    assert judge_facts(cluster()) == []


FACTS = {
    "another torch": ({"versions": {"torch": "2.12.0", "python": "3.11.7"}}, "FAIL", "versions", "2.12.0 on node2"),
    "a missing library": ({"versions": {"python": "3.11.7"}}, "FAIL", "versions", "missing on node2"),
    "another Python": ({"versions": {"torch": "2.13.0", "python": "3.11.8"}}, "WARN", "versions", "3.11.8"),
    "another device": ({"device": "NVIDIA A100"}, "WARN", "versions", "NVIDIA A100 on node2"),
    "few open files": ({"descriptors": 256}, "FAIL", "limits", "ulimit -n"),
    "few threads": ({"processes": 100}, "WARN", "limits", "ulimit -u"),
    "little locked memory": ({"locked": 65536}, "WARN", "limits", "ulimit -l"),
    "a small /dev/shm": ({"shared_memory": 64 * 2**20}, "WARN", "limits", "/dev/shm has 64.0 MiB"),
    "a device in use": ({"device_memory": (80 * GIB, 40 * GIB)}, "WARN", "memory", "40.0 GiB of 80.0 GiB"),
    "a lost memory module": ({"memory": (750 * GIB, 700 * GIB)}, "WARN", "memory", "750.0 GiB"),
}


@pytest.mark.parametrize("fault", FACTS)
def test_a_host_that_differs_is_named(fault: str) -> None:
    values, level, check, text = FACTS[fault]
    [finding] = judge_facts(changed(cluster(), "node2", **values))
    assert summary([finding]) == [(level, check, ("node2",))]
    assert text in finding.text and finding.remedy


def test_unequal_numbers_of_ranks_are_reported() -> None:
    assert summary(judge_facts(cluster()[:-1])) == [("WARN", "versions", ("node3",))]


def test_a_warning_about_all_hosts_singles_out_none_but_a_failure_does() -> None:
    everywhere = [replace(one, shared_memory=2**26) for one in cluster()]
    assert summary(judge_facts(everywhere)) == [("WARN", "limits", ())]
    everywhere = [replace(one, descriptors=100) for one in cluster()]
    assert summary(judge_facts(everywhere)) == [("FAIL", "limits", ("node0", "node1", "node2", "node3"))]


def test_file_descriptors_are_counted_for_all_ranks_and_corpora() -> None:
    facts = [replace(one, descriptors=400) for one in cluster()]
    assert judge_facts(facts) == []
    assert summary(judge_facts(facts, descriptors_for_run=200))[0][:2] == ("FAIL", "limits")


def test_a_slow_device_is_named_among_devices_of_its_kind() -> None:
    hosts, kinds = ["a", "a", "b", "b"], ["NVIDIA H100"] * 4
    [finding] = judge_devices([6e14, 6.1e14, 4e14, 5.9e14], hosts, kinds)
    assert finding.hosts == ("b",) and "rank 2" in finding.text
    assert judge_devices([6e14, 6.1e14, 5.6e14, 5.9e14], hosts, kinds) == []
    assert judge_devices([6e11, 6e11, 4e11, 6e11], hosts, ["CPU (x86_64)"] * 4) == []


def speeds(hosts: int, **slow: float) -> dict[tuple[str, str], Speed | None]:
    """Return the speeds of all pairs; those of a named host take a multiple of the usual time."""
    names = [f"node{n}" for n in range(hosts)]
    factor = {pair: max(slow.get(host, 1.0) for host in pair) for pair in itertools.combinations(names, 2)}
    return {pair: Speed(5e-5 * f, 1e10 / f) for pair, f in factor.items()}


def test_a_host_with_a_slow_link_is_named_and_its_partners_are_not() -> None:
    assert judge_pairs(speeds(3)) == []
    assert summary(judge_pairs(speeds(3, node1=10.0))) == [("WARN", "network", ("node1",))]


def test_a_distant_host_is_named() -> None:
    measured = {pair: Speed(2e-3, 1e10) if "node2" in pair else speed for pair, speed in speeds(4).items()}
    assert summary(judge_pairs(measured)) == [("WARN", "network", ("node2",))]


def test_a_slow_pair_of_good_hosts_and_a_pair_that_fails_are_reported() -> None:
    [slow] = judge_pairs(speeds(4) | {("node0", "node2"): Speed(5e-5, 1e9)})
    assert slow.hosts == () and "node0 and node2" in slow.text
    [failed] = judge_pairs(speeds(4) | {("node0", "node2"): None})
    assert failed.level == "FAIL" and failed.hosts == ("node0", "node2")


@pytest.mark.parametrize("count", [2, 3, 4, 7, 16])
def test_all_pairs_are_measured_once_and_no_host_twice_at_a_time(count: int) -> None:
    names = [f"n{i}" for i in range(count)]
    found = [list(pairs) for pairs in rounds(names)]
    assert all(len({host for pair in pairs for host in pair}) == 2 * len(pairs) for pairs in found)
    pairs = [frozenset(pair) for pairs in found for pair in pairs]
    assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2


@pytest.mark.parametrize("count", [17, 20])
def test_many_hosts_are_measured_in_a_ring(count: int) -> None:
    found = [list(pairs) for pairs in rounds([str(i) for i in range(count)])]
    assert all(len({host for pair in pairs for host in pair}) == 2 * len(pairs) for pairs in found)
    pairs = [frozenset(map(int, pair)) for pairs in found for pair in pairs]
    assert len(pairs) == count and set(pairs) == {frozenset((i, (i + 1) % count)) for i in range(count)}


def test_a_clock_that_is_off_is_named_even_if_it_is_that_of_rank_0() -> None:
    assert judge_skew({"a": 0.0, "b": 0.2, "c": -0.3}) == []
    [ahead] = judge_skew({"a": 0.0, "b": 7.0, "c": 0.01})
    assert ahead.hosts == ("b",) and "ahead" in ahead.text
    [behind] = judge_skew({"a": 0.0, "b": 7.0, "c": 7.1})
    assert behind.hosts == ("a",) and "behind" in behind.text


DIRECTORIES = {
    "one host apart": ({"c": DirectoryFacts(apart=True), "a": DirectoryFacts(unseen=["c"])}, "FAIL", ("c",)),
    "rank 0 apart": ({"b": DirectoryFacts(apart=True), "c": DirectoryFacts(apart=True)}, "FAIL", ("a",)),
    "a late file": ({"b": DirectoryFacts(unseen=["c"])}, "FAIL", ("b",)),
    "no permission": ({"b": DirectoryFacts(unwritable="Permission denied")}, "FAIL", ("b",)),
    "a rename in parts": ({"b": DirectoryFacts(renames="a reader found no file")}, "FAIL", ("b",)),
    "no locks": ({"b": DirectoryFacts(locks="it got a lock that rank 0 held")}, "WARN", ()),
    "a slow reader": ({"b": DirectoryFacts(speed=1e8)}, "WARN", ("b",)),
}


@pytest.mark.parametrize("fault", DIRECTORIES)
def test_a_host_that_does_not_share_a_directory_is_named(fault: str) -> None:
    values, level, hosts = DIRECTORIES[fault]
    facts = {host: DirectoryFacts(speed=1e9) for host in "abc"}
    assert judge_directory(Path("/run"), facts) == []
    assert summary(judge_directory(Path("/run"), facts | values)) == [(level, "files", hosts)]


def test_an_input_that_a_host_cannot_read_or_that_differs_is_named() -> None:
    same = {host: InputFacts("x", speed=1e9) for host in "abc"}
    assert judge_input("data.train", "web", same) == []
    [missing] = judge_input("data.train", "web", same | {"b": InputFacts(problem="No such file: web.bin")})
    assert missing.level == "FAIL" and missing.hosts == ("b",)
    [other] = judge_input("data.train", "web", same | {"c": InputFacts("y", speed=1e9)})
    assert other.level == "FAIL" and other.hosts == ("c",)


ALONE = World(0, 1, 0, torch.device("cpu"))


def test_a_directory_is_checked_at_its_nearest_parent_and_nothing_is_left(tmp_path: Path) -> None:
    found = check_directory(ALONE, ["a"], tmp_path / "not" / "yet")
    assert judge_directory(tmp_path, found) == [] and found["a"].speed > 0 and found["a"].free > 0
    assert list(tmp_path.iterdir()) == []


def test_an_input_is_known_by_its_content(tmp_path: Path) -> None:
    def fingerprint(text: str) -> str:
        (tmp_path / "file").write_text(text)
        return check_input(ALONE, ["a"], [tmp_path / "file"])["a"].fingerprint

    assert fingerprint("one") == fingerprint("one") != fingerprint("two")
    assert "No such file" in check_input(ALONE, ["a"], [tmp_path / "none"])["a"].problem


NEEDS = RunNeeds("/run", checkpoint=100 * GIB, checkpoints=4)


def test_a_run_that_is_too_large_for_the_hosts_is_reported() -> None:
    facts, disk = cluster(), {"/run": {"node0": DirectoryFacts(free=500 * GIB)}}
    assert judge_needs(NEEDS, facts, disk) == []
    assert judge_needs(NEEDS, facts, {"/run": {"node0": DirectoryFacts(free=300 * GIB)}})[0].level == "FAIL"
    assert summary(judge_needs(replace(NEEDS, device_memory=70 * GIB), facts, disk)) == [("WARN", "run", ())]
    everyone = ("node0", "node1", "node2", "node3")
    assert summary(judge_needs(replace(NEEDS, device_memory=80 * GIB), facts, disk)) == [("FAIL", "run", everyone)]
    # Two ranks of a host share its memory.
    assert summary(judge_needs(replace(NEEDS, host_memory=460 * GIB), facts, disk)) == [("FAIL", "run", everyone)]
    small = changed(facts, "node3", memory=(500 * GIB, 400 * GIB))
    assert summary(judge_needs(replace(NEEDS, host_memory=300 * GIB), small, disk)) == [("FAIL", "run", ("node3",))]
    assert judge_needs(replace(NEEDS, errors=("x is 1, but no.",)), facts, disk)[0].level == "FAIL"


def test_the_report_lists_hosts_findings_and_verdict_and_is_json_too() -> None:
    found = Measurements(cluster(), [6e14] * 8, speeds(4, node1=10.0), Speed(1e-4, 1e9), {"node3": 9.0, "node0": 0.0})
    found.skew |= {"node1": 0.0, "node2": 0.0}
    found.directories["/run"] = {f"node{n}": DirectoryFacts(apart=n == 2, free=1) for n in range(4)}
    findings = judge(found, NEEDS)
    assert [finding.level for finding in findings] == ["FAIL", "FAIL", "WARN", "WARN"]
    text = as_text(found, findings)
    assert "verdict: FAIL" in text and all(str(finding) in text for finding in findings)
    plain = json.loads(json.dumps(as_json(found, findings)))
    assert plain["verdict"] == "FAIL" and plain["passing_hosts"] == ["node0"] and len(plain["pairs"]) == 6
    assert host_list(found, plain["passing_hosts"]) == "node0 slots=2\n"


def test_the_verdict_is_the_worst_finding() -> None:
    warning, failure = (Finding(level, "x", ("b",), "", "") for level in ("WARN", "FAIL"))
    assert [verdict(found) for found in ([], [warning], [warning, failure])] == ["PASS", "WARN", "FAIL"]
    assert passing_hosts(["a", "b"], [warning]) == ["a"]


HOSTFILES = {
    "the same host twice": ("node1 slots=8\nnode1 slots=8\n", "line 2", "line 1"),
    "unequal slots": ("node1 slots=8\nnode2 slots=4\nnode3 slots=8\n", "slots of node2", "have 8"),
    "no slots": ("node1\n", "line 1", "not a host"),
    "slots in words": ("# hosts\nnode1 slots=eight\n", "line 2", "not a host"),
    "no slot": ("node1 slots=0\n", "line 1", "not a host"),
    "words after the slots": ("node1 slots=8 gpu\n", "line 1", "not a host"),
    "no host": ("# nothing\n\n", "--hostfile", "no host"),
}


@pytest.mark.parametrize("mistake", HOSTFILES)
def test_a_mistake_in_a_hostfile_is_named(tmp_path: Path, mistake: str) -> None:
    text, setting, reason = HOSTFILES[mistake]
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(UserError) as caught:
        read_hostfile(tmp_path / "hostfile")
    assert setting in caught.value.setting and reason in caught.value.reason and not caught.value.others


def test_a_hostfile_holds_comments_and_the_limits_of_open_mpi(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("# mine\n\nnode1 slots=8 # fast\n  node2   slots=8 max_slots=8\n")
    assert [(host.name, host.slots) for host in read_hostfile(tmp_path / "hostfile")] == [("node1", 8), ("node2", 8)]
    with refuses("--hostfile", reason="cannot be read"):
        read_hostfile(tmp_path / "none")


@pytest.fixture
def listening() -> Iterator[int]:
    """Return a port of this host that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def host_list_of(folder: Path, *names: str) -> Path:
    (folder / "hostfile").write_text("".join(f"{name} slots=2\n" for name in names))
    return folder / "hostfile"


def test_hosts_that_do_not_resolve_or_answer_or_are_the_same_are_named(tmp_path: Path, listening: int) -> None:
    path = host_list_of(tmp_path, "127.0.0.1", "localhost", "host.invalid")
    with pytest.raises(UserError) as caught:
        check_hosts(path, read_hostfile(path), listening, seconds=2.0)
    errors = [caught.value, *caught.value.others]
    assert [error.value for error in errors] == ["localhost", "host.invalid"]
    assert "same host as 127.0.0.1" in errors[0].reason and "does not resolve" in errors[1].reason
    path = host_list_of(tmp_path, "127.0.0.1")
    check_hosts(path, read_hostfile(path), listening, seconds=2.0)
    with refuses(f"{path}, line 1,", "127.0.0.1", "does not answer"):
        check_hosts(path, read_hostfile(path), 1, seconds=2.0)


def test_the_command_checks_a_host_list_without_a_launcher(
    tmp_path: Path, listening: int, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", "--hostfile", str(host_list_of(tmp_path, "127.0.0.1")), "--ssh-port", str(listening)])
    assert "All hosts answer: 127.0.0.1." in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--hostfile", str(host_list_of(tmp_path, "127.0.0.1", "127.0.0.1"))])
    heard = capsys.readouterr().err
    assert end.value.code == 2 and heard.count("\n") == 1 and "line 2, is 127.0.0.1" in heard


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu[007-009,12],login", ["gpu007", "gpu008", "gpu009", "gpu12", "login"]),
        ("node1", ["node1"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("a[9-11]x,b", ["a9x", "a10x", "a11x", "b"]),
    ],
)
def test_slurms_lists_of_hosts_are_expanded(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


def test_the_hosts_to_expect_come_from_the_hostfile_or_from_slurm(tmp_path: Path) -> None:
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_NODELIST": "n[1-3]"}
    assert expected_hosts(slurm, []) == ["n1", "n2"]
    assert expected_hosts(slurm, read_hostfile(host_list_of(tmp_path, "a", "b"))) == ["a", "b"]
    assert expected_hosts({}, []) == []


def test_absent_hosts_are_found_by_short_name_and_address() -> None:
    came = ["node1", "10.0.0.1", "node2.cluster", "10.0.0.2"]
    expected = ["node1.cluster", "node2", "alias", "10.0.0.2", "node4"]
    assert absent_hosts(expected, came, {"alias": "10.0.0.1"}.get) == ["node4"]


INTERFACES = {
    "gloo": ({"GLOO_SOCKET_IFNAME": "eth9"}, "GLOO_SOCKET_IFNAME"),
    "gloo's second": ({"GLOO_SOCKET_IFNAME": "eth0,eth9"}, "GLOO_SOCKET_IFNAME"),
    "no beginning, for gloo": ({"GLOO_SOCKET_IFNAME": "eth"}, "GLOO_SOCKET_IFNAME"),
    "NCCL": ({"NCCL_SOCKET_IFNAME": "bond"}, "NCCL_SOCKET_IFNAME"),
    "NCCL's exact": ({"NCCL_SOCKET_IFNAME": "=eth"}, "NCCL_SOCKET_IFNAME"),
}


@pytest.mark.parametrize("mistake", INTERFACES)
def test_an_interface_that_does_not_exist_is_named_with_those_that_do(mistake: str) -> None:
    environment, variable = INTERFACES[mistake]
    with refuses(variable, environment[variable], "it has lo, eth0, ib0"):
        refuse_missing_interface(environment, ["lo", "eth0", "ib0"])


@pytest.mark.parametrize("text", ["eth0", "ib", "bond,ib", "=ib0", "^docker,lo"])
def test_interfaces_that_nccl_finds_are_accepted(text: str) -> None:
    refuse_missing_interface({"NCCL_SOCKET_IFNAME": text, "GLOO_SOCKET_IFNAME": "eth0,ib0"}, ["lo", "eth0", "ib0"])


def test_the_address_of_gloo_is_that_of_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert gloo_address() == "127.0.0.1" and interface_of("127.0.0.1") == "lo"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert interface_of(gloo_address()) != "?"


def test_hosts_that_cannot_connect_and_ranks_in_one_place_are_named() -> None:
    places = [Place(rank, 0, f"node{rank}", "eth0", f"10.0.0.{rank}", port=1) for rank in range(3)]
    assert unreachable(places, {0: {}, 1: {}, 2: {}}) is None
    error = unreachable(places, {0: {}, 1: {"node2": "timed out"}})
    assert error is not None and "node1 cannot connect to node2 at 10.0.0.2, eth0 (timed out)" in error.reason
    assert "node2 went silent" in error.reason
    assert same_place(places) is None
    error = same_place([*places, replace(places[1], rank=3)])
    assert error is not None and "ranks 1 and 3" in error.reason and "node1" in error.reason
