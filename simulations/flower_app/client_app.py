"""One client: its partition of the data, gradients on request, and the estimator's memory in Flower's context."""

from fedsample.clients.app import client_app

app = client_app()
