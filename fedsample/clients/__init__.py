"""The client side: gradients on request, the estimator's memory, and the Flower ClientApp around them."""

if __name__ != "fedsample.clients":
    raise ImportError(f"import this package as fedsample.clients, not as {__name__}: it would exist twice")
