"""Who executes jobs: this machine's devices now; a cluster is one more file with the same function."""
