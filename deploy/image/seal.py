"""Make a directory of packages ready to run read-only: bytecode that is never checked again, version metadata, modes.

    python seal.py PYPROJECT DIRECTORY

Run while an image is built, with the interpreter of the image. Needs nothing but the standard library.
"""

from __future__ import annotations

import compileall
import sys
import tomllib
from pathlib import Path
from py_compile import PycInvalidationMode


def seal(pyproject: Path, directory: Path) -> None:
    """Compile ``directory``, let importlib.metadata find the distribution in it, and let everybody read it.

    Raises:
        SystemExit: a file has a syntax error; the compiler has said which.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    name, version = project["name"], project["version"]
    metadata = directory / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    # Unchecked: the image never changes, so imports need no stat of the source, and the bytes depend on it alone.
    mode = PycInvalidationMode.UNCHECKED_HASH
    if not compileall.compile_dir(directory, quiet=1, invalidation_mode=mode, stripdir=directory):
        raise SystemExit("a package of the image does not compile")
    for path in (directory, *directory.rglob("*")):  # COPY keeps the modes of the checkout, so its owner's umask
        executable = path.is_dir() or path.stat().st_mode & 0o100
        path.chmod(0o755 if executable else 0o644)


if __name__ == "__main__":
    seal(Path(sys.argv[1]), Path(sys.argv[2]))
