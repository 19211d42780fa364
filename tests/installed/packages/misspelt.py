"""It misspells a hook."""

from srm_core import hookimpl


@hookimpl
def srm_backend_inof():
    return []
