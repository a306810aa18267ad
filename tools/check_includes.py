"""Checks that dependencies point downwards: a file may include only what its layer may see."""

import re
import subprocess
import sys

# First match wins: files below this prefix may include project headers that match the pattern.
RULES = [
    ("include/machmoe/", r"machmoe/machmoe\.h"),
    ("src/core/", r"core/|[a-z_0-9]+\.h"),
    ("src/cuda/hopper/ptx/", r"cuda/hopper/ptx/|[a-z_0-9]+\.cuh"),
    ("src/cpu/", r"cpu/|core/|ops\.h|backend\.h"),
    ("src/cuda/", r"cuda/|core/|ops\.h|backend\.h|[a-z_0-9]+\.(h|cuh)"),
    ("src/c_api.cpp", r".*"),
    ("src/moe", r"core/|ops\.h|backend\.h|moe\.h"),
    ("src/", r"core/|ops\.h|backend\.h"),
    ("bindings/torch/", r"machmoe/machmoe\.h"),
    ("examples/", r"machmoe/machmoe\.hp?p?"),
    ("tests/facade/", r"machmoe/machmoe\.hpp"),
]
# Headers of other libraries that a layer must not see, in <> or "".
FORBIDDEN = [
    ("src/", r"(torch|ATen|c10|Python\.h)"),
    ("include/", r"(torch|ATen|c10|Python\.h|fmt|dnnl|cuda)"),
    ("src/cpu/", r"cuda"),
    ("src/core/", r"(cuda|dnnl)"),
]


def violations(path: str) -> list[str]:
    found = []
    allowed = next((pattern for prefix, pattern in RULES if path.startswith(prefix)), None)
    for number, line in enumerate(open(path, encoding="utf-8"), 1):
        match = re.match(r'\s*#include\s+([<"])([^">]+)[">]', line)
        if not match:
            continue
        kind, header = match.groups()
        if kind == '"' and allowed and not re.fullmatch(f"({allowed}).*", header):
            found.append(f'{path}:{number}: includes "{header}", which is not below this layer')
        for prefix, pattern in FORBIDDEN:
            if path.startswith(prefix) and re.match(pattern, header):
                found.append(f"{path}:{number}: includes {header}, which {prefix} must not see")
    return found


def main() -> int:
    files = subprocess.run(["git", "ls-files", "*.h", "*.hpp", "*.cpp", "*.cu", "*.cuh"], capture_output=True, text=True, check=True).stdout.split()
    found = [v for path in files for v in violations(path)]
    print("\n".join(found) if found else f"includes: {len(files)} files point downwards")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
