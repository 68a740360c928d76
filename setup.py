"""What pyproject.toml cannot say: ``recipes/`` ships as ``align/recipes/``."""

from setuptools import find_namespace_packages, setup

folders = find_namespace_packages("recipes")
setup(
    packages=[
        *find_namespace_packages(include=["align", "align.*"]),
        "align.recipes",
        *(f"align.recipes.{folder}" for folder in folders),
    ],
    package_dir={"align": "align", "align.recipes": "recipes"},
    package_data={
        "": ["*.yaml"],
        "align.feedback": ["*.html"],
        "align.report": ["*.j2", "*.css", "*.js"],
    },
)
