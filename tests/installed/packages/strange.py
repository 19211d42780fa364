"""It has a kernel for an operator that nobody specifies, and one for scan."""

from srm_core import hookimpl
from srm_core.spec import BackendInfo, Kernel


@hookimpl
def srm_backend_info():
    return BackendInfo("strange", "test", (Kernel("scam", "strange:scan"), Kernel("scan", "strange:scan")))


def scan(ctx, gates, tokens, initial_state, *, reverse, lengths):
    return ctx.zeros(tokens.shape, tokens.dtype), ctx.zeros((tokens.shape[0], tokens.shape[2]), tokens.dtype)
