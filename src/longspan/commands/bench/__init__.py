"""`longspan bench`: what training, prefill and decode cost on this machine, and how far that is from what it could."""
