"""Engines run a subject for probes: token ids in, likelihoods or tokens out, whatever the subject is made of."""
