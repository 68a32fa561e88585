"""Run many generated inputs and print the counts: python -m tests.hostile [COUNT [FIRST]]."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter

# Before jax is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from tests.hostile.judged import judge

SHOWN = 20


def run(count: int, first: int) -> int:
    """Judge `count` cases; return the exit code: 1 where one broke the contract."""
    kinds: Counter[str] = Counter()
    codes: Counter[int | None] = Counter()
    wrong: Counter[str] = Counter()
    slowest = 0.0
    seeds = range(first, first + count)
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=2000) as pool:
        for done, verdict in enumerate(pool.imap_unordered(judge, seeds, chunksize=20), 1):
            kinds[verdict.kind] += 1
            codes[verdict.code] += 1
            slowest = max(slowest, verdict.seconds)
            if verdict.wrong:
                wrong[verdict.wrong] += 1
                if wrong.total() <= SHOWN:
                    print(f"seed {verdict.seed} ({verdict.kind}): {verdict.wrong}")
                    print("\n".join(verdict.errors.splitlines()[-6:]), flush=True)
            if done % 1000 == 0:
                print(f"{done} of {count}: {wrong.total()} wrong", flush=True)
    print(f"inputs: {dict(kinds)}\nexit codes: {dict(codes)}\nslowest: {slowest:.1f} s")
    print(f"against the contract: {wrong.total()} {dict(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    numbers = [int(each) for each in sys.argv[1:]]
    sys.exit(run(numbers[0] if numbers else 20_000, numbers[1] if len(numbers) > 1 else 0))
