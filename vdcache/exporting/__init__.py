"""Fixed graphs: a model under a static schedule as a package that runs without PyTorch. `manifest` and `running` need no torch."""
