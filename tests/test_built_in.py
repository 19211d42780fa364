"""The built-in backends conform: every operator, without a known failure."""

from __future__ import annotations

from srm_conformance import Conformance


class TestNumPy(Conformance):
    backend = "numpy"


class TestReference(Conformance):
    backend = "reference"


class TestTorch(Conformance):
    backend = "torch"
