"""A pytest plugin: the triton backend takes the choice numbered SRM_OTHER_CHOICE of each list, not the first or the
fastest, so that the suite checks that one.

    SRM_OTHER_CHOICE=1 pytest -p other_choice --pyargs srm_conformance --srm-backend triton --srm-only 'scan/values/*'
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from srm_backends.triton import attention, attention_backward, convolution, recurrent_mix, scan

NUMBER = int(os.environ["SRM_OTHER_CHOICE"])


def choose(ctx: Any, name: str, key: Any, ask: Callable[[], Any], run: Any) -> Any:
    choices = ask().choices
    return choices[NUMBER % len(choices)]


for module in (attention, attention_backward, convolution, recurrent_mix, scan):
    module.choose = choose  # type: ignore[assignment]
