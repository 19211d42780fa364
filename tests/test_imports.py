"""What importing and listing may not import, in a fresh interpreter."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from built_in import BUILT_IN

HEAVY = "print(sorted({'torch', 'triton', 'cupy', 'jax', 'scipy', 'srm_conformance'} & set(sys.modules)))"
SCAN = "import numpy as np; y, _ = srm_core.scan(np.ones((2, 3, 4)), np.ones((2, 3, 4))); assert y[0, 2, 0] == 3"


@pytest.mark.parametrize(
    "what",
    [
        "import srm_core",
        "import srm_core; srm_core.list_backends()",
        "import srm_core; srm_core.report()",
        f"import srm_core; {SCAN}",
        f"import srm_core; {SCAN}; srm_core.vjp('scan', np.ones((2, 3, 4)))[1](None, None)",
        "import srm_core, numpy as np; print(srm_core.explain('scan', np.ones((1, 2, 3))))",
        "import srm_core; srm_core.use_backend('reference,auto').__enter__()",
    ],
)
def test_imports_nothing_heavy(run_python: Any, what: str) -> None:
    """NumPy arrays need NumPy alone, whatever else is installed."""
    assert run_python(f"import sys; {what}; {HEAVY}").splitlines()[-1] == "[]"


def test_torch_is_there_to_be_imported(run_python: Any) -> None:
    """The tests above mean something where torch is installed."""
    pytest.importorskip("torch")
    assert run_python(f"import sys, torch; {HEAVY}").strip() == "['torch']"


def test_listing_loads_no_kernel(run_python: Any) -> None:
    """Targets are imported on first selection, and only the one that is selected."""
    source = """
        import json, sys
        import numpy as np, srm_core
        names = lambda: sorted(m for m in sys.modules if m.startswith("srm_backends.") and m.count(".") == 2)
        srm_core.list_backends()
        listed = names()
        srm_core.scan(np.ones((1, 1, 1)), np.ones((1, 1, 1)))
        print(json.dumps([listed, names()]))
    """
    listed, called = json.loads(run_python(source))
    assert listed == [f"srm_backends.{b}.plugin" for b in BUILT_IN]
    assert "srm_backends.numpy.scan" in called
    assert "srm_backends.numpy.recurrent_mix" not in called
    assert "srm_backends.reference.kernels" not in called


def test_import_reads_no_environment(run_python: Any) -> None:
    """A mistake in the environment is an error of the first call, not of the import."""
    source = """
        import srm_core
        import numpy as np
        try:
            srm_core.scan(np.ones((1, 1, 1)), np.ones((1, 1, 1)))
        except srm_core.UnknownNameError as error:
            print(error)
    """
    assert "did you mean 'numpy'?" in run_python(source, SRM_BACKEND="nunpy")


def test_import_warns_of_nothing(run_python: Any) -> None:
    """Importing and calling raise no warning."""
    run_python(f"import srm_core; {SCAN}", "-W", "error")


def test_import_time(run_python: Any) -> None:
    """Importing is a matter of less than two seconds."""
    run_python("import srm_core")
    start = time.perf_counter()
    run_python("import srm_core")
    assert time.perf_counter() - start < 2
