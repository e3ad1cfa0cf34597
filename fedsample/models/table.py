"""Table of models by name: what each predicts and with which likelihood. Does not import torch."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Literal, NamedTuple

from fedsample.errors import ConfigError

if TYPE_CHECKING:
    from fedsample.data import FederatedData, Task

Likelihood = Literal["gaussian", "bernoulli", "categorical"]


class ModelFact(NamedTuple):
    """One row of the table of models.

    Attributes:
        name: value of `model.name`.
        task: what it predicts; None: a class or a number, as the data decide.
        inputs: the features that it takes.
        parameters: number of parameters, for p features and K outputs.
        about: short description.
    """

    name: str
    task: Task | None
    inputs: str
    parameters: str
    about: str


_FACTS = (
    ModelFact("linear", "regression", "any", "p + 1", "linear regression, Gaussian noise"),
    ModelFact("logistic", "classification", "any", "p + 1", "logistic regression, two classes"),
    ModelFact("softmax", "classification", "any", "(p + 1) K", "softmax regression"),
    ModelFact("mlp", None, "any", "(p + 1) h + (h + 1) K", "multilayer perceptron, tanh"),
    ModelFact("lenet5", None, "images 28x28 or 32x32", "61,706 (28x28, K = 10)", "LeNet-5, tanh, average pooling"),
    ModelFact("resnet20", None, "images 32x32x3", "274,042 (K = 10)", "ResNet-20, filter response norm, Swish"),
    ModelFact("quadratic", None, 'data.kind = "quadratic"', "d", "quadratic clients, exact posterior"),
)


def models() -> tuple[ModelFact, ...]:
    """List all models, for `fedsample list models`."""
    return _FACTS


def fact_of(name: str) -> ModelFact:
    """Return the table's row of one model.

    Raises:
        ConfigError: if there is no such model (names the nearest).
    """
    facts = {fact.name: fact for fact in _FACTS}
    if name not in facts:
        close = difflib.get_close_matches(name, facts, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"there is no model {name!r}.{hint} Expected one of {', '.join(facts)}")
    return facts[name]


def task_of(name: str) -> Task | None:
    """Task of a model, for `fedsample.data.load`; None if the data decide."""
    return fact_of(name).task


def likelihood_of(name: str, data: FederatedData) -> Likelihood:
    """Law of a target given the model's outputs.

    gaussian: N(output, noise_scale^2), one output; bernoulli: logit of class 1, one output; categorical: K logits.

    Raises:
        ConfigError: if the model does not fit the data's task or number of classes.
    """
    task = task_of(name)
    if name == "quadratic":
        raise ConfigError('model.name = "quadratic" has no likelihood: it is read with data.kind = "quadratic"')
    if task is not None and task != data.task:
        fitting = ", ".join(fact.name for fact in _FACTS if fact.task in (None, data.task) and fact.name != "quadratic")
        raise ConfigError(
            f'model.name = "{name}" is for {task}, but {data.name} was loaded for {data.task}: choose one of {fitting}'
        )
    if data.classes is None:
        return "gaussian"
    if name != "logistic":
        return "categorical"
    if data.classes != 2:
        raise ConfigError(
            f'model.name = "logistic" takes two classes, but {data.name} has {data.classes}: choose "softmax"'
        )
    return "bernoulli"
