"""What is stored of a matrix, and the product straight from it: codes, streams, packed matrices, kernels."""
