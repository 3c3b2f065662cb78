"""The plan as another graph, which runs."""
