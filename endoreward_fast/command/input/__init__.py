"""Files to rows: formats and their readers, and the columns that make a row."""
