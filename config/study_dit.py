"""The generators of runs/study.py, beside config/study_tokenizer.py."""
workers = 0
size = "192/6/6"
epochs = 12
batch_size = 256
optimizer = "muon"
learning_rate = 2e-3
decay_epoch = 6.0
warmup_steps = 100
ema_momentum = 0.995
log_every = 50
save_every = 500
sample_every = 10000
