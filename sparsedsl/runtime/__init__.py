"""What any interpretation of a pattern or program on tensors needs: the call checked, autograd, vmap, caches, threads."""
