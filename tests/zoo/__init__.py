"""Every architecture of the installed transformers, built tiny and put through the operations."""
