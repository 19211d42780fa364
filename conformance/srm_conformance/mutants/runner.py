"""Running the suite on mutants: in this process each, until the first item fails."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from srm_conformance.mutants import mutants
from srm_conformance.mutants.mutant import Mutant
from srm_conformance.proof import watched
from srm_conformance.session import Options, Session
from srm_core.hookspecs import hookimpl
from srm_core.registry import local_plugin
from srm_core.spec import BackendInfo

NAME = "mutant"


@dataclass(frozen=True)
class Fate:
    """What became of a mutant. killer: the item that failed, and message what it said; "" if it survived."""

    op: str
    name: str
    killer: str
    message: str
    items: int
    seconds: float

    @property
    def killed(self) -> bool:
        return bool(self.killer)


class _Plugin:
    """A plugin that is one backend."""

    def __init__(self, info: BackendInfo) -> None:
        self.info = info

    @hookimpl
    def srm_backend_info(self) -> BackendInfo:
        return self.info


def try_out(mutant: Mutant) -> Fate:
    """Run the suite on a mutant until an item fails."""
    start = time.perf_counter()
    killer = message = ""
    number = 0
    with local_plugin(NAME, _Plugin(mutant.backend(NAME))):
        session = Session(Options(NAME, ops=(mutant.op,)))
        with watched():
            for item in session.items:
                number += 1
                ended = session.run(item)
                if ended.verdict == "failed":
                    killer, message = ended.id, ended.message
                    break
    return Fate(mutant.op, mutant.name, killer, message, number, time.perf_counter() - start)


def _try_out_all(op: str, names: list[str]) -> list[Fate]:
    return [try_out(m) for m in mutants() if m.op == op and m.name in names]


def run(chosen: Iterable[Mutant], processes: int) -> Iterator[Fate]:
    """The fates of mutants, in the order in which they are known. Those of one operator share a process, in which
    what they are held against is computed once."""
    groups: dict[str, list[str]] = {}
    for mutant in chosen:
        groups.setdefault(mutant.op, []).append(mutant.name)
    largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    if processes < 2:
        for op, names in largest_first:
            for name in names:
                yield from _try_out_all(op, [name])
        return
    # Spawned: the parent may have threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for group in [pool.submit(_try_out_all, *g) for g in largest_first]:
            yield from group.result()
