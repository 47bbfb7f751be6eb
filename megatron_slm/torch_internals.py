"""The private names of PyTorch that this package uses. No other file touches them.

    torch.UntypedStorage._checkpoint_offset       offset of a storage in a file that was loaded to the meta device;
                                                  PyTorch's notes on serialization describe it
    torch.UntypedStorage._cdata                   identity of a storage, even of one without data
    torch._subclasses.fake_tensor.FakeTensorMode  tensors without data
    torch._dynamo.OptimizedModule                 what `torch.compile(module)` returns
    torch.nn.Module._compiled_call_impl           what `module.compile()` sets

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


def is_compiled(module: nn.Module) -> bool:
    """Return whether the module, or a module in it, was compiled by `torch.compile` or `module.compile()`."""
    return any(hasattr(child, "_orig_mod") or child._compiled_call_impl is not None for child in module.modules())
