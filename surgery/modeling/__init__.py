"""Models of transformers: the stock classes, building one from lazy tensors, and the modeling
file for layers of different widths. The only room that imports transformers."""
