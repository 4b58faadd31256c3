"""Several processes that run one model together."""

from vdcache.distributed.agreement import GroupAgreement, Ranks

__all__ = ["GroupAgreement", "Ranks"]
