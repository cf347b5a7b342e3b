"""The laws a part must keep, to run on ours and on your own, and tiny seeded models to run them with."""
