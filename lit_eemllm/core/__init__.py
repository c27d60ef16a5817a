"""The method of the papers: a mechanism's table, the stream, and the decoder layer that executes a row of the table."""
