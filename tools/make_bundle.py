"""Make a folder of wheels from which `align` installs on a machine that reaches no registry.

    make bundle PYTHON_VERSION=3.12        into dist/bundle-3.12
    pip install --no-index --no-deps dist/bundle-3.12/*.whl      over there

The other machine has torch, transformers and what `HAVE` lists, as machines with a GPU usually do;
the bundle has what else `align` imports. It has to stay small, so wheels of compiled code lose
what `align` never loads (`UNUSED`: tests, headers, parts of Arrow and SciPy) and are packed by
LZMA, which pip reads. Those wheels keep their version, so install them on such machines only.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HAVE = ("torch", "transformers", "accelerate", "peft", "sacrebleu", "safetensors", "tensorboard",
        "matplotlib", "jaxtyping", "psutil", "rich")  # fmt: skip
"""With what these need in their turn: numpy, PyYAML, tqdm, jinja2, huggingface-hub, fsspec, ..."""
NEED = ("datasets", "pyarrow", "pandas", "multiprocess", "dill", "xxhash", "scipy", "evaluate",
        "requests", "urllib3", "charset-normalizer")  # fmt: skip
BUILD = ("omegaconf", "antlr4-python3-runtime==4.9.3")
"""Pure Python; the second, which the first needs, has no wheel on PyPI."""
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)) + (
    "manylinux2014_x86_64",
)
UNUSED: dict[str, str] = {
    "pyarrow": r"pyarrow/(tests|include|includes|src)/|flight|pyarrow/_?substrait\.|_s3|_cpp_tests"
    r"|encryption|_(azurefs|gcsfs|hdfs|orc)\.|\.px[di]$|\.pyx$|libarrow_python\w*\.so$|\.so\.\d+\.\d+\.\d+$",
    "pandas": r"/tests/|\.pyi$",
    "scipy": r"/tests/|\.py[ix]$|\.px[di]$|scipy/(io|signal|odr|cluster|datasets|fftpack|misc)/"
    r"|scipy/stats/(_unuran/|_sobol_direction_numbers)|scipy/special/_add_newdocs",
}
"""Package -> files of its wheel that are left out. Arrow's shared libraries are loaded by the name
that ends in one number; its wheel has each three times."""
STRIPPED: dict[str, str] = {"pyarrow": r"\.so(\.|$)", "scipy": r"^scipy/.*\.so$"}
"""Package -> libraries that lose their symbol tables, a fifth of Arrow's bytes. Not OpenBLAS and
Fortran's: they were patched when SciPy's wheel was made, and do not load after that."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python-version", default="3.12", metavar="3.x")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", args.python_version):
        parser.error(f"--python-version {args.python_version}: write it as 3.12")
    folder = args.output or ROOT / "dist" / f"bundle-{args.python_version}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as place:
        fetched = Path(place)
        platforms = [option for name in PLATFORMS for option in ("--platform", name)]
        _pip(
            "download", "--only-binary", ":all:", "--python-version", args.python_version,
            *platforms, "--no-deps", "-d", place, *NEED,
        )  # fmt: skip
        _pip("wheel", "--no-deps", "-w", place, *BUILD, str(ROOT))
        for wheel in sorted(fetched.glob("*.whl")):
            name = wheel.name.partition("-")[0]
            slim(wheel, folder / wheel.name, UNUSED.get(name), strip=STRIPPED.get(name))
    size = sum(wheel.stat().st_size for wheel in folder.iterdir()) / 2**20
    print(f"{folder}: {len(list(folder.iterdir()))} wheels, {size:.1f} MiB")
    print(f"on a machine that has {', '.join(HAVE)}:")
    print(f"  pip install --no-index --no-deps {folder.name}/*.whl")


def slim(wheel: Path, target: Path, unused: str | None, *, strip: str | None = None) -> None:
    """Copy a wheel without the files that match, its RECORD to suit, packed by LZMA.

    ``strip`` says of which shared libraries the symbol tables are removed.
    """
    with zipfile.ZipFile(wheel) as full, zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as kept:
        for info in full.infolist():
            if unused and re.search(unused, info.filename):
                continue
            content = full.read(info)
            if unused and info.filename.endswith(".dist-info/RECORD"):
                content = _record(content, unused)
            if strip and re.search(strip, info.filename):
                content = _stripped(content)
            kept.writestr(info, content, zipfile.ZIP_LZMA)


def _stripped(library: bytes) -> bytes:
    if shutil.which("strip") is None:
        raise SystemExit("make bundle: strip: not found; on Debian: apt install binutils")
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        subprocess.run(["strip", "--strip-unneeded", file.name], check=True)
        return Path(file.name).read_bytes()


def _record(content: bytes, unused: str) -> bytes:
    rows = csv.reader(io.StringIO(content.decode("utf-8")))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for name, digest, size in rows:
        if not re.search(unused, name):
            # a library that was stripped has another hash: pip writes its own when it installs
            changed = ".so" in Path(name).name
            writer.writerow((name, "" if changed else digest, "" if changed else size))
    return out.getvalue().encode("utf-8")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"make bundle: pip {arguments[0]} failed; see its lines above")


if __name__ == "__main__":
    main()
