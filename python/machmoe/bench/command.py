"""`python -m machmoe bench`: the measurement, its table, its JSON and the figures made from the JSON."""

import gc
import importlib.util
import json
from pathlib import Path

from ..errors import UserError, need
from ..table import print_table
from ..train.checkpoint import write_atomically
from .plot import plot
from .shapes import H200_SHAPES, SHAPES, floor_ms, parse

PATTERNS = ("random", "balanced", "aligned", "skewed", "rounded")
NAMES = ("machmoe", "dense bmm", "grouped_mm", "grouped_mm+compile", "sonic-moe")
SCHEMA = 1


def add_arguments(parser):
    names = f"a shape by name, repeatable; 'all' = the 12 of the H200 tables (default: cpu, on CUDA all). Names: {', '.join(SHAPES)}"
    parser.add_argument("--shape", action="append", metavar="NAME", help=names)
    parser.add_argument("--thiek", action="append", metavar="T,H,I,E,K", help="a shape by its sizes, repeatable")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:<i>")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on CUDA, fp32 on the CPU")
    parser.add_argument(
        "--routing",
        default="random",
        metavar="A,B",
        help=f"of {', '.join(PATTERNS)} (default: random); several take turns. aligned: balanced at the nearest K that gives every "
        "expert whole tiles; skewed: p_e ~ 1 / the place of e in a random order; "
        "rounded: token rounding, machmoe only",
    )
    parser.add_argument("--contestants", metavar="A,B", help=f"of {', '.join(NAMES)} (default: those that can run here)")
    parser.add_argument("--budget-ms", type=float, default=300, help="time spent on each measurement")
    parser.add_argument("--soak-ms", type=float, default=300, help="untimed work before the measurements of a shape, CUDA only")
    parser.add_argument(
        "--steady", action="store_true", help="forwards and backwards without a pause, with a warm cache, as in training; no whole layer"
    )
    parser.add_argument("--host-calls", type=int, default=1000, help="calls over which the host's time is averaged, 2 s at most; CUDA only")
    parser.add_argument("--out", type=Path, help="folder for bench.json and the figures (default: print only)")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="measure nothing: draw the figures of an earlier bench.json beside it")


def choose_shapes(arguments, on_cuda):
    names = [name for given in arguments.shape or [] for name in (H200_SHAPES if given == "all" else [given])]
    if not names and not arguments.thiek:
        names = H200_SHAPES if on_cuda else ["cpu"]
    return [parse(text) for text in names + (arguments.thiek or [])]


def choose_patterns(arguments, names):
    patterns = list(dict.fromkeys(arguments.routing.split(",")))
    unknown = [pattern for pattern in patterns if pattern not in PATTERNS]
    if unknown:
        raise UserError(f"--routing does not know '{unknown[0]}'; choose from {', '.join(PATTERNS)}")
    if patterns == ["rounded"] and "machmoe" not in names:
        raise UserError(f"--routing rounded is measured for machmoe alone, --contestants has {', '.join(names)}: add machmoe")
    return patterns


def choose_contestants(arguments, on_cuda):
    if arguments.contestants:
        names = arguments.contestants.split(",")
        unknown = [name for name in names if name not in NAMES]
        if unknown:
            raise UserError(f"--contestants does not know '{unknown[0]}'; choose from {', '.join(NAMES)}")
        return names
    names = ["machmoe", "dense bmm", "grouped_mm"]
    if on_cuda:
        names += ["grouped_mm+compile"] + (["sonic-moe"] if importlib.util.find_spec("sonicmoe") else [])
    return names


def measure_shape(shape, patterns, names, arguments, device, dtype):
    """A record for each contestant and routing; one that fails is reported with its error and does not stop the others."""
    from .contestants import CONTESTANTS, Problem
    from .measure import host_cost, memory, time_all, time_steady

    sizes = {"shape": shape.name, "T": shape.T, "d": shape.d, "n": shape.n, "E": shape.E}
    problem, contestants, records = None, {}, {}

    def labelled(name, pattern):
        return name if len(patterns) == 1 else f"{name}, {pattern}"

    for pattern in patterns:
        problem = Problem(shape, pattern, dtype, device, like=problem)
        for name in (name for name in names if pattern != "rounded" or name == "machmoe"):
            label = labelled(name, pattern)
            records[label] = sizes | {"K": problem.shape.K, "contestant": label, "routing": pattern}
            try:
                contestant = CONTESTANTS[name](problem)
                contestant.backward(contestant.forward())
                contestants[label] = contestant
            except Exception as error:  # noqa: BLE001  a rival that does not run here
                records[label]["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    measure = time_steady if arguments.steady else time_all
    times = measure(contestants, device, arguments.budget_ms, arguments.soak_ms) if contestants else {}
    scale = 1e-9 if device.type == "cuda" else 1e-6  # FLOP/ms -> TFLOP/s, GFLOP/s
    for name, contestant in contestants.items():
        record = records[name] | {"rows": contestant.rows, **times[name]}
        record["total"] = {key: record["forward"][key] + record["backward"][key] for key in ("min_ms", "median_ms")}
        flops = shape.flops(contestant.rows)
        for kind, factor in (("forward", 1), ("backward", 2), ("total", 3), ("layer", 3)):
            if kind in record:
                record[kind]["throughput"] = factor * flops / record[kind]["median_ms"] * scale
        if device.type == "cuda":
            at = contestant.problem.shape
            floor = {"forward": floor_ms(at, False), "backward": floor_ms(at, True)}
            for kind, ms in (floor | {"total": sum(floor.values())}).items():
                record[kind]["floor_share"] = ms / record[kind]["median_ms"]
        records[name] = record | memory(contestant, device) | host_cost(contestant, device, arguments.host_calls)
    for name, key in (("dense bmm", "time_over_dense"), ("machmoe", "time_over_machmoe")):
        for record in records.values():
            base = records.get(labelled(name, record["routing"]), {}).get("total")
            record[key] = record["total"]["median_ms"] / base["median_ms"] if base and "total" in record else None
    return list(records.values())


def show(shape, records, unit, on_cuda):
    title = f"{shape.name}: T {shape.T}, d {shape.d}, n {shape.n}, E {shape.E}, K {shape.K}"
    table = need("rich.table").Table(title=title, title_justify="left")
    columns = [
        "",
        "forward ms\nmin / median",
        "backward ms\nmin / median",
        f"forward\n{unit}",
        f"backward\n{unit}",
        "f + b\nms",
        "time over\ndense",
        "time over\nmachmoe",
        "layer\nf + b ms",
        "saved\nMiB",
    ]
    if on_cuda:
        columns += ["peak f / b\nMiB", "floor / time\nf / b", "host us\nf / b", "launches"]
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    digits = 3 if on_cuda else 1

    def number(value, digits):
        return "-" if value is None else f"{value:.{digits}f}"

    def pair(times):
        return f"{times['min_ms']:.{digits}f} / {times['median_ms']:.{digits}f}"

    for r in (r for r in records if "error" not in r):
        row = [
            r["contestant"] + (f", K {r['K']}" if r["K"] != shape.K else ""),
            pair(r["forward"]),
            pair(r["backward"]),
            f"{r['forward']['throughput']:.0f}",
            f"{r['backward']['throughput']:.0f}",
            number(r["total"]["median_ms"], digits),
            number(r["time_over_dense"], 3),
            number(r["time_over_machmoe"], 3),
            number(r.get("layer", {}).get("median_ms"), digits),
            f"{r['saved_mib']:.1f}",
        ]
        if on_cuda:
            row += [
                f"{r['peak_forward_mib']:.0f} / {r['peak_backward_mib']:.0f}",
                f"{r['forward']['floor_share']:.2f} / {r['backward']['floor_share']:.2f}",
                f"{r.get('host_forward_us', 0):.0f} / {r.get('host_backward_us', 0):.0f}",
                str(r.get("launches", "-")),
            ]
        table.add_row(*row)
    print_table(table)
    for r in (r for r in records if "error" in r):
        print(f"{r['contestant']} did not run: {r['error']}")


def run(arguments):
    if arguments.plot:
        try:
            result = json.loads(arguments.plot.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"cannot read {arguments.plot}: {error}") from error
        if not isinstance(result, dict) or result.get("schema") != SCHEMA:
            raise UserError(f"{arguments.plot} is no result of this bench: expected a bench.json of schema {SCHEMA}")
        for path in plot(result, arguments.plot.parent):
            print(path)
        return 0

    import torch

    from ..device import parse_device
    from ..info import collect

    need("rich")
    device = parse_device(arguments.device, ours=False)
    on_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if (arguments.dtype or ("bf16" if on_cuda else "fp32")) == "bf16" else torch.float32
    shapes, names = choose_shapes(arguments, on_cuda), choose_contestants(arguments, on_cuda)
    patterns = choose_patterns(arguments, names)
    if "aligned" in patterns:
        for shape in shapes:
            shape.aligned()  # refuses before anything is measured
    unit = "TFLOP/s" if on_cuda else "GFLOP/s"
    result = {
        "schema": SCHEMA,
        "machine": collect(),
        "device": arguments.device,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "routing": arguments.routing,
        "steady": arguments.steady,
        "unit": unit,
        "results": [],
    }
    machine, steady = result["machine"]["devices"].get("cuda:0" if on_cuda else "cpu"), ", steady" if arguments.steady else ""
    print(f"{machine}, {result['dtype']}, {arguments.routing} routing{steady}")
    failed = False
    for shape in shapes:
        records = measure_shape(shape, patterns, names, arguments, device, dtype)
        result["results"] += records
        show(shape, records, unit, on_cuda)
        failed |= any("error" in record for record in records if record["contestant"].startswith("machmoe"))
        gc.collect()
        if on_cuda:
            torch.cuda.empty_cache()
        if arguments.out:  # after every shape: an interrupted run keeps what it measured
            try:
                arguments.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot create {arguments.out}: {error.strerror}") from error
            write_atomically(arguments.out / "bench.json", json.dumps(result, indent=1).encode())
    if arguments.out:
        for path in [arguments.out / "bench.json", *plot(result, arguments.out)]:
            print(path)
    return int(failed)
