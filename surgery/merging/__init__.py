"""Merge methods: what each is and takes (methods), the lazy tensors that it makes (builders), and
what has to be known first (measures, alpha)."""
