"""Its import hangs."""

import sys
import time

print("sleepy: goes to sleep", file=sys.stderr, flush=True)
time.sleep(9999)
