"""The benchmark harness of every milestone: workloads, metrics, contenders that take turns, tables and figures."""
from . import style
from .contender import BenchError, Contender, EngineContender, RunResult, Served
from .figures import Series, line_plot, throughput_bars
from .harness import Comparison, ContenderResult, compare
from .metrics import SLO, PeakMemory, RequestRecord, RunMetrics, Stats, compute_metrics
from .peers import PEERS, make_peers
from .report import BenchReport, comparison_table
from .workloads import BenchRequest, Workload, get_workload, workload_names

__all__ = ["PEERS", "SLO", "BenchError", "BenchReport", "BenchRequest", "Comparison", "Contender", "ContenderResult",
           "EngineContender", "PeakMemory", "RequestRecord", "RunMetrics", "RunResult", "Series", "Served", "Stats",
           "Workload", "compare", "comparison_table", "compute_metrics", "get_workload", "line_plot", "make_peers",
           "style", "throughput_bars", "workload_names"]
