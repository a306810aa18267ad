"""Figures of a benchmark's JSON."""

import io
from pathlib import Path

from ..errors import need
from ..train.checkpoint import write_atomically


def measured(result):
    return [record for record in result["results"] if "error" not in record]


def save(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    need("matplotlib.pyplot").close(figure)
    write_atomically(path, buffer.getvalue())
    return path


def bars(result, path):
    """Throughput of each contestant at each shape, forward and backward."""
    plt = need("matplotlib.pyplot")
    records, unit = measured(result), result["unit"]
    shapes, names = (list(dict.fromkeys(record[key] for record in records)) for key in ("shape", "contestant"))
    figure, axes = plt.subplots(2, 1, figsize=(max(6, 0.75 * len(shapes) + 2), 6), layout="constrained", sharex=True, sharey=True)
    width = 0.8 / len(names)
    for panel, kind in zip(axes, ("forward", "backward"), strict=True):
        for i, name in enumerate(names):
            mine = {shapes.index(r["shape"]): r[kind]["throughput"] for r in records if r["contestant"] == name}
            panel.bar([x + (i - (len(names) - 1) / 2) * width for x in mine], list(mine.values()), width=width, label=name, color=f"C{i}")
        panel.set_ylabel(f"{kind}, {unit}")
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.margins(x=0.02)
    axes[1].set_xticks(range(len(shapes)), shapes, rotation=30 if len(shapes) > 3 else 0, ha="right" if len(shapes) > 3 else "center")
    axes[0].legend(ncols=min(3, len(names)), fontsize="small", loc="lower left", bbox_to_anchor=(0, 1.0))
    return save(figure, path)


def granularity(result, path):
    """Throughput and activation memory over granularity d / n (figure 1 of arXiv 2512.14080), for shapes that differ in n alone at constant K n;
    None where there is no such family."""
    plt = need("matplotlib.pyplot")
    families, names = {}, list(dict.fromkeys(record["contestant"] for record in measured(result)))
    for record in measured(result):
        families.setdefault((record["T"], record["d"], record["K"] * record["n"]), []).append(record)
    families = {key: records for key, records in families.items() if len({r["n"] for r in records}) > 1}
    if not families:
        return None
    figure, axes = plt.subplots(2, len(families), figsize=(5 * len(families) + 1, 7), layout="constrained", squeeze=False, sharex="col")
    for column, (key, records) in enumerate(sorted(families.items())):
        for i, name in enumerate(names):
            mine = sorted((r for r in records if r["contestant"] == name), key=lambda r: -r["n"])
            x = [r["d"] / r["n"] for r in mine]
            style = {"color": f"C{i}", "marker": "o", "markersize": 10 - 1.5 * i, "linewidth": 3 - 0.5 * i}  # of equal curves both stay visible
            axes[0, column].plot(x, [r["total"]["throughput"] for r in mine], label=name, **style)
            axes[1, column].plot(x, [r["saved_mib"] for r in mine], label=name, **style)
        axes[0, column].set(title="T {}, d {}, K n = {}".format(*key), ylabel=f"forward + backward, {result['unit']}", ylim=(0, None), xscale="log")
        axes[1, column].set(xlabel="granularity d / n", ylabel="activations saved for the backward, MiB", ylim=(0, None))
        ticks = sorted({r["d"] / r["n"] for r in records})
        axes[1, column].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        for panel in axes[:, column]:
            panel.set_ylim(0, 1.06 * panel.get_ylim()[1])  # the default ends in the topmost marker
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    return save(figure, path)


def plot(result, folder):
    need("matplotlib").use("Agg")
    if not measured(result):
        return []
    folder = Path(folder)
    return [path for path in (bars(result, folder / "bars.png"), granularity(result, folder / "granularity.png")) if path]
