"""The stages of the command line, one a module; each has a dataclass of options and `run`."""
