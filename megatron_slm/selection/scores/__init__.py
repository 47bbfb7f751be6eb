"""One file a score, found by its name: see `selection/score.py`."""
