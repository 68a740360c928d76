"""Commands that take files instead of a recipe; ``cli.py`` finds them."""
