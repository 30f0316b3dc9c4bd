"""The default job over several seeds: what of its table depends on the draw, and what does not.

    python tests/seeds.py --seeds 6                # pre-training, tuning and evaluation, 20 to 35 minutes a seed
    python tests/seeds.py --seeds 3 --ablations    # and what each part of the recipe is for: 45 minutes more a seed

A seed is that of weights and data order; the corpus (data/corpus, from collect.py and build_corpus.py) is one.
Everything goes on where it was stopped, in out/seeds/<seed>. Prints, for each metric, the mean difference
between ours and the control with Student's 95% interval over seeds, beside the interval over the items of the
first seed's run, and writes tests/seeds.json and, with --plot, tests/seeds.png: the loss of conversations while
both are tuned. An ablation starts from the seed's base and takes the same tokens as ours; what is compared is the
last validation loss of pre-training.
"""
import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from pretrain import held_out_losses

BOTH = 1_600_000 + 2_400_000  # tokens of the default's stages
OURS = "both kinds, both stages"
ABLATIONS = {  # name: how it differs from the default
    "documentation alone": ["--agent", "api_doc=1"],
    "trajectories alone": ["--agent", "trajectory=1"],
    "stage 1 alone": ["--stage1-tokens", BOTH, "--stage2-tokens", 0],
    "stage 2 alone": ["--stage1-tokens", 0, "--stage2-tokens", BOTH],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="how many, from 0")
    parser.add_argument("--ablations", action="store_true", help="train and measure them, too")
    parser.add_argument("--corpus", default="data/corpus", help="corpus directory")
    parser.add_argument("--out", default="out/seeds", help="directory of the runs")
    parser.add_argument("--plot", action="store_true", help="draw the tuning, too (pip install matplotlib)")
    parser.add_argument("--json", default=str(ROOT / "tests" / "seeds.json"), help="file for the results")
    args = parser.parse_args()
    seeds, ablations = {}, {}
    for seed in range(args.seeds):
        out = Path(args.out) / str(seed)
        for script in ("pretrain.py", "finetune.py"):
            run(script, "--corpus", args.corpus, "--out", out, "--seed", seed)
        run("evaluate.py", "--corpus", args.corpus, "--out", out)
        seeds[seed] = json.loads((out / "eval" / "results.json").read_text())
        if args.ablations:
            ablations[seed] = ablate(out, seed, args)
    about = {"commit": git("rev-parse", "--short", "HEAD"), "date": time.strftime("%Y-%m-%d"),
             "python": platform.python_version(), "machine": machine()}
    results = about | {"seeds": seeds, "ablations": ablations}
    Path(args.json).write_text(json.dumps(results).replace("}, {", "},\n{") + "\n")  # a line a row
    if args.plot:
        draw_tuning(Path(args.out), seeds, Path(args.json).with_suffix(".png"))
    print_differences(seeds)
    if ablations:
        print_ablations(ablations)


def run(script, *arguments):
    """Run a script of the project; it prints what it always does."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)])
    if done.returncode:
        sys.exit(done.returncode)


def ablate(out, seed, args):
    """Train the ablations of a seed from its base. Returns {name: {domain: last validation loss}}."""
    losses = {OURS: held_out_losses(out / "stage2")[-1]}
    for name, flags in ABLATIONS.items():
        own = out / name.replace(" ", "-")
        own.mkdir(exist_ok=True)
        if not (own / "base").exists():
            (own / "base").symlink_to(Path("..") / "base")
        run("pretrain.py", "--corpus", args.corpus, "--out", own, "--seed", seed, "--no-control", *flags)
        last = "stage1" if name == "stage 1 alone" else "stage2"
        losses[name] = held_out_losses(own / last)[-1]
    return losses


def interval(values):
    """Mean and Student's 95% interval of a few numbers."""
    values = np.array(values, float)
    if len(values) < 2:
        return values.mean(), np.nan, np.nan
    quantile = np.quantile(np.random.default_rng(0).standard_t(len(values) - 1, 10**6), 0.975)
    reach = quantile * values.std(ddof=1) / len(values) ** 0.5
    return values.mean(), values.mean() - reach, values.mean() + reach


def print_differences(seeds):
    """A line for each metric: means of control and ours, and their difference over seeds and over items."""
    print(f"\n{'metric':<42}{'control':>9}{'ours':>9}   ours - control, 95% over {len(seeds)} seeds   over items, seed 0")
    first = next(iter(seeds.values()))
    for compared in (row for row in first if "difference" in row):
        key = compared["suite"], compared["metric"]
        rows = [[row for row in results if (row["suite"], row["metric"]) == key] for results in seeds.values()]
        if any(len(pair) != 2 for pair in rows):
            continue
        control, ours = (np.mean([pair[i]["score"] for pair in rows]) for i in (0, 1))
        mean, low, high = interval([pair[1]["difference"] for pair in rows])
        items = f"[{compared['difference_low']:+.3f}, {compared['difference_high']:+.3f}]"
        print(f"{': '.join(key):<42}{control:>9.3f}{ours:>9.3f}   {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
              f"{'' if low > 0 or high < 0 else ' none':<6}          {items}")


def print_ablations(ablations):
    """A line for each domain and arm: the mean loss, and the difference to ours in pairs of one seed."""
    print(f"\n{'validation loss':<17}{'arm':<26}{'mean':>8}   minus ours, 95% over {len(ablations)} seeds")
    first = next(iter(ablations.values()))
    for domain in first[OURS]:
        for arm in first:
            losses = [of_seed[arm][domain] for of_seed in ablations.values()]
            mean, low, high = interval([of_seed[arm][domain] - of_seed[OURS][domain] for of_seed in ablations.values()])
            print(f"{domain:<17}{arm:<26}{np.mean(losses):>8.3f}" + f"   {mean:+.3f} [{low:+.3f}, {high:+.3f}]" * (arm != OURS))


def draw_tuning(out, seeds, path):
    """Draw the loss of conversations while control and ours are tuned: in training the mean of 50 steps and of
    all seeds, on held-out APIs a dot a seed.
    """
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for model in ("control", "ours"):
        runs = [[json.loads(line) for line in open(out / str(seed) / model / "metrics.jsonl")] for seed in seeds]
        losses = [[line["loss"] for line in run if "loss" in line] for run in runs]
        curve = np.mean(losses, 0)                                               # (steps,)
        curve = curve[:len(curve) // 50 * 50].reshape(-1, 50).mean(1)
        [drawn] = axis.plot(25 + 50 * np.arange(len(curve)), curve, label=f"{model}, in training")
        dots = [(line["step"], line["loss/instruction"]) for run in runs for line in run if "loss/instruction" in line]
        axis.plot(*zip(*dots), "o", color=drawn.get_color(), markersize=4, label=f"{model}, held-out APIs")
    axis.set(yscale="log", xlabel="steps of tuning", ylabel="loss of conversations (nats per token)")
    axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 4], labels=["0.1", "0.2", "0.5", "1", "2", "4"])
    axis.legend()
    figure.savefig(path, dpi=100)


def git(*arguments):
    """What git says, or "" where this is no clone."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine():
    """The processor and the number of cores, as the system names them."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{next(iter(names), platform.processor())}, {len(names) or '?'} cores"


if __name__ == "__main__":
    main()
