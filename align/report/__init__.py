"""``align report``: what runs have left in their folders, on one page and in the terminal."""
