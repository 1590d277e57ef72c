"""One question per script, answered by one CSV of the same name in benchmarks/results."""
