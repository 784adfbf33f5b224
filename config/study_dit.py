"""The generators of runs/study.py, beside config/study_tokenizer.py."""
workers = 0
size = "128/6/4"
epochs = 10
batch_size = 256
optimizer = "muon"
learning_rate = 2e-3
decay_epoch = 5.0
warmup_steps = 100
ema_momentum = 0.995
log_every = 50
save_every = 500
keep_every = 195  # an epoch; for the curve of gFD against steps
sample_every = 10000
