"""Longspan: attention, a state-space model, or a hybrid, at this context length and this budget?"""

__version__ = "0.1.0"
