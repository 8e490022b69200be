"""How far each kernel is from what this machine can do: costs, limits, measurements, reports."""

from q35c.roofline.cost import Cost, call_cost
from q35c.roofline.machine import Limits, cached_limits, find_limits
from q35c.roofline.measure import predict_tests, run_roofline
from q35c.roofline.picture import html_report
from q35c.roofline.report import KernelRow, Test, report_json, report_text

__all__ = [
    "Cost",
    "KernelRow",
    "Limits",
    "Test",
    "cached_limits",
    "call_cost",
    "find_limits",
    "html_report",
    "predict_tests",
    "report_json",
    "report_text",
    "run_roofline",
]
