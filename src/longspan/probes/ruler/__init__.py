"""RULER (Hsieh et al. 2024): tasks, words, questions and the probe."""

from longspan.probes.ruler.probe import Ruler as Ruler
