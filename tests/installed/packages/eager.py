"""It calls an operator at import, when the registry that it is to be part of is only being made."""

import numpy as np

import srm_core

srm_core.scan(np.ones((1, 2, 3)), np.ones((1, 2, 3)))
