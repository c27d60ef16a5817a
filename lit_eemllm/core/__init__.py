"""What a reader of the papers wants: the table of a mechanism, the stream and the layer that executes a row of it."""
