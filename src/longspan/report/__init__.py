"""The page a researcher reads: made from plain facts and summaries, no model needed."""
