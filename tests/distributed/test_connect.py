"""How ranks meet: a start that follows an earlier one at the same store, as after a restart by torchrun."""

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_slm.dist import store_of_this_start


def start(store: Any, ranks: list[int], size: int, seconds: float = 20.0) -> dict[int, Any]:
    """Let the given ranks of a start meet in threads; return the store or the error of each."""
    found: dict[int, Any] = {}

    def meet(rank: int) -> None:
        try:
            client = TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=seconds))
            found[rank] = store_of_this_start(client, rank, size, timedelta(seconds=seconds))
        except dist.DistError as error:
            found[rank] = error

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def store() -> Any:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_the_ranks_of_a_start_read_what_they_wrote_and_nothing_of_an_earlier_start(store: Any) -> None:
    for number in range(3):
        found = start(store, [2, 0, 1], 3)
        for rank, mine in found.items():
            assert not mine.check([f"address/{rank}"])
            mine.set(f"address/{rank}", f"{number}:{rank}")
        for mine in found.values():
            assert [mine.get(f"address/{rank}") for rank in range(3)] == [
                f"{number}:{rank}".encode() for rank in range(3)
            ]


def test_a_start_after_one_in_which_ranks_died_while_they_met_is_not_confused(store: Any) -> None:
    for alone in ([1], [0], [0, 2], [1, 2]):
        start(store, alone, 3, seconds=0.3)
        stores = start(store, [0, 1, 2], 3)
        stores[0].set("address", "new")
        assert all(stores[rank].get("address") == b"new" for rank in (1, 2))


def test_rank_0_names_the_ranks_that_did_not_come(store: Any) -> None:
    error = start(store, [0, 2], 4, seconds=0.5)[0]
    assert isinstance(error, dist.DistStoreError) and "[1, 3]" in str(error)
