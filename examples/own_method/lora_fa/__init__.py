"""LoRA-FA (arXiv 2308.03303) as a method of rankloom: A keeps its initial values, B alone trains."""
