"""Models as `nn.Module`s that take their parameters from flat vectors. Imports torch only when one is built."""

from fedsample.models.build import build as build
from fedsample.models.build import parameter_layout as parameter_layout
from fedsample.models.build import starting_law as starting_law
from fedsample.models.table import Likelihood as Likelihood
from fedsample.models.table import ModelFact as ModelFact
from fedsample.models.table import likelihood_of as likelihood_of
from fedsample.models.table import models as models
from fedsample.models.table import task_of as task_of

__all__ = [
    "Likelihood",
    "ModelFact",
    "build",
    "likelihood_of",
    "models",
    "parameter_layout",
    "starting_law",
    "task_of",
]
