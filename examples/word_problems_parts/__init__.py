"""What `examples.word_problems` is made of. Nothing here but `killer.py` needs a database."""
