"""Loss curves as PNG."""

import io

from ..errors import need
from .checkpoint import write_atomically


def smooth(values):
    """Mean over a centred window of 2 % of the run."""
    half = max(1, len(values) // 100)
    return [sum(window) / len(window) for i in range(len(values)) for window in [values[max(0, i - half) : i + half + 1]]]


def plot_losses(path, runs, bigram, title=""):
    """runs: {label: records of metrics.jsonl}; losses in bits per byte."""
    need("matplotlib").use("Agg")
    plt = need("matplotlib.pyplot")
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, (label, records) in enumerate(runs.items()):
        train = [(r["step"], r["train_loss"]) for r in records if "train_loss" in r]
        validation = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
        color = f"C{i}"
        if train:
            steps, losses = zip(*train, strict=True)
            axes.plot(steps, losses, color=color, alpha=0.15, linewidth=0.8)
            axes.plot(steps, smooth(losses), color=color, linewidth=1.5, label=f"{label}, training")
        if validation:
            axes.plot(*zip(*validation, strict=True), "o--", color=color, markersize=4, label=f"{label}, validation")
    axes.axhline(bigram, color="0.4", linestyle=":", label=f"H(next byte | previous byte) = {bigram:.3f}")
    axes.set(xlabel="step", ylabel="loss, bits per byte")
    axes.set_title(title, fontsize="medium")
    settled = [r.get("train_loss", r.get("val_loss")) for records in runs.values() for r in records if r["step"] > 20] or [8.0]
    axes.set_ylim(0.9 * min(*settled, bigram), min(8.5, 1.1 * max(*settled, bigram)))
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
