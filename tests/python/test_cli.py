"""`python -m machmoe info|bench|check`: what they print, write and return."""

import builtins
import json
import subprocess
import sys

import machmoe
import pytest
import torch
from machmoe import check, errors
from machmoe.bench import command as bench
from machmoe.bench.contestants import CONTESTANTS, Problem
from machmoe.bench.shapes import H200_SHAPES, SHAPES, Shape, floor_ms, parse
from machmoe.cli import COMMANDS, main
from machmoe.errors import UserError
from machmoe.torch_layer import grouped_experts

SMALL = ["--thiek", "64,32,16,4,2", "--budget-ms", "1"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Sizes this small are fastest on one thread, also in the processes that a test starts."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- the command line ------------------------------------------------------------------------------------------------------------
def test_the_module_runs_and_names_its_commands():
    done = subprocess.run([sys.executable, "-m", "machmoe", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: python -m machmoe " + command in capsys.readouterr().out


def test_an_unknown_flag_is_exit_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--layres", "3"])
    assert stop.value.code == 2


def test_a_missing_package_names_the_pip_command(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(errors.importlib, "import_module", lambda name: real("package_that_is_not_there"))
    with pytest.raises(UserError, match="pip install numpy matplotlib tqdm rich"):
        errors.need("rich.table")


@pytest.mark.parametrize("command", [["check"], ["bench", *SMALL], ["train"]], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("device", "sentence"),
    [("foo", "expected cpu, cuda or cuda:<i>"), ("meta", "expected cpu, cuda or cuda:<i>"), (f"cuda:{torch.cuda.device_count()}", "torch finds")],
    ids=["foo", "meta", "cuda"],
)
def test_a_device_that_is_not_there_is_exit_status_2(command, device, sentence, capsys, tmp_path):
    out = [] if command[0] == "check" else ["--out", str(tmp_path)]
    assert main([*command, *out, "--device", device]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "reason"), [("cpu", ""), (torch.device("cpu"), ""), ("mps", "machmoe has no backend for mps, expected cpu or cuda")]
)
def test_a_device_has_a_reason_where_it_cannot_be_used(device, reason):
    assert machmoe.device_reason(device) == reason


@pytest.mark.parametrize("device", ["cuda:0", torch.device("cuda")])
def test_every_name_of_a_gpu_has_the_same_reason(device):
    assert machmoe.device_reason(device) == machmoe.device_reason("cuda")


# ---- info --------------------------------------------------------------------------------------------------------------------------
def test_info_tells_build_backends_devices_and_versions(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["build"]["machmoe"] == machmoe.__version__
    assert facts["backends"]["cpu"] == "available"
    assert facts["backends"]["cuda"]  # available, or the reason why not
    assert "threads" in facts["devices"]["cpu"]
    assert facts["versions"]["torch"] == torch.__version__


def test_info_is_readable(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("build", "backends", "devices", "versions", torch.__version__))


# ---- bench -------------------------------------------------------------------------------------------------------------------------
def test_bench_writes_json_table_and_figures(tmp_path, capsys):
    assert main(["bench", *SMALL, "--thiek", "64,32,8,8,4", "--contestants", "machmoe,dense bmm,grouped_mm", "--out", str(tmp_path)]) == 0
    assert "machmoe" in capsys.readouterr().out
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["schema"] == bench.SCHEMA and result["unit"] == "GFLOP/s" and result["dtype"] == "float32"
    assert {"build", "devices", "versions"} <= result["machine"].keys()
    assert len(result["results"]) == 6
    for record in result["results"]:
        assert (record["T"], record["d"], record["K"] * record["n"]) == (64, 32, 32)
        for kind in ("forward", "backward"):
            times = record[kind]
            assert 0 < times["min_ms"] <= times["median_ms"] and times["reps"] >= 5
            flops = 6 * 64 * 32 * 32 * (1 if kind == "forward" else 2)
            assert times["throughput"] == pytest.approx(flops / times["median_ms"] * 1e-6)
        assert record["total"]["median_ms"] == pytest.approx(record["forward"]["median_ms"] + record["backward"]["median_ms"])
        assert record["saved_mib"] > 0
        assert ("layer" in record) == (record["contestant"] != "dense bmm")
    for name in ("bars.png", "granularity.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_bench_draws_the_figures_of_an_earlier_json(tmp_path, capsys):
    assert main(["bench", *SMALL, "--contestants", "grouped_mm", "--out", str(tmp_path)]) == 0
    (tmp_path / "bars.png").unlink()
    assert main(["bench", "--plot", str(tmp_path / "bench.json")]) == 0
    assert (tmp_path / "bars.png").exists()


def test_a_rival_that_fails_is_reported_and_stops_nobody(tmp_path, capsys):
    assert main(["bench", "--thiek", "63,32,16,4,2", "--budget-ms", "1", "--contestants", "dense bmm,grouped_mm", "--out", str(tmp_path)]) == 0
    dense, grouped = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert "not divisible" in dense["error"] and grouped["forward"]["median_ms"] > 0
    assert "dense bmm did not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--shape", "7B"],
        ["--thiek", "1,2,3"],
        ["--thiek", "64,32,16,4,5"],
        ["--contestants", "cutlass"],
        ["--routing", "skew"],
        ["--plot", "nowhere.json"],
    ],
)
def test_bench_refuses_what_it_does_not_know(words, capsys):
    assert main(["bench", *words]) == 2
    assert words[1].split(",")[0] in capsys.readouterr().err


@pytest.mark.parametrize("pattern", bench.PATTERNS)
def test_every_routing_pattern_can_be_timed(pattern, tmp_path):
    assert (
        main(["bench", "--thiek", "256,32,16,4,2", "--budget-ms", "1", "--routing", pattern, "--contestants", "machmoe", "--out", str(tmp_path)]) == 0
    )
    (record,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert record["rows"] == 512 or pattern == "rounded"


def test_steady_timing_has_both_passes_and_no_layer(tmp_path):
    words = ["--thiek", "256,32,16,4,3", "--budget-ms", "1", "--contestants", "machmoe,grouped_mm", "--steady"]
    assert main(["bench", *words, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["steady"] and len(result["results"]) == 2
    for record in result["results"]:
        assert record["forward"]["reps"] >= 5 <= record["backward"]["reps"] and "layer" not in record


def test_aligned_routing_takes_the_nearest_number_of_experts_with_whole_tiles(tmp_path, capsys):
    words = ["--thiek", "256,32,16,4,3", "--budget-ms", "1", "--routing", "aligned,rounded", "--contestants", "machmoe"]
    assert main(["bench", *words, "--out", str(tmp_path)]) == 0
    assert "aligned, K 2" in capsys.readouterr().out
    assert [record["rows"] % 128 for record in json.loads((tmp_path / "bench.json").read_text())["results"]] == [0, 0]
    assert [Shape("s", 16384, 8, 8, 512, k).aligned().K for k in (1, 4, 10, 11)] == [4, 4, 8, 12]
    assert main(["bench", "--thiek", "256,32,16,4,2", "--thiek", "100,32,16,4,2", "--routing", "random,aligned"]) == 2
    assert "take another T" in capsys.readouterr().err


def test_rounded_routing_needs_machmoe(capsys):
    assert main(["bench", "--thiek", "256,32,16,4,2", "--routing", "rounded", "--contestants", "dense bmm,grouped_mm"]) == 2
    assert "add machmoe" in capsys.readouterr().err


def test_routing_patterns_take_turns_on_the_same_data(tmp_path):
    words = ["--thiek", "256,32,16,4,2", "--budget-ms", "1", "--routing", "balanced,rounded", "--contestants", "machmoe,grouped_mm"]
    assert main(["bench", *words, "--out", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert [record["contestant"] for record in records] == ["machmoe, balanced", "grouped_mm, balanced", "machmoe, rounded"]
    assert [record["routing"] for record in records] == ["balanced", "balanced", "rounded"]
    assert records[2]["rows"] % 128 == 0 and records[2]["forward"]["throughput"] > 0
    assert records[0]["time_over_machmoe"] == records[2]["time_over_machmoe"] == 1 != records[1]["time_over_machmoe"]
    first = Problem(Shape("small", 256, 32, 16, 4, 2), "random", torch.float32, torch.device("cpu"))
    other = Problem(first.shape, "rounded", torch.float32, torch.device("cpu"), like=first)
    assert other.w1 is first.w1 and torch.equal(other.scores, first.scores)


def test_the_problem_has_distinct_experts_and_normalised_weights():
    for pattern in ("random", "balanced", "skewed"):
        problem = Problem(Shape("s", 4096, 8, 8, 16, 4), pattern, torch.float32, torch.device("cpu"))
        ids = problem.ids.sort(1).values
        assert (ids[:, 1:] > ids[:, :-1]).all() and ids.min() >= 0 and ids.max() < 16
        assert torch.allclose(problem.weights.sum(1), torch.ones(4096))
        counts = torch.bincount(ids.flatten().long(), minlength=16)
        if pattern == "balanced":
            assert (counts == 1024).all()
        if pattern == "skewed":  # and the experts do not stand in the order of their rows
            by_rows = counts.sort(descending=True).values
            assert by_rows[0] > 2 * by_rows[8] and not torch.equal(counts, by_rows)


def test_the_dense_yardstick_computes_a_balanced_layer_with_unit_scores():
    shape = Shape("s", 32, 16, 8, 4, 2)
    problem = Problem(shape, "balanced", torch.float64, torch.device("cpu"))
    dense = CONTESTANTS["dense bmm"](problem)
    o = dense.forward()
    gradients = dense.backward(o)
    # Row r = k T + t belongs to expert r / (rows per expert).
    expert = torch.arange(64).view(2, 32).t() // 16
    x, w1, w2 = (leaf.detach().requires_grad_() for leaf in (problem.x, problem.w1, problem.w2))
    expected = torch.zeros_like(x)
    for k in range(2):
        h = torch.einsum("tnd,td->tn", w1[expert[:, k]], x)
        gate, up = h.chunk(2, dim=1)
        expected = expected + torch.einsum("tdn,tn->td", w2[expert[:, k]], torch.nn.functional.silu(gate) * up)
    assert torch.allclose(o, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (x, w1, w2), problem.d_o), strict=True):
        assert check.relative_error(ours, theirs) < 1e-5  # the SwiGLU gradient is computed in fp32


def test_the_floor_of_the_h200_shapes():
    """Forward and backward in ms, as published for the official package's comparison."""
    published = {
        "30B-n1024-K4": (4.49, 8.66),
        "30B-n512-K8": (4.74, 8.91),
        "30B-n256-K16": (5.24, 9.41),
        "7B-n1024-K2": (0.64, 1.23),
        "7B-n512-K4": (0.67, 1.26),
        "7B-n256-K8": (0.75, 1.33),
        "1.4B-n256-K8": (0.63, 1.17),
        "OLMoE-1B-7B": (4.46, 8.63),
        "Qwen3-30B-A3B": (3.41, 6.54),
        "Qwen3-Next-80B": (2.95, 5.56),
        "gpt-oss-20b": (8.48, 16.73),
        "DeepSeek-V3": (15.11, 29.72),
    }
    assert list(published) == H200_SHAPES
    for name, expected in published.items():
        assert (round(floor_ms(SHAPES[name], False), 2), round(floor_ms(SHAPES[name], True), 2)) == expected


def test_shapes_by_name_and_by_size():
    assert parse("OLMoE-1B-7B") == Shape("OLMoE-1B-7B", 32768, 2048, 1024, 64, 8)
    assert parse("4096,512,256,32,4").flops() == 6 * 4096 * 4 * 256 * 512


# ---- check -------------------------------------------------------------------------------------------------------------------------
def test_check_passes_here_within_seconds(capsys):
    assert main(["check", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "PASS in" in out and "FAIL" not in out


def test_check_covers_every_activation_router_rule_and_entry_point():
    names = " ".join(name for name, _ in check.build_cases(torch.float32, torch.device("cpu")))
    entries = ("experts_general", "grouped_mlp", "token_round", "route", "layer", "interleaved", "pair", "recompute")
    for word in (*check.ACTIVATIONS, *check.ROUTERS, *check.RULES, *entries):
        assert word in names


def wrong_by(factor):
    """An experts layer whose output, and with it every gradient, is off by a factor."""
    return lambda x, w1, w2, ids, weights, **_: grouped_experts(x, w1, w2, ids, weights) * factor


@pytest.mark.parametrize("factor, passes", [(1.0, True), (1.0 + 3e-5, False), (float("nan"), False)])
def test_check_sees_a_wrong_layer(monkeypatch, factor, passes):
    monkeypatch.setattr(check.machmoe, "experts", wrong_by(factor))
    data = check.Data(torch.float32, torch.device("cpu"))
    result = check.examine("experts", lambda: data.experts_case("experts"), torch.float32, torch.Generator())
    assert not result.failure and result.passed == passes


def test_check_sees_bits_that_change_from_run_to_run(monkeypatch):
    calls = []

    def unsteady(x, w1, w2, ids, weights, **_):
        calls.append(1)
        return grouped_experts(x, w1, w2, ids, weights) * (1 + 1e-6 * len(calls))

    monkeypatch.setattr(check.machmoe, "experts", unsteady)
    data = check.Data(torch.float32, torch.device("cpu"))
    result = check.examine("experts", lambda: data.experts_case("experts"), torch.float32, torch.Generator())
    assert max(result.errors.values()) < 1e-5 and not result.same_bits and not result.passed


def test_a_failing_check_is_exit_status_1(monkeypatch, capsys):
    failed = check.Result("experts", torch.float32, {"O": 1.0}, True)
    monkeypatch.setattr(check, "check", lambda device: [failed])
    assert main(["check", "--device", "cpu"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_reference_of_zero_requires_exact_zero():
    zero = torch.zeros(3, dtype=torch.float64)
    assert check.relative_error(torch.zeros(3), zero) == 0
    assert check.relative_error(torch.full((3,), 1e-30), zero) == float("inf")
    assert check.relative_error(torch.full((3,), float("nan")), torch.ones(3).double()) == float("inf")
