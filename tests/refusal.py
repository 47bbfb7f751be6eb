"""A check of the fields of user errors."""

import contextlib
import re
from collections.abc import Iterator

import pytest

from megatron_slm.errors import UserError


@contextlib.contextmanager
def refuses(setting: str, value: object = None, reason: str = "") -> Iterator[None]:
    """Expect a UserError of this setting.

    Args:
        setting: its setting.
        value: its value, compared as text; None accepts any.
        reason: a pattern that occurs in its reason.
    """
    with pytest.raises(UserError) as caught:
        yield
    error = caught.value
    assert error.setting == setting
    assert value is None or str(error.value) == str(value)
    assert re.search(reason, error.reason), error.reason
