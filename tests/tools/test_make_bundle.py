"""Slimmed wheels still install: their RECORD lists what is left, and pip reads their packing."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.make_bundle import STRIPPED, UNUSED, slim


def _wheel(folder: Path) -> Path:
    files = {
        "thing/__init__.py": "SAID = 'installed'\n",
        "thing/tests/test_it.py": "raise SystemExit\n",
        "thing-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
        "thing-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256=0,{len(text)}\n" for name, text in files.items())
    wheel = folder / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, "thing-1.0.dist-info/RECORD": record}.items():
            archive.writestr(name, text)
    return wheel


def test_a_slim_wheel_installs(tmp_path: Path) -> None:
    (tmp_path / "slim").mkdir()
    target = tmp_path / "slim" / "thing-1.0-py3-none-any.whl"
    slim(_wheel(tmp_path), target, r"/tests/")
    with zipfile.ZipFile(target) as archive:
        names = archive.namelist()
        record = archive.read("thing-1.0.dist-info/RECORD").decode()
    assert "thing/__init__.py" in names
    assert not [name for name in names if "tests" in name]
    assert "tests" not in record
    place = tmp_path / "place"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "-t"]
    subprocess.run([*command, str(place), str(target)], check=True)
    assert (place / "thing" / "__init__.py").read_text() == "SAID = 'installed'\n"


def test_what_is_imported_is_not_left_out() -> None:
    """No module that `align` loads, directly or through another one, matches."""
    code = (
        "import sys\n"
        "import scipy.optimize, scipy.special, scipy.stats, datasets, pandas, pyarrow.parquet\n"
        "for module in list(sys.modules.values()):\n"
        "    print(getattr(module, '__file__', None) or '')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for package, unused in UNUSED.items():
        for path in done.stdout.splitlines():
            _, found, inside = path.partition(f"site-packages/{package}/")
            # a wheel's optional parts are tried and passed over by their packages
            if found and not re.search(
                r"_(azurefs|gcsfs|hdfs|s3fs|orc)|substrait|encryption", inside
            ):
                assert not re.search(unused, f"{package}/{inside}"), path


@pytest.mark.parametrize(
    ("package", "kept", "left_out"),
    [
        ("pyarrow", "pyarrow/libarrow_substrait.so.2600", "pyarrow/libarrow_flight.so.2600"),
        ("pyarrow", "pyarrow/_fs.cpython-312-x86_64-linux-gnu.so", "pyarrow/tests/test_fs.py"),
        ("pyarrow", "pyarrow/libarrow_python.so.2600", "pyarrow/libarrow_python.so"),
        ("scipy", "scipy/special/_ufuncs.cpython-312.so", "scipy/signal/__init__.py"),
        ("scipy", "scipy/stats/_sobol.cpython-312.so", "scipy/stats/_sobol_direction_numbers.npz"),
    ],
)
def test_what_is_loaded_is_kept(package: str, kept: str, left_out: str) -> None:
    assert not re.search(UNUSED[package], kept)
    assert re.search(UNUSED[package], left_out)


def test_patched_libraries_keep_their_symbols() -> None:
    """OpenBLAS and Fortran's were moved into SciPy's wheel by a tool that rewrites them."""
    assert re.search(STRIPPED["scipy"], "scipy/optimize/_highspy/_core.cpython-312.so")
    assert not re.search(STRIPPED["scipy"], "scipy.libs/libscipy_openblas-5f890258.so")
