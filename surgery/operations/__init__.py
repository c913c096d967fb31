"""Operations: what users call. Pure functions from checkpoints to a checkpoint; all checks are
made as they are called, from headers, and all that is wrong is reported at once."""
