"""The composition root: from a configuration to the objects of a run. Imported by commands and the dry run only."""
