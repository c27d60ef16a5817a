"""What goes into a model: conversations as ids and label spans, images as pixels, rows as strangers write them."""
