"""Tasks: objectives with their rows, losses and metrics."""
