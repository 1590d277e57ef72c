"""Every fused op against its reference on this device, outputs and gradients, at the shapes of the presets.

    python benchmarks/parity.py [--batch 32] [--smallest]     # exit code 1: one differs by more than BOUND of the largest value

--smallest: each op in its smallest size only, for a run under compute-sanitizer.
"""

import argparse
import sys

from bench_kernels import BOUND, difference, fill
from kernel_cases import CASES
from measure import DEVICE, DTYPE


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--smallest", action="store_true")
    options = parser.parse_args(words)
    wrong = []
    for op, case in CASES.items():
        for size in case.sizes[:1] if options.smallest else case.sizes:
            function, inputs = case.make(size, options.batch, DTYPE, DEVICE)
            fill(inputs)
            found = difference(function, inputs, case.backward_launches > 0)
            print(f"{op:24} {size:5} {found:.1e}", flush=True)
            if not found <= BOUND:  # or not a number
                wrong.append(f"{op} {size}")
    print(f"more than {BOUND:.1e}: {', '.join(wrong)}" if wrong else f"all within {BOUND:.1e} on {DEVICE}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
