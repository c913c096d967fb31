"""Kill it, starve it, lie to it: what must not happen to anybody's weights."""
