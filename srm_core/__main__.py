"""`python -m srm_core` is `srm-core`."""

from srm_core.cli import main

if __name__ == "__main__":
    main()
