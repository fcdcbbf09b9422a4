"""What can go wrong, by name."""


class UnsupportedModelError(ValueError):
    """The model has no Mixture-of-Experts block that this package knows how to read or edit."""


class NoExpertsError(UnsupportedModelError):
    """The model has no stack of experts at all: it is dense."""


class NotApplicableError(TypeError, ValueError):
    """An attack needs something that the model does not have, such as an adapter."""
