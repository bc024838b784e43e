"""Read files into rows: the formats, their readers, and the columns of a row."""
