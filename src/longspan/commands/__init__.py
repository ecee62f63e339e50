"""What single commands do with a loaded subject: read their input, show their output."""
