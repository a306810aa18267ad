"""The compile gate of the kernels: fails on register spills, local memory and serialised wgmma (ptxas C75xx) in the logs of a build folder."""

import json
import pathlib
import re
import sys


def kernels_and_problems(log: str) -> tuple[int, list[str]]:
    """How many entry functions the log of one .cu file reports, and one line for each that would run slowly."""
    kernels, found, name = 0, [], "?"
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            kernels += 1
        if match := re.search(r"(?:Compiling entry function|Function properties for) '?([^\s']+)", line):
            name = match.group(1)
        if (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)) and any(
            map(int, match.groups())
        ):
            found.append(f"{name}: {match.group(0)}")
        if re.search(r"\bC75\d\d\b", line):
            found.append(line.strip())
    return kernels, found


def main(folder: pathlib.Path) -> int:
    objects = []
    for command in json.loads((folder / "compile_commands.json").read_text()):
        if command["file"].endswith(".cu") and "/tests/" not in command["file"]:
            output = command.get("output") or re.search(r" -o (\S+)", command["command"]).group(1)
            objects.append((command["file"], pathlib.Path(command["directory"], output + ".log")))
    kernels, found = 0, []
    for source, log in objects:
        if not log.exists():
            found.append(f"{source}: no log at {log}; build it with ./dev build")
            continue
        count, problems = kernels_and_problems(log.read_text(errors="replace"))
        kernels += count
        found += [f"{source}: {problem}" for problem in problems]
    if found:
        print("\n".join(found))
    elif objects:
        print(f"ptxas: {kernels} kernels of {len(objects)} files without spills, local memory or serialised wgmma")
    else:
        print("ptxas: the CUDA backend is not in this build; no kernel to check")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
