"""Pictures of a result: the roofline, the speed against torch per class, and the times of whole models."""

import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from benchmarks.machine import arithmetic, headline

OURS, TORCH, ROOF = "tab:blue", "0.55", "0.25"
ROOFLINE_LAYOUT = {"cpu": "nchw", "cuda": "channels_last"}  # where it was measured
LAYOUT_COLORS = {"nchw": "tab:blue", "channels_last": "tab:orange"}
SPEED_TICKS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]
MODEL_TITLES = {"mnist": "The lecture's CNN", "networks": "Whole networks, converted"}
DIRECTION_TITLES = {
    "forward": "forward",
    "forward_training": "forward, for training",
    "backward_input": "backward_input",
    "backward_weight": "backward_weight",
    "backward": "backward",
}


def draw(document: dict, stem: Path) -> list[Path]:
    """Writes the pictures that belong to a document beside it and returns their paths."""
    figures = {
        "conv2d": lambda: {"roofline": roofline(document), "speed": speed_by_class(document)},
        "pooling": lambda: {"speed": speed_by_class(document)},
        "mnist": lambda: {"time": times_of_models(document)},
        "networks": lambda: {"time": times_of_models(document)},
    }
    paths = []
    for name, figure in figures[document["benchmark"]]().items():
        paths.append(stem.with_name(f"{stem.name}_{name}.png"))
        figure.savefig(paths[-1], dpi=110)
    return paths


def roofline(document: dict) -> Figure:
    """GFLOP/s over FLOP per byte, a panel per direction: a dot in its class's colour, a thin line to torch's cross."""
    layouts = {row["layout"] for row in document["rows"]}
    layout = ROOFLINE_LAYOUT[document["device"]] if len(layouts) > 1 else layouts.pop()
    rows = [row for row in document["rows"] if row["layout"] == layout]
    directions = _in_order(row["direction"] for row in rows)
    classes = sorted({row["class"] for row in rows})
    colors = {name: f"C{i % 10}" for i, name in enumerate(classes)}

    figure = Figure(figsize=(4.6 * len(directions) + 2.2, 5.4), layout="constrained")
    figure.suptitle(f"conv2d in {arithmetic(document)}, {layout}: the roofline\n{headline(document)}", size=11)
    panels = figure.subplots(1, len(directions), sharex=True, sharey=True, squeeze=False)[0]
    for axes, direction in zip(panels, directions, strict=True):
        members = [row for row in rows if row["direction"] == direction]
        _draw_roof(axes, document["peak"], rows)
        for row in members:
            intensity = row["flops"] / row["bytes"]
            axes.plot([intensity] * 2, [row["torch_gflops"], row["gflops"]], color=TORCH, lw=0.8, zorder=2)
            axes.plot(intensity, row["torch_gflops"], "x", color=TORCH, ms=5, zorder=3)
            axes.plot(intensity, row["gflops"], "o", color=colors[row["class"]], ms=5.5, zorder=4)
        axes.set_title(direction)
        axes.set_xlabel("FLOP per byte of the three tensors")
    panels[0].set_ylabel("GFLOP/s")
    for name in classes:
        panels[-1].plot([], [], "o", color=colors[name], label=name)
    panels[-1].plot([], [], "x", color=TORCH, label="torch, same layer")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _draw_roof(axes, peak: dict, rows: list[dict]) -> None:
    intensities = [row["flops"] / row["bytes"] for row in rows]
    x = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
    top = statistics.median(row["peak_gflops"] for row in rows)
    axes.loglog(x, np.minimum(top, x * peak["memory_gbytes_per_s"]), color=ROOF, lw=1.5, zorder=1)
    axes.loglog(x, np.minimum(top, x * peak["cache_gbytes_per_s"]), color=ROOF, lw=1, ls=":", zorder=1)
    slowest = min(min(row["gflops"], row["torch_gflops"]) for row in rows)
    axes.set_ylim(min(slowest / 2, top / 10), top * 2)
    axes.text(x[-1], top * 1.08, f"peak {top:.0f} GFLOP/s", ha="right", color=ROOF, size=8)
    axes.text(
        0.98,
        0.02,
        f"solid: memory, {peak['memory_gbytes_per_s']:.0f} GB/s\ndotted: cache, {peak['cache_gbytes_per_s']:.0f} GB/s",
        transform=axes.transAxes, ha="right", va="bottom", color=ROOF, size=8,
    )  # fmt: skip
    axes.grid(alpha=0.25, which="major")


def speed_by_class(document: dict) -> Figure:
    """For each direction a panel, for each class a bar per layout: the geometric mean, with each layer as a dot."""
    rows = document["rows"]
    panels_of = _in_order((row["op"], row["direction"]) for row in rows)
    heights = [len({row["class"] for row in rows if (row["op"], row["direction"]) == key}) for key in panels_of]
    columns = 3
    lines = -(-len(panels_of) // columns)
    figure = Figure(figsize=(14, (1.6 + 0.46 * max(heights)) * lines + 0.4), layout="constrained")
    figure.suptitle(f"Speed of cnn_ext against torch in the same layout (1 = torch's)\n{headline(document)}", size=11)
    grid = figure.subplots(lines, columns, squeeze=False)
    speeds = [row["speed_vs_torch"] for row in rows]
    for axes, (op, direction) in zip(grid.flat, panels_of, strict=False):
        members = [row for row in rows if (row["op"], row["direction"]) == (op, direction)]
        _draw_bars(axes, members)
        _set_speed_axis(axes, min(speeds), max(speeds))
        axes.set_title(f"{op} {DIRECTION_TITLES[direction]}")
    for axes in list(grid.flat)[len(panels_of) :]:
        axes.set_visible(False)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_bars(axes, rows: list[dict]) -> None:
    classes = sorted({row["class"] for row in rows}, reverse=True)
    layouts = [layout for layout in LAYOUT_COLORS if any(row["layout"] == layout for row in rows)]
    thickness = 0.8 / len(layouts)
    for number, layout in enumerate(reversed(layouts)):
        for position, name in enumerate(classes):
            speeds = [r["speed_vs_torch"] for r in rows if r["class"] == name and r["layout"] == layout]
            y = position + thickness * (number - (len(layouts) - 1) / 2)
            mean = float(np.exp(np.mean(np.log(speeds))))
            label = layout if position == 0 else None
            axes.barh(y, mean - 1, thickness, left=1, color=LAYOUT_COLORS[layout], alpha=0.75, label=label)
            axes.plot(speeds, [y] * len(speeds), ".", color="black", ms=3.5, alpha=0.7)
    axes.axvline(1, color="black", lw=1)
    axes.set_yticks(range(len(classes)), classes)


def _set_speed_axis(axes, slowest: float, fastest: float) -> None:
    low, high = min(0.5, slowest / 1.2), max(2, fastest * 1.2)
    inside = [tick for tick in SPEED_TICKS if low <= tick <= high]
    if len(inside) < 5:
        inside = [0.7, *inside, 1.5]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(inside if len(inside) < 7 else inside[inside.index(1) % 2 :: 2]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.grid(axis="x", alpha=0.3)


def times_of_models(document: dict) -> Figure:
    """A panel per row name (training step, epoch), two in a line; a bar per contender."""
    names = _in_order(row["name"] for row in document["rows"])
    lines = -(-len(names) // 2)
    figure = Figure(figsize=(max(9, 6 * min(2, len(names))), 0.5 + 2.4 * lines), layout="constrained")
    figure.suptitle(f"{MODEL_TITLES[document['benchmark']]}\n{headline(document)}", size=10)
    for axes, name in zip(figure.subplots(lines, 2 if len(names) > 1 else 1, squeeze=False).flat, names, strict=True):
        rows = [row for row in document["rows"] if row["name"] == name][::-1]
        in_seconds = max(row["ms"] for row in rows) > 1000
        values = [row["ms"] / (1000 if in_seconds else 1) for row in rows]
        colors = [OURS if row["backend"].startswith(("cnn_ext", "cnn-ext")) else TORCH for row in rows]
        bars = axes.barh([row["backend"] for row in rows], values, color=colors)
        labels = [f"{value:.3g} ({row['time_vs_torch']:.2f})" for value, row in zip(values, rows, strict=True)]
        axes.bar_label(bars, labels, padding=3)
        axes.set_xlim(0, max(values) * 1.3)
        axes.set_title(f"{name}, batch {rows[0]['batch_size']}")
        axes.set_xlabel(f"{'seconds' if in_seconds else 'ms'} (share of {rows[-1]['backend']}'s time)")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def mnist_curves(histories: dict[str, list[dict]]) -> Figure:
    """Loss and accuracy over the epochs: a colour per backend, a line per seed; validation solid, training dashed."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    figure.suptitle("The lecture's CNN on MNIST: each line one seed")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for (backend, runs), color in zip(histories.items(), ("tab:blue", "tab:orange"), strict=False):
            for number, run in enumerate(runs):
                for part, style in (("validation", "-"), ("train", "--")):
                    values = run[f"{part}_{quantity}"]
                    label = f"{backend}, {part}" if number == 0 else None
                    axes.plot(range(1, len(values) + 1), values, style, color=color, lw=1.2, alpha=0.8, label=label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _in_order(items: Iterable) -> list:
    return list(dict.fromkeys(items))
