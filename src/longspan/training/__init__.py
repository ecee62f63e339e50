"""Training: from batches to checkpoints, exactly resumable, with honest numbers on the way."""
