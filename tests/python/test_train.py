"""`python -m machmoe train`: it learns, survives what happens to long runs, and says clearly what is wrong."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from machmoe.cli import main
from machmoe.errors import UserError
from machmoe.train import checkpoint
from machmoe.train.config import PRESETS, Config
from machmoe.train.data import Batches, bigram_entropy, load_corpus
from machmoe.train.loop import BITS, Trainer, learning_rate
from machmoe.train.metrics import read as read_metrics
from machmoe.train.model import LanguageModel

TINY = {
    "layers": 1,
    "d": 32,
    "n": 16,
    "num_experts": 4,
    "k": 2,
    "heads": 2,
    "context": 32,
    "batch": 4,
    "steps": 12,
    "warmup": 3,
    "val_every": 6,
    "val_sequences": 8,
    "checkpoint_every": 4,
    "log_every": 2,
    "sample": 20,
    "corpus_mb": 0.2,
}
BOTH = pytest.mark.parametrize("experts", ["torch", "machmoe"])


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Sizes this small are fastest on one thread, also in the processes that a test starts."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flags(**changes):
    words = []
    for name, value in (TINY | changes).items():
        words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return words


def train(out, *extra, **changes):
    return main(["train", "--plain", "--out", str(out), *flags(**changes), *extra])


def losses(run):
    """{step: loss}, each step exactly once."""
    records = [r for r in read_metrics(Path(run) / "metrics.jsonl") if "train_loss" in r]
    assert len({r["step"] for r in records}) == len(records)
    return {r["step"]: r["train_loss"] for r in records}


def validation(run):
    return {r["step"]: r["val_loss"] for r in read_metrics(Path(run) / "metrics.jsonl") if "val_loss" in r}


# ---- a whole run -----------------------------------------------------------------------------------------------------------------
@BOTH
def test_a_run_leaves_metrics_plot_checkpoints_and_a_sample(tmp_path, capsys, experts):
    assert train(tmp_path / "run", experts=experts) == 0
    out = capsys.readouterr().out
    assert "H(next byte | previous byte)" in out and "bits/byte" in out and "def " in out
    assert list(losses(tmp_path / "run")) == list(range(1, 13))
    assert list(validation(tmp_path / "run")) == [6, 12]
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-00000008.pt", "checkpoint-00000012.pt"]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "run").glob("*.tmp"))


@BOTH
def test_the_model_learns_more_than_the_previous_byte_tells(tmp_path, experts):
    """A text of period 24 in which every byte has many predecessors: its bigram entropy is high, its true entropy is zero."""
    text = tmp_path / "text"
    text.write_bytes(b"abacadbcbdcdaabbccdd\nabba" * 2000)
    config = Config(**(TINY | {"steps": 120, "lr": 1e-2, "experts": experts, "corpus": str(text), "val_every": 120, "checkpoint_every": 120}))
    trainer = Trainer(config, tmp_path / "run")
    trainer.train(plain=True)
    assert trainer.bigram > 1.0
    assert trainer.val_loss < 0.5 * trainer.bigram


def test_token_rounding_trains(tmp_path):
    assert train(tmp_path / "run", experts="machmoe", routing="token-rounding") == 0
    values = list(losses(tmp_path / "run").values())
    assert values[-1] < values[0]


def test_machmoe_and_torch_experts_follow_the_same_curve(tmp_path):
    for experts in ("machmoe", "torch"):
        assert train(tmp_path / experts, experts=experts) == 0
    ours, theirs = losses(tmp_path / "machmoe"), losses(tmp_path / "torch")
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[s] - theirs[s]) for s in ours) < 1e-3


def test_a_terminal_gets_a_progress_bar_and_a_pipe_gets_lines(tmp_path):
    command = [sys.executable, "-m", "machmoe", "train", *flags(experts="torch")]
    piped = subprocess.run([*command, "--out", str(tmp_path / "piped")], capture_output=True, text=True, check=True)
    assert "step 12/12" in piped.stdout and "ETA" in piped.stdout
    terminal, other_end = pty.openpty()
    subprocess.run([*command, "--out", str(tmp_path / "terminal")], stdout=subprocess.DEVNULL, stderr=other_end, check=True)
    bar = os.read(terminal, 1 << 16).decode()
    os.close(terminal), os.close(other_end)
    assert "12/12" in bar and "tokens/s" in bar


# ---- interruption and resume -----------------------------------------------------------------------------------------------------
def start(out, *extra, **changes):
    command = [sys.executable, "-m", "machmoe", "train", "--plain", "--out", str(out), *flags(**changes), *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(run, step, process, seconds=60):
    deadline = time.monotonic() + seconds
    metrics = Path(run) / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and any(r["step"] >= step for r in read_metrics(metrics)):
            return
        time.sleep(0.01)
    pytest.fail(f"the run did not reach step {step}: {process.communicate()[0]}")


@BOTH
def test_kill_9_resumes_to_the_same_losses(tmp_path, experts):
    sizes = {"steps": 100, "checkpoint_every": 5, "val_every": 25, "experts": experts}
    process = start(tmp_path / "killed", **sizes)
    wait_for_step(tmp_path / "killed", 12, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = max(losses(tmp_path / "killed"))
    assert done < 100
    assert main(["train", "--plain", "--resume", str(tmp_path / "killed")]) == 0
    assert train(tmp_path / "straight", **sizes) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert validation(tmp_path / "killed") == validation(tmp_path / "straight")


def test_every_checkpoint_resumes_to_the_same_losses(tmp_path):
    assert train(tmp_path / "run", experts="torch") == 0
    straight = losses(tmp_path / "run")
    for path in checkpoint.checkpoints(tmp_path / "run"):
        step = int(path.stem.split("-")[1])
        assert main(["train", "--plain", "--resume", str(path)]) == 0
        assert losses(tmp_path / "run") == straight, step


def test_checkpoints_of_later_steps_go_when_an_earlier_one_was_resumed(tmp_path):
    """At its first save: --resume of the folder goes on from there. Files of other names stay."""
    run = tmp_path / "run"
    assert train(run, experts="torch") == 0
    earlier, latest = checkpoint.checkpoints(run)
    (run / "checkpoint-best.pt").write_bytes(latest.read_bytes())
    saved = checkpoint.save(run, 9, checkpoint.load(earlier))
    assert checkpoint.checkpoints(run) == [earlier, saved] and checkpoint.find(run) == saved
    assert (run / "checkpoint-best.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_the_step_it_stopped_at(tmp_path, number):
    process = start(tmp_path / "run", steps=100_000, checkpoint_every=100_000, val_every=100_000, experts="torch")
    wait_for_step(tmp_path / "run", 4, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "--resume" in output and "Traceback" not in output
    state = checkpoint.load(checkpoint.find(tmp_path / "run"))
    assert state["step"] == max(losses(tmp_path / "run"))


def test_resume_drops_metrics_beyond_the_checkpoint(tmp_path):
    assert train(tmp_path / "run", experts="torch") == 0
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 13, "train_loss": 99.0}) + "\n" + '{"step": 14, "train_')
    assert main(["train", "--plain", "--resume", str(tmp_path / "run")]) == 0
    assert max(losses(tmp_path / "run")) == 12


def test_resume_refuses_another_corpus_and_other_sizes(tmp_path, capsys):
    text = tmp_path / "text"
    text.write_bytes(b"some text to learn from, again and again\n" * 400)
    assert train(tmp_path / "run", experts="torch", corpus=text) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "99"]) == 2
    assert "--steps" in capsys.readouterr().err
    text.write_bytes(b"other text\n" * 2000)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert "corpus" in capsys.readouterr().err


# ---- what goes wrong outside -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.999], ids=["empty", "10 bytes", "half", "nearly whole"])
def test_a_truncated_checkpoint_is_refused_and_the_earlier_one_named(tmp_path, capsys, kept):
    assert train(tmp_path / "run", experts="torch") == 0
    earlier, latest = checkpoint.checkpoints(tmp_path / "run")
    before, content = earlier.read_bytes(), latest.read_bytes()
    latest.write_bytes(content[: kept if kept >= 1 else int(len(content) * kept)])
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "truncated or damaged" in error and str(earlier) in error
    assert earlier.read_bytes() == before
    assert main(["train", "--plain", "--resume", str(earlier)]) == 0


def test_one_flipped_bit_in_a_checkpoint_is_found(tmp_path, capsys):
    assert train(tmp_path / "run", experts="torch") == 0
    latest = checkpoint.find(tmp_path / "run")
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes(content)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_full_disk_stops_the_run_and_leaves_the_earlier_checkpoints(tmp_path, capsys):
    """/dev/full answers every write with ENOSPC, as a full disk does."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-00000008.pt.tmp").symlink_to("/dev/full")
    assert train(run, experts="torch") == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "intact" in error
    assert [p.name for p in checkpoint.checkpoints(run)] == ["checkpoint-00000004.pt"]
    assert main(["train", "--plain", "--resume", str(run)]) == 0
    assert max(losses(run)) == 12


def test_a_full_disk_under_the_metrics_is_an_error_too(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").symlink_to("/dev/full")
    assert train(run, experts="torch") == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [(None, "does not exist"), (b"", "is empty"), (b"too short", "has only 9 bytes")])
def test_missing_empty_and_short_corpora(tmp_path, capsys, content, message):
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    assert train(tmp_path / "run", experts="torch", corpus=text) == 2
    assert message in capsys.readouterr().err


def test_an_earlier_run_is_never_overwritten(tmp_path, capsys):
    assert train(tmp_path / "run", experts="torch") == 0
    assert train(tmp_path / "run", experts="torch") == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, named",
    [
        ({"k": 9}, "--k"),
        ({"lr": -1}, "--lr"),
        ({"corpus_mb": "nan"}, "--corpus-mb"),
        ({"seed": 10**14}, "--seed"),
        ({"d": 30}, "--d"),
        ({"batch": 0}, "--batch"),
        ({"experts": "torch", "routing": "token-rounding"}, "--routing"),
        ({"experts": "torch", "compile": True}, "--compile"),
    ],
)
def test_impossible_settings_name_the_flag(tmp_path, capsys, change, named):
    assert train(tmp_path / "run", **change) == 2
    assert named in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    assert train(tmp_path / "run", experts="torch", lr=1e30, clip=1e30) == 2
    assert "--lr" in capsys.readouterr().err


# ---- comparison ------------------------------------------------------------------------------------------------------------------
def test_compare_trains_both_choices_from_one_seed(tmp_path, capsys):
    assert train(tmp_path / "both", "--compare", "machmoe,torch") == 0
    assert "%" in capsys.readouterr().out
    first = [losses(tmp_path / "both" / choice)[1] for choice in ("machmoe", "torch")]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert (tmp_path / "both" / "compare.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "both" / "compare.json").read_text())
    assert set(result) == {"machmoe", "torch"} and all(r["val_loss"] > 0 and r["tokens_per_s"] > 0 for r in result.values())


@pytest.mark.parametrize("choices", ["torch", "torch,torch", "torch,quick"])
def test_compare_refuses_what_is_no_comparison(tmp_path, capsys, choices):
    assert train(tmp_path / "both", "--compare", choices) == 2
    assert "--compare" in capsys.readouterr().err


# ---- parts -----------------------------------------------------------------------------------------------------------------------
def test_bigram_entropy_of_known_texts():
    assert bigram_entropy(torch.tensor([0, 1] * 1000, dtype=torch.uint8)) == pytest.approx(0, abs=1e-12)
    uniform = torch.randint(0, 4, (1 << 20,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert bigram_entropy(uniform) == pytest.approx(2, abs=1e-3)
    # After a comes a or b with equal chance, after b always a: H = P(a) x 1 bit, P(a) = 2/3.
    chain = [0]
    flips = torch.rand(200_000, generator=torch.Generator().manual_seed(1))
    for flip in flips.tolist():
        chain.append(1 if chain[-1] == 0 and flip < 0.5 else 0)
    assert bigram_entropy(torch.tensor(chain, dtype=torch.uint8)) == pytest.approx(2 / 3, abs=0.01)


def test_batches_visit_every_window_once_an_epoch_and_continue_at_a_position():
    data = torch.arange(101, dtype=torch.uint8)
    batches = Batches(data, context=10, batch=2, seed=3, device="cpu")
    first = [batches.next()[0][:, 0].tolist() for _ in range(4)]
    assert batches.per_epoch == 8
    starts = sorted(s for pair in first for s in pair)
    assert all(b - a == 10 for a, b in pairwise(starts))
    later = batches.next()[0]
    again = Batches(data, context=10, batch=2, seed=3, device="cpu")
    again.position = 8
    assert torch.equal(again.next()[0], later)


def test_a_batch_at_the_end_of_an_epoch_is_filled_from_the_next_one():
    batches = Batches(torch.arange(101, dtype=torch.uint8), context=10, batch=3, seed=3, device="cpu")  # 8 sequences an epoch
    starts = torch.cat([batches.next()[0][:, 0] for _ in range(6)])
    assert len(starts) == 18 and batches.position == 18
    for epoch in starts[:8], starts[8:16]:
        assert len(set(epoch.tolist())) == 8


def test_the_corpus_depends_on_names_and_bytes_only(tmp_path):
    for copy in ("one", "two"):
        folder = tmp_path / copy
        names = [f"{i}.txt" for i in range(20)]
        (folder / "sub").mkdir(parents=True)
        for name in names if copy == "one" else reversed(names):
            (folder / "sub" / name).write_text(f"text of {name}\n" * 50)
        (folder / "binary").write_bytes(b"\0\1\2" * 1000)
        (folder / ".hidden").write_text("secret")
    one, two = (load_corpus(tmp_path / copy, 1, 16) for copy in ("one", "two"))
    assert one.digest == two.digest
    assert b"secret" not in bytes(one.train.tolist()) and b"\0" not in bytes(one.train.tolist())
    assert len(one.validation) == pytest.approx(0.05 * (len(one.train) + len(one.validation)), abs=1)


def test_the_default_corpus_is_on_every_machine_with_python():
    corpus = load_corpus("", 0.5, 256)
    assert len(corpus.train) + len(corpus.validation) == 2**19


def test_learning_rate_rises_then_falls_to_its_share():
    config = Config(steps=100, warmup=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[9] == max(rates) == 1.0 and rates[0] == 0.1
    assert rates[100] == pytest.approx(0.1) and all(a >= b for a, b in pairwise(rates[9:]))


def test_two_choices_of_experts_start_from_the_same_weights():
    one, two = (LanguageModel(replace(Config(**TINY), experts=experts)) for experts in ("torch", "machmoe"))
    one.initialise(5), two.initialise(5)
    a, b = one.state_dict(), two.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert {"blocks.0.moe.gate.weight", "blocks.0.moe.experts.gate_up_proj", "blocks.0.moe.experts.down_proj"} <= a.keys()


def test_the_120m_preset_has_120_million_parameters():
    with torch.device("meta"):
        total, _ = LanguageModel(replace(PRESETS["120m"], experts="torch")).num_parameters()
    assert total == pytest.approx(120e6, rel=0.01)
    assert (PRESETS["120m"].k, PRESETS["120m"].num_experts) == (8, 64)


def test_losses_are_bits_per_byte(tmp_path):
    """An untrained head is nearly uniform over 256 bytes: 8 bits, not 5.5 nats."""
    config = Config(**(TINY | {"experts": "torch"}))
    trainer = Trainer(config, tmp_path / "run")
    with torch.no_grad():
        trainer.model.head.weight.zero_()
    assert trainer.validate() == pytest.approx(8.0, abs=1e-4)
    assert BITS == pytest.approx(1.442695, abs=1e-6)


def test_write_atomically_keeps_the_old_content_when_it_fails(tmp_path):
    path = tmp_path / "file"
    checkpoint.write_atomically(path, b"old")
    os.symlink("/dev/full", tmp_path / "file.tmp")
    with pytest.raises(UserError, match="No space left"):
        checkpoint.write_atomically(path, b"new" * 10_000)
    assert path.read_bytes() == b"old" and not (tmp_path / "file.tmp").exists()
