"""What a study is, how it unfolds into jobs, and who executes them."""
