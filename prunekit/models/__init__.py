"""A Hugging Face model as layers, sublayers and matrices, whatever its architecture."""
