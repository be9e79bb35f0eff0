"""Text in and out of a model: generation, conversations, evaluation."""
