"""The contract of launch_kernel in src/cuda/launch.h, as far as text tells: all threads of a kernel wait for the one before, then may return."""

import pathlib
import re
import sys

WAIT = re.compile(r"^  cudaGridDependencySynchronize\(\);", re.MULTILINE)  # a statement of its own, not inside another


def violations(path: pathlib.Path) -> tuple[int, list[str]]:
    """How many kernels the file has, and one line for each that does not wait, or may return before it does."""
    text, kernels, found = path.read_text(encoding="utf-8"), 0, []
    for match in re.finditer(r"^__global__[^{;]*?(\w+)\([^()]*\) \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        kernels += 1
        name, body = match.groups()
        wait = WAIT.search(body)
        if not wait or "return" in body[: wait.start()]:
            found.append(f"{path}: {name} does not call cudaGridDependencySynchronize() in all threads before one may return")
    if kernels != len(re.findall(r"^(?:template <.*>\n)?__global__", text, re.MULTILINE)):
        found.append(f"{path}: a kernel that this check cannot read")
    if "<<<" in text:
        found.append(f"{path}: a launch in <<< >>>, expected launch_kernel")
    return kernels, found


def main() -> int:
    results = [violations(path) for path in sorted(pathlib.Path("src/cuda").rglob("*.cu*"))]
    found = [line for _, lines in results for line in lines]
    print("\n".join(found) if found else f"kernels: {sum(count for count, _ in results)} wait for the one before")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
