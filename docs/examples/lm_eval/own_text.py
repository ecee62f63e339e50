"""What the task own_text counts: bytes of the text that was scored."""


def process_results(doc: dict[str, str], results: tuple[float]) -> dict[str, tuple[float, int]]:
    """(log-likelihood, bytes): the harness divides the sums."""
    (log_likelihood,) = results
    size = len(doc["text"].encode())
    return {"bits_per_byte": (log_likelihood, size), "byte_perplexity": (log_likelihood, size)}
