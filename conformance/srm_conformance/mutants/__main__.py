"""`python -m srm_conformance.mutants`: exit code 0 if every mutant is killed, 1 if one survives, 2 for bad input."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter

from rich.console import Console
from rich.progress import Progress

from srm_conformance.mutants import mutants
from srm_conformance.mutants.mutant import Mutant
from srm_conformance.mutants.runner import run, try_out


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m srm_conformance.mutants", description=__doc__)
    parser.add_argument("--op", help="only the mutants of this operator")
    parser.add_argument("--only", help="only the mutants whose name holds this text")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one a core")
    parser.add_argument("--verbose", action="store_true", help="what killed each of them")
    options = parser.parse_args()
    chosen = [m for m in mutants() if options.op in (None, m.op) and (options.only or "") in m.name]
    if not chosen:
        print("no mutant is called so; leave --op and --only out to run all", file=sys.stderr)
        return 2
    control = try_out(Mutant(chosen[0].op, "none"))
    if control.killed:
        print(f"the honest kernel of {control.op} fails, so nothing is proved:\n{control.message}", file=sys.stderr)
        return 1
    fates = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("mutants", total=len(chosen))
        for fate in run(chosen, options.processes):
            fates.append(fate)
            progress.advance(task)
            if options.verbose:
                progress.console.print(f"{fate.op}: {fate.name}: {fate.killer or 'SURVIVED'}", markup=False)
    killed = [f for f in fates if f.killed]
    by_check = Counter(f.killer.split("/")[1] for f in killed)
    print(f"{len(killed)} of {len(fates)} mutants killed, of {len({f.op for f in fates})} operators")
    print("killed by: " + ", ".join(f"{check} {n}" for check, n in by_check.most_common()))
    for fate in fates:
        if not fate.killed:
            print(f"survived: {fate.op}: {fate.name} ({fate.items} items)")
    return 0 if len(killed) == len(fates) else 1


if __name__ == "__main__":
    sys.exit(main())
