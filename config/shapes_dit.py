"""The generator on the shapes' latents, after config/shapes_tokenizer.py: two CPU cores, minutes."""
tokenizer = "out/shapes_tokenizer/checkpoint.pt"
out_dir = "out/shapes_dit"
workers = 1
size = "128/6/4"
epochs = 6
batch_size = 128
optimizer = "muon"
learning_rate = 3e-3
decay_epoch = 3.0
warmup_steps = 50
ema_momentum = 0.99
log_every = 50
save_every = 500
sample_every = 500
sample_cfg_scale = 2.5
