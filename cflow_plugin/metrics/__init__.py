"""AUROC and AUPRO in bounded memory: exact for sets that fit, in score bins with a stated error for larger ones."""

__all__ = ["AUPRO", "AUROC"]

from cflow_plugin.metrics.ranked import AUPRO, AUROC
