"""What importing nnx_fit adds to importing Flax, and how long `nnx-fit --help` takes.

Each measurement is a process of its own; the kinds take turns, so that a busy machine slows all of them alike. The time
is that of the whole process for `--help`, and of the import statement alone otherwise.

    python benchmarks/import_time.py --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

# `import nnx_fit` resolves its names lazily: only touching them shows what they cost.
IMPORTS = {
    "flax": "from flax import nnx; import optax",
    "flax and nnx_fit": "from flax import nnx; import optax; import nnx_fit",
    "flax and Trainer": "from flax import nnx; import optax; from nnx_fit import FitModule, Trainer, ArrayLoader",
}
HELP = "nnx-fit --help"
IMPORT_LIMIT, HELP_LIMIT = 0.3, 1.5


def import_seconds(statement: str) -> float:
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def help_seconds() -> float:
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'nnx-fit'; from nnx_fit.cli.main import main; main()"]
    start = time.perf_counter()
    subprocess.run([*command, "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="processes of each kind (default 7)")
    rounds = parser.parse_args().rounds

    seconds: dict[str, list[float]] = {name: [] for name in [*IMPORTS, HELP]}
    for turn in range(rounds + 1):
        for name, statement in IMPORTS.items():
            seconds[name].append(import_seconds(statement))
        seconds[HELP].append(help_seconds())
        if turn == 0:  # the first round fills the disk cache and writes bytecode
            seconds = {name: [] for name in seconds}

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<20}{median:>8.2f} s")
    for name in list(IMPORTS)[1:]:
        added = statistics.median(b - a for a, b in zip(seconds["flax"], seconds[name], strict=True))
        print(f"{name.removeprefix('flax and '):<12} adds {added:.2f} s (goal: below {IMPORT_LIMIT})")
    print(f"{HELP:<12} {medians[HELP]:.2f} s (goal: below {HELP_LIMIT})")


if __name__ == "__main__":
    main()
