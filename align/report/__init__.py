"""``align report``: runs on one HTML page or live in the terminal."""
