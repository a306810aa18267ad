"""Draws padded_rows.png: the rows that tiles of 128 compute beyond top-K's, for plain top-K and for each rounding rule."""

from pathlib import Path

import machmoe
import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

K, TILE = 8, 128
STYLES = {"top-K, padded": {"linewidth": 4, "alpha": 0.5}, "up": {"linestyle": "--"}}
RULES = ("nr_f", "sr_f", "nr_s", "up", "down", "balance_f")


def shares(T, E):
    """{rule: (rows computed - T K) / (T K)}"""
    scores = torch.randn(T, E, generator=torch.Generator().manual_seed(T + E)).softmax(-1)
    counts = torch.bincount(scores.topk(K).indices.flatten(), minlength=E)
    out = {"top-K, padded": ((counts + TILE - 1) // TILE * TILE).sum().item()}
    out |= {rule: machmoe.token_round(scores, K, TILE, rule, seed=1).counts.sum().item() for rule in RULES}
    return {name: rows / (T * K) - 1 for name, rows in out.items()}


figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
for axis, label, points in (
    (axes[0], "T (E = 128)", [(T, (T, 128)) for T in (2048, 4096, 8192, 16384)]),
    (axes[1], "E (T = 8192)", [(E, (8192, E)) for E in (32, 64, 128, 256)]),
):
    values = [shares(*sizes) for _, sizes in points]
    for name in values[0]:
        axis.plot([x for x, _ in points], [100 * v[name] for v in values], marker="o", label=name, **STYLES.get(name, {}))
    axis.set_xscale("log", base=2)
    axis.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
    axis.set_xlabel(label)
    axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
axes[0].set_ylabel("rows beyond top-K's, % of T K")
axes[1].legend(fontsize=8, ncol=2)
figure.tight_layout()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
