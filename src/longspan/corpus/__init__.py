"""From the outside world to batches: documents, cleaning, deduplication, tokens, shards, packing. No torch here."""
