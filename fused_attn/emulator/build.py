"""C that is compiled at its first use, and kept beside Triton's own cache."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import triton

from fused_attn import files


def compiler() -> str:
    """The C compiler: CC, else cc, gcc or clang. Raises RuntimeError where there is none."""
    named = os.environ.get("CC", "").strip()
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    if found is None:
        raise RuntimeError(f"C is compiled at its first use, and {named or 'none of gcc, cc, clang'} was not found: "
                           "install a C compiler, or name one in CC")
    return found


def built(name: str, main: Path, flags: Sequence[str], generated: Mapping[str, str], libraries: Sequence[str] = ()) -> Path:
    """The shared library ``name`` of a C file and what lies beside it; ``generated``: other files to include, by name.

    It is compiled anew where a source, a flag or the compiler differs. Raises RuntimeError where it cannot be.
    """
    sources = sorted(path for path in main.parent.iterdir() if path.suffix in (".c", ".h"))
    parts = *(path.read_text(encoding="utf-8") for path in sources), *generated.values(), compiler(), *flags
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    library = Path(triton.knobs.cache.dir) / f"fused_attn-{main.stem}-{key}" / name
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            for file, text in generated.items():
                files.write(Path(folder) / file, text)
            fresh = Path(folder) / name
            include = "-I", folder, "-I", str(main.parent)
            command = (compiler(), *flags, *include, str(main), "-o", str(fresh), *libraries)
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{compiler()} could not compile {main.name}: {done.stderr.strip()[-500:]}")
            fresh.replace(library)
    return library
