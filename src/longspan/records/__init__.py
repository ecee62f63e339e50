"""Answers on disk, and the statistics that turn them into numbers with intervals. Needs no model."""
