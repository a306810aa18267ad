"""The contract of launch_kernel in src/cuda/launch.h in machine code: no kernel touches global memory before it has waited for the one before it.

ptxas may move a load of what it takes for constant (ld.global.nc, __ldg) up across griddepcontrol.wait."""

import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys

GLOBAL = re.compile(r"\b(LDG|STG|LD|ST|ATOM|ATOMG|RED|LDGSTS|UBLK\w+|UTMA\w+|EXIT)\b")


def find_cuobjdump() -> str:
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")  # torch brings it
    if triton and triton.origin and (tool := pathlib.Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump").exists():
        return str(tool)
    sys.exit("cuobjdump was found neither in PATH nor in triton: install CUDA's binary utilities")


def violations(sass: str) -> tuple[int, list[str]]:
    """How many kernels there are, and one line for each that touches global memory before the wait, or does not wait."""
    kernels, found = 0, []
    for function in sass.split("Function : ")[1:]:
        name, code = function.split(maxsplit=1)
        before, wait, _ = code.partition("ACQBULK")
        kernels += 1
        if not wait:
            found.append(f"{name} does not wait")
        elif touch := next((line for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", before) if GLOBAL.search(line)), None):
            found.append(f"{name}: {touch} stands before the wait")
    return kernels, found


def main(folder: pathlib.Path) -> int:
    kernels, found = 0, []
    if any(command["file"].endswith(".cu") for command in json.loads((folder / "compile_commands.json").read_text())):
        sass = subprocess.run([find_cuobjdump(), "-sass", folder / "libmachmoe.so"], capture_output=True, text=True, check=True).stdout
        kernels, found = violations(sass)
    print("\n".join(found) if found else f"sass: {kernels} kernels touch nothing before they have waited")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
