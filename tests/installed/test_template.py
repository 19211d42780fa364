"""The package that people copy is right, and small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parents[2] / "backends/plugins/srm-backend-template"


def test_template(environment: Any) -> None:
    environment.install_project(TEMPLATE)
    assert "template: from srm-backend-template" in environment.command("backends").stdout
    done = environment.command("conformance", "template", "--op", "scan", "--op", "mdi", "--only", "*/values/*")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [n for path in TEMPLATE.rglob("srm_backend_template/*.py") for n in path.read_text("utf-8").splitlines()]
    assert len([n for n in lines if n.strip()]) < 100
