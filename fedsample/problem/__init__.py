"""The problem of an experiment: clients, prior, and the functions of the draws that diagnostics use."""

from fedsample.problem.build import build_problem, device_of, quadratic_problem, rows_problem
from fedsample.problem.problem import Problem

__all__ = ["Problem", "build_problem", "device_of", "quadratic_problem", "rows_problem"]
