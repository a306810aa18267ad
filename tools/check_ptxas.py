"""The compile gate of the kernels: reads the build's log and fails on register spills, local memory and serialised wgmma (ptxas C75xx)."""

import pathlib
import re
import sys


def problems(log: str) -> tuple[int, list[str]]:
    found, kernels, name = [], 0, "?"
    for line in log.splitlines():
        if match := re.search(r"(?:Compiling entry function|Function properties for) '?(\S+?)'?( for|$)", line):
            name = match.group(1)
        if match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels += 1
            if any(int(n) for n in match.groups()):
                found.append(f"{name}: {match.group(0)}")
        if re.search(r"C75\d\d", line):
            found.append(line.strip())
    return kernels, found


def main() -> int:
    path = pathlib.Path(sys.argv[1])
    if not path.exists():
        print("ptxas: no build log, nothing was compiled for a GPU")
        return 0
    kernels, found = problems(path.read_text(errors="replace"))
    print("\n".join(found) if found else f"ptxas: {kernels} functions without spills, local memory or serialised wgmma")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
