"""The machine code of the CUDA kernels, where a disassembler is at hand.

``cuobjdump`` and the ``nvdisasm`` that it calls belong to the CUDA toolkit; without one,
``pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`` brings both.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

_FOLDERS = [Path("/usr/local/cuda/bin"), *Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
_PATH = os.pathsep.join([os.environ.get("PATH", ""), *map(str, _FOLDERS)])
_FUNCTION = re.compile(r"\s*Function : (\w+)")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")


def is_at_hand() -> bool:
    return all(shutil.which(tool, path=_PATH) for tool in ("cuobjdump", "nvdisasm", "c++filt"))


def opcodes(module: Path, arch: str) -> dict[str, set[str]]:
    """The instructions of each kernel in a module, by the kernel's C++ name, as ``{"LDG.E.128", ...}``."""
    command = ["cuobjdump", "-sass", "-arch", arch, str(module)]
    environment = os.environ | {"PATH": _PATH}
    found: dict[str, set[str]] = {}
    current: set[str] = set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if instruction := _INSTRUCTION.match(line):
                current.add(instruction[1])
            elif function := _FUNCTION.match(line):
                current = found.setdefault(function[1], set())
    assert process.returncode == 0, command
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    return dict(zip(names.splitlines(), found.values(), strict=True))
