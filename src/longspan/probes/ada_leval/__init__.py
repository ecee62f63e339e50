"""Ada-LEval (Wang et al. 2024): BestAnswer and TSort."""

from longspan.probes.ada_leval.probe import AdaLEval as AdaLEval
