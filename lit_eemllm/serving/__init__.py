"""`serve` and `demo-web`: a run's model behind OpenAI's interface, and a page that asks it."""
