"""Draw size against KL and against speed over the types of exports: python scripts/export_figure.py FOLDER --out FIGURE.png

FOLDER is what `ril export --to gguf` has written and checked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    types = json.loads((arguments.folder / "check.json").read_text(encoding="utf-8"))
    busy = any(t["load"] > t["cores"] for t in types)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for t in types:
        size = t["bytes"] / 1e6
        color = left.scatter(size, t["kl_mean"], s=60).get_facecolor()
        label = f"{t['type']}: {100 * t['score']['score']:.1f}%"
        left.annotate(label, (size, t["kl_mean"]), xytext=(6, 6), textcoords="offset points")
        right.scatter(size, t["tokens_per_second"], s=60, color=color)
        right.annotate(t["type"], (size, t["tokens_per_second"]), xytext=(6, 6), textcoords="offset points")
        if t["kl_limit"]:
            left.hlines(t["kl_limit"], size * 0.97, size * 1.03, color=color, linestyle="dashed")
    left.set(yscale="log", xlabel="language and vision model, MB", ylabel="mean KL, nats")
    left.set_title(
        f"dashed: limit; score of the original {100 * types[0]['original_score']['score']:.1f}%", fontsize=10
    )
    right.set(xlabel="language and vision model, MB", ylabel="tokens per second")
    title = f"{types[0]['threads']} of {types[0]['cores']} cores"
    right.set_title(f"{title}{', a busy machine' if busy else ''}", fontsize=10)
    for axes in (left, right):
        axes.margins(0.25)
        axes.grid(alpha=0.3)
    right.set_ylim(0, 1.2 * max(t["tokens_per_second"] for t in types))
    figure.savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()
