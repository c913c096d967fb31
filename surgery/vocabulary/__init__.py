"""Vocabularies: which token has which row (tokens), a common one for several models (target), the
tensors that have its rows (places), and those rows put in its order (rows)."""
