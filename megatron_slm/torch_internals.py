"""The private names of PyTorch that this package uses. No other file touches them.

    torch.UntypedStorage._checkpoint_offset       offset of a storage in a file that was loaded to the meta device;
                                                  PyTorch's notes on serialization describe it
    torch.UntypedStorage._cdata                   identity of a storage, even of one without data
    torch._subclasses.fake_tensor.FakeTensorMode  tensors without data
    torch._dynamo.OptimizedModule                 what `torch.compile(module)` returns
    torch.nn.Module._compiled_call_impl           what `module.compile()` sets
    torch.testing._internal.distributed.fake_pg.FakeStore
                                                  store of a group whose collectives only copy this rank's values

Checked with torch 2.11 and 2.13. `tests/contracts/test_private_names.py` fails if one is missing.
"""

from contextlib import AbstractContextManager

from torch import Tensor, nn


def offset_in_file(tensor: Tensor) -> int | None:
    """Return the offset in bytes of a tensor's storage in its file; None if it was not loaded from a file.

    Args:
        tensor: from `torch.load(..., map_location="meta")`.
    """
    offset: int | None = tensor.untyped_storage()._checkpoint_offset
    return offset


def storage_id(tensor: Tensor) -> int:
    """Return a number that is equal for two live tensors if and only if they share their storage.

    `data_ptr()` does not work here, because it is 0 for all storages without data.
    """
    number: int = tensor.untyped_storage()._cdata
    return number


def fake_tensors() -> AbstractContextManager[object]:
    """Return a context in which new tensors have shapes and strides, but no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def join_fake_group(ranks: int) -> None:
    """Make this process rank 0 of a process group of `ranks`, in which no other rank exists and nothing is sent.

    An all-reduce and a broadcast leave the tensor as it is, an all-gather repeats this rank's part, and a
    reduce-scatter returns the first part of this rank's input.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())


def is_compiled(module: nn.Module) -> bool:
    """Return whether the module, or a module in it, was compiled by `torch.compile` or `module.compile()`."""
    return any(hasattr(child, "_orig_mod") or child._compiled_call_impl is not None for child in module.modules())
