"""Probes: the same questions for every subject, one file each."""
