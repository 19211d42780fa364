"""The checks, in the order in which they run."""

from __future__ import annotations

from srm_conformance.checks.behaviour import determinism, repeats, threads
from srm_conformance.checks.compiled import compiled
from srm_conformance.checks.contract import errors, predicates
from srm_conformance.checks.edges import edges, lengths
from srm_conformance.checks.layouts import layouts
from srm_conformance.checks.random import random
from srm_conformance.checks.selftest import self_test
from srm_conformance.checks.values import gradients, invariants, tf32, values
from srm_conformance.items import Check

CHECKS: dict[str, Check] = {
    "self-test": self_test,
    "predicates": predicates,
    "values": values,
    "gradients": gradients,
    "invariants": invariants,
    "tf32": tf32,
    "lengths": lengths,
    "edges": edges,
    "repeats": repeats,
    "determinism": determinism,
    "threads": threads,
    "layouts": layouts,
    "errors": errors,
    "compiled": compiled,
    "random": random,
}
