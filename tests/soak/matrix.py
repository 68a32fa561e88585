"""Send each signal to each of two processes at each of six moments, and judge how both end.

    python -m tests.soak.matrix [--signals SIGKILL ...] [--moments save ...]

In every case both processes have to be gone within a minute, with the codes of the contract and a
line each that says why, without a traceback or a C++ stack, and the next start has to go on from
the newest checkpoint. After all of them the run is finished, and its metrics have to equal those of
a run that was left alone, bit for bit.

A moment is found from outside, by output and files: start-up is the first at which the process
answers signals, before it has met the other; restore the first after it says what it continues
from; save while there is an unfinished checkpoint; end while a stop that was asked for is on its
way. A case in which the moment was missed is done again.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.soak.runs import (
    GONE_S,
    MOMENTS,
    NOISE,
    SIGNALS,
    Start,
    checkpoints,
    computed,
    reach,
    records,
    saving,
    start,
    wait,
)

STEPS = 300
_TRIES = 5
_CONTINUES = "the same command continues"


def judge(started: Start, sent: signal.Signals, victim: int, moment: str, took: float) -> list[str]:
    """Return what was wrong with how the processes of a start ended."""
    codes = [process.returncode for process in started.processes]
    several = len(codes) > 1
    wrong = [] if took <= GONE_S else [f"not gone within {GONE_S:.0f} s"]
    wanted = [{75} for _ in codes]
    if sent == signal.SIGKILL:
        wanted[victim] = {-signal.SIGKILL} | ({75} if moment == "end" else set())
    if any(code not in each for code, each in zip(codes, wanted, strict=True)):
        wrong.append(f"codes {codes}")
    name = "Ctrl-C" if sent == signal.SIGINT else sent.name
    for index, text in enumerate(started.texts()):
        wrong += [f"process {index} wrote {mark!r}" for mark in NOISE if mark in text]
        killed = sent == signal.SIGKILL and index == victim
        lines = [line for line in text.splitlines() if re.search(r"stopped by|: ends: ", line)]
        me = f"process {index}: " if several else ""
        to, last = (f" to process {each}" if several else "" for each in (victim, 1))
        gone = rf"{me}ends: process {victim} .*gone; {_CONTINUES}"
        stopped = rf"{me}stopped by {name}{to} .*; {_CONTINUES}"
        allowed = [gone if sent == signal.SIGKILL else stopped]
        if moment == "start-up":  # where they had not met
            allowed += [rf"{me}ends: process {victim} .*(did not come|reached).*"]
        if moment == "end":  # it was stopped before
            allowed += [rf"{me}stopped by SIGTERM{last} .*; {_CONTINUES}"]
        most = 2 if moment == "end" else 1
        whole = all(any(re.fullmatch(each, line) for each in allowed) for line in lines)
        if not killed and not (whole and 1 <= len(lines) <= most):
            wrong.append(f"process {index} said {lines or 'nothing'}")
    return wrong


def hit(started: Start, run: Path, moment: str, made: int) -> bool:
    """Return whether it is still the moment, just after the signal was sent."""
    if moment == "save":
        return saving(run)
    if moment in ("start-up", "compile", "restore"):
        return len(records(run)) == made
    return moment != "end" or started.running()


def matrix(folder: Path, signals: Iterable[signal.Signals], moments: Iterable[str]) -> list[str]:
    """Run all cases on one run; return what was wrong."""
    arguments = (f"steps={STEPS}", "run_name=killed")
    run = folder / "outputs" / "killed"
    wrong: list[str] = []
    seconds: dict[tuple[str, int, str], float] = {}
    cases = [(s, victim, m) for m in moments for s in signals for victim in (0, 1)]
    missed = 0
    for sent, victim, moment in cases:
        for _ in range(_TRIES):
            newest = max(checkpoints(run), default=0)
            made = len(records(run))
            started = start(folder, 2, arguments)
            reached = reach(started, run, moment, victim)
            started.processes[victim].send_signal(sent)
            reached &= hit(started, run, moment, made)
            took = wait(started, GONE_S)
            if reached or took > GONE_S:
                break
            missed += 1
        case = f"{sent.name} to process {victim} at {moment}"
        found = judge(started, sent, victim, moment, took)
        text = started.texts()[0]
        if not reached:
            found.append("the moment was missed")
        if newest and moment in ("step", "save", "end"):
            whole = f"continuing from the checkpoint after step {newest}"
            found += [] if whole in text else [f"it did not continue from {newest}"]
        codes = [process.returncode for process in started.processes]
        print(f"{case}: {codes} {took:.1f} s {'; '.join(found)}", flush=True)
        if found:
            wrong.append(f"{case}: {found}\n" + "\n---\n".join(t[-1500:] for t in started.texts()))
        seconds[sent.name, victim, moment] = took
    last = start(folder, 2, arguments)
    if wait(last, 600) > 600 or any(process.returncode for process in last.processes):
        wrong.append("the last start did not finish: " + last.texts()[0][-600:])
    alone = start(folder, 2, (f"steps={STEPS}", "run_name=alone"))
    wait(alone, 600)
    metrics = [computed(run.with_name(name)) for name in ("killed", "alone")]
    if metrics[0] != metrics[1] or len(metrics[0]) != STEPS:
        wrong.append(f"metrics differ: {[len(each) for each in metrics]} records of {STEPS}")
    shown = [moment for moment in MOMENTS if any(m == moment for _, _, m in cases)]
    print(f"\n| signal | to process | {' | '.join(shown)} |\n|---|---|{'---|' * len(shown)}")
    for name, victim in dict.fromkeys((s.name, v) for s, v, _ in cases):
        times = " | ".join(f"{seconds[name, victim, moment]:.1f} s" for moment in shown)
        print(f"| {name} | {victim} | {times} |")
    same = "equal bit for bit" if metrics[0] == metrics[1] else "NOT equal"
    print(
        f"\n{len(cases)} cases, {missed} done again, longest {max(seconds.values()):.1f} s, "
        f"{len(wrong)} wrong; metrics of all {len(metrics[0])} steps {same} to those of a run left "
        "alone",
        flush=True,
    )
    return wrong


def main() -> int:
    """Run the command line; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description="Signal two processes at every moment.")
    names = [each.name for each in SIGNALS]
    parser.add_argument("--signals", nargs="+", default=names, choices=names)
    parser.add_argument("--moments", nargs="+", default=list(MOMENTS), choices=MOMENTS)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        wrong = matrix(Path(folder), [signal.Signals[name] for name in args.signals], args.moments)
    print(f"{time.monotonic() - began:.0f} s", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
