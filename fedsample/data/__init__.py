"""Datasets and their partition over clients. Imports numpy only, until something is loaded."""

from fedsample.data.base import FederatedData as FederatedData
from fedsample.data.base import Task as Task
from fedsample.data.builtin import DatasetFact as DatasetFact
from fedsample.data.builtin import datasets as datasets
from fedsample.data.loading import load as load
from fedsample.data.quadratic import QuadraticData as QuadraticData
from fedsample.data.quadratic import load_quadratic as load_quadratic

__all__ = ["DatasetFact", "FederatedData", "QuadraticData", "Task", "datasets", "load", "load_quadratic"]
