"""The arithmetic of `plan`, against cases that were computed by hand."""

import math

import pytest
import torch

from megatron_slm.devices import CPU, DENSE_BF16_PEAKS, DEVICES, find_device
from megatron_slm.errors import UserError
from megatron_slm.planning.calibrate import measured_rates
from megatron_slm.planning.disk import checkpoint_bytes, disk_space, lost_share, optimal_interval
from megatron_slm.planning.measure import PhaseRecorder
from megatron_slm.planning.network import Network
from megatron_slm.planning.time import Rates, StepTime, TimeSettings, assumed_rates, step_time
from megatron_slm.reporting.tables import aligned_table
from megatron_slm.training.cost import ModelFlops, ModelSize, StepTokens, TokenFlops

SIZE = ModelSize(
    (600, 400),
    900,
    2,
    layer_bytes=4000,
    boundary_bytes=80,
    cache_bytes=4,
    head_bytes=7,
    head=50,
    flops=TokenFlops(6, 2),
)
"""Two layers that keep 4,000 bytes each for 10 tokens of width 2 in float32; the vocabulary is 25."""
TOKENS = StepTokens(candidates=0, trained=80, selected=40, reference=80)
NETWORK = Network(gpus_per_node=8, nvlink_gb=400, network_gb=50)


def times(rates: Rates, backward: str = "exact", **changes: object) -> StepTime:
    settings = {
        "ranks": 4,
        "micro_steps": 2,
        "micro_tokens": 10,
        "pools": 2,
        "each": 4,
        "zero": {"stage": 3, "reduce_bucket_size": 250, "stage3_prefetch_bucket_size": 100},
        "checkpointing": False,
        "reference_batches": 2,
        "stall": 30.0,
        "save_interval": 10,
    }
    models = ModelFlops(SIZE.flops, 8.0, backward)
    return step_time(models, TOKENS, SIZE, [SIZE], rates, NETWORK, TimeSettings(**(settings | changes)))


def test_the_devices_have_plausible_figures_and_name_their_source() -> None:
    for name, device in DEVICES.items():
        assert device.name == name == name.lower() and len(device.source) > 10
        if name == CPU:
            continue
        assert device.flops in DENSE_BF16_PEAKS.values() and 1e14 < device.flops < 1e16
        assert device.memory == float(name.partition("-")[2].removesuffix("gb")) * 1e9
        assert 1e12 < device.bandwidth < 1e13 and 1e11 < device.link < device.bandwidth
        assert 100 <= device.network <= 800


def test_a_device_is_found_by_a_part_of_its_name_and_an_unknown_one_suggests_the_nearest() -> None:
    assert find_device("H100").name == "h100-80gb" and find_device("mi300x-192GB").name == "mi300x-192gb"
    for name, suggestion in (("h100-80g", "h100-80gb"), ("a100", "a100-40gb or a100-80gb"), ("zzz", "cpu")):
        with pytest.raises(UserError) as caught:
            find_device(name)
        assert caught.value.setting == "--device" and suggestion in caught.value.remedy


def test_compute_is_flops_over_the_assumed_speed() -> None:
    # 20 tokens per rank: 8 FLOPs per token forward, and 16 backward, at 0.5 of 100 FLOP/s.
    device = find_device("h100")
    assert assumed_rates(device, 0.4, False) == Rates(0.4 * device.flops, 0.4 * device.flops, device.bandwidth)
    # With checkpointing, the same MFU means a third more FLOPs.
    assert assumed_rates(device, 0.3, True).products == pytest.approx(0.4 * device.flops)
    parts = times(Rates(50.0, 50.0, 1e6)).compute
    assert parts["student forward"] == pytest.approx(20 * 8 / 50)
    assert parts["student backward"] == pytest.approx(20 * 16 / 50)
    assert parts["forward of the reference"] == pytest.approx(20 * 8 / 50)
    assert parts["layers run again"] == 0 and "pointwise, forward" not in parts
    assert times(Rates(50.0, 50.0, 1e6), checkpointing=True).compute["layers run again"] == pytest.approx(20 * 8 / 50)
    # Rows: the backward of half of the tokens through the weights, and of all through attention.
    rows = times(Rates(50.0, 50.0, 1e6), backward="rows").compute
    assert rows["student backward"] == pytest.approx((10 * 12 + 20 * 4) / 50)


def test_attention_and_pointwise_work_have_speeds_of_their_own_on_a_cpu() -> None:
    parts = times(Rates(50.0, 10.0, 1e6, fresh=1e5)).compute
    assert parts["student forward"] == pytest.approx(20 * (6 / 50 + 2 / 10))
    # 800 bytes per token in layers, and twice 4 bytes for each of the 25 logits.
    assert parts["pointwise, forward"] == pytest.approx(1.7 * 20 * (800 + 200) / 1e5)
    assert parts["pointwise, reference"] == pytest.approx(1.25 * 20 * (800 + 200) / 1e5)
    assert parts["pointwise, gradients"] == pytest.approx(2 * 1000 * (12 / 1e5 + 72 / 1e6))


def test_gathers_and_reductions_follow_the_ring() -> None:
    # On one node: 4 ranks pass 3/4 of the bytes at 400 GB/s, with 8.4 us to launch and 3 hops of 3.4 us per message.
    def ring(size: int, messages: int) -> float:
        return messages * (8.4 + 3 * 3.4) * 1e-6 + size * 0.75 / 400e9

    found = times(Rates(50.0, 50.0, 1e6)).communication
    assert found["gathers for the student"] == pytest.approx(4 * ring(4000, 10))
    assert found["reduce-scatter"] == pytest.approx(2 * ring(4000, 4))
    assert found["gathers for the reference"] == pytest.approx(2 * ring(4000, 10))
    # Two nodes are joined by the network: 8 adapters of 50 GB/s, and one hop of 9.6 us.
    assert NETWORK.shard_or_gather(16, 10**9) == pytest.approx((8.4 + 14 * 3.4 + 9.6) * 1e-6 + 1e9 * 15 / 16 / 400e9)
    assert NETWORK.shard_or_gather(1, 10**9) == 0


def test_stages_below_3_gather_the_weights_once() -> None:
    def found(stage: int) -> dict[str, float]:
        return times(Rates(50.0, 50.0, 1e6), zero={"stage": stage}).communication

    once = NETWORK.shard_or_gather(4, 4000)
    assert found(2) == {"gathers for the student": pytest.approx(once), "reduce-scatter": pytest.approx(2 * once)}
    assert found(1)["reduce-scatter"] == pytest.approx(once)


def test_selection_update_and_checkpoint_are_exposed() -> None:
    exposed = times(Rates(50.0, 50.0, 1e6)).exposed
    one = 3 * NETWORK.all_reduce(4, 16384, "tree") + 3 * NETWORK.all_reduce(4, 8, "tree")
    assert exposed["selection"] == pytest.approx(2 * one)
    assert exposed["update"] == pytest.approx(250 * 84 / 1e6)
    assert exposed["checkpoint"] == 3.0
    slow = times(Rates(50.0, 50.0, 1e6, fresh=1e5), zero={"stage": 0}).exposed
    assert slow["update"] == pytest.approx(1000 * (122 / 1e6 + 12 / 1e5))


def test_communication_hides_behind_compute_only_if_it_overlaps() -> None:
    parts = {"compute": {"a": 3.0, "b": 1.0}, "communication": {"c": 2.0}, "exposed": {"d": 0.5}}
    assert StepTime(**parts, overlaps=True).seconds == 4.5
    assert StepTime(**parts, overlaps=False).seconds == 6.5
    longer = parts | {"communication": {"c": 7.0}}
    assert StepTime(**longer, overlaps=True).seconds == 7.5
    # DeepSpeed overlaps by default at stage 3 alone.
    assert [times(Rates(1, 1, 1), zero={"stage": stage}).overlaps for stage in (1, 2, 3)] == [False, False, True]
    assert not times(Rates(1, 1, 1), zero={"stage": 3, "overlap_comm": False}).overlaps


def test_a_store_takes_the_place_of_the_forward_and_the_gathers_of_the_reference() -> None:
    live = times(Rates(50.0, 50.0, 1e6, fresh=1e5))
    stored = live.with_store()
    assert live.compute.keys() - stored.compute.keys() == {"forward of the reference", "pointwise, reference"}
    assert live.communication.keys() - stored.communication.keys() == {"gathers for the reference"}
    assert stored.exposed == live.exposed and stored.seconds < live.seconds


def test_the_interval_of_daly_is_the_best_by_the_expected_time() -> None:
    stall, failure = 60.0, 7200.0

    def expected(interval: float) -> float:
        """Seconds per second of work with exponential failures (Daly 2006, equation 20, without a restart)."""
        return failure * (math.exp((interval + stall) / failure) - 1) / interval

    best = optimal_interval(stall, failure)
    exact = min(range(100, 5000), key=expected)
    assert best == pytest.approx(exact, rel=0.01)
    # Young's first term alone is 5 % off here.
    assert math.sqrt(2 * stall * failure) == pytest.approx(929.5, rel=1e-3) and best < 900
    assert optimal_interval(100.0, 10.0) == 10.0
    assert lost_share(900.0, 60.0, 7200.0) == pytest.approx(60 / 900 + 960 / 14400)


def test_disk_space_counts_tokens_losses_and_one_checkpoint_more_than_are_kept() -> None:
    assert checkpoint_bytes(SIZE, 2) == 14 * 1000
    small, large = (disk_space(SIZE, 2, 500, 300, vocabulary, 3) for vocabulary in (32_000, 128_000))
    assert (small.tokens, small.losses, small.checkpoints) == (1000, 600, 4 * 14_000)
    assert large.tokens == 2000


def test_this_cpu_is_measured() -> None:
    rates = measured_rates(64, 64, 128, 4, 32)
    assert rates.fresh is not None
    assert min(rates.products, rates.attention, rates.memory, rates.fresh) > 0


def test_a_watch_sees_the_memory_of_each_phase() -> None:
    with PhaseRecorder(torch.device("cpu")) as watch:
        watch.begin("small")
        torch.ones(1 << 20)
        watch.begin("large")
        block = torch.ones(1 << 26)
        del block
        watch.begin("small")
    assert list(watch.phases) == ["small", "large"]
    assert watch.phases["large"].peak - watch.phases["small"].peak > 200e6
    assert watch.phases["large"].seconds > 0


def test_a_table_is_aligned() -> None:
    assert aligned_table(["part", "GiB"], [["weights", "1.5"], ["all", "12.5"]]) == (
        "part      GiB\nweights   1.5\nall      12.5"
    )
