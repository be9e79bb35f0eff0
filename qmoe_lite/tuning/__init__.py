"""Training what stands beside frozen digits: row steps, column scales, norms."""
