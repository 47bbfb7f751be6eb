"""Work that the server of ranks does once, so that not every rank repeats it: see tests/gloo.py."""

from contextlib import suppress

with suppress(ImportError):
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    # Compiles a thousand patterns, and keeps them.
    get_checkpoint_conversion_mapping("llama")
