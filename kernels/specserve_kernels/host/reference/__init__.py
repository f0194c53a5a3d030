"""The reference of the compiled host code, in Python; used where nothing is compiled."""

from specserve_kernels.host.reference.calibration import Calibration
from specserve_kernels.host.reference.suffix import SuffixSearch
from specserve_kernels.host.reference.token_log import TokenLog
from specserve_kernels.host.reference.topk_table import TopKTable, best_logits
from specserve_kernels.host.reference.tree import build_tree, select_nodes, validate

__all__ = [
    "Calibration",
    "SuffixSearch",
    "TokenLog",
    "TopKTable",
    "best_logits",
    "build_tree",
    "select_nodes",
    "validate",
]
