"""Run one benchmark in full, or list them with what they cost: `make bench BENCH=NAME`."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

#: What runs without further words, its cost on two cores, and its words.
BENCHMARKS = {
    "vs_peers": ("every step, views, training, probes and start-up beside the peers", "20 minutes", []),
    "attention": ("which attention kernel is fastest where, and whether it is chosen", "10 minutes", []),
    "augmentation": ("k-NN after equal steps with the fast and the published augmentation", "an hour", []),
    "data": ("decode and views per core beside DINO's pipeline and torchvision", "10 minutes", []),
    "equal_minutes": ("our recipes and lightly's modules, 20 minutes each on CIFAR-10, three seeds", "10 hours", []),
    "linear_probe": ("linear probes of random encoders on the built-in scenes", "5 minutes", ["--quick"]),
    "knn_million": ("k-NN among a million features beside plain torch", "20 minutes", []),
    "cifar_fashion": ("small encoders on CIFAR-10 and Fashion-MNIST beside random init and pixels", "30 minutes", []),
    "budgets": ("DINO, MAE and both joint forms at equal images and equal minutes; the ablation", "6 hours", []),
    "formats": ("every encoder form in every export format, at two versions of each library", "5 minutes", []),
    "knn": ("k-NN of random encoders on the built-in scenes", "2 minutes", ["--quick"]),
    "no_collapse": ("36 runs with auto, and 12 broken on purpose that must raise the alarm", "10 hours", []),
}


def main(names: list[str]) -> int:
    """List without a name; else run the script, its numbers into results/."""
    if not names:
        for name, (what, cost, _) in BENCHMARKS.items():
            print(f"{name:14} {cost:12} {what}")
        return 0
    name = names[0]
    if name not in BENCHMARKS:
        print(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    what, cost, words = BENCHMARKS[name]
    print(f"{name}: {what}; about {cost} on two cores", flush=True)
    result = HERE / "results" / f"{name}.json"
    return subprocess.call([sys.executable, str(HERE / f"{name}.py"), *words, "--json", str(result)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
