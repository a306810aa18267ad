"""`python -m machmoe info`: build, backends, devices, versions."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version


def add_arguments(parser):
    parser.add_argument("--json", action="store_true", help="machine-readable")


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def package_version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def collect():
    """{section: {key: value}}, JSON-ready."""
    import torch

    import machmoe

    devices = {"cpu": f"{cpu_name()}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {p.total_memory / 2**30:.0f} GiB"
    return {
        "build": {"machmoe": machmoe.__version__, "library": machmoe.build_info()},
        "backends": {name: machmoe.device_reason(name) or "available" for name in ("cpu", "cuda")},
        "devices": devices,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch's CUDA": torch.version.cuda,
            "platform": platform.platform(),
            **{name: package_version(name) for name in ("numpy", "rich", "tqdm", "matplotlib", "sonic-moe")},
        },
    }


def run(arguments):
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return
    for section, values in facts.items():
        print(section)
        for key, value in values.items():
            print(f"  {key:14s} {value if value is not None else 'not installed'}")
    sys.stdout.flush()
