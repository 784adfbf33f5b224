"""The generator beside config/toy_tokenizer.py."""
workers = 0
size = "64/2/4"
epochs = 1
batch_size = 32
learning_rate = 1e-3
sample_steps = 5
log_every = 5
