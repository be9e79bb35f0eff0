"""transformers' side: model families, skeletons, the module that stands for the experts."""
