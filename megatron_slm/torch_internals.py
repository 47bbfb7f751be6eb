"""The private names of PyTorch that this package uses. No other file touches any.

    torch.UntypedStorage._checkpoint_offset       place of a storage in a file that was loaded to the meta device;
                                                  PyTorch's notes on serialization describe it
    torch.UntypedStorage._cdata                   identity of a storage, also of one without data
    torch._subclasses.fake_tensor.FakeTensorMode  tensors without data
    torch._dynamo.OptimizedModule                 what `torch.compile(module)` returns
    torch.nn.Module._compiled_call_impl           what `module.compile()` sets

Checked with torch 2.11 and 2.13. `tests/contracts/test_private_names.py` fails when one is gone.
"""

from contextlib import AbstractContextManager

from torch import Tensor, nn


def offset_in_file(tensor: Tensor) -> int | None:
    """Return the byte at which the storage of a tensor begins in its file; None if it was not loaded from a file.

    Args:
        tensor: from `torch.load(..., map_location="meta")`.
    """
    offset: int | None = tensor.untyped_storage()._checkpoint_offset
    return offset


def storage_id(tensor: Tensor) -> int:
    """Return a number that tensors share if and only if they share their storage, while one of them is alive.

    `data_ptr()` would not do: storages without data all return 0.
    """
    number: int = tensor.untyped_storage()._cdata
    return number


def fake_tensors() -> AbstractContextManager[object]:
    """Return a context in which new tensors have shapes and strides, but no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def is_compiled(module: nn.Module) -> bool:
    """Return whether `torch.compile` or `module.compile()` compiled the module or a module in it."""
    return any(hasattr(child, "_orig_mod") or child._compiled_call_impl is not None for child in module.modules())
