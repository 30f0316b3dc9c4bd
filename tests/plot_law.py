"""Draw what `python pretrain.py --scaling-law` measured: out/scaling/scaling_law.png.

    python tests/plot_law.py                                   # pip install matplotlib

Runs are dots, lines the law that errs less at shares left out of its fit. The runs of the check, whose size and
budget no fit has seen, are stars, and broken lines what D-CPT predicts of them.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from collect import run_main, shares
from pretrain import FORMS, TARGETS, Law, by_cell, left_out_error, optional


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="directory of the runs, as for pretrain.py")
    parser.add_argument("--weights", type=shares(TARGETS), default="agent=1,code=1,text=1", help="as for pretrain.py")
    args = parser.parse_args()
    pyplot = optional("matplotlib.pyplot", "plot_law.py")
    runs = [json.loads(line) for line in open(Path(args.out) / "scaling" / "scaling_law.jsonl")]
    check = [run for run in runs if run["size"] == runs[-1]["size"]]
    runs = runs[:-len(check)]
    form = min(FORMS, key=lambda form: left_out_error(form, runs))
    shown = [(Law(form, inside if form == "power" else runs), "o", "-", inside) for inside in by_cell(runs)]
    shown += [(Law("D-CPT", runs), "*", "--", check)]
    r = np.linspace(min(run["ratio"] for run in runs), max(run["ratio"] for run in runs), 191)
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 4), layout="constrained")
    for i, (law, dots, line, inside) in enumerate(shown):
        x = r, inside[0]["parameters"], inside[0]["tokens"]
        label = f"{Path(inside[0]['size']).name}, {inside[0]['tokens']:,} tokens ({law.form})"
        for axis, title in zip(axes, (*TARGETS, "relative")):
            curve = law.relative_loss(*x, args.weights) if title == "relative" else law.predict(title, *x)
            axis.plot([run["ratio"] for run in inside], [run["loss"][title] for run in inside], dots, color=f"C{i}", markersize=5)
            axis.plot(r, curve[0], line, color=f"C{i}", label=label)
            axis.set(title=title, xlabel="share of agent data")
    axes[-1].legend(fontsize=8)
    figure.savefig(Path(args.out) / "scaling" / "scaling_law.png", dpi=100)


if __name__ == "__main__":
    run_main(main)
