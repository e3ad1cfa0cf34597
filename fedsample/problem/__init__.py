"""What an experiment samples: clients, prior, and what the draws are judged by."""

from fedsample.problem.build import build_problem, device_of, quadratic_problem, rows_problem
from fedsample.problem.problem import Problem

__all__ = ["Problem", "build_problem", "device_of", "quadratic_problem", "rows_problem"]
