"""One file a score, found by its name: see `selection/scoring.py`."""
