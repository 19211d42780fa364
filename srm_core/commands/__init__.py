"""What the commands do; `srm_core.cli` says how they are called."""
