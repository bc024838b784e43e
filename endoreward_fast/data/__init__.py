"""Rows of data: the formats of files, the columns of a row, and the shape of its answers."""
